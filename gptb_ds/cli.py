"""Owns the verbs: turns a command line into calls of the functions that do the work, and errors into exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gptb_ds.config import Config, Group, load_config

DONE, FAULT, USAGE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Exit codes: 0 done, 2 bad usage or configuration, 85 stopped on request, else a fault."""
    argv = list(sys.argv[1:] if argv is None else argv)
    verbs = {
        "prepare": (_prepare, "documents -> tokenised, memory-mapped store"),
        "train": (_train, "train a model (alone, or under deepspeed, mpirun or srun)"),
        "evaluate": (_evaluate, "held-out loss and bits per byte"),
        "generate": (_generate, "print text as it is generated"),
        "export": (_export, "a checkpoint -> a folder that transformers loads"),
        "plot": (_plot, "loss curves of runs, side by side, as a picture"),
        "checkpoints": (_checkpoints, "list a run's checkpoints"),
        "doctor": (_doctor, "what a bug report needs, and what is wrong with this machine"),
    }
    parser = _Parser(
        prog="gptb-ds",
        description="Train recurrent transformers: GPT-2 with its outputs connected to its inputs.",
        epilog="\n".join(f"  {name:<12} {text}" for name, (_, text) in verbs.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=verbs, metavar="VERB", help="one of the verbs below")
    # The deepspeed launcher puts --local_rank=N first, before the verb.
    while argv and argv[0].startswith("--local_rank="):
        argv.pop(0)
    chosen = parser.parse_args(argv[:1]).verb
    try:
        return verbs[chosen][0](argv[1:])
    except ValueError as error:
        # What a user gave: every line says what, where and what to do. Ranks that share a mistake say it once.
        if _speaks():
            for line in str(error).splitlines():
                print(f"gptb-ds {chosen}: {line}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        if error.filename is None:  # not of a file that the user named
            raise
        print(f"gptb-ds {chosen}: {error.filename}: {error.strerror}", file=sys.stderr)
        return FAULT


def _speaks() -> bool:
    """Whether this process is the first of a job, by whichever launcher."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if os.environ.get(name)), "0") == "0"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line once, not on every rank."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if _speaks():
            super()._print_message(message, file)


def _parser(verb: str, add_arguments: Callable[[argparse.ArgumentParser], None], text: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"gptb-ds {verb}", description=text, allow_abbrev=False)
    add_arguments(parser)
    return parser


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """`--config`, `--deepspeed_config` and one dotted option for each key of the configuration."""
    parser.add_argument("--config", metavar="FILE", help="a recipe's name or a YAML file")
    parser.add_argument("--deepspeed_config", metavar="FILE", help="DeepSpeed policy, see ds_configs/")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    for name, field in Config.model_fields.items():
        model = field.annotation
        if not (isinstance(model, type) and issubclass(model, Group)):
            continue
        group = parser.add_argument_group(name)
        for key, leaf in model.model_fields.items():
            many = "list" in str(leaf.annotation)
            default = "" if leaf.is_required() else f" (default: {leaf.default})"
            group.add_argument(
                f"--{name}.{key}",
                nargs="+" if many else None,
                default=argparse.SUPPRESS,
                metavar="VALUE",
                help=f"{leaf.description}{default}".replace("%", "%%"),
            )


def parse_train(argv: Sequence[str]) -> Config:
    """The configuration of a `train` command line. Raises ConfigError; argparse exits with 2 on unknown options."""
    args = vars(_parser("train", add_train_arguments, "Train a model, or continue a run.").parse_args(argv))
    source = args.pop("config")
    overrides = {key: _value(value) for key, value in args.items() if value is not None and key != "local_rank"}
    return load_config(source, overrides)


def _value(text: str | list[str]) -> str | list[str] | None:
    return None if text in ("none", "null") else text


def _train(argv: Sequence[str]) -> int:
    config = parse_train(argv)
    from gptb_ds.training.preemption import StopRequests

    # From now on: what follows takes seconds, and to be asked to stop meanwhile is no fault.
    with StopRequests() as stop:
        # DeepSpeed loads only for who needs it; the other verbs load what is theirs likewise.
        from gptb_ds.training.run import train

        return train(config, stop)


def _prepare(argv: Sequence[str]) -> int:
    from gptb_ds.data.prepare import add_prepare_arguments, run_prepare

    args = _parser("prepare", add_prepare_arguments, "Make a store of documents.").parse_args(argv)
    if (Path(args.tokenizer) / "config.json").is_file():
        import gptb_ds.model  # noqa: F401  (a model's folder: transformers asks who can read its configuration)
    return run_prepare(args)


def _evaluate(argv: Sequence[str]) -> int:
    from gptb_ds.evaluation import add_evaluate_arguments, run_evaluate
    from gptb_ds.export import load_any

    return run_evaluate(_parser("evaluate", add_evaluate_arguments, "Held-out loss.").parse_args(argv), load_any)


def _generate(argv: Sequence[str]) -> int:
    from gptb_ds.export import load_any
    from gptb_ds.generation import add_generate_arguments, run_generate

    return run_generate(_parser("generate", add_generate_arguments, "Generate text.").parse_args(argv), load_any)


def _export(argv: Sequence[str]) -> int:
    from gptb_ds.export import add_export_arguments, run_export

    return run_export(_parser("export", add_export_arguments, "Export a model.").parse_args(argv))


def _plot(argv: Sequence[str]) -> int:
    from gptb_ds.plot import add_plot_arguments, run_plot

    return run_plot(_parser("plot", add_plot_arguments, "Draw loss curves.").parse_args(argv))


def _checkpoints(argv: Sequence[str]) -> int:
    from gptb_ds.training.listing import add_checkpoints_arguments, run_checkpoints

    return run_checkpoints(_parser("checkpoints", add_checkpoints_arguments, "List checkpoints.").parse_args(argv))


def _doctor(argv: Sequence[str]) -> int:
    from gptb_ds.doctor import add_doctor_arguments, run_doctor

    return run_doctor(_parser("doctor", add_doctor_arguments, "Look at this machine.").parse_args(argv))
