"""A configuration is checked whole, and that bad usage is one clear line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from gptb_ds.cli import main, parse
from gptb_ds.commands.train import configuration
from gptb_ds.config import RECIPES, Config, ConfigError, divisors, load_config, save_config


def test_defaults_need_only_a_store():
    config = load_config(None, {"data.path": "store"})
    assert config.data.path == ["store"]
    assert config.run.resume == "auto"


def test_saved_configuration_repeats_the_run(tmp_path: Path):
    config = load_config(None, {"data.path": ["a", "b"], "data.weights": ["1", "3"], "optim.lr": "3e-4"})
    file = tmp_path / "config.yaml"
    file.write_text(save_config(config))
    assert load_config(str(file), {}) == config
    assert config.optim.lr == 3e-4 and config.data.weights == [1.0, 3.0]


def test_every_error_is_reported_at_once_with_key_and_value():
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"model.num_slots": "1", "train.precision": "fp8", "optim.rate": "3", "data.lanes": "many"})
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    text = str(caught.value)
    for words in (
        "model.num_slots: '1'",
        "train.precision: 'fp8'",
        "optim.rate: unknown key",
        "data.lanes: 'many'",
        "data.path: required",
    ):
        assert words in text


def test_errors_between_keys_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        load_config(
            None,
            {
                "data.path": "s",
                "optim.warmup_updates": 50,
                "train.updates": 10,
                "data.lanes": 6,
                "train.lane_groups": 4,
            },
        )
    text = str(caught.value)
    assert "optim.warmup_updates 50 is above train.updates 10" in text
    assert "train.lane_groups 4 does not divide data.lanes 6; choose one of [1, 2, 3, 6]" in text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model.n_embd": 10, "model.n_head": 4}, "n_embd 10 is not divisible by model.n_head 4"),
        ({"data.weights": [1.0]}, "data.weights has 1 numbers for 2 stores"),
        ({"data.weights": [1.0, 0.0]}, "must all be above 0"),
        ({"train.recompute_every": 17}, "recompute_every 17 is above data.window 16"),
        ({"run.dir": "./b"}, "run.dir ./b: is the store of data.path"),
        ({"task.grow_at": 1.0}, "task.grow_at: 1.0: input should be less than 1"),  # a running mean never gets there
    ],
)
def test_checks_between_keys(values, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        load_config(None, {"data.path": ["a", "b"]} | values)


def test_configuration_is_frozen():
    config = load_config(None, {"data.path": "s"})
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 1.0


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid(recipe: Path):
    config = load_config(recipe.stem, {"data.path": "store"})
    assert load_config(str(recipe), {"data.path": "store"}) == config


def parse_train(arguments: list[str]) -> Config:
    return configuration(parse("train", arguments))


def test_command_line_goes_over_the_file(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"data": {"path": "s", "lanes": 8}, "model": {"rebias": False}}))
    config = parse_train(
        ["--config", str(file), "--data.lanes", "16", "--local_rank=3", "--data.max_document_tokens", "none"]
    )
    assert config.data.lanes == 16 and config.model.rebias is False and config.data.max_document_tokens is None
    config = parse_train(
        ["--local_rank", "0", "--data.path", "a", "b", "--run.monitor", "csv", "--model.rebias", "true"]
    )
    assert config.data.path == ["a", "b"] and config.run.monitor == ["csv"]


@pytest.mark.parametrize(
    ("content", "words"),
    [("a: [", "not valid YAML"), ("- 1", "must hold groups of keys"), ("data: 3", "data")],
)
def test_broken_files(content, words, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    assert main(["train", "--config", str(file)]) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "--config", "no-such-recipe"]) == 2
    assert "recipes: " in capsys.readouterr().err
    for arguments in (["no-such-verb"], ["train", "--no.such.key", "1"], ["evaluate"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for key in ("--model.num_slots", "--data.weights", "--optim.clip", "--train.recompute_every", "--run.keep"):
        assert key in text
    assert text.startswith("usage: gptb-ds train [--config FILE]") and "(demo, " in text and "wide)" in text


def test_a_missing_store_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", str(tmp_path), "--data", str(tmp_path / "none")]) == 2
    assert "no run with checkpoints" in capsys.readouterr().err


def test_policies_may_not_set_what_the_run_owns(tmp_path: Path):
    from gptb_ds.training.deepspeed_policy import read_policy

    file = tmp_path / "policy.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "gradient_clipping": 1}))
    with pytest.raises(ConfigError) as caught:
        read_policy(str(file))
    text = str(caught.value)
    assert "'bf16' belongs to train.precision" in text and "'gradient_clipping' belongs to optim.clip" in text
    file.write_text(json.dumps({"zero_optimisation": {"stage": 2}, "steps_per_print": 1}))
    with pytest.raises(ConfigError) as caught:
        read_policy(str(file))
    assert "'zero_optimisation' is no key of a policy; choose out of zero_optimization" in str(caught.value)
    assert "'steps_per_print' belongs to run.log_every" in str(caught.value)
    file.write_text(json.dumps({"zero_optimization": 2}))
    with pytest.raises(ConfigError, match="must be an object"):
        read_policy(str(file))
    file.write_text("[")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_policy(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_policy(str(tmp_path / "none.json"))


def test_divisors():
    assert divisors(1) == [1]
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(49) == [1, 7, 49]


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_must_be_finite(value: str):
    with pytest.raises(ConfigError, match=r"optim.lr: .*finite"):
        parse_train(["--data.path", "x", "--optim.lr", value])
    with pytest.raises(ConfigError, match=r"data.weights.0: .*finite"):
        parse_train(["--data.path", "x", "y", "--data.weights", value, "1"])


def test_an_empty_group_takes_its_defaults(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("model:\ndata: {path: x}\n")
    assert parse_train(["--config", str(tmp_path / "a.yaml")]).model.num_slots == 20


@pytest.mark.parametrize("name", ["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"])
def test_only_the_first_rank_speaks_of_a_mistake(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv(name, "1")
    assert main(["train", "--data.path", "x", "--optim.lr", "-1"]) == 2
    with pytest.raises(SystemExit) as caught:
        main(["train", "--no-such-option"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(name, "0")
    assert main(["train", "--data.path", "x", "--optim.lr", "-1"]) == 2
    assert "optim.lr" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "metrics.jsonl").write_text('{"update": 1, "tokens": 2, "loss": 0.5}\n')
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "none/loss.png")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "none/loss.png: No such file or directory" in error


def test_lanes_are_out_of_step_where_documents_are_cut(tmp_path: Path):
    for options, expected in (
        ({}, False),
        ({"data.max_document_tokens": 9}, True),
        ({"data.max_document_tokens": 9, "data.stagger": "off"}, False),
        ({"data.stagger": "true"}, True),
    ):
        assert load_config(None, {"data.path": "s", **options}).data.is_staggered is expected


@pytest.mark.parametrize(
    ("given", "meant"), [(True, "on"), ("True", "on"), ("false", "off"), (False, "off"), ("on", "on")]
)
def test_a_switch_takes_a_truth_value(given: object, meant: str):
    """As YAML reads on and off, and as `train.compile`, which was one, was given on command lines."""
    config = load_config(None, {"data.path": "store", "train.compile": given, "train.graph": given})
    assert (config.train.compile, config.train.graph) == (meant, meant)
    assert load_config(None, {"data.path": "store", "task.curriculum": "false"}).task.curriculum == "off"
