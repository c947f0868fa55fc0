"""A head whose product is padded for the GPU gives the losses and gradients of the plain product."""

from __future__ import annotations

import pytest
import torch

from gptb_ds.model import aligned, objective
from gptb_ds.model.configuration import GPTBConfig
from gptb_ds.model.modeling import GPTBLMHeadModel
from gptb_ds.model.objective import WindowObjective

VOCAB, STEPS, LANES = 61, 6, 5


def window_results(dtype: torch.dtype, tie: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 4, "num_slots": 4}
    config = GPTBConfig(vocab_size=VOCAB, dropout=0.0, tie_word_embeddings=tie, **shape)
    model = GPTBLMHeadModel(config).to(dtype).train()
    ids, targets = torch.randint(VOCAB, (2, STEPS, LANES))
    computed = WindowObjective(model, fp32_sums=True)
    loss, _ = computed(ids, targets, torch.rand(ids.shape) < 0.3, model.empty_state(LANES))
    (loss / ids.numel()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return gradients | {"loss": loss.detach()}


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Products are padded on this device too; notes how many outputs were added each time."""
    monkeypatch.setattr(aligned, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(aligned, "LEAST_OUTPUTS", VOCAB)
    added: list[int] = []
    with_rows = aligned.with_rows

    def noted(matrix_OI: torch.Tensor, missing: int) -> torch.Tensor:
        added.append(missing)
        return with_rows(matrix_OI, missing)

    monkeypatch.setattr("gptb_ds.model.gradient_sums.with_rows", noted)
    return added


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_padding_the_heads_product_changes_nothing(
    dtype: torch.dtype,
    limit: float,
    tie: bool,
    pieces: bool,
    everywhere: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if pieces:  # of 7 rows: the head is recomputed in backward
        monkeypatch.setattr(objective, "HEAD_ELEMENTS", 7 * VOCAB)
    padded = window_results(dtype, tie)
    assert set(everywhere) == {3}, "no product was padded"
    monkeypatch.setattr(aligned, "DEVICES", ())
    plain = window_results(dtype, tie)
    assert padded.keys() == plain.keys()
    for name, value in plain.items():
        apart = float((padded[name] - value).double().norm() / value.double().norm())
        assert apart < limit, f"{name}: {apart:.1e}"
        assert padded[name].shape == value.shape, name


def test_small_heads_and_cpus_are_left_alone() -> None:
    assert aligned.missing_outputs(torch.empty(50257, 2)) == 0
    assert aligned.missing_outputs(torch.empty(257, 2, device="meta")) == 0
