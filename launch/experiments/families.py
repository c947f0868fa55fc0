"""Which of transformers' decoders can be a backbone, and why the others can't: each is tried at a tiny size.

    python launch/experiments/families.py --out runs/families.jsonl

writes a line for each family that has a causal language model: {"family", "fits", "reason"}. One that fits was built by
configuration alone, passed `check_backbone` with attention among all slots and with causal attention, and went forward
and backward over three tokens. Each has a process and 60 seconds of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SECONDS, BYTES = 60, 12 << 30
KEYS = {"data.path": "none", "model.num_slots": 6, "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 16}


def families() -> list[str]:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    return sorted(name for name, config in CONFIG_MAPPING.items() if config in MODEL_FOR_CAUSAL_LM_MAPPING)


def attempt(family: str, pipe: Any) -> None:
    """Sends None, or what is in the way."""
    import torch

    from gptb_ds.config import load_config
    from gptb_ds.model.backbones import build_decoder
    from gptb_ds.model.decoder_configuration import GPTBDecoderConfig
    from gptb_ds.model_choice import model_configuration, new_model

    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        for rebias in (False, True):
            config = model_configuration(
                load_config(None, KEYS | {"model.backbone": family, "model.rebias": rebias}), 259, 1
            )
            model = build_decoder(config) if isinstance(config, GPTBDecoderConfig) else new_model(config)
            model(torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
        pipe.send(None)
    except ValueError as error:
        pipe.send(str(error))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def tried(family: str) -> dict[str, Any]:
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=attempt, args=(family, there))
    process.start()
    there.close()
    try:
        reason = here.recv() if here.poll(SECONDS) else f"no answer within {SECONDS} s"
    except EOFError:
        reason = "its process ended without a word (memory?)"
    process.kill()
    process.join()
    return {"family": family, "fits": reason is None, "reason": reason}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/families.jsonl"))
    parser.add_argument("--jobs", type=int, default=1, help="families side by side")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    import gptb_ds.model_choice  # noqa: F401 - once, for all the processes that are forked from this one

    with args.out.open("w") as file, ThreadPoolExecutor(args.jobs) as pool:
        found = []
        for line in pool.map(tried, families()):
            found.append(line["fits"])
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(line["family"], "fits" if line["fits"] else line["reason"], flush=True)
    print(f"{sum(found)} of {len(found)} families fit")


if __name__ == "__main__":
    main()
