"""The verb `doctor`: its arguments and what it prints."""

from __future__ import annotations

import argparse

from gptb_ds.doctor import examine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gptb-ds doctor`."""
    parser.add_argument("--data", nargs="+", default=[], metavar="STORE", help="stores that a run would read")
    parser.add_argument("--run", metavar="FOLDER", help="folder that a run would write")


def run(args: argparse.Namespace) -> int:
    """Prints the report; 0 when this machine can train, 1 when something that training needs is wrong."""
    bad = []
    for finding in examine(args.data, args.run):
        mark = {"ok": "  ", "note": "- ", "bad": "! "}[finding.level]
        print(f"{mark}{finding.name:<13} {finding.text}", flush=True)
        if finding.level == "bad":
            bad.append(finding.name)
    print(f"wrong: {', '.join(bad)}" if bad else "ready to train")
    return 1 if bad else 0
