"""The proof that the model is GPTB: float64 agreement with the original's numbers.

The files hold what the original GPTB.py (xloem/GPTb 3e81ccb, transformers 4.17) computed: tokens and targets (K, B),
logits (K, B, V), states (K, B, S-1, E), the mean loss and its gradient by every parameter.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import GPT2Config

from gptb_ds import GPTBConfig, GPTBLMHeadModel

GOLDEN = Path(__file__).parent.parent / "golden"
ATTENTION = (None, "eager", "sdpa")
EXACT = {"rtol": 0, "atol": 1e-10}


class Golden:
    """One golden file: its tensors by name and a model with its weights."""

    def __init__(self, name: str, attention: str | None = None) -> None:
        with safe_open(GOLDEN / f"gptb_{name}.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = file.metadata()
        self.shape = json.loads(metadata["config"])
        values = dict(self.shape)
        config = GPTBConfig(
            num_slots=values.pop("max_length"),
            rebias=metadata["rebias"] == "true",
            attn_implementation=attention,
            **values,
        )
        self.model = self.load(GPTBLMHeadModel(config))

    def load(self, model: GPTBLMHeadModel) -> GPTBLMHeadModel:
        model = model.double()
        weights = {k.removeprefix("weight/"): v for k, v in self.tensors.items() if k.startswith("weight/")}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert missing == ["lm_head.weight"] and not unexpected  # tied
        return model

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]


def assert_gradients(model: GPTBLMHeadModel, golden: Golden) -> None:
    names = {name for name, _ in model.named_parameters()}
    assert names == {k.removeprefix("grad/") for k in golden.tensors if k.startswith("grad/")}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, golden[f"grad/{name}"], **EXACT, msg=name)


def window(golden: Golden, recompute_every: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (B, K, V), new state and the mean loss of the file's window, whose targets are not shifted."""
    logits, state, loss = golden.model(golden["tokens"].t(), recompute_every=recompute_every)
    assert loss is None
    return logits, state, F.cross_entropy(logits.flatten(0, 1), golden["targets"].t().flatten())


@pytest.mark.parametrize("recompute_every", [0, 1, 4])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", ["rebias", "causal"])
def test_window_matches_original(name: str, attention: str | None, recompute_every: int) -> None:
    golden = Golden(name, attention)
    logits, state, loss = window(golden, recompute_every)
    torch.testing.assert_close(logits.transpose(0, 1), golden["logits"], **EXACT)
    torch.testing.assert_close(state, golden["past_hidden_states"][-1], **EXACT)
    torch.testing.assert_close(loss, golden["loss"].squeeze(), **EXACT)
    loss.backward()
    assert_gradients(golden.model, golden)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", ["rebias", "causal"])
def test_every_step_matches_original(name: str, attention: str | None) -> None:
    golden = Golden(name, attention)
    state, losses = None, []
    for tokens, targets, logits, next_state in zip(
        *(golden[key] for key in ("tokens", "targets", "logits", "past_hidden_states")), strict=True
    ):
        output = golden.model(tokens[:, None], past_hidden_states=state)
        torch.testing.assert_close(output.logits[:, 0], logits, **EXACT)
        torch.testing.assert_close(output.past_hidden_states, next_state, **EXACT)
        state = output.past_hidden_states
        losses.append(F.cross_entropy(output.logits[:, 0], targets))
    # Nothing was detached on the way: the mean of the steps' losses has the window's gradient.
    torch.stack(losses).mean().backward()
    assert_gradients(golden.model, golden)


def test_readme_loop_of_the_original_runs_with_a_plain_configuration() -> None:
    golden = Golden("rebias")
    values = dict(golden.shape)
    config = GPT2Config(bos_token_id=None, eos_token_id=None, **{k: v for k, v in values.items() if k != "max_length"})
    config.rebias = True
    config.max_length = values["max_length"]
    before, attention = config.to_dict(), config._attn_implementation

    model = golden.load(GPTBLMHeadModel(config))
    past_hidden_states = None
    for step, batch_of_tokens in enumerate(golden["tokens"][:, :, None]):
        past_logits, past_hidden_states, extra = model(batch_of_tokens, past_hidden_states=past_hidden_states)
        torch.testing.assert_close(past_logits[:, 0], golden["logits"][step], **EXACT)
        assert extra is None
        past_logits.mean().backward()
        past_hidden_states = past_hidden_states.detach()

    assert config.to_dict() == before and config._attn_implementation == attention


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rebias", "causal"])
def test_compiled_step_matches_original(name: str) -> None:
    golden = Golden(name)
    golden.model.compile_step()
    logits, state, loss = window(golden)
    torch.testing.assert_close(logits.transpose(0, 1), golden["logits"], **EXACT)
    torch.testing.assert_close(state, golden["past_hidden_states"][-1], **EXACT)
    loss.backward()
    assert_gradients(golden.model, golden)
