"""ZeRO is right: losses, gradient norms and weights of every stage against one plain process.

Axes: B lanes, K steps, S slots, E embedding.
"""

from __future__ import annotations

import pytest
import torch

from gptb_ds.config import OptimConfig
from gptb_ds.data.window import Window
from gptb_ds.distributed.world import World
from gptb_ds.model.backbones import build_decoder, named_backbone
from gptb_ds.model.configuration import GPTBConfig
from gptb_ds.model.decoder import AnyGPTB
from gptb_ds.model.decoder_configuration import GPTBDecoderConfig
from gptb_ds.model.modeling import GPTBLMHeadModel
from gptb_ds.model.objective import WindowObjective
from tests.harness.processes import run_ranks

LANES, STEPS, UPDATES, VOCAB = 8, 7, 3, 31
OPTIM = OptimConfig(lr=1e-2, warmup_updates=0, weight_decay=0.1, clip=0.5)


def build(tied: bool = True, family: str = "gpt2") -> AnyGPTB:
    torch.manual_seed(5)
    if family != "gpt2":
        sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
        backbone = named_backbone(family, sizes, dropout=0.0, vocab_size=VOCAB)
        return build_decoder(GPTBDecoderConfig(backbone_config=backbone, num_slots=5, tie_word_embeddings=tied)).train()
    return GPTBLMHeadModel(
        GPTBConfig(
            vocab_size=VOCAB,
            n_positions=5,
            num_slots=5,
            n_layer=2,
            n_head=2,
            n_embd=12,
            dropout=0.0,
            tie_word_embeddings=tied,
        )
    ).train()


def columns(update: int, first: int, stop: int, weighted: bool) -> Window:
    """Window `update` of the lanes [first, stop): the same tokens whoever asks."""
    generator = torch.Generator().manual_seed(100 + update)
    tokens = torch.randint(VOCAB, (STEPS + 1, LANES), generator=generator)
    reset = torch.rand((STEPS, LANES), generator=generator) < 0.2
    weights = (torch.rand((STEPS, LANES), generator=generator) < 0.5).float() if weighted else None
    # Uneven over the lanes, so that a mean of per-rank means would show.
    if weights is not None:
        weights[:, : LANES // 2] *= torch.rand((STEPS, LANES // 2), generator=generator) < 0.3
    own = slice(first, stop)
    return Window(tokens[:-1, own], tokens[1:, own], reset[:, own], None if weights is None else weights[:, own])


def one_process(
    tied: bool, weighted: bool, family: str = "gpt2"
) -> tuple[list[float], list[float], dict[str, torch.Tensor], dict]:
    """Plain PyTorch: losses, gradient norms, final weights, and the gradients of the first update."""
    model = build(tied, family)
    objective = WindowObjective(model)
    matrices, others = [], []
    for name, p in model.named_parameters():
        plain = p.ndim >= 2 and not name.endswith(("initial_embeds", "wpe.weight"))
        (matrices if plain else others).append(p)
    groups = [{"params": matrices, "weight_decay": OPTIM.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=(0.9, 0.95))
    state = torch.zeros((LANES, 4, 12))
    losses, norms, first = [], [], {}
    for update in range(UPDATES):
        window = columns(update, 0, LANES, weighted)
        total, state = objective(window.input_ids, window.targets, window.reset, state, window.loss_weights)
        loss = total / (window.input_ids.numel() if window.loss_weights is None else window.loss_weights.sum())
        optimizer.zero_grad()
        loss.backward()
        first = first or {name: p.grad.clone() for name, p in model.named_parameters()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}, first


def train(
    world: World,
    stage: int,
    precision: str,
    groups: int,
    tied: bool,
    weighted: bool,
    recompute: int,
    family: str = "gpt2",
):
    from gptb_ds.training.engine import Engine

    engine = Engine(
        WindowObjective(build(tied, family), recompute),
        world,
        lanes=LANES // world.size,
        lane_groups=groups,
        precision=precision,
        optim=OPTIM,
        policy={"zero_optimization": {"stage": stage, "overlap_comm": False}},
    )
    size = LANES // world.size // groups
    states = [torch.zeros((size, 4, 12), dtype=engine.dtype) for _ in range(groups)]
    losses, norms, first = [], [], {}
    for update in range(UPDATES):
        start = world.rank * LANES // world.size
        parts = [columns(update, start + g * size, start + (g + 1) * size, weighted) for g in range(groups)]
        targets = [
            float(p.input_ids.numel()) if p.loss_weights is None else p.loss_weights.double().sum() for p in parts
        ]
        counted = world.sum(torch.tensor(sum(targets), dtype=torch.float64)).item()
        result, states = engine.update(list(zip(parts, states, strict=True)), OPTIM.lr, counted)
        assert result.applied
        losses.append(result.loss)
        norms.append(result.grad_norm)
        if not first:
            # After one step of Adam from nothing, exp_avg is (1 - beta1) times the clipped gradient.
            first = engine.fp32_state.export(lambda name: True)["exp_avg"]
    return losses, norms, engine.fp32_state.export(lambda name: True)["weight"], first


CASES = [
    pytest.param(stage, "fp32", ranks, groups, True, weighted, recompute, id=f"{stage}-fp32-{ranks}x{groups}-{label}")
    for stage in (0, 1, 2, 3)
    for ranks, groups, weighted, recompute, label in (
        (2, 1, False, 0, "plain"),
        (2, 2, True, 3, "groups-weights-recompute"),
        (1, 2, False, 0, "one-rank"),
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision", "ranks", "groups", "tied", "weighted", "recompute"), CASES)
def test_fp32_equals_one_process(stage, precision, ranks, groups, tied, weighted, recompute):
    compare(one_process(tied, weighted), run_ranks(train, ranks, stage, precision, groups, tied, weighted, recompute))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32_equals_one_process_with_another_backbone(stage):
    found = run_ranks(train, 2, stage, "fp32", 2, True, True, 3, "llama")
    compare(one_process(True, True, "llama"), found)


def compare(wanted, found) -> None:
    """What each rank found is what one process finds."""
    want_losses, want_norms, want_weights, want_first = wanted
    for losses, norms, weights, first in found:
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(want_losses), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.tensor(norms), torch.tensor(want_norms), rtol=1e-5, atol=1e-6)
        clip = min(1.0, OPTIM.clip / want_norms[0])
        assert first.keys() == want_first.keys()
        for name, gradient in want_first.items():
            torch.testing.assert_close(
                first[name], 0.1 * clip * gradient, rtol=2e-5, atol=2e-8, msg=lambda m, n=name: f"{n}: {m}"
            )
        for name, weight in want_weights.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_is_close_to_one_process(stage):
    want_losses, want_norms, _, want_first = one_process(True, False)
    losses, norms, _, first = run_ranks(train, 2, stage, "bf16", 1, True, False, 0)[0]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(want_losses), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(want_norms), rtol=5e-2, atol=5e-2)
    clip = min(1.0, OPTIM.clip / want_norms[0])
    for name, gradient in want_first.items():
        want = 0.1 * clip * gradient
        if want.norm() > 1e-4:  # below that, bf16 has no digits left (the bias of the keys has no gradient at all)
            direction = torch.nn.functional.cosine_similarity(first[name].flatten(), want.flatten(), dim=0)
            assert direction > 0.98, f"{name}: the gradient points elsewhere ({direction:.3f})"


@pytest.mark.slow
def test_an_untied_head_trains_at_stage_3():
    want_losses, *_ = one_process(False, False)
    losses, *_ = run_ranks(train, 2, 3, "fp32", 1, False, False, 0)[0]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(want_losses), rtol=1e-6, atol=1e-6)
