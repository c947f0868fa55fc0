"""The state as transformers' cache: what each operation leaves, and what is refused.

Axes: B lanes, T tokens, S slots, E embedding.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptb_ds.model import GPTBCache
from gptb_ds.model.cache import KEPT, RECORDED
from tests.harness.models import V, random_ids, small_gptb

MODEL = small_gptb()
B, T = 3, 9


def read(ids: torch.Tensor, cache: GPTBCache | None = None) -> GPTBCache:
    with torch.no_grad():
        return MODEL(ids, past_key_values=cache).past_key_values


def same(cache: GPTBCache, ids: torch.Tensor) -> bool:
    """Whether the cache stands where reading `ids` from the start stands, its hash of tokens included."""
    expected = read(ids)
    assert cache.state is not None and cache.get_seq_length() == ids.shape[1] and cache.knows(ids)
    return torch.allclose(cache.state, expected.state, atol=1e-6)


def test_reset_restores_the_learned_initial_state() -> None:
    cache = read(random_ids(B, T))
    cache.reset()
    assert cache.state is None and cache.get_seq_length() == 0 and cache.batch_size == -1
    other = random_ids(B, T, seed=1)
    assert same(read(other, cache), other)


@given(st.integers(1, 30), st.integers(1, 30), st.data())
@settings(max_examples=30, deadline=None)
def test_crop_is_as_if_the_tokens_had_not_been_read(first: int, second: int, data: st.DataObject) -> None:
    ids = random_ids(2, first + second)
    cache = read(ids[:, first:], read(ids[:, :first]))
    back = data.draw(st.integers(0, min(first + second, KEPT - 1)))
    cache.crop(-back)
    if back == first + second:
        assert cache.state is None
    else:
        assert same(cache, ids[:, : first + second - back])
    more = random_ids(2, 3, seed=7)
    assert same(read(more, cache), torch.cat((ids[:, : first + second - back], more), dim=1))


def test_crop_beyond_what_is_kept_says_what_to_do() -> None:
    cache = read(random_ids(1, KEPT + 5))
    with pytest.raises(ValueError, match=rf"can't go back by {KEPT}; make it as GPTBCache\(kept={KEPT + 1}\)"):
        cache.crop(-KEPT)
    kept_more = GPTBCache(kept=KEPT + 4)
    ids = random_ids(1, KEPT + 5)
    read(ids, kept_more).crop(-KEPT)
    assert same(kept_more, ids[:, :5])
    kept_more.crop(3)  # transformers 5.0: the length to go back to
    assert same(kept_more, ids[:, :3])


def test_recording_keeps_all_of_a_call_until_the_next_crop() -> None:
    cache = GPTBCache()
    cache.activate_past_recording()
    ids = random_ids(1, 3 * KEPT)
    read(ids, cache).crop(-2 * KEPT)
    assert same(cache, ids[:, :KEPT]) and len(cache.layer.moments) <= KEPT
    read(random_ids(1, 2 * RECORDED), cache)
    assert len(cache.layer.moments) == RECORDED


def test_lanes_can_be_reordered_repeated_and_selected() -> None:
    ids = random_ids(B, T)
    reordered, repeated, selected = read(ids), read(ids), read(ids)
    reordered.reorder_cache(torch.tensor([2, 0, 0]))
    assert same(reordered, ids[[2, 0, 0]])
    repeated.batch_repeat_interleave(2)
    assert same(repeated, ids.repeat_interleave(2, dim=0)) and repeated.batch_size == 2 * B
    selected.batch_select_indices(torch.tensor([1]))
    assert same(selected, ids[1:2])
    reordered.crop(-4)  # the states before went with it
    assert same(reordered, ids[[2, 0, 0], : T - 4])


def test_a_copy_goes_its_own_way() -> None:
    ids = random_ids(B, T)
    cache = read(ids[:, :5])
    copy = cache.copy()
    read(ids[:, 5:], copy)
    assert same(cache, ids[:, :5]) and same(copy, ids)


def test_states_are_never_written_to() -> None:
    cache = read(random_ids(B, T))
    state, before = cache.state, cache.state.clone()
    read(random_ids(B, T, seed=3), cache)
    cache.reorder_cache(torch.tensor([1, 1, 1]))
    assert torch.equal(state, before)


def test_offloading_keeps_states_on_the_cpu() -> None:
    ids, cache = random_ids(B, T), GPTBCache(offloading=True)
    read(ids[:, 4:], read(ids[:, :4], cache))
    assert same(cache, ids) and {m.state_BSE.device.type for m in cache.layer.moments} == {"cpu"}
    cache.offload(0)
    cache.prefetch(0)
    assert same(cache, ids)


@given(st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=7), min_size=1, max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_the_hash_depends_on_the_tokens_that_were_read_alone(pieces: list[list[int]], data: st.DataObject) -> None:
    """However they came: in one call or several, with padding between, with the states kept or not."""
    flat = torch.tensor([[token for piece in pieces for token in piece]])
    cache = GPTBCache(kept=data.draw(st.sampled_from([1, 3, 40])))
    for piece in pieces:
        padded, mask = [], []
        for token in piece:
            for _ in range(data.draw(st.integers(0, 1))):
                padded.append(data.draw(st.integers(0, V - 1)))
                mask.append(0)
            padded.append(token)
            mask.append(1)
        with torch.no_grad():
            MODEL(torch.tensor([padded]), attention_mask=torch.tensor([mask]), past_key_values=cache)
    plain = read(flat)
    assert torch.equal(cache.layer.moments[-1].hash_B, plain.layer.moments[-1].hash_B)
    assert torch.allclose(cache.state, plain.state, atol=1e-6)
    changed = flat.clone()
    at = data.draw(st.integers(0, flat.shape[1] - 1))
    changed[0, at] = (changed[0, at] + 1) % V
    assert not plain.knows(changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    model, ids, more = small_gptb(dtype), random_ids(B, T), random_ids(B, 4, seed=8)
    cache = model(ids).past_key_values
    cache.save(tmp_path / "state.safetensors", model)
    again = GPTBCache.load(tmp_path / "state.safetensors", model, input_ids=ids)
    assert torch.equal(again.state, cache.state) and again.get_seq_length() == T and again.knows(ids)
    assert torch.equal(model(more, past_key_values=again).logits, model(more, past_key_values=cache).logits)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_the_wrong_state_is_refused_with_a_line(tmp_path: Path) -> None:
    ids, file = random_ids(1, T), tmp_path / "state.safetensors"
    cache = read(ids)
    cache.save(file, MODEL)

    def refused(model: object, match: str, path: Path = file, **kwargs: object) -> None:
        with pytest.raises(ValueError, match=match) as error:
            GPTBCache.load(path, model, **kwargs)
        assert "\n" not in str(error.value) and str(path) in str(error.value)

    refused(MODEL, "the state after 9 other tokens", input_ids=random_ids(1, T, seed=2))
    refused(MODEL, "the state after 9 other tokens than these 8", input_ids=ids[:, :-1])
    refused(small_gptb(seed=5), "another model")
    refused(small_gptb(torch.bfloat16), "another model, or of this one in another precision")
    refused(small_gptb(num_slots=4), r"shape \(1, 5, 16\); this model's are \(lanes, 3, 16\)")
    refused(MODEL, "not a saved state", path=tmp_path / "nothing.safetensors")
    (tmp_path / "half.safetensors").write_bytes(file.read_bytes()[:-9])
    refused(MODEL, "not a saved state", path=tmp_path / "half.safetensors")
    MODEL.save_pretrained(tmp_path / "model")
    refused(MODEL, "not a saved state", path=tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="nothing was read yet"):
        GPTBCache().save(tmp_path / "none", MODEL)


def test_a_cache_that_does_not_fit_is_refused_with_a_line() -> None:
    from transformers import DynamicCache

    ids = random_ids(2, 3)
    with pytest.raises(ValueError, match=r"holds 3 lanes, the tokens have 2; cache\.batch_repeat_interleave"):
        MODEL(ids, past_key_values=read(random_ids(B, T)))
    with pytest.raises(ValueError, match="a DynamicCache; this model keeps its state in a GPTBCache"):
        MODEL(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="not both"):
        MODEL(ids, past_key_values=read(ids), past_hidden_states=torch.zeros(2, 5, 16))
    with pytest.raises(ValueError, match="past_hidden_states has shape"):
        MODEL(ids, past_key_values=GPTBCache(torch.zeros(2, 4, 16)))
