"""What a rank raises, all raise, and it stays what it is: an I/O error is retried by a cluster, a mistake is not."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from gptb_ds.checkpoint.format import CheckpointError, UnreadableError
from gptb_ds.config import ConfigError
from gptb_ds.distributed.world import AnyRank, World, _portable, is_shared
from tests.harness.processes import run_ranks


class PickyError(ValueError):
    """One of the classes that pickle can't build again."""

    def __init__(self, row: int, text: str) -> None:
        super().__init__(f"row {row}: {text}")


def full_disk(path: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def raise_on(world: World, ranks: list[int], error: Exception) -> str:
    if world.rank in ranks:
        raise error
    return f"rank {world.rank}"


def broken_row() -> None:
    raise PickyError(3, "not a number")


def outcomes(world: World) -> list[tuple[str, str, bool, object, object]]:
    """Class, text, sharedness, errno and file of what each call raises on this rank."""
    no_space = OSError(errno.ENOSPC, "No space left on device", "/data/x")
    calls = [
        lambda: world.on_all_ranks(raise_on, world, [1], no_space),
        lambda: world.on_all_ranks(raise_on, world, [0, 1], CheckpointError("step-1: altered")),
        lambda: world.on_all_ranks(raise_on, world, [1], UnreadableError("step-1: not yours")),
        lambda: world.on_all_ranks(raise_on, world, [1], FileNotFoundError(errno.ENOENT, "No such file", "b.bin")),
        lambda: world.on_rank0(raise_on, world, [0], ConfigError("run.dir x: taken")),
        lambda: world.on_rank0(full_disk, Path("/data/y")),
        lambda: world.on_all_ranks(broken_row),
    ]
    found = []
    for call in calls:
        with pytest.raises((OSError, ValueError)) as caught:
            call()
        error = caught.value
        file = getattr(error, "filename", None)
        found.append((type(error).__name__, str(error), is_shared(error), getattr(error, "errno", None), file))
    return found


@pytest.mark.slow
def test_errors_keep_their_class_on_every_rank():
    first, second = run_ranks(outcomes, 2)
    assert first == second
    assert first[:6] == [
        ("OSError", "[Errno 28] rank 1: No space left on device: '/data/x'", True, errno.ENOSPC, "/data/x"),
        ("CheckpointError", "step-1: altered", True, None, None),
        ("UnreadableError", "rank 1: step-1: not yours", True, None, None),
        ("FileNotFoundError", "[Errno 2] rank 1: No such file: 'b.bin'", True, errno.ENOENT, "b.bin"),
        ("ConfigError", "run.dir x: taken", True, None, None),
        ("OSError", "[Errno 28] No space left on device: '/data/y'", True, errno.ENOSPC, "/data/y"),
    ]
    assert first[6] == ("ValueError", "row 3: not a number", True, None, None), "this class can't travel"


def _asked(world: World, here: list[bool]) -> list[bool]:
    """Between several ranks the answer is that to the question before."""
    any_rank = AnyRank(world)
    return [any_rank.ask(word) for word in here]


def results(world: World) -> list[object]:
    return [
        world.on_all_ranks(raise_on, world, [], ValueError()),
        world.on_rank0(raise_on, world, [], ValueError()),
        world.broadcast({"of": world.rank}),
        world.all_gather(world.rank * 10),
        *_asked(world, [world.rank == 1, False, False]),
    ]


@pytest.mark.slow
def test_results_are_those_of_the_right_rank():
    assert run_ranks(results, 2) == [
        ["rank 0", "rank 0", {"of": 0}, [0, 10], False, True, False],
        ["rank 1", "rank 0", {"of": 0}, [0, 10], False, True, False],
    ]


def test_one_rank_alone_needs_no_group():
    assert results(World()) == ["rank 0", "rank 0", {"of": 0}, [0], False, False, False]
    with pytest.raises(CheckpointError, match="altered"):
        World().on_all_ranks(raise_on, World(), [0], CheckpointError("altered"))


def test_an_error_that_cannot_travel_keeps_its_kind():
    assert type(_portable(PickyError(3, "not a number"))) is ValueError
    error = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    assert _portable(error) is error
