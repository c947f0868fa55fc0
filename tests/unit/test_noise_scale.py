"""The gradient noise scale against gradients whose noise is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gptb_ds.training.noise_scale import AVERAGED_UPDATES, GradientNorms, NoiseScale, merged


def test_it_finds_the_noise_of_gradients_that_were_made_with_it():
    generator = torch.Generator().manual_seed(0)
    truth = torch.full((400,), 0.1)  # |G|^2 = 4
    deviation = 2.0  # of each element of a token's gradient: S = 1600
    found = NoiseScale()
    for _ in range(200):
        parts = truth + deviation / 8**0.5 * torch.randn((4, 400), generator=generator)  # 4 parts of 8 tokens
        small = parts.square().sum(1).mean().item()
        found = found.after((8, small), (32, parts.mean(0).square().sum().item()))
    assert found.signal == pytest.approx(4.0, rel=0.25)
    assert found.noise == pytest.approx(1600.0, rel=0.1)
    assert found.tokens == pytest.approx(400.0, rel=0.35)


def test_it_is_unknown_before_a_measurement_and_when_noise_drowns_the_signal():
    assert NoiseScale().tokens is None
    assert NoiseScale().after((1, 100.0), (2, 1.0)).tokens is None


def test_updates_merge_when_twice_the_tokens_are_within_the_noise_scale_and_never_part_again():
    def measured(tokens: float, updates: int = AVERAGED_UPDATES) -> NoiseScale:
        return NoiseScale(1.0, tokens, updates)

    assert merged(8, 1024, measured(255.0)) == 8
    assert merged(8, 1024, measured(256.0)) == 4
    assert merged(8, 1024, measured(1e9)) == 4  # one halving at a time
    assert merged(8, 1024, measured(1e9, updates=3)) == 8
    assert merged(1, 1024, measured(1e9)) == 1
    assert merged(2, 1024, measured(1.0)) == 2


def test_norms_are_those_of_each_backward_pass_though_a_weight_is_used_often_and_gradients_add_up():
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    norms = GradientNorms(layer.parameters(), torch.device("cpu"))
    want = 0.0
    for seed in range(2):
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        loss = layer(layer(layer(x))).square().sum()
        alone = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
        norms.take()
        loss.backward()
        one = norms.take().item()
        assert one == pytest.approx(sum(g.square().sum().item() for g in alone), rel=1e-5)
        want += one
    assert norms.take() == 0
