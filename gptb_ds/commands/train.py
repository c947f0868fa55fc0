"""The verb `train`: one dotted option for each key of the configuration."""

from __future__ import annotations

import argparse

from gptb_ds.config import RECIPES, Config, Group, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--config`, `--deepspeed_config` and one dotted option for each key of the configuration."""
    # argparse's own would list eighty options before it says what the verb does.
    parser.usage = "gptb-ds train [--config FILE] [--deepspeed_config FILE] [--profile] [--GROUP.KEY VALUE ...]"
    recipes = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    parser.epilog = (
        "For example: gptb-ds train --config demo --data.path data/mine --run.dir runs/mine. The same command goes on"
        " with a run that was stopped. A VALUE of none leaves a key out."
    )
    parser.add_argument("--config", metavar="FILE", help=f"a recipe's name ({recipes}) or a YAML file")
    parser.add_argument("--deepspeed_config", metavar="FILE", help="DeepSpeed policy, see ds_configs/")
    parser.add_argument(
        "--profile",
        action="store_const",
        const="true",
        dest="run.profile",
        default=argparse.SUPPRESS,
        help="measure where the time goes: a table at the end, and a trace of three windows, in RUN/profile",
    )
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


def configuration(args: argparse.Namespace) -> Config:
    """The run's configuration: the file or recipe of `--config`, the other options on top. Raises ConfigError."""
    values = vars(args).copy()
    source = values.pop("config")
    overrides = {key: _value(value) for key, value in values.items() if value is not None and key != "local_rank"}
    return load_config(source, overrides)


def _value(text: str | list[str]) -> str | list[str] | None:
    return None if text in ("none", "null") else text


def run(args: argparse.Namespace) -> int:
    """Trains; returns the exit code. Raises ConfigError, a line for each thing that is wrong."""
    config = configuration(args)
    from gptb_ds.training.stop_requests import StopRequests

    # From now on: what follows takes seconds, and to be asked to stop meanwhile is no fault.
    with StopRequests() as stop:
        from gptb_ds.training.setup import train

        return train(config, stop)
