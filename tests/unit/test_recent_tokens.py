"""Slots of recent tokens, and a start that preserves a trained decoder's function.

Axes: B lanes, T tokens, S slots, E embedding, C recent tokens.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gptb_ds import GPTBConfig
from gptb_ds.model import AnyGPTB, GPTBDecoderConfig, warm_start
from gptb_ds.model_choice import new_model
from tests.harness.models import random_ids, small_gptb

V, C, SLOTS = 16, 5, 9


def text(lanes: int, steps: int, seed: int) -> torch.Tensor:
    """A language in which the next token depends on the last two, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, V, (lanes, steps), generator=generator)
    noise = torch.rand((lanes, steps), generator=generator) < 0.1
    for t in range(2, steps):
        ids[:, t] = torch.where(noise[:, t], ids[:, t], 1 + (3 * ids[:, t - 1] + ids[:, t - 2]) % (V - 1))
    return ids


LLAMA = LlamaConfig(
    vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    intermediate_size=64, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
)  # fmt: skip


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A small decoder, trained here until it knows the language."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=V, n_positions=16, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config) if request.param == "gpt2" else LlamaForCausalLM(LLAMA)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for update in range(250):
        ids = text(32, 16, seed=update)
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("decoder")
    model.eval().save_pretrained(folder)
    return model, folder


def gptb_config(**changes: object) -> GPTBConfig:
    shape = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 2, "num_slots": SLOTS, "n_positions": 16}
    return GPTBConfig(**(shape | {"dropout": 0.0, "eos_token_id": 0} | changes))


def config_over(model: PreTrainedModel, **changes: object) -> GPTBConfig | GPTBDecoderConfig:
    """Of a GPTB over this decoder's blocks."""
    if isinstance(model, GPT2LMHeadModel):
        return gptb_config(**changes)
    return GPTBDecoderConfig(
        backbone_config=LLAMA, num_slots=SLOTS, eos_token_id=0, tie_word_embeddings=False, **changes
    )


def loss_of(model: AnyGPTB, ids: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens that have C + 1 before them."""
    logits = model(ids, use_cache=False).logits[:, C:-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, C + 1 :].flatten())


def test_the_last_vectors_are_the_last_tokens_embeddings() -> None:
    model, ids = small_gptb(torch.float64, recent_tokens=2), random_ids(3, 7)
    state = model(ids).past_hidden_states
    assert torch.equal(state[:, -2:], model.transformer.wte(ids[:, -2:]))
    initial = model.transformer.initial_embeds
    one = model(ids[:, :1]).past_hidden_states
    assert torch.equal(one[:, -2], initial[-1].expand(3, -1)) and torch.equal(
        one[:, -1], model.transformer.wte(ids[:, 0])
    )
    reset = torch.zeros(3, 7, dtype=torch.bool)
    reset[:, 4] = True
    torch.testing.assert_close(model(ids, reset=reset).past_hidden_states, model(ids[:, 4:]).past_hidden_states)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[:, :3] = 0
    torch.testing.assert_close(model(ids, attention_mask=mask).past_hidden_states, model(ids[:, 3:]).past_hidden_states)


def test_without_recent_tokens_nothing_of_them_is_there() -> None:
    names = dict(small_gptb().named_parameters())
    assert not any("gate" in name for name in names)


def test_a_warm_start_is_the_decoder_at_its_context(decoder: tuple[PreTrainedModel, Path]) -> None:
    original, folder = decoder
    said: list[str] = []
    torch.manual_seed(1)
    model = warm_start(config_over(original, recent_tokens=C, preserve_decoder=True), str(folder), said.append)
    assert len(said) == 1 and "new: transformer.initial_embeds, transformer.state_gate" in said[0]
    ids = text(16, 40, seed=1000)
    windows = ids.unfold(1, C + 1, 1)[:, :-1]  # (B, T - C - 1, C + 1): what the decoder sees before each prediction
    with torch.no_grad():
        last = original(windows.flatten(0, 1)).logits[:, -1]
        expected = F.cross_entropy(last, ids[:, C + 1 :].flatten())
        ours = loss_of(model, ids)
    uniform = torch.tensor(float(V)).log()
    print(f"decoder at context {C + 1}: {expected:.4f}, warm start: {ours:.4f}, uniform: {uniform:.4f}")
    assert expected < 0.6 * uniform  # it has learned something
    assert abs(ours / expected - 1) < 0.01


def test_the_state_begins_as_it_was_drawn_also_where_no_tokens_are_carried(
    decoder: tuple[PreTrainedModel, Path],
) -> None:
    original, folder = decoder
    for recent in (0, 1):
        model = warm_start(config_over(original, recent_tokens=recent, preserve_decoder=True), str(folder))
        state_NE = model.transformer.initial_embeds[: SLOTS - 1 - recent]
        assert len(state_NE) == len(torch.unique(state_NE, dim=0))


def test_the_gate_opens_and_a_token_reaches_the_state(decoder: tuple[PreTrainedModel, Path]) -> None:
    original, folder = decoder
    model = warm_start(config_over(original, recent_tokens=C, preserve_decoder=True), str(folder))
    ids = text(4, C + 12, seed=2)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    F.cross_entropy(model(inputs_embeds=embeds).logits[:, -1], ids[:, -1]).backward()
    assert (model.transformer.state_gate.grad != 0).all()
    assert (embeds.grad[:, 0] != 0).any()  # beyond C + 1 tokens: only the state can have carried it


def test_a_warm_start_beats_a_start_from_nothing(decoder: tuple[PreTrainedModel, Path]) -> None:
    original, folder = decoder

    def trained(model: AnyGPTB) -> float:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for update in range(15):
            optimizer.zero_grad()
            loss_of(model, text(16, 24, seed=update)).backward()
            optimizer.step()
        with torch.no_grad():
            return float(loss_of(model, text(16, 24, seed=999)))

    torch.manual_seed(2)
    warm = trained(warm_start(config_over(original, recent_tokens=C, preserve_decoder=True), str(folder)))
    cold = trained(new_model(config_over(original, recent_tokens=C)))
    print(f"after 15 updates: warm {warm:.4f}, from nothing {cold:.4f}")
    assert warm < cold - 0.3


def test_a_padded_vocabulary_keeps_its_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=V + 4, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    gpt2.save_pretrained(tmp_path)
    said: list[str] = []
    model = warm_start(gptb_config(), str(tmp_path), said.append)
    assert model.config.vocab_size == V + 4 and "4 rows of its vocabulary have no token" in said[0]
    assert torch.equal(model.transformer.wte.weight, gpt2.transformer.wte.weight)


@pytest.mark.parametrize("recent", [-1, 8, 2.5])
def test_recent_tokens_must_leave_a_state(recent: object) -> None:
    with pytest.raises(ValueError, match="recent_tokens is"):
        gptb_config(recent_tokens=recent)


def test_a_preserved_decoder_comes_back_from_its_folder(decoder: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    original, folder = decoder
    model = warm_start(config_over(original, recent_tokens=C, preserve_decoder=True), str(folder)).eval()
    model.save_pretrained(tmp_path)
    again, ids = type(model).from_pretrained(tmp_path), text(2, 12, seed=3)
    assert torch.equal(again(ids).logits, model(ids).logits)
