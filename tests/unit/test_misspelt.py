"""What is misspelt on a command line or in a configuration: a line each, with the nearest name that exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptb_ds.cli import main
from gptb_ds.config import ConfigError, load_config


@pytest.mark.parametrize(
    ("command", "lines"),
    [
        ("trian", ["gptb-ds: trian: no such verb; did you mean train?"]),
        ("evaluate m --data d --lane 3", ["gptb-ds evaluate: --lane: no such option; did you mean --lanes?"]),
        ("train --data.lans 3", ["gptb-ds train: --data.lans: no such option; did you mean --data.lanes?"]),
        ("train --data.lans=3", ["gptb-ds train: --data.lans=3: no such option; did you mean --data.lanes?"]),
        ("train --lr 3", ["gptb-ds train: --lr: no such option; did you mean --optim.lr?"]),
        (
            "prepare --source x --tokeniser bytes",
            ["gptb-ds prepare: --tokeniser: no such option; did you mean --tokenizer?"],
        ),
        ("plot a --qqqq", None),
        ("export m n --out d", ["gptb-ds export: n: no such argument; `gptb-ds export --help` lists what there is"]),
        (
            "train --data.lans 3 --run.kep 4",
            [
                "gptb-ds train: --data.lans: no such option; did you mean --data.lanes?",
                "gptb-ds train: --run.kep: no such option; did you mean --run.keep?",
            ],
        ),
    ],
)
def test_the_nearest_option_is_named(command: str, lines: list[str] | None, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    if lines is None:
        assert "no such option" in said.err and said.err.count("\n") == 1
    else:
        assert said.err.splitlines() == lines


def test_the_nearest_key_of_a_file_is_named(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("data: {path: [x], lans: 3}\nrun: {dir: y}\ntrian: {updates: 3}\nqqqqqq: 1\nlr: 3\n")
    with pytest.raises(ConfigError) as caught:
        load_config(str(file), {})
    said = str(caught.value).splitlines()
    assert said == [
        "data.lans: unknown key; did you mean data.lanes?",
        "trian: unknown key; did you mean train?",
        "qqqqqq: unknown key; `gptb-ds train --help` lists them",
        "lr: unknown key; did you mean optim.lr?",
    ]
