"""The whole configuration: its groups, and every check that one group's value makes on another's."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from gptb_ds.config.data import DataConfig
from gptb_ds.config.group import Group
from gptb_ds.config.model import ModelConfig
from gptb_ds.config.numbers import divisors
from gptb_ds.config.optim import OptimConfig
from gptb_ds.config.run import RunConfig
from gptb_ds.config.task import TaskConfig
from gptb_ds.config.train import TrainConfig


class Config(Group):
    """A resolved run: `RUN/config.yaml` holds it, enough to repeat the run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    task: TaskConfig = TaskConfig()
    run: RunConfig = RunConfig()
    deepspeed_config: str | None = Field(None, description="DeepSpeed policy (JSON file, see ds_configs/)")

    @model_validator(mode="after")
    def _groups_fit(self) -> Config:
        errors = [
            *self._schedule_errors(),
            *self._lane_group_errors(),
            *self._store_errors(),
            *self._only_for_gptb(),
            *self._window_errors(),
        ]
        if errors:
            raise ValueError("\n".join(errors))
        return self

    def _schedule_errors(self) -> list[str]:
        """A line for each part of the schedule that does not fit the run's length."""
        errors = []
        optim, train = self.optim, self.train
        if train.tokens is None and optim.warmup_tokens is None and optim.warmup_updates > train.updates:
            errors.append(
                f"optim.warmup_updates {optim.warmup_updates} is above train.updates {train.updates};"
                " lower it or train longer"
            )
        if train.tokens is not None and (optim.warmup_tokens or 0) > train.tokens:
            errors.append(
                f"optim.warmup_tokens {optim.warmup_tokens} is above train.tokens {train.tokens}; lower it, or train"
                " longer"
            )
        if train.tokens is None and (optim.decay_from or 0) >= train.updates:
            errors.append(
                f"optim.decay_from {optim.decay_from} is not below train.updates {train.updates}; the decay takes the"
                " updates between them"
            )
        in_updates = [key for key in ("decay_updates", "decay_from") if getattr(optim, key) is not None]
        if optim.warmup_tokens is None and optim.warmup_updates:
            in_updates.append("warmup_updates")
        if train.starts_adaptive and in_updates:
            errors.append(
                f"optim.{' and optim.'.join(in_updates)} with train.updates_per_window auto: when an update comes is"
                " not known; give optim.warmup_tokens and optim.decay_tokens"
            )
        return errors

    def _lane_group_errors(self) -> list[str]:
        """A line when lanes can't be shared by the groups."""
        train = self.train
        if self.data.lanes % train.most_groups:
            key = "lane_groups" if train.most_groups == train.lane_groups else "updates_per_window"
            return [
                f"train.{key} {train.most_groups} does not divide data.lanes {self.data.lanes};"
                f" choose one of {divisors(self.data.lanes)}"
            ]
        return []

    def _store_errors(self) -> list[str]:
        """A line for each store that is named twice, or is the run's folder."""
        errors = [
            f"run.dir {self.run.dir}: is the store of data.path, whose tokenizer the run would replace; name another"
            for path in self.data.path
            if Path(path).resolve() == Path(self.run.dir).resolve()
        ]
        places = [Path(path).resolve() for path in self.data.path]
        errors += [
            f"data.path {path}: is named twice, so each of its documents would come twice; name it once (data.weights"
            " says how often a store is read)"
            for number, path in enumerate(self.data.path)
            if places[number] in places[:number]
        ]
        return errors

    def _window_errors(self) -> list[str]:
        """A line for each way of taking a window that does not fit it, or another one."""
        errors = []
        if (self.model.context or self.data.window) < self.data.window:
            errors.append(
                f"model.context {self.model.context} is below data.window {self.data.window}; a window is read in one"
                " go, choose at least that"
            )
        if self.train.recompute_every > self.data.window:
            errors.append(
                f"train.recompute_every {self.train.recompute_every} is above data.window {self.data.window};"
                " choose at most the window, or 0 for off"
            )
        if self.train.recompute_cheap and self.train.recompute_every:
            errors.append(
                "train.recompute_cheap keeps products of every step, and train.recompute_every none: choose one"
            )
        if self.train.recompute_cheap and self.train.compile == "on":
            errors.append(
                "train.recompute_cheap has no say in a compiled step, of which the compiler chooses what is kept; leave"
                " it or train.compile on out"
            )
        return errors

    def _only_for_gptb(self) -> list[str]:
        """A line for each key that was set and means nothing to a model to compare with."""
        if self.model.kind == "gptb":
            return []
        wanted = {
            "model.init_from": self.model.init_from is not None,
            "model.backbone": self.model.backbone != "gpt2",
            "model.n_inner": self.model.n_inner is not None,
            "model.recent_tokens": self.model.recent_tokens > 0,
            "model.carry": self.model.carry != "outputs",
            "model.rebias false": not self.model.rebias,
            "train.compile": self.train.compile == "on",
            "train.recompute_every": self.train.recompute_every > 0,
            "train.recompute_cheap": self.train.recompute_cheap,
            "run.sample_every": self.run.sample_every > 0,
        }
        return [
            f"{key} is not offered with model.kind {self.model.kind}, a model to compare with; leave it out"
            for key, is_set in wanted.items()
            if is_set
        ]
