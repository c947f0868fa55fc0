"""The assembly of a training run: from a configuration to a trainer, and from its end to an exit code."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PreTrainedTokenizerBase

from gptb_ds.atomic_files import replace_file
from gptb_ds.checkpoint.identity import changed_settings, check_identity
from gptb_ds.checkpoint.reader import CheckpointReader
from gptb_ds.checkpoint.resume import choose_checkpoint
from gptb_ds.checkpoint.writer import SaveError
from gptb_ds.config import Config, ConfigError, divisors, save_config
from gptb_ds.data.collator import LaneCollator
from gptb_ds.data.corpus import Corpus, open_corpus
from gptb_ds.data.documents import load_tokenizer
from gptb_ds.data.held_out import held_out_windows
from gptb_ds.distributed.error_report import report
from gptb_ds.distributed.join import join, leave
from gptb_ds.distributed.watchdog import Watchdog
from gptb_ds.distributed.world import World, derive_seed, is_shared
from gptb_ds.evaluation import held_out_loss, metrics_of
from gptb_ds.exit_codes import DONE, FAULT, STOPPED, USAGE
from gptb_ds.generation import generate
from gptb_ds.loading import model_configuration
from gptb_ds.model.configuration import inherited, warn_if_memoryless
from gptb_ds.model.modeling import GPTBLMHeadModel
from gptb_ds.model.objective import WindowObjective
from gptb_ds.model.warm_start import warm_start
from gptb_ds.training.deepspeed_policy import offload_devices, read_policy, zero_stage
from gptb_ds.training.engine import Engine, check_policy
from gptb_ds.training.metrics import MetricsLog
from gptb_ds.training.run_folder import RunFolder
from gptb_ds.training.stop_requests import StopRequests
from gptb_ds.training.trainer import Plan, Trainer, TrainingError

Say = Callable[[str], None]


def train(config: Config, stop: StopRequests) -> int:
    """Trains as `config` says on the ranks that a launcher started; returns the exit code.

    Raises ValueError for what the user gave. With several ranks, or at a fault, the process ends at once instead: ranks
    that wait in a collective are freed by the launcher, or by the closed connection.
    """
    started = time.time()
    # Longer than the watchdog takes: it names the ranks that are missing, a time-out in a collective can't.
    world = join(config.run.hang_seconds + max(config.run.hang_seconds, 60))
    try:
        watchdog = Watchdog(world, config.run.hang_seconds).start()
        trainer, folder = _set_up(config, world, stop, started, watchdog)
    except (ValueError, OSError) as error:
        if world.size == 1 and isinstance(error, ValueError):
            raise
        if world.rank == 0 or not is_shared(error):
            _speak(error, world)
        return _end(USAGE if isinstance(error, ValueError) else FAULT)
    except BaseException as error:
        report(error, world)
        return _end(FAULT)
    try:
        code = _run(trainer, folder, world)
        if code == STOPPED:
            stop.ignore_more()
        world.barrier()
        watchdog.stop()
        leave()
        return code
    except (TrainingError, SaveError) as error:
        if world.rank == 0:  # all ranks raise these
            _speak(error, world)
    except BaseException as error:
        report(error, world)
    return _end(FAULT)


def _speak(error: Exception, world: World) -> None:
    me = "gptb-ds train:" if world.rank == 0 else f"[rank {world.rank} on {world.host}]"
    for line in str(error).splitlines():
        print(f"{me} {line}", file=sys.stderr)


def _end(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _set_up(
    config: Config, world: World, stop: StopRequests, started: float, watchdog: Watchdog
) -> tuple[Trainer, RunFolder]:
    """A trainer that stands where the run is to begin. Nothing of an earlier run is touched before all is checked.

    Raises ValueError for what the user has to change, OSError for what the system refuses.
    """
    say: Say = (lambda text: print(text, flush=True)) if world.rank == 0 else (lambda text: None)
    inputs = world.on_all_ranks(_read_inputs, config, world)
    watchdog.progress_made("reading the inputs")
    folder = RunFolder(config.run.dir, world)
    stop.watch(
        folder.path / "stop" if world.rank == 0 else None, config.run.max_seconds, started, config.run.stop_margin
    )
    plan = inputs.plan
    checkpoint, superseded = choose_checkpoint(config.run.resume, folder.path, world, watchdog.progress_made, say)
    reader = None
    if checkpoint is not None:
        reader = world.on_all_ranks(CheckpointReader, checkpoint)
        world.on_all_ranks(check_identity, reader.manifest, plan.identity, checkpoint)
        changes = "; ".join(changed_settings(reader.manifest, plan.setting))
        say(
            f"resuming from {checkpoint} (update {reader.manifest.step})" + (f"; changed: {changes}" if changes else "")
        )
    engine = Engine(
        WindowObjective(inputs.model, config.train.recompute_every),
        world,
        lanes=config.data.lanes // world.size,
        lane_groups=config.train.lane_groups,
        precision=config.train.precision,
        optim=config.optim,
        policy=inputs.policy,
        monitor=_monitor(config, folder.path),
    )
    watchdog.progress_made("building the engine")
    if config.train.compile:
        inputs.model.compile_step()
    trainer = Trainer(
        plan,
        world,
        engine,
        inputs.collator,
        engine.model.empty_state(config.data.lanes // world.size),
        optim=config.optim,
        train=config.train,
        run=config.run,
        stop=stop,
        log=MetricsLog(folder.path / "metrics.jsonl") if world.rank == 0 else None,
        watchdog=watchdog,
        evaluate=_evaluation(config, world, engine, inputs.held_out) if inputs.held_out else None,
        sample=lambda: _sample(config, engine, inputs.tokenizer, inputs.collator.corpus.eot_id),
    )
    if reader is not None:
        trainer.resume(reader)
        reader.close()
    kept = folder.set_aside(superseded)
    if kept:
        say(f"what this run had saved beyond that is now in {kept}")
    if trainer.log:
        _prepare_folder(trainer, trainer.log, checkpoint)
        replace_file(folder.path / "config.yaml", save_config(config).encode())
        inputs.tokenizer.save_pretrained(folder.path / "tokenizer")
    say(_headline(config, world, engine, trainer.at.update))
    if not inputs.held_out:
        say(f"WARNING: nothing is held out in {' '.join(config.data.path)}: no evaluation")
    watchdog.progress_made("set-up")
    return trainer, folder


def _prepare_folder(trainer: Trainer, log: MetricsLog, checkpoint: Path | None) -> None:
    """The metrics end where training begins; a checkpoint of another run brings that run's metrics with it."""
    if checkpoint is None:
        log.cut_after(-1)
        return
    source = checkpoint.parent.parent / log.path.name
    if source.is_file() and source.resolve() != log.path.resolve():
        replace_file(log.path, source.read_bytes())
    log.cut_after(trainer.at.update, evaluated=not trainer.at.evaluation_due)


def _run(trainer: Trainer, folder: RunFolder, world: World) -> int:
    try:
        reason = trainer.loop()
    finally:
        trainer.windows.close()
    if world.rank == 0:
        # Obeyed: left there, it would stop the run again each time it is continued.
        (folder.path / "stop").unlink(missing_ok=True)
        if reason is None:
            print(f"done: {trainer.at.update} updates, run in {folder.path}", flush=True)
        else:
            again = "the same command" if trainer.run.resume == "auto" else "--run.resume auto"
            print(f"stopped after update {trainer.at.update}: {reason}; {again} continues", flush=True)
    folder.release()
    return DONE if reason is None else STOPPED


@dataclass(frozen=True)
class _Inputs:
    model: GPTBLMHeadModel
    tokenizer: PreTrainedTokenizerBase
    collator: LaneCollator
    held_out: Corpus | None
    policy: dict[str, Any]
    plan: Plan


def _read_inputs(config: Config, world: World) -> _Inputs:
    """Everything that this rank can read and build on its own. Raises ValueError."""
    _check_lanes(config, world)
    if config.train.precision == "fp16" and world.device.type == "cpu":
        raise ConfigError("train.precision fp16: DeepSpeed refuses it on the CPU; choose bf16 or fp32")
    if "wandb" in config.run.monitor and importlib.util.find_spec("wandb") is None:
        raise ConfigError("run.monitor wandb: the package wandb is not installed; pip install wandb, or leave it out")
    policy = read_policy(config.deepspeed_config)
    check_policy(policy)
    corpus = open_corpus(config.data.path, config.data.weights, "train")
    torch.manual_seed(derive_seed(config.train.seed, "initialisation"))
    configuration = model_configuration(config, corpus.vocab_size, corpus.eot_id)
    if world.rank == 0:
        warn_if_memoryless(configuration)
    model = (
        warm_start(configuration, config.model.init_from) if config.model.init_from else GPTBLMHeadModel(configuration)
    )
    collator = LaneCollator(
        corpus,
        lanes=config.data.lanes,
        window=config.data.window,
        seed=config.data.seed,
        rank=world.rank,
        world_size=world.size,
        max_document_tokens=config.data.max_document_tokens,
        ahead=2,
    )
    identity: dict[str, Any] = {
        "data": collator.fingerprint,
        "tokenizer": corpus.tokenizer_fingerprint,
        "vocab_size": corpus.vocab_size,
        "eot_id": corpus.eot_id,
        "data.lanes": config.data.lanes,
        "data.window": config.data.window,
        "data.seed": config.data.seed,
        "data.max_document_tokens": config.data.max_document_tokens,
        "data.weights": config.data.weights,
        "train.seed": config.train.seed,
    } | inherited(model.config)
    identity |= {
        f"model.{key}": getattr(config.model, key) for key in ("num_slots", "n_layer", "n_head", "n_embd", "rebias")
    }
    setting = {f"optim.{key}": value for key, value in config.optim.model_dump().items()}
    setting |= {f"train.{key}": value for key, value in config.train.model_dump().items() if key != "seed"}
    setting |= {"model.dropout": config.model.dropout, "world_size": world.size, "zero_stage": zero_stage(policy)}
    setting |= offload_devices(policy)
    target_bytes = corpus.bytes_per_target(config.data.max_document_tokens)
    plan = Plan(config.data.lanes, config.data.window, target_bytes, identity, setting)
    with_held_out = [store.path for store in corpus.stores if store.manifest["splits"]["validation"]["documents"]]
    held_out = open_corpus(with_held_out, None, "validation") if with_held_out else None
    return _Inputs(
        model.train(),
        load_tokenizer(config.data.path[0]),
        collator,
        held_out,
        policy,
        plan,
    )


def _check_lanes(config: Config, world: World) -> None:
    lanes, groups = config.data.lanes, config.train.lane_groups
    if lanes % (world.size * groups):
        valid = [d for d in divisors(lanes) if d % groups == 0]
        each = [d // groups for d in valid]
        raise ConfigError(
            f"data.lanes {lanes} cannot be shared by {world.size} ranks with train.lane_groups {groups}: use"
            f" {' or '.join(map(str, each))} ranks, or a multiple of {world.size * groups} as data.lanes"
        )


def _evaluation(config: Config, world: World, engine: Engine, held_out: Corpus) -> Callable[..., Any]:
    """The trainer's `evaluate`."""
    target_bytes = held_out.bytes_per_target(config.data.max_document_tokens)

    def evaluate(goes_on: Callable[[], bool]) -> dict[str, float] | None:
        lanes = config.data.lanes // config.train.lane_groups
        windows = held_out_windows(
            held_out,
            lanes=lanes,
            window=config.data.window,
            rank=world.rank,
            world_size=world.size,
            max_tokens=config.run.eval_tokens,
            max_document_tokens=config.data.max_document_tokens,
        )
        with engine.evaluating():
            state = engine.model.empty_state(lanes // world.size)
            measured = held_out_loss(engine.objective, windows, state, world, goes_on)
        return None if measured is None else metrics_of(measured[0], target_bytes)

    return evaluate


def _sample(config: Config, engine: Engine, tokenizer: PreTrainedTokenizerBase, eot_id: int) -> str:
    """A text from the model as it is. All ranks take part: at stage 3 no rank has the weights alone."""
    with engine.evaluating():
        seed = derive_seed(config.train.seed, "sample")
        tokens = list(generate(engine.model, [], config.run.sample_tokens, seed=seed))
    return str(tokenizer.decode([t for t in tokens if t != eot_id]))


def _monitor(config: Config, run: Path) -> dict[str, Any]:
    """DeepSpeed's configuration of the metric sinks."""
    places = {
        "tensorboard": ("tensorboard", {"output_path": str(run / "tensorboard"), "job_name": run.name}),
        "csv": ("csv_monitor", {"output_path": str(run / "csv"), "job_name": run.name}),
        "wandb": ("wandb", {"project": "gptb-ds", "group": run.name}),
    }
    return {places[name][0]: {"enabled": True} | places[name][1] for name in config.run.monitor}


def _headline(config: Config, world: World, engine: Engine, update: int) -> str:
    parameters = sum(torch.Size(shape).numel() for shape in engine.fp32_state.shapes().values())
    return (
        f"{parameters / 1e6:.2f} M parameters, {config.model.num_slots} slots; {config.data.lanes} lanes x"
        f" {config.data.window} columns = {config.data.lanes * config.data.window:,} tokens an update;"
        f" {world.size} rank(s) on {world.device.type}, ZeRO {engine.stage}, {config.train.precision};"
        f" updates {update} to {config.train.updates}"
    )
