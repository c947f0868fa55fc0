"""The verb `generate`: its arguments and what it prints."""

from __future__ import annotations

import argparse
import sys

from gptb_ds.commands.arguments import options_of
from gptb_ds.generation import PRECISIONS, GenerateOptions, generate_texts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a run, a checkpoint or an exported folder")
    parser.add_argument(
        "--prompt",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="how the document starts, one or several (default: nothing)",
    )
    parser.add_argument("--prompt-file", metavar="FILE", help="a prompt a line, beside those of --prompt")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="default: %(default)s")
    choice = parser.add_argument_group("how a token is chosen")
    choice.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="0 = the likeliest token (default: 1)"
    )
    choice.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest (default: among all)")
    choice.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest that sum up to P")
    choice.add_argument("--min-p", type=float, metavar="P", help="draw among those above P times the likeliest")
    choice.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: what was said is less likely")
    choice.add_argument("--num-beams", type=int, default=1, metavar="N", help="search with N beams (default: 1)")
    choice.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="end after one of these texts")
    choice.add_argument("--seed", type=int, metavar="N", help="repeat the same draws (default: unpredictable)")
    state = parser.add_argument_group("the state")
    state.add_argument("--state-in", metavar="FILE", help="go on from a saved state, with every prompt")
    state.add_argument("--state-out", metavar="FILE", help="save the state after the text (one prompt)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--precision", default="fp32", choices=list(PRECISIONS), help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Prints the prompt and what follows it, as it is generated. Raises ValueError for what the user gave."""
    options = options_of(GenerateOptions, args)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark
    prompts = options.prompts()
    if len(prompts) == 1:
        begun: list[bool] = []

        def say(piece: str) -> None:
            if not begun:  # only now: what is wrong with the model is said before anything is printed
                print(prompts[0], end="")
                begun.append(True)
            print(piece, end="", flush=True)

        (text,) = generate_texts(options, say)
        print("" if begun else prompts[0] + text)
        return 0
    for number, (prompt, text) in enumerate(zip(prompts, generate_texts(options), strict=True), 1):
        print(f"--- {number} of {len(prompts)}\n{prompt}{text}", flush=True)
    return 0
