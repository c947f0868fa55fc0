"""Prints how long a checkpoint stops training, against an update and against torch.save of the same bytes.

    python tests/benchmarks/bench_save.py [--n-embd 512 --n-layer 6 --lanes 64 --window 16]

All in one run and one process: the ratios count, the seconds are this machine's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from gptb_ds.checkpoint.format import Manifest
from gptb_ds.checkpoint.writer import CheckpointWriter
from gptb_ds.config import OptimConfig
from gptb_ds.data.window import Window
from gptb_ds.distributed.join import join
from gptb_ds.model.configuration import GPTBConfig
from gptb_ds.model.modeling import GPTBLMHeadModel
from gptb_ds.model.objective import WindowObjective
from gptb_ds.training.engine import Engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-embd", type=int, default=512)
    parser.add_argument("--n-layer", type=int, default=6)
    parser.add_argument("--num-slots", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    world = join(60)
    config = GPTBConfig(
        vocab_size=args.vocab,
        n_positions=args.num_slots,
        num_slots=args.num_slots,
        n_embd=args.n_embd,
        n_layer=args.n_layer,
        n_head=args.n_embd // 64,
    )
    engine = Engine(
        WindowObjective(GPTBLMHeadModel(config).train()),
        world,
        lanes=args.lanes,
        lane_groups=1,
        precision="fp32",
        optim=OptimConfig(),
        policy={"zero_optimization": {"stage": args.stage, "overlap_comm": False}},
    )
    tokens = torch.randint(args.vocab, (args.window + 1, args.lanes))
    window = Window(tokens[:-1], tokens[1:], torch.zeros(args.window, args.lanes, dtype=torch.bool))
    state = torch.zeros(args.lanes, args.num_slots - 1, args.n_embd)

    def update() -> None:
        nonlocal state
        _, (state,) = engine.update([(window, state)], 1e-4, args.window * args.lanes)

    update()
    times: dict[str, list[float]] = {
        "update": [],
        "pause": [],
        "update while writing": [],
        "all of it": [],
        "torch": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for round_ in range(args.rounds):
            saver = CheckpointWriter(Path(folder), world, keep=1)
            times["update"].append(timed(update))
            begun = time.perf_counter()
            lanes = {"state": state.clone(), "ordinal": torch.zeros(args.lanes), "offset": torch.zeros(args.lanes)}
            saver.begin(_manifest(round_ + 1, args), engine.fp32_state.export(lambda name: True), lanes, {})
            pause = time.perf_counter() - begun
            if not saver.written_here:
                times["update while writing"].append(timed(update))
            finish = timed(saver.finish)
            times["all of it"].append(time.perf_counter() - begun)
            # Waiting for the files would be a pause too, had training been faster than the disk.
            times["pause"].append(pause + (finish if not times["update while writing"] else 0))
            export = engine.fp32_state.export(lambda name: True)
            times["torch"].append(timed(lambda tensors=export: torch.save((tensors, state), Path(folder) / "plain.pt")))
        size = (Path(folder) / "plain.pt").stat().st_size
    middle = {name: statistics.median(values) for name, values in times.items() if values}
    print(f"{size / 2**20:.0f} MiB, ZeRO {args.stage}, medians of {args.rounds}")
    for name, seconds in middle.items():
        by_update, by_torch = seconds / middle["update"], seconds / middle["torch"]
        print(f"{name:<22} {seconds:8.3f} s  {by_update:6.2f} x update  {by_torch:6.2f} x torch.save")


def timed(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _manifest(step: int, args: argparse.Namespace) -> Manifest:
    progress = {"adam_steps": step, "skipped": 0, "bad_in_row": 0, "evaluation_due": False}
    return Manifest(
        step, step * args.lanes * args.window, None, 1, args.stage, args.lanes, args.window, {}, {}, progress, {}
    )


if __name__ == "__main__":
    main()
