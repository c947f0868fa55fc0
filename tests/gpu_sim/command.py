"""The command line on the make-believe device: `python -m tests.gpu_sim.command train ...`.

With FAKE_CUDA_FAILURE (memory, assert) in the environment the third window fails as on a real device.
"""

from __future__ import annotations

import os
import sys

from tests.gpu_sim import fake_cuda  # noqa: F401

os.environ["DS_ACCELERATOR"] = "cuda"

import torch

from gptb_ds.cli import main

FAILURES = {
    "memory": lambda: torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 80.00 GiB of which 1.00 MiB is"
        " free.\nSee documentation for Memory Management."
    ),
    "assert": lambda: torch.AcceleratorError(
        "CUDA error: device-side assert triggered\nSearch for `cudaErrorAssert' in the documentation.\n"
    ),
}


def plant(name: str) -> None:
    from gptb_ds.model.objective import WindowObjective

    forward, calls = WindowObjective.forward, []

    def failing(self, *call):
        calls.append(1)
        if len(calls) == 3:
            raise FAILURES[name]()
        return forward(self, *call)

    WindowObjective.forward = failing


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "FAKE_CUDA_FAILURE" in os.environ:
        plant(os.environ["FAKE_CUDA_FAILURE"])
    sys.exit(main(sys.argv[1:]))
