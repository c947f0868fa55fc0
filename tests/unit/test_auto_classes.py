"""`import gptb_ds` costs little and makes the Auto classes know GPTB, however the program was started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = {
    "ours first": "import gptb_ds; from transformers import AutoConfig, AutoModelForCausalLM",
    "theirs first": "from transformers import AutoConfig, AutoModelForCausalLM; import gptb_ds",
    "configuration alone": "import gptb_ds; from transformers import AutoConfig",
    "amid GPT-2": "import gptb_ds; from transformers import GPT2Config; from transformers import AutoConfig",
    "our class first": "from gptb_ds import GPTBConfig; from transformers import AutoConfig, AutoModelForCausalLM",
}
CHECK = """
config = AutoConfig.for_model("gptb", num_slots=3, n_embd=8, n_head=2, n_layer=1, vocab_size=10)
assert type(config).__module__ == "gptb_ds.model.configuration", type(config)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_config(config)
assert type(model).__name__ == "GPTBLMHeadModel", type(model)
backbone = dict(model_type="llama", hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=10)
other = AutoConfig.for_model("gptb_decoder", num_slots=3, backbone_config=backbone)
assert type(AutoModelForCausalLM.from_config(other)).__name__ == "GPTBDecoderLMHeadModel"
import inspect, transformers.models.auto.configuration_auto as table
assert "CONFIG_MAPPING" in inspect.getsource(table)
"""


@pytest.mark.parametrize(
    ("program", "start"),
    [(program, "-c") for program in PROGRAMS] + [("ours first", "gptb-ds"), ("ours first", "-m")],
)
def test_auto_classes_know_gptb(program: str, start: str, tmp_path: Path):
    text = PROGRAMS[program] + CHECK
    (tmp_path / "gptb-ds").write_text(text)
    (tmp_path / "program.py").write_text(text)
    command = {"-c": ["-c", text], "gptb-ds": [str(tmp_path / "gptb-ds")], "-m": ["-m", "program"]}[start]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_loads_neither_torch_nor_transformers():
    text = "import sys, gptb_ds; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", text]).returncode == 0
