"""Shows that what a user gave is never dropped, doubled or misread without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptb_ds.cli import main
from gptb_ds.config import ConfigError, load_config
from gptb_ds.data.documents import manifest_checksum, open_store
from gptb_ds.training.deepspeed_policy import read_policy
from tests.harness.stores import write_store


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "train: {updates: 3}\nmodel: {n_head: 2}\ntrain: {seed: 4}\n",
            "'train' is in line 1 and in line 3; join them",
        ),
        ("train:\n  updates: 3\n  updates: 4\n", "'updates' is in line 2 and in line 3"),
        ("[" * 1_000, "not valid YAML: maximum recursion depth"),
        ("train: {updates: true}\n", "train.updates: True: input should be a number, not a truth value"),
        ("optim: {lr: yes}\n", "optim.lr: True: input should be a number, not a truth value"),
        ("data: {weights: [yes]}\n", "data.weights: [True]: input should be a number, not a truth value"),
        ("data: {weights: true}\n", "data.weights: [True]: input should be a number, not a truth value"),
        ("data: {window: 2020-13-45}\n", "c.yaml: not valid YAML: month must be in 1..12"),
        ("data: {window: !!bool x}\n", "c.yaml: not valid YAML: 'x'"),
        ("data: {window: !!int x}\n", "c.yaml: not valid YAML: invalid literal for int()"),
        ("train: {decide: [1]}\n", "train.decide: unknown key"),
        ("train: {updates: 2020-01-01}\n", "train.updates: "),
        ("train: {updates: 3.5}\n", "train.updates: "),
        ("train: &x {updates: *x}\n", "train.updates: "),
    ],
)
def test_a_configuration_that_says_two_things_or_none_is_refused(tmp_path: Path, text: str, words: str):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "c.yaml"), {"data.path": "x"})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_anchors_and_a_mark_of_bytes_are_read(tmp_path: Path):
    (tmp_path / "c.yaml").write_text(
        "\ufeffdata: {path: &p [x], weights: [1]}\ntrain: {updates: 7}\n", encoding="utf-8"
    )
    config = load_config(str(tmp_path / "c.yaml"), {"optim.warmup_updates": 1})
    assert config.train.updates == 7 and config.data.path == ["x"]


def test_an_empty_name_of_a_configuration_is_no_default():
    with pytest.raises(ConfigError, match="is empty"):
        load_config("", {"data.path": "x"})


def test_a_store_that_is_named_twice_is_refused(tmp_path: Path):
    (tmp_path / "store").mkdir()
    (tmp_path / "link").symlink_to("store")
    for again in (tmp_path / "store", f"{tmp_path}/store/", tmp_path / "store/../link"):
        with pytest.raises(ConfigError, match=r"is named twice, so each of its documents would come twice"):
            load_config(None, {"data.path": [str(tmp_path / "store"), str(again)]})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 2}}', "'zero_optimization' is there more"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "'stage' is there more than once"),
        ('{"a":' * 100_000, "cannot be read as JSON: maximum recursion depth"),
    ],
)
def test_a_policy_that_says_two_things_is_refused(tmp_path: Path, text: str, words: str):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_policy(str(tmp_path / "p.json"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"splits": None}, "splits: Field required"),
        ({"splits": []}, "splits: Input should be a valid dictionary"),
        ({"splits": {}}, "lacks the split 'train'"),
        ({"dtype": "float64"}, "dtype: Input should be 'uint16' or 'uint32'"),
        ({"dtype": "uint32"}, "which train/tokens.bin does not hold"),
        ({"weighted": True}, "which train/counted.bin does not hold"),
        ({"own_targets": True}, "which train/targets.bin does not hold"),
        ({"files": {}}, "which train/tokens.bin does not hold"),
        ({"eot_id": 999}, "eot_id is beyond vocab_size"),
        ({"vocab_size": "300"}, "vocab_size: Input should be a valid integer"),
        ({"documents": 3}, "says 3 documents of 5 tokens, which train/tokens.bin does not hold"),
        ({"tokens": 1}, "says 2 documents of 1 tokens"),
        ({"bytes": -5}, "splits.train.bytes: Input should be greater than or equal to 0"),
    ],
)
def test_a_forged_manifest_of_a_store_is_refused_in_one_line(tmp_path: Path, changes: dict, words: str):
    """Its checksum fits: what a stranger, or a script that renames things, can do."""
    path = write_store(tmp_path, [[5, 6], [7, 8, 9]])
    manifest = json.loads((path / "store.json").read_text())
    for key, value in changes.items():
        target = manifest["splits"]["train"] if key in manifest["splits"]["train"] else manifest
        target[key] = value
    manifest = {key: value for key, value in manifest.items() if value is not None}
    manifest["manifest_checksum"] = manifest_checksum(manifest)
    (path / "store.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r".") as caught:
        open_store(path)
    assert f"{path}/store.json: " in (line := str(caught.value)) and words in line and "\n" not in line


def test_a_store_that_is_a_file_or_brackets_is_said(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a.txt: is a file, not a document store; run gptb-ds prepare"):
        open_store(tmp_path / "a.txt")
    (tmp_path / "store.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"store.json: cannot be read \(maximum recursion depth"):
        open_store(tmp_path)


def test_metrics_without_tokens_are_not_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "metrics.jsonl").write_text('{"update": 1, "loss": 1.0}\n')
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "a.png")]) == 2
    assert f"{tmp_path}/metrics.jsonl: the line of update 1 has no 'tokens'" in capsys.readouterr().err


def test_a_seed_beyond_64_bits_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "nowhere", "--seed", "9" * 30]) == 2
    assert "seed is 999999999999999999999999999999; expected a number of 64 bits" in capsys.readouterr().err


def test_output_that_a_full_disk_does_not_take_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path = write_store(tmp_path, [[5, 6], [7, 8, 9]])
    with monkeypatch.context() as patched, Path("/dev/full").open("w") as full:
        patched.setattr("sys.stdout", full)
        assert main(["prepare", "--describe", str(path)]) == 1
    assert capsys.readouterr().err == ("gptb-ds prepare: No space left on device, for what it prints or for a file\n")


@pytest.mark.parametrize(
    ("environment", "spoken"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "3", "WORLD_SIZE": "1"}, True),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, True),
        ({"RANK": "x", "WORLD_SIZE": "2"}, True),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, False),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "2"}, True),
    ],
)
def test_a_rank_that_has_no_place_in_its_job_does_not_fail_in_silence(
    environment: dict, spoken: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--data.path", "x", "--optim.lr", "-1"]) == 2
    assert bool(capsys.readouterr().err) == spoken


def test_a_manifest_may_name_files_that_are_none_of_the_split(tmp_path: Path):
    path = write_store(tmp_path, [[5, 6]])
    manifest = json.loads((path / "store.json").read_text())
    manifest["files"] |= {name: {"size": 1, "sha256": "", "sample": ""} for name in ("", "notes.txt")}
    manifest["manifest_checksum"] = manifest_checksum(manifest)
    (path / "store.json").write_text(json.dumps(manifest))
    assert len(open_store(path).tokens) == 4
