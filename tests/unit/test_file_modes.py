"""Files that are written can be read by whom the umask lets read them: a group shares its checkpoints and exports."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import ByT5Tokenizer

from gptb_ds.atomic_files import write_atomically
from gptb_ds.export import ExportOptions, export
from tests.harness.models import random_ids, small_gptb


@pytest.fixture(params=[0o022, 0o027, 0o007], ids=oct)
def expected(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_safetensors_files_have_the_usual_permissions(expected: int, tmp_path: Path) -> None:
    with write_atomically(tmp_path / "a.safetensors") as temporary:
        save_file({"a": torch.zeros(2)}, temporary)
    model = small_gptb()
    model(random_ids(1, 3)).past_key_values.save(tmp_path / "state.safetensors", model)
    assert [mode(path) for path in sorted(tmp_path.iterdir())] == [expected, expected]


def test_an_exported_folder_can_be_shared(expected: int, tmp_path: Path) -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    small_gptb(vocab_size=len(tokenizer), eos_token_id=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = export(ExportOptions(str(tmp_path / "model"), str(tmp_path / "out")))
    assert {mode(path) for path in out.iterdir()} == {expected} and len(list(out.iterdir())) > 9
