"""Where a run begins: the checkpoint that it continues, what it leaves behind, its first files and its first line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from gptb_ds.atomic_files import replace_file
from gptb_ds.checkpoint.format import Manifest
from gptb_ds.checkpoint.identity import changed_settings, check_identity
from gptb_ds.checkpoint.reader import CheckpointReader
from gptb_ds.checkpoint.resume import choose_checkpoint, is_own
from gptb_ds.config import Config, ConfigError, save_config
from gptb_ds.distributed.world import World
from gptb_ds.training.inputs import Inputs
from gptb_ds.training.metrics import read_metrics
from gptb_ds.training.reporter import Reporter
from gptb_ds.training.run_folder import RunFolder
from gptb_ds.training.schedule import BatchPlan, run_tokens
from gptb_ds.training.sinks import FOLDERS
from gptb_ds.training.train_state import RunFacts
from gptb_ds.training.trainer import Trainer


@dataclass(frozen=True)
class Start:
    """Where training begins: the checkpoint (None: from nothing), its run's metrics, and what it leaves behind."""

    reader: CheckpointReader | None
    metrics: Path | None
    left_behind: list[Path]


def find_start(inputs: Inputs, folder: RunFolder, world: World, reporter: Reporter) -> Start:
    """The third stage: the checkpoint to continue from, checked against the run. Raises ValueError on all ranks."""
    facts = inputs.facts
    checkpoint, left_behind = choose_checkpoint(facts.run.resume, folder.path, world, reporter.say)
    if checkpoint is None and world.on_rank0(_has_trained, reporter.metrics_file) and not left_behind:
        # Killed before its first checkpoint, or its checkpoints were moved away: nobody can tell which from here.
        reporter.say(f"no checkpoint in {folder.checkpoints}: training starts over, at update 0")
        left_behind = [reporter.metrics_file, folder.path / "config.yaml"]
    if reporter.metrics_file in left_behind:
        left_behind += [folder.path / name for name in FOLDERS]
    if checkpoint is None:
        return Start(None, None, left_behind)
    reader = world.on_all_ranks(CheckpointReader, checkpoint)
    manifest = reader.manifest
    world.on_all_ranks(check_identity, manifest, facts.identity, checkpoint)
    world.on_rank0(_must_not_be_beyond_the_end, manifest, facts, checkpoint)
    own = world.on_rank0(is_own, checkpoint, folder.path)
    metrics = reporter.metrics_file if own else checkpoint.parent.parent / reporter.metrics_file.name
    # Here, where a broken line costs nothing yet: it is read again when the metrics are cut.
    last = world.on_rank0(_last_update, metrics)
    changes = "; ".join(changed_settings(manifest, facts.settings))
    reporter.say(f"resuming from {checkpoint} (update {manifest.step})" + (f"; changed: {changes}" if changes else ""))
    if (last or 0) < manifest.step:
        there = "is not there" if last is None else f"ends after update {last}"
        reporter.say(f"WARNING: {metrics} {there}: the lines up to update {manifest.step} are lost")
    return Start(reader, None if last is None else metrics, left_behind)


def _must_not_be_beyond_the_end(manifest: Manifest, facts: RunFacts, checkpoint: Path) -> None:
    key, done = ("updates", manifest.step) if facts.train.tokens is None else ("tokens", manifest.tokens)
    if manifest.tokens > run_tokens(facts.train, BatchPlan(facts.window_tokens, facts.train.batch_phases())):
        raise ConfigError(
            f"train.{key} {getattr(facts.train, key)}: {checkpoint} is after {done} {key} already; give a number"
            " above that, name an earlier checkpoint with --run.resume, or another --run.dir"
        )


def _has_trained(metrics: Path) -> bool:
    """Whether there are updates in the metrics. Half a line at the end, or any other, is none of our business yet."""
    return metrics.is_file() and b'"loss"' in metrics.read_bytes()


def _last_update(metrics: Path) -> int | None:
    """The last update of the metrics; 0 for none, None for no file. Raises ValueError as `read_metrics` does."""
    if not metrics.is_file():
        return None
    return max((int(line["update"]) for line in read_metrics(metrics)), default=0)


def write_beginning(config: Config, inputs: Inputs, start: Start, trainer: Trainer, folder: RunFolder) -> None:
    """The fifth stage, on rank 0: the metrics end where training begins, and the run describes itself.

    A checkpoint of another run brings that run's metrics with it.
    """
    metrics = trainer.reporter.metrics_file
    if start.metrics is not None and start.metrics.resolve() != metrics.resolve():
        replace_file(metrics, start.metrics.read_bytes())
    if start.reader is None:
        trainer.reporter.follow(-1)
    else:
        trainer.reporter.follow(trainer.state.update, evaluated=not trainer.state.evaluation_due)
    replace_file(folder.path / "config.yaml", save_config(config).encode())
    inputs.data.tokenizer.save_pretrained(folder.path / "tokenizer")


def headline(config: Config, world: World, trainer: Trainer, in_tf32: bool) -> str:
    facts, engine = trainer.facts, trainer.engine
    parameters = sum(torch.Size(shape).numel() for shape in engine.fp32_state.shapes().values())
    plain = facts.train.updates_per_window == ["1"]
    taken = "an update" if plain else f"a window, in {' '.join(facts.train.updates_per_window)} updates"
    precision = facts.train.precision + (" (products in TF32)" if in_tf32 else "")
    over = "" if config.model.backbone == "gpt2" else f" over {config.model.backbone}"
    kinds = {"gptb": f"{config.model.num_slots} slots{over}", "gpt2": "GPT-2", "lstm": "LSTM"}
    kind = kinds[config.model.kind]
    curriculum = trainer.data.windows.curriculum
    lengths = ""
    if curriculum is not None:
        lengths = (
            f"; documents of up to {curriculum.limit} tokens now, {curriculum.longest} later (task.curriculum auto)"
        )
    return (
        f"{parameters / 1e6:.2f} M parameters, {kind}; {facts.lanes} lanes x"
        f" {facts.window} columns = {facts.window_tokens:,} tokens {taken};"
        f" {world.size} rank(s) on {world.device.type}, ZeRO {engine.stage}, {precision};"
        f" updates {trainer.state.update} to {trainer.updates.last_update}{lengths}"
    )
