"""The command line: finds the verb, turns errors into lines and exit codes."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from gptb_ds.exit_codes import DONE, FAULT, USAGE
from gptb_ds.suggestions import nearest

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

# Each is a module of gptb_ds.commands with `add_arguments(parser)` and `run(args) -> exit code`. It is imported when it
# is asked for: `--help` and a `prepare` that has nothing to do must not wait for torch.
VERBS = {
    "prepare": "documents -> tokenised, memory-mapped store",
    "train": "train a model (alone, or under deepspeed, mpirun or srun)",
    "evaluate": "held-out loss, bits per byte, and what the state is worth",
    "generate": "print text as it is generated",
    "export": "a checkpoint -> a folder that transformers loads",
    "plot": "loss curves of runs, side by side, as a picture",
    "checkpoints": "list a run's checkpoints",
    "doctor": "what a bug report needs, and what is wrong with this machine",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Exit codes: 0 done, 2 bad usage or configuration, 85 stopped on request, else a fault."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(
        prog="gptb-ds",
        description="Train recurrent transformers: GPT-2 with its outputs connected to its inputs.",
        epilog="\n".join(f"  {name:<12} {text}" for name, text in VERBS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", metavar="VERB", help="one of the verbs below")
    # The deepspeed launcher puts --local_rank=N first, before the verb.
    while argv and argv[0].startswith("--local_rank="):
        argv.pop(0)
    verb = parser.parse_args(argv[:1]).verb
    if verb not in VERBS:
        parser.error(f"{verb}: no such verb; {_hint(nearest(verb, VERBS), 'there are ' + ', '.join(VERBS))}")
    try:
        code: int = import_module(f"gptb_ds.commands.{verb}").run(parse(verb, argv[1:]))
        if sys.stdout is not None:  # None: closed (`>&-`)
            sys.stdout.flush()  # what a full disk does not take is found here, not in the interpreter's last moments
        return code
    except ValueError as error:
        # What a user gave: every line says what, where and what to do. Ranks that share a mistake say it once.
        if _is_first_of_job():
            for line in str(error).splitlines():
                print(f"gptb-ds {verb}: {line}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:
        _print_nothing_more()
        return DONE
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            _print_nothing_more()
            print(f"gptb-ds {verb}: {error.strerror}, for what it prints or for a file", file=sys.stderr)
            return FAULT
        if error.filename is None:  # not of a file that the user named
            raise
        print(f"gptb-ds {verb}: {error.filename}: {error.strerror}", file=sys.stderr)
        return FAULT


def _print_nothing_more() -> None:
    """What still waits to be printed goes nowhere: the interpreter would try again when it ends."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(verb: str, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a verb's command line. Exits with 2, after a line for each option that there is not."""
    parser = _Parser(prog=f"gptb-ds {verb}", description=VERBS[verb], allow_abbrev=False)
    import_module(f"gptb_ds.commands.{verb}").add_arguments(parser)
    args, unknown = parser.parse_known_args(argv)
    # The values of options that there are not are unknown too, but nobody asks about them.
    options = [word for word in unknown if word.startswith("-")]
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        listed = f"`gptb-ds {verb} --help` lists what there is"
        lines = [
            f"{word}: no such option; {_hint(nearest(word.split('=')[0], known), listed)}" for word in options
        ] or [f"{word}: no such argument; {listed}" for word in unknown]
        parser.error(f"\n{parser.prog}: ".join(lines))
    return args


def _hint(near: str | None, otherwise: str) -> str:
    return f"did you mean {near}?" if near else otherwise


def _is_first_of_job() -> bool:
    """Whether this process speaks for its job: the first of it, by whichever launcher, or one that has no place in it.

    A rank that is no number, or beyond the number of ranks, is such a mistake itself: nobody else would say it.
    """
    names = (
        ("RANK", "WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
        ("SLURM_PROCID", "SLURM_NTASKS"),
    )
    for rank, size in names:
        if place := os.environ.get(rank):
            ranks = os.environ.get(size, "")
            return not place.isdecimal() or int(place) == 0 or (ranks.isdecimal() and int(place) >= int(ranks))
    return True


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, and once, not on every rank."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message}\n")

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        if _is_first_of_job():
            super()._print_message(message, file)
