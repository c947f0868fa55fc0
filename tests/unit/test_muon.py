"""Muon on one process: which weights it takes, and the step that it makes of a momentum."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gptb_ds.baselines import LSTMBaseline, LSTMConfig
from gptb_ds.model.configuration import GPTBConfig
from gptb_ds.model.modeling import GPTBLMHeadModel
from gptb_ds.training.muon import Matrix, MuonWithAdamW, Piece, matrices_of, muon_direction, orthogonalised


def tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_blocks_matrices_and_nothing_else():
    model = GPTBLMHeadModel(GPTBConfig(vocab_size=9, num_slots=4, n_positions=4, n_layer=2, n_head=2, n_embd=8))
    found = matrices_of(model)
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert list(found) == [f"transformer.h.{layer}.{name}.weight" for layer in range(2) for name in names]
    assert found["transformer.h.0.attn.c_attn.weight"] == Matrix(3, 1)
    assert found["transformer.h.0.mlp.c_fc.weight"] == Matrix(1, 1)
    assert found.keys() <= dict(model.named_parameters()).keys()


def test_the_gates_of_an_lstm_are_matrices_of_their_own():
    model = LSTMBaseline(LSTMConfig(vocab_size=9, n_layer=2, n_embd=6))
    found = matrices_of(model)
    assert found == {
        f"lstm.weight_{kind}_l{layer}": Matrix(1 if kind == "hr" else 4, 0)
        for layer in range(2)
        for kind in ("ih", "hh", "hr")
    }
    weight = model.lstm.weight_ih_l0
    step = muon_direction(weight.detach(), found["lstm.weight_ih_l0"])
    gate = muon_direction(weight.detach()[8:16], Matrix(1, 0))
    torch.testing.assert_close(step[8:16], gate)


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (64, 16), (5, 7)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_orthogonalised_keeps_the_singular_vectors_and_levels_the_values(shape, scale):
    matrix = tensor(*shape) * scale
    found = orthogonalised(matrix)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.mT @ found @ vh.mT
    torch.testing.assert_close(inside, torch.diag(inside.diagonal()), rtol=0, atol=1e-3)
    level = inside.diagonal()[s > 0.05 * s.max()]
    assert level.min() > 0.6 and level.max() < 1.3


@pytest.mark.parametrize("shape", [(24, 24), (24, 96), (96, 24)])
def test_the_step_equals_torchs_muon_that_matches_adamws_rate(shape):
    # torch computes the iterations in bfloat16: equal to its digits.
    start, gradients = tensor(*shape), [tensor(*shape, seed=seed) for seed in (1, 2, 3)]
    theirs, ours = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    reference = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    muon = MuonWithAdamW(
        [{"params": [ours], "muon": True, "weight_decay": 0.1}],
        matrices={"w": Matrix(1, 0)},
        momentum=0.9,
        device=torch.device("cpu"),
        lr=0.02,
    )
    muon.layout = lambda _: [Piece("w", shape, 0, 0, start.numel())]
    for gradient in gradients:
        theirs.grad, ours.grad = gradient.clone(), gradient.clone()
        reference.step()
        muon.step()
    moved = (theirs - start).norm()
    assert (theirs - ours).norm() < 0.03 * moved


def test_the_step_is_as_long_as_adamws():
    for shape in ((64, 64), (64, 256), (256, 64)):
        root_mean_square = muon_direction(tensor(*shape), Matrix(1, 1)).square().mean().sqrt()
        assert 0.15 < root_mean_square < 0.25


def test_fused_maps_are_orthogonalised_each_on_its_own():
    q, k, v = (tensor(16, 16, seed=seed) * 10.0**seed for seed in range(3))
    fused = muon_direction(torch.cat([q, k, v], 1), Matrix(3, 1))
    alone = [muon_direction(part, Matrix(1, 1)) for part in (q, k, v)]
    torch.testing.assert_close(fused, torch.cat(alone, 1))


def test_a_transposed_layer_makes_the_transposed_step():
    matrix = tensor(16, 48)
    conv1d, linear = muon_direction(matrix, Matrix(3, 1)), muon_direction(matrix.mT.contiguous(), Matrix(3, 0))
    torch.testing.assert_close(conv1d.mT, linear)


def test_the_other_groups_take_adamws_steps_bit_for_bit():
    start, gradient = tensor(5, 3), tensor(5, 3, seed=1)
    plain, mixed, matrix = (nn.Parameter(start.clone()) for _ in range(3))
    options = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
    reference = torch.optim.AdamW([plain], **options)
    muon = MuonWithAdamW(
        [{"params": [matrix], "muon": True}, {"params": [mixed], "muon": False}],
        matrices={"w": Matrix(1, 0)},
        momentum=0.95,
        device=torch.device("cpu"),
        **options,
    )
    muon.layout = lambda _: [Piece("w", (5, 3), 0, 0, 15)]
    for _ in range(3):
        for parameter in (plain, mixed, matrix):
            parameter.grad = gradient.clone()
        reference.step()
        muon.step()
    assert torch.equal(plain, mixed) and not torch.equal(plain, matrix)
    assert set(muon.state[matrix]) == {"momentum_buffer"}
