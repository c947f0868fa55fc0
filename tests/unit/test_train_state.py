"""What a run's counters may be: those of some run, whoever wrote them down."""

from __future__ import annotations

import pytest

from gptb_ds.training.train_state import TrainState

# Of a run of ten updates, 16 tokens each; one was skipped, and Adam's moments began anew after four.
SAVED = TrainState(update=10, tokens=160, adam_steps=9, adam_start=4, adam_tokens=80, skipped=1).saved()
WHOLE = TrainState(update=10, tokens=160, adam_steps=10, adam_tokens=160).saved()


def test_what_was_saved_is_restored() -> None:
    assert TrainState.restored(SAVED).saved() == SAVED
    assert TrainState.restored(WHOLE).saved() == WHOLE
    before = {name: value for name, value in WHOLE.items() if name not in ("adam_tokens", "adam_start", "rewinds")}
    assert TrainState.restored(before).adam_tokens == 0  # of a version that had no such counter


@pytest.mark.parametrize(
    ("saved", "changes", "words"),
    [
        (SAVED, {"adam_start": 10}, "adam_start 10 is above adam_steps 9: counters of no run"),
        (SAVED, {"adam_start": 10**30}, "is above adam_steps 9"),
        (SAVED, {"adam_tokens": 161}, "adam_tokens 161 is above tokens 160"),
        (SAVED, {"bad_in_row": 2}, "bad_in_row 2 is above skipped 1"),
        (SAVED, {"noise_updates": 100_000}, "noise_updates 100000 is above update 10"),
        (SAVED, {"loss_windows": 11}, "loss_windows 11 is above update 10"),
        (WHOLE, {"adam_tokens": 0}, "all updates were applied, and adam_tokens 0 are not 160"),
        (SAVED, {"adam_steps": 8}, "8 steps of Adam, 1 skipped updates and 0 in which nothing counted are not 10"),
        (SAVED, {"noise_signal": float("nan")}, "noise_signal: Input should be a finite number"),
        (SAVED, {"loss_mean": float("inf")}, "loss_mean: Input should be a finite number"),
        (SAVED, {"loss_variance": -1.0}, "loss_variance: Input should be greater than or equal to 0"),
        (SAVED, {"evaluation_due": 1}, "evaluation_due: Input should be a valid boolean"),
        (SAVED, {"of_no_version": 1}, "of_no_version: Unexpected keyword argument"),
    ],
)
def test_counters_of_no_run_are_refused_in_one_line(saved: dict, changes: dict, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        TrainState.restored(saved | changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)
