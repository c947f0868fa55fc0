"""What MFU is made of: the arithmetic of a token as torch counts it, and a device's rate."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config

from gptb_ds.baselines import GPT2Baseline, LSTMBaseline, LSTMConfig
from gptb_ds.model.objective import WindowObjective
from gptb_ds.training.flops import flops_per_token, peak_flops
from tests.harness.models import V, small_gptb

LANES, STEPS = 3, 4
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.mark.parametrize("tied", [True, False])
def test_the_flops_of_a_token_are_those_that_torch_counts(tied: bool):
    model = small_gptb(tie_word_embeddings=tied).train()
    ids = torch.randint(V, (STEPS, LANES))
    with FlopCounterMode(display=False) as counter:
        loss, _ = WindowObjective(model)(ids, ids, torch.zeros_like(ids, dtype=torch.bool), model.empty_state(LANES))
        loss.backward()
    assert counter.get_total_flops() == flops_per_token(model) * LANES * STEPS


@pytest.mark.parametrize(
    ("name", "precision", "rate"),
    [("NVIDIA H100 80GB HBM3", "bf16", 989e12), ("NVIDIA H100 PCIe", "bf16", 756e12), ("NVIDIA L40S", "fp32", 183e12)],
)
def test_the_rate_of_a_known_gpu_is_its_data_sheets(name: str, precision: str, rate: float, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found, said = peak_flops(torch.device("cuda", 0), precision, 64, 32)
    assert found == rate
    assert name in said


def test_the_rate_of_a_cpu_is_measured():
    found, said = peak_flops(torch.device("cpu"), "fp32", 64, 32)
    assert 0 < found < 1e16
    assert "measured here" in said


@pytest.mark.parametrize("kind", ["gpt2", "lstm"])
def test_the_models_to_compare_with_are_counted_the_same_way(kind: str):
    """torch counts GPT-2's causal attention over the tokens that there are, here a whole context."""
    shared = {"vocab_size": V, "n_layer": 2, "n_embd": 16}
    config = LSTMConfig(**shared) if kind == "lstm" else GPT2Config(**shared, n_head=2, n_positions=STEPS, **NO_DROPOUT)
    model = (LSTMBaseline if kind == "lstm" else GPT2Baseline)(config).train()
    ids = torch.randint(V, (STEPS, LANES))
    with FlopCounterMode(display=False) as counter:
        loss, _ = WindowObjective(model)(ids, ids, torch.zeros_like(ids, dtype=torch.bool), model.empty_state(LANES))
        loss.backward()
    # The first step's gradient with respect to the empty state is nobody's, and not computed.
    assert counter.get_total_flops() == pytest.approx(flops_per_token(model) * LANES * STEPS, rel=0.05)
