"""Prints what ranks exchange for a token against K: counted and timed over gloo, and as the model has it for GPUs.

    python tests/benchmarks/bench_exchange.py [--ranks 2 --windows 4 16 64 --lanes 16 --stage 1 --out FILE.jsonl]

Every rank takes one thread of this machine. Measured rows, in fp32: of an update the time in collectives, without the
wait for the other rank, against forward, backward and optimizer. The ratios count. The table for GPUs follows from
`gptb_ds/training/exchange.py`, whose bytes and calls tests/distributed/test_exchange.py counts; --tokens-per-second is
what one GPU computes of the model (24,260 for GPT-2 small with 20 slots at 1,024 lanes, docs/gpu.md).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from gptb_ds.training.exchange import NETWORKS, exchange_seconds, exchanges, tokens_for_share

GPT2_SMALL, TENSORS = 124_000_000, 149


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--windows", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--lanes", type=int, default=16, help="of each rank")
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--embd", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--tokens-per-second", type=float, default=24_260)
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no row after so long")
    parser.add_argument("--out", type=Path, help="a JSON line for each row, as it comes")
    args = parser.parse_args()
    if "RANK" in os.environ:
        as_rank(args)
        return
    end = time.monotonic() + args.seconds
    for stage in range(4):
        gpu_table(stage, args.tokens_per_second)
    print(f"\nmeasured here over gloo, fp32, stage {args.stage}, E={args.embd}, {args.layers} blocks, S={args.slots},")
    print(f"{args.lanes} lanes and one thread a rank; bytes are those of the collectives' tensors, by token of a rank")
    print(
        f"{'ranks':>6}{'K':>6}{'bytes/token':>13}{'of the model':>14}{'collectives':>13}{'computing':>11}{'share':>8}"
    )
    for ranks in args.ranks:
        for window in args.windows:
            if time.monotonic() < end:
                measured_row(args, ranks, window)


def gpu_table(stage: int, tokens_per_second: float) -> None:
    """GPT-2 small in bf16: from how many tokens of a rank's update on the exchange is below 5% of it."""
    found = exchanges(GPT2_SMALL, stage=stage, value_bytes=2, tensors=TENSORS)
    print(f"\n124M, bf16, ZeRO {stage}, {tokens_per_second:,.0f} tokens/s a GPU, hosts of 8 GPUs")
    print(
        "exchange of an update in ms / K x lanes of a GPU from which on it is below 5% / its share at K=16, 256 lanes"
    )
    for network in NETWORKS:
        cells = []
        for ranks in (8, 64, 1024):
            seconds = exchange_seconds(found, ranks, network)
            tokens = tokens_for_share(found, ranks, network, tokens_per_second)
            share = seconds / (seconds + 16 * 256 / tokens_per_second)
            cells.append(f"{ranks:,} GPUs: {seconds * 1e3:.1f} ms / {tokens:,.0f} / {share:.1%}")
        print(f"| {network.name} | {' | '.join(cells)} |")


def measured_row(args: argparse.Namespace, ranks: int, window: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    shape = {key: getattr(args, key) for key in ("lanes", "stage", "embd", "layers", "slots", "vocab", "updates")}
    words = [word for key, value in shape.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, __file__, *words, "--windows", str(window)]
    started = [
        subprocess.Popen(
            command,
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"a rank failed: {[process.returncode for process in started]}")
    row = json.loads(next(line for line in outputs[0].splitlines() if line.startswith("{")))
    print(
        f"{ranks:>6}{window:>6}{row['bytes_per_token']:>13,.0f}{row['counted_by_predicted']:>13.2f}x"
        f"{row['collectives_ms']:>10.1f} ms{row['computing_ms']:>8.1f} ms{row['share']:>8.1%}",
        flush=True,
    )
    if args.out:
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def as_rank(args: argparse.Namespace) -> None:
    """One rank of a measured row; rank 0 prints it."""
    from gptb_ds import phases
    from gptb_ds.config import OptimConfig
    from gptb_ds.data.window import Window
    from gptb_ds.distributed.collectives import COMMUNICATION, CollectiveMeter
    from gptb_ds.distributed.join import join, leave
    from gptb_ds.model.configuration import GPTBConfig
    from gptb_ds.model.modeling import GPTBLMHeadModel
    from gptb_ds.model.objective import WindowObjective
    from gptb_ds.training.deepspeed_policy import with_defaults
    from gptb_ds.training.engine import Engine

    torch.set_num_threads(1)
    world, window = join(60), args.windows[0]
    meter = CollectiveMeter(world, timed=True).install()
    torch.manual_seed(5)
    shape = {"n_embd": args.embd, "n_layer": args.layers, "n_head": max(1, args.embd // 64), "n_positions": args.slots}
    model = GPTBLMHeadModel(GPTBConfig(vocab_size=args.vocab, num_slots=args.slots, dropout=0.0, **shape)).train()
    sizes = [parameter.numel() for parameter in model.parameters()]
    engine = Engine(
        WindowObjective(model),
        world,
        lanes=args.lanes,
        lane_groups=1,
        precision="fp32",
        optim=OptimConfig(),
        policy=with_defaults({"zero_optimization": {"stage": args.stage}}),
        graph="off",
    )
    ids = torch.randint(args.vocab, (window, args.lanes))
    part = Window(ids, ids, torch.zeros_like(ids, dtype=torch.bool), None)
    state, clock = engine.model.empty_state(args.lanes), phases.PhaseClock(lambda: None)
    for update in range(args.updates + 1):
        if update == 1:  # the first one warms up
            meter.tallies.clear()
            clock = phases.PhaseClock(lambda: None)
            phases.use(clock)
        _, (state,) = engine.update([(part, state)], 1e-4, ids.numel() * world.size)
    clock.close()
    phases.use(None)
    bytes_here = sum(tally.bytes for tally in meter.tallies.values()) / args.updates
    predicted = exchanges(sum(sizes), stage=args.stage, value_bytes=4, tensors=len(sizes), numbers=3)
    collectives = clock.seconds.get(COMMUNICATION, 0.0)
    computing = sum(clock.seconds.get(name, 0.0) for name in ("forward", "backward", "optimizer"))
    row = {
        "ranks": world.size,
        "K": window,
        "lanes": args.lanes,
        "stage": args.stage,
        "parameters": sum(sizes),
        "bytes_per_token": bytes_here / ids.numel(),
        "counted_by_predicted": bytes_here / sum(one.bytes for one in predicted),
        "calls": sum(tally.calls for tally in meter.tallies.values()) / args.updates,
        "collectives_ms": collectives / args.updates * 1e3,
        "computing_ms": computing / args.updates * 1e3,
        "share": collectives / (collectives + computing),
    }
    if world.rank == 0:
        print(json.dumps(row), flush=True)
    world.barrier()
    leave()


if __name__ == "__main__":
    main()
