"""The command line on the make-believe device: `python -m tests.gpu_sim.command train ...`."""

from __future__ import annotations

import os
import sys

from tests.gpu_sim import fake_cuda  # noqa: F401

os.environ["DS_ACCELERATOR"] = "cuda"

import torch

from gptb_ds.cli import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
