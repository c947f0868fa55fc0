"""GPTB over decoders other than GPT-2: the recurrence's promises hold for each, and what can't be one is refused.

Axes: B lanes, T tokens, S slots, E embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM, GPT2Config, LlamaConfig

from gptb_ds import GPTBConfig, GPTBLMHeadModel
from gptb_ds.model import GPTBDecoderConfig, GPTBDecoderLMHeadModel, GPTBDecoderModel, gradient_sums
from gptb_ds.model.attention import NAME as SLOT_ATTENTION
from gptb_ds.model.backbones import build_decoder, check_backbone, named_backbone
from gptb_ds.model.objective import WindowObjective
from gptb_ds.training.muon import Matrix, matrices_of, muon_direction
from tests.harness.backbones import FAMILIES, V, decoder_config, small_backbone, small_decoder
from tests.harness.models import random_ids

B, T, S, E = 3, 7, 6, 16
SIZES = {"hidden_size": E, "num_hidden_layers": 2, "num_attention_heads": 2}
# Their norms compute in float32, whatever the type of the model.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
each_family = pytest.mark.parametrize("family", FAMILIES)


def resets() -> torch.Tensor:
    reset = torch.zeros((B, T), dtype=torch.bool)
    reset[0, 3] = reset[2, 5] = True
    return reset


@each_family
def test_dropout_is_that_of_its_own_layers(family: str):
    """GPT-NeoX's configuration has one of 0.1 for a classifier, too, that would keep windows from being captured."""
    config = decoder_config(family)
    config.backbone.classifier_dropout = 0.1
    assert not GPTBDecoderModel(config).has_dropout
    assert small_decoder(family, backbone={"dropout": 0.1}).transformer.has_dropout


@each_family
def test_a_token_reaches_every_vector_of_the_state(family: str) -> None:
    model = small_decoder(family)
    check_backbone(model.transformer)
    embeds = model.transformer.embed(random_ids(1, 1)).detach().requires_grad_()
    state = model(inputs_embeds=embeds).past_hidden_states
    for slot in range(S - 1):
        (gradient,) = torch.autograd.grad(state[0, slot].pow(3).sum(), embeds, retain_graph=True)
        assert gradient.norm() > 1e-4, f"slot {slot}"


@each_family
def test_without_rebias_no_token_does(family: str) -> None:
    model = small_decoder(family, rebias=False)
    ids, other = random_ids(B, 2, seed=1), random_ids(B, 2, seed=2)
    assert torch.equal(model(ids).past_hidden_states, model(other).past_hidden_states)


@each_family
def test_windows_may_be_cut_anywhere_and_a_reset_begins_anew(family: str) -> None:
    model, ids, reset = small_decoder(family), random_ids(B, T), resets()
    whole = model(ids, reset=reset)
    for edge in (1, 3, 6):
        first = model(ids[:, :edge], reset=reset[:, :edge])
        second = model(ids[:, edge:], first.past_hidden_states, reset[:, edge:])
        torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), whole.logits, **TOLERANCE)
    alone = model(ids[:1, 3:])
    torch.testing.assert_close(alone.logits, whole.logits[:1, 3:], **TOLERANCE)
    assert (model(ids).logits[0, 3:] - whole.logits[0, 3:]).abs().max() > 1e-3  # the state matters


@each_family
def test_a_masked_token_leaves_the_state_as_it_was(family: str) -> None:
    model, ids = small_decoder(family), random_ids(B, T)
    mask = torch.ones((B, T), dtype=torch.long)
    mask[:, :2] = 0
    torch.testing.assert_close(
        model(ids, attention_mask=mask).past_hidden_states, model(ids[:, 2:]).past_hidden_states, **TOLERANCE
    )


@each_family
def test_a_state_enters_the_blocks_as_it_is(family: str) -> None:
    """Gemma scales embeddings, and only those."""
    model = small_decoder(family).transformer
    state, token = torch.randn(1, S - 1, E), model.embed(torch.tensor([[3]]))
    layers: list[torch.Tensor] = []
    model.run_slots(torch.cat((state, token), 1), model.slot_context(model.initial_embeds), layers)
    torch.testing.assert_close(layers[0][:, :-1], state)
    scale = E**0.5 if family.startswith("gemma") else 1.0
    torch.testing.assert_close(layers[0][0, -1], scale * model.get_input_embeddings().weight[3])


@each_family
def test_the_blocks_start_as_transformers_draws_them(family: str) -> None:
    torch.manual_seed(0)
    theirs = AutoModel.from_config(small_backbone(family, initializer_range=0.02)).state_dict()
    ours = small_decoder(family, backbone={"initializer_range": 0.02})
    assert all(torch.equal(ours.transformer.backbone.state_dict()[name], tensor) for name, tensor in theirs.items())
    assert ours.lm_head.weight is ours.get_input_embeddings().weight
    wide = GPTBDecoderLMHeadModel(decoder_config(family, num_slots=400, tie_word_embeddings=False))
    assert 0.9 < wide.transformer.initial_embeds.std() < 1.1
    assert 0.8 < wide.lm_head.weight.std() / 0.3 < 1.2


@each_family
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_through_auto_classes(family: str, tied: bool, tmp_path: Path) -> None:
    model, ids = small_decoder(family, tie_word_embeddings=tied), random_ids(B, T)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is GPTBDecoderConfig and type(config.backbone) is type(model.config.backbone)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is GPTBDecoderLMHeadModel
    assert (again.lm_head.weight is again.get_input_embeddings().weight) is tied
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(ids)[1], model(ids).past_hidden_states)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(ids).past_hidden_states.dtype == torch.bfloat16


@each_family
def test_generate_is_a_loop_over_steps_also_with_padding(family: str) -> None:
    model, ids = small_decoder(family), random_ids(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    found = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for lane, first in ((0, 3), (1, 0)):
        read = ids[lane : lane + 1, first:]
        output = model(read)
        wanted = []
        for _ in range(6):
            wanted.append(int(output.logits[0, -1].argmax()))
            output = model(torch.tensor([wanted[-1:]]), past_key_values=output.past_key_values)
        assert found[lane, 5:].tolist() == wanted


def gradients(model: GPTBDecoderLMHeadModel, recompute: int, fp32_sums: bool, steps: int = 9) -> dict[str, Any]:
    ids = torch.randint(V, (2, steps, 8), generator=torch.Generator().manual_seed(1))
    objective = WindowObjective(model.train(), recompute, fp32_sums)
    model.zero_grad()
    torch.manual_seed(3)
    reset = torch.rand((steps, 8), generator=torch.Generator().manual_seed(2)) < 0.1
    loss, _ = objective(ids[0], ids[1], reset, model.empty_state(8))
    (loss / (8 * steps)).backward()
    return {name: p.grad if p.grad is None else p.grad.double() for name, p in model.named_parameters()}


def error(found: dict[str, Any], want: dict[str, Any]) -> float:
    squares = sum((found[name] - want[name]).square().sum() for name in want)
    return float(squares / sum(tensor.square().sum() for tensor in want.values())) ** 0.5


@each_family
def test_recomputation_and_sums_give_the_same_gradients(family: str) -> None:
    model = small_decoder(family, backbone={"dropout": 0.2, "initializer_range": 0.1})
    want = gradients(model, 0, fp32_sums=False)
    assert all(tensor.abs().max() > 0 for name, tensor in want.items() if not name.endswith("k_proj.bias"))
    assert error(gradients(model, 4, fp32_sums=False), want) < 1e-5
    assert error(gradients(model, 4, fp32_sums=True), want) < 1e-4


@each_family
def test_every_use_of_every_weight_is_summed_in_float32(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the sums are kept back nothing is left: no use goes past them, of the initial state neither."""
    monkeypatch.setattr(gradient_sums._Sum, "take", lambda _: None)
    model = small_decoder(family).bfloat16()
    left = {name for name, parameter in gradients(model, 0, fp32_sums=True).items() if parameter is not None}
    assert not left


@each_family
@pytest.mark.parametrize("changes", [{}, {"rebias": False}, {"recent_tokens": 2, "preserve_decoder": True}])
def test_what_runs_on_a_gpu_is_what_runs_on_a_cpu(family: str, changes: dict[str, Any]) -> None:
    """PyTorch's fused attention there, products here; Gemma 2 has its own on both."""
    ours, ids = small_decoder(family, **changes), random_ids(B, T)
    kind = "sdpa" if ours.config._attn_implementation == SLOT_ATTENTION else "eager"
    assert (kind == "eager") is (family == "gemma2")
    fused = small_decoder(family, attn_implementation=kind, **changes)
    fused.load_state_dict(ours.state_dict())
    torch.testing.assert_close(fused(ids).logits, ours(ids).logits, rtol=1e-3, atol=1e-4)


def test_gpt2_as_any_decoder_is_gptb() -> None:
    torch.manual_seed(0)
    ours = GPTBLMHeadModel(
        GPTBConfig(vocab_size=V, num_slots=S, n_embd=E, n_layer=2, n_head=2, dropout=0.0, initializer_range=0.3)
    )
    plain = GPTBDecoderLMHeadModel(
        GPTBDecoderConfig(backbone_config=named_backbone("gpt2", SIZES, dropout=0.0, vocab_size=V), num_slots=S)
    )
    weights = {name.replace("transformer.", "transformer.backbone."): w for name, w in ours.state_dict().items()}
    weights["transformer.initial_embeds"] = weights.pop("transformer.backbone.initial_embeds")
    plain.load_state_dict(weights)
    ids = random_ids(B, T)
    torch.testing.assert_close(plain.double()(ids).logits, ours.double()(ids).logits, rtol=0, atol=1e-12)


def test_the_vocabulary_can_grow() -> None:
    model, ids = small_decoder("llama"), random_ids(B, T)
    before = model(ids).logits
    model.resize_token_embeddings(V + 5, mean_resizing=False)
    assert model.config.vocab_size == model.config.backbone.vocab_size == V + 5
    assert model.lm_head.weight is model.get_input_embeddings().weight
    torch.testing.assert_close(model(ids).logits[..., :V], before)


def test_one_step_exports_with_the_state_as_input_and_output() -> None:
    model, ids = small_decoder("llama"), random_ids(2, 1)

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            output = self.model(ids, past_hidden_states=state, use_cache=False)
            return output.logits, output.past_hidden_states

    state = torch.randn(2, S - 1, E)
    exported = torch.export.export(Step(), (ids, state)).module()
    for found, wanted in zip(exported(ids, state), Step()(ids, state), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.slow
@each_family
def test_a_step_is_compiled_once_and_gives_the_same_gradients(family: str) -> None:
    model = small_decoder(family)
    want = gradients(model, 0, fp32_sums=False)
    made: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        made.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    model.compile_step(backend=backend)
    assert error(gradients(model, 0, fp32_sums=False), want) < 1e-5
    assert error(gradients(model, 4, fp32_sums=True), want) < 1e-4
    assert len(made) <= 2  # one for each kind of sums


def test_muon_tells_fused_maps_apart() -> None:
    neox, phi, llama = (matrices_of(small_decoder(family)) for family in ("gpt_neox", "phi3", "llama"))
    first = "transformer.backbone.layers.0."
    assert neox[f"{first}attention.query_key_value.weight"] == Matrix(3, 0, groups=2)
    assert phi[f"{first}self_attn.qkv_proj.weight"] == Matrix(3, 0, sizes=(16, 8, 8))
    assert phi[f"{first}mlp.gate_up_proj.weight"] == Matrix(2, 0)
    kinds = {name.split(".")[-2] for name in llama}
    assert kinds == {f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")}
    assert set(llama.values()) == {Matrix(1, 0)}


@pytest.mark.parametrize("matrix", [Matrix(3, 0, groups=2), Matrix(3, 1, groups=4), Matrix(3, 0, sizes=(12, 6, 6))])
def test_each_of_fused_maps_is_orthogonalised_on_its_own(matrix: Matrix) -> None:
    weight = torch.randn((24, 16) if matrix.dim == 0 else (16, 24), generator=torch.Generator().manual_seed(0))
    parts = matrix.split(weight)
    assert torch.equal(matrix.join(parts), weight) and len(parts) == 3
    if matrix.groups == 2:  # of 24 outputs: q, k, v of 4 each, of the first head and then of the second
        assert torch.equal(parts[1], torch.cat((weight[4:8], weight[16:20])))
    directions = matrix.split(muon_direction(weight, matrix))
    for part, direction in zip(parts, directions, strict=True):
        torch.testing.assert_close(direction, muon_direction(part, Matrix(1, matrix.dim)), rtol=1e-3, atol=1e-3)


REFUSED = {
    "lamma": "no decoder of transformers, and no folder.*did you mean llama",
    "t5": "an encoder and a decoder",
    "mamba": "it has no attention",
    "rwkv": "it has no attention",
    "bailing_hybrid": "slot 0 does not see slot 1, whatever the mask says",
    "gemma3": "a model of several parts; its text decoder is gemma3_text",
    "vit": "no language model",
    "bert": "an encoder, which fills gaps",
    "bert-generation": "an encoder, which fills gaps",
    "mixtral": "a mixture of experts",
    "gpt_oss": "a mixture of experts",
    "xlnet": "does not run over embeddings with a mask",
    "gptb": "a GPTB itself",
    "gemma4_assistant": "can't be had by its name alone",
    "gpt_neo": "backbone gpt_neo: ",
    "bloom": "does not run over embeddings with a mask",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_a_backbone_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[name]) as caught:
        build_decoder(
            GPTBDecoderConfig(backbone_config=named_backbone(name, SIZES, dropout=0.0, vocab_size=V), num_slots=S)
        )
    assert "\n" not in str(caught.value)


def test_a_window_of_attention_smaller_than_the_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="sliding_window 4 is below num_slots 6"):
        build_decoder(decoder_config("mistral", backbone={"sliding_window": 4}))


def test_attention_that_sees_what_the_mask_hides_is_refused() -> None:
    def sees_all(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **_: Any) -> tuple[Any, None]:
        output = nn.functional.scaled_dot_product_attention(query, key, value)
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register("sees_all", sees_all)
    with pytest.raises(ValueError, match="slot 0 sees slot 1, whatever the mask says"):
        build_decoder(decoder_config("qwen2", attn_implementation="sees_all", rebias=False))


def test_attention_that_ignores_the_mask_is_refused() -> None:
    def causal(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **_: Any) -> tuple[Any, None]:
        output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register("causal_always", causal)
    with pytest.raises(ValueError, match="slot 0 does not see slot 1, whatever the mask says"):
        build_decoder(decoder_config("qwen2", attn_implementation="causal_always"))
    with pytest.raises(ValueError, match="Flash Attention 2"):
        build_decoder(decoder_config("qwen2", attn_implementation="flash_attention_2"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_slots": 1}, "num_slots is 1"),
        ({"recent_tokens": 5}, "recent_tokens is 5"),
        ({"backbone_config": None}, "backbone_config is None"),
    ],
)
def test_keys_that_do_not_hold_up_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTBDecoderConfig(**({"backbone_config": LlamaConfig(**SIZES), "num_slots": S} | changes))


def test_the_model_keeps_a_copy_of_its_configuration() -> None:
    config = decoder_config("llama")
    model = GPTBDecoderModel(config)
    assert model.config is not config and model.backbone.config is model.config.backbone
    assert config._attn_implementation is None
    assert GPT2Config().model_type == "gpt2"  # nothing of transformers was registered over
