"""A sample while training is what `generate` draws."""

from __future__ import annotations

import pytest

from gptb_ds.generation import generate
from gptb_ds.training.samples import sample_document
from tests.harness.models import small_gptb


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_a_sample_has_the_tokens_that_generate_draws(seed: int):
    model = small_gptb().eval()
    eot = 5
    drawn = sample_document(model, eot, 40, seed)
    assert drawn == generate(model, [], 40, seed=seed, eot_id=eot)
    assert eot not in drawn and drawn != sample_document(model, eot, 40, seed + 10)


def test_some_samples_end_with_their_document():
    model = small_gptb().eval()
    lengths = [len(sample_document(model, 5, 40, seed)) for seed in range(12)]
    assert min(lengths) < 40
