"""The claims about checkpoints that need no training: the manifest, sharing among writers, and large worlds."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptb_ds.atomic_files import sha256_of
from gptb_ds.checkpoint.format import (
    MANIFEST,
    MANIFEST_COPY,
    CheckpointError,
    Manifest,
    UnreadableError,
    _checksum,
    checkpoint_folder,
    checkpoint_folders,
    list_checkpoints,
    newest_good,
    read_manifest,
    verify,
)
from gptb_ds.checkpoint.identity import changed_settings, check_identity
from gptb_ds.checkpoint.reader import CheckpointReader
from gptb_ds.checkpoint.writer import MAX_WRITERS, CheckpointWriter, assign_parameters, prune, writer_blocks
from gptb_ds.distributed.world import World


def manifest(step: int = 3, lanes: int = 4, **changes) -> Manifest:
    values = {
        "step": step,
        "tokens": step * lanes * 2,
        "loss": 1.5,
        "world_size": 1,
        "zero_stage": 1,
        "lanes": lanes,
        "window": 2,
        "identity": {"data": "x", "data.lanes": lanes},
        "settings": {"optim.lr": 0.1, "world_size": 1},
        "progress": {"adam_steps": step, "skipped": 0, "bad_in_row": 0, "evaluation_due": False},
        "versions": {},
    }
    return Manifest(**values | changes)


def lose_manifests(folder: Path) -> None:
    for name in (MANIFEST, MANIFEST_COPY):
        (folder / name).unlink()


def save(run: Path, step: int = 3, lanes: int = 4) -> Path:
    saver = CheckpointWriter(run, World(), keep=5)
    weight = {"a": torch.randn(3, 2), "b": torch.randn(5)}
    parameters = {kind: {n: t.clone() for n, t in weight.items()} for kind in ("weight", "exp_avg", "exp_avg_sq")}
    state = {"state": torch.randn(lanes, 3, 8), "ordinal": torch.arange(lanes), "offset": torch.arange(lanes)}
    saver.begin(manifest(step, lanes), parameters, state, {"cpu": torch.get_rng_state()})
    return saver.finish()


def test_a_saved_checkpoint_reads_back(tmp_path: Path):
    folder = save(tmp_path)
    assert folder == checkpoint_folder(tmp_path, 3)
    reader = CheckpointReader(folder)
    assert verify(folder) == reader.manifest
    assert reader.shapes() == {"a": (3, 2), "b": (5,)}
    reader.check_model({"a": (3, 2), "b": (5,)})
    part = reader.lanes(1, 3, (3, 8))
    assert part["ordinal"].tolist() == [1, 2] and part["state"].shape == (2, 3, 8)
    assert torch.equal(reader.random_state(0)["cpu"], torch.get_rng_state())
    assert not list(folder.glob(".*"))  # no temporary file stays


def test_what_does_not_fit_is_named(tmp_path: Path):
    reader = CheckpointReader(save(tmp_path))
    for shapes, words in (
        ({"a": (3, 2)}, "'b': the model has no such parameter"),
        ({"a": (3, 2), "b": (5,), "c": (1,)}, "'c': the checkpoint lacks it"),
        ({"a": (2, 3), "b": (5,)}, "'a' is F32 (3, 2), the model needs F32 (2, 3)"),
    ):
        with pytest.raises(CheckpointError) as caught:
            reader.check_model(shapes)
        assert words in str(caught.value)
    with pytest.raises(CheckpointError, match="lane 4 is in no file"):
        reader.lanes(2, 6, (3, 8))
    with pytest.raises(CheckpointError, match="the run needs"):
        reader.lanes(0, 2, (3, 9))
    with pytest.raises(CheckpointError, match="no random state of rank 1"):
        reader.random_state(1)


def test_identity_and_settings():
    saved = manifest()
    check_identity(saved, dict(saved.identity), Path("c"))
    with pytest.raises(CheckpointError) as caught:
        check_identity(saved, {"data": "y", "data.lanes": 8}, Path("c"))
    text = str(caught.value)
    assert "data was 'x' when this was saved and is 'y' now" in text and "data.lanes was 4" in text
    assert "--run.resume never" in text
    assert "is 'y' now (it comes from the stores in data.path)" in text and "data.lanes was 4" in text
    with pytest.raises(CheckpointError, match=r"\(it comes from the decoder in model.backbone or model.init_from\)"):
        check_identity(saved, {"n_positions": 4}, Path("c"))
    assert changed_settings(saved, {"optim.lr": 0.2, "world_size": 1}) == ["optim.lr 0.1 -> 0.2"]


def test_a_checkpoint_from_before_there_was_a_key():
    """It goes on where the key is off, and is refused by what to set where it is not; no news is made of settings."""
    saved = manifest()
    check_identity(saved, dict(saved.identity) | {"task.curriculum": "off"}, Path("c"))
    with pytest.raises(CheckpointError, match=r"task.curriculum was 'off' when this was saved and is 'auto, .*' now"):
        check_identity(saved, {"task.curriculum": "auto, documents of 4 tokens at first"}, Path("c"))
    assert changed_settings(saved, dict(saved.settings) | {"run.snapshot_every": 0}) == []
    check_identity(saved, dict(saved.identity) | {"model.init_from": "none to begin as"}, Path("c"))
    for stagger in ("on", "off"):  # the data's fingerprint told
        check_identity(saved, dict(saved.identity) | {"data.stagger": stagger}, Path("c"))
    with pytest.raises(CheckpointError, match=r"data.stagger was 'off' when this was saved and is 'on' now"):
        check_identity(saved, {"data": "y", "data.stagger": "on"}, Path("c"))


def test_listing_and_newest_good(tmp_path: Path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    file = next(checkpoint_folder(tmp_path, 3).glob("model-*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (tmp_path / "checkpoints" / "step-nonsense").mkdir()
    found = dict(list_checkpoints(tmp_path))
    assert isinstance(found[checkpoint_folder(tmp_path, 3)], CheckpointError)
    assert found[checkpoint_folder(tmp_path, 2)].step == 2
    good, passed_over = newest_good(tmp_path, World())
    assert good == checkpoint_folder(tmp_path, 2)
    assert list(passed_over) == [checkpoint_folder(tmp_path, 3)] and "was altered" in next(iter(passed_over.values()))


def test_pruning_counts_only_what_is_whole(tmp_path: Path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    lose_manifests(checkpoint_folder(tmp_path, 4))
    next(checkpoint_folder(tmp_path, 3).glob("lanes-*")).unlink()
    prune(tmp_path, keep=1)
    assert [p.name[-1] for p in checkpoint_folders(tmp_path)] == ["4", "3", "2"]
    verify(checkpoint_folder(tmp_path, 2))


def test_the_verb_lists_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from gptb_ds.cli import main

    save(tmp_path, 7)
    save(tmp_path, 8)
    lose_manifests(checkpoint_folder(tmp_path, 8))
    assert main(["checkpoints", str(tmp_path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "no manifest.json" in out[1] and out[2].split()[0] == "7" and out[2].endswith("yes")
    assert main(["checkpoints", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize("size", [1, 2, 3, 31, 32, 33, 64, 1000, 1024])
def test_writer_blocks_cover_the_ranks_with_few_files(size: int):
    blocks = writer_blocks(size)
    assert [rank for block in blocks for rank in block] == list(range(size))
    assert len(blocks) <= MAX_WRITERS
    assert {len(block) for block in blocks[:-1]} <= {len(blocks[0])}


def test_parameters_are_shared_evenly():
    shapes = {f"p{i}": (100 + i,) for i in range(64)}
    owner = assign_parameters(shapes, [0, 4, 8, 12])
    assert set(owner) == set(shapes)
    load = {w: sum(shapes[n][0] for n in shapes if owner[n] == w) for w in (0, 4, 8, 12)}
    assert max(load.values()) < 1.2 * min(load.values())
    assert assign_parameters({"one": (10,)}, [0, 1]).keys() == {"one"}


def test_a_thousand_ranks_and_a_million_lanes_without_processes(tmp_path: Path):
    """What 1,024 ranks would do when they save and when 768 of them resume, without a process for each.

    A step that is quadratic in ranks or lanes would run into the test's time limit. The hand-over
    between ranks is replaced by shared memory; file naming, lane ranges and reading are the real ones.
    """
    lanes, ranks = 1_048_576, 1_024
    blocks = writer_blocks(ranks)
    per_rank = lanes // ranks

    class Member(World):
        def gather_to(self, tensors, leader, members):
            if self.rank != leader:
                return {}
            return {k: torch.stack([t + (r - leader) * per_rank for r in members]) for k, t in tensors.items()}

        def on_rank0(self, function, *args, **kwargs):
            return function(*args, **kwargs) if self.rank == 0 else None

        def all_gather(self, value):
            gathered.append(value)
            return gathered

    gathered: list = []
    savers = []
    (tmp_path / "checkpoints").mkdir()
    for block in blocks:
        leader = block[0]
        own = torch.arange(leader * per_rank, (leader + 1) * per_rank)
        saver = CheckpointWriter(tmp_path, Member(rank=leader, size=ranks), keep=1)
        parameters = {kind: {f"p{leader}": torch.zeros(2)} for kind in ("weight", "exp_avg", "exp_avg_sq")}
        state = {"state": own[:, None, None].float(), "ordinal": own, "offset": own}
        saver.begin(manifest(5, lanes, world_size=ranks), parameters, state, {"cpu": torch.zeros(4, dtype=torch.uint8)})
        savers.append(saver)
    for saver in [*savers[1:], savers[0]]:
        saver.finish()
    folder = checkpoint_folder(tmp_path, 5)
    assert len(list(folder.iterdir())) == 4 * len(blocks) + 2
    reader = CheckpointReader(folder)
    for rank in (0, 1, 511, 767):
        first, last = rank * lanes // 768, (rank + 1) * lanes // 768
        assert torch.equal(reader.lanes(first, last, (1, 1))["ordinal"], torch.arange(first, last))
    assert threading.active_count() < 8


def forge(folder: Path, **changes: object) -> None:
    """Rewrites values of the manifest, with a checksum that fits: what a stranger can do."""
    body = json.loads((folder / "manifest.json").read_text())
    del body["checksum"]
    (folder / "manifest.json").write_text(json.dumps(body | changes | {"checksum": _checksum(body | changes)}))


def forge_tensors(folder: Path, kind: str, **tensors: torch.Tensor | None) -> None:
    """Replaces tensors of a file (None: leaves one out), with a manifest that fits."""
    path = next(folder.glob(f"{kind}-*"))
    changed = {k: v for k, v in (load_file(path) | tensors).items() if v is not None}
    save_file(changed, path)
    entry = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    forge(folder, files=json.loads((folder / "manifest.json").read_text())["files"] | {path.name: entry})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": -5}, "step: Input should be greater"),
        ({"step": 4}, "manifest.json is of update 4"),
        ({"progress": {"adam_steps": "many"}}, "progress.adam_steps.int: Input should be a valid integer"),
        ({"tokens": 25}, "says 25 tokens, which 3 updates can't have read in windows of 4 lanes x 2 columns"),
        ({"tokens": 32}, "says 32 tokens, which 3 updates can't have read"),
        ({"tokens": 0}, "says 0 tokens, which 3 updates can't have read"),
        ({"files": ["a"]}, "files: Input should be a valid dictionary"),
        ({"files": {"lanes-0-4.safetensors": 5}}, "files.lanes-0-4.safetensors"),
        ({"files": {"lanes-a-b.safetensors": {"bytes": 0, "sha256": ""}}}, "which is no file of a checkpoint"),
        ({"world_size": 2}, "says 2 ranks, its files rng-* are of 1"),
        ({"world_size": 10**30}, "ranks, its files rng-* are of 1"),
        ({"lanes": 2, "window": 4}, "says 2 lanes, its files lanes-* are of 4"),
        ({"lanes": 12, "window": 1, "tokens": 36}, "says 12 lanes, its files lanes-* are of 4"),
        ({"files": {}}, "says 4 lanes, its files lanes-* are of 0"),
        ({"loss": float("nan")}, "loss: Input should be a finite number"),
        ({"zero_stage": -1}, "zero_stage: Input should be greater"),
        ({"identity": []}, "identity: Input should be a valid dictionary"),
        ({"surprise": 1}, "surprise"),
        ({"format": 9}, "format 9, this version reads 3"),
        ({"format": 9, "versions": {"gptb-ds": "7.1"}}, "it was written by gptb-ds 7.1"),
        ({"format": 2}, "format 2, this version reads 3; gptb-ds 0.1 reads it"),
        ({"files": {"tokenizer/../../../secret": {"bytes": 0, "sha256": ""}}}, "which is no file of a checkpoint"),
    ],
)
def test_a_forged_manifest_is_refused_in_one_line(tmp_path: Path, changes: dict, words: str):
    folder = save(tmp_path)
    forge(folder, **changes)
    with pytest.raises(CheckpointError) as caught:
        read_manifest(folder)
    assert words in str(caught.value) and "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_manifest_of_brackets_is_refused_in_one_line(tmp_path: Path):
    """json raises RecursionError, which is neither a ValueError nor an OSError."""
    folder = save(tmp_path)
    (folder / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"manifest.json cannot be read: RecursionError"):
        read_manifest(folder)
    (folder / "manifest.json").write_text('{"a":' * 100_000)
    assert newest_good(tmp_path, World())[0] is None


def test_a_pipe_for_a_manifest_is_not_waited_for(tmp_path: Path):
    folder = save(tmp_path)
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    with pytest.raises(CheckpointError, match=r"manifest.json cannot be read: it is no file"):
        read_manifest(folder)


def test_forged_lanes_and_random_states_are_refused(tmp_path: Path):
    def reader(kind: str, **tensors: torch.Tensor | None) -> CheckpointReader:
        folder = save(tmp_path)
        forge_tensors(folder, kind, **tensors)
        verify(folder)
        return CheckpointReader(folder)

    with pytest.raises(CheckpointError, match=r"ordinal is F32 \(4,\), the run needs I64"):
        reader("lanes", ordinal=torch.arange(4) + 0.7).lanes(0, 4, (3, 8))
    with pytest.raises(CheckpointError, match=r"state is I64 \(4, 3, 8\), the run needs F32"):
        reader("lanes", state=torch.zeros(4, 3, 8, dtype=torch.int64)).lanes(0, 4, (3, 8))
    with pytest.raises(CheckpointError, match="lacks the tensor 'state'"):
        reader("lanes", state=None).lanes(0, 4, (3, 8))
    with pytest.raises(CheckpointError, match="cpu is F32"):
        reader("rng", cpu=torch.zeros(1, 8)).random_state(0)
    with pytest.raises(CheckpointError, match="lacks the tensor 'cpu'"):
        reader("rng", cpu=None, cuda=torch.zeros(1, 8, dtype=torch.uint8)).random_state(0)


def test_a_checkpoint_that_may_not_be_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path)

    def forbidden(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", forbidden)  # root, as which tests may run, reads everything
    with pytest.raises(UnreadableError, match="Permission denied"):
        newest_good(tmp_path, World())
