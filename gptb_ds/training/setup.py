"""The assembly of a training run in five stages, and how it ends: from a configuration to an exit code."""

from __future__ import annotations

import os
import socket
import sys
import time
from dataclasses import replace
from typing import NoReturn, cast

import torch
from transformers import PreTrainedModel

from gptb_ds.checkpoint.model_files import model_files
from gptb_ds.checkpoint.writer import SaveError
from gptb_ds.config import Config
from gptb_ds.distributed.error_report import report_error
from gptb_ds.distributed.heartbeat import take_leave
from gptb_ds.distributed.join import JoinError, join, leave
from gptb_ds.distributed.watchdog import Watchdog, progress_made
from gptb_ds.distributed.world import World, is_shared
from gptb_ds.exit_codes import DONE, FAULT, STOPPED, USAGE
from gptb_ds.model.modeling import RecurrentLM
from gptb_ds.model.objective import WindowObjective
from gptb_ds.training.beginning import find_start, headline, write_beginning
from gptb_ds.training.checkpointer import Checkpointer
from gptb_ds.training.compilation import compile_step, obstacle
from gptb_ds.training.decisions import decided
from gptb_ds.training.deepspeed_policy import zero_stage
from gptb_ds.training.device_failures import DeviceFailureError, GpuMemory, gpu_memory, named_failures
from gptb_ds.training.engine import Engine
from gptb_ds.training.inputs import Inputs, read_inputs
from gptb_ds.training.output import forgiving_output
from gptb_ds.training.precision import allow_tf32
from gptb_ds.training.profile import Profile
from gptb_ds.training.reporter import Reporter
from gptb_ds.training.run_folder import RunFolder
from gptb_ds.training.sizes import free_memory, measure_memory, memory_line
from gptb_ds.training.stop_requests import StopRequests
from gptb_ds.training.trainer import MetricsError, Trainer, TrainingError
from gptb_ds.training.usage import usage_of


def train(config: Config, stop: StopRequests) -> int:
    """Trains as `config` says on the ranks that a launcher started; returns the exit code.

    Raises ValueError for what the user gave. With several ranks, or at a fault, the process ends at once instead, see
    `_end`.
    """
    started = time.monotonic()
    with forgiving_output():
        try:
            world = join(config.run.hang_seconds + max(config.run.hang_seconds, 60))
        except JoinError as error:
            if error.alone or os.environ.get("LOCAL_RANK") == "0":  # they can't agree yet on who speaks
                print(f"[rank {os.environ['RANK']} on {socket.gethostname()}] {error}", file=sys.stderr)
            _end(error.code)
        except ValueError as error:
            if not torch.distributed.is_initialized():
                raise
            # All ranks raise it, and have a process group by now, which an ordinary end of the process may crash in.
            if os.environ["RANK"] == "0":
                print(f"gptb-ds train: {error}", file=sys.stderr)
            _end(USAGE)
        try:
            watchdog = Watchdog(world, config.run.hang_seconds, lost_seconds=config.run.lost_seconds).start()
            trainer, folder = _set_up(config, world, stop, started)
        except (ValueError, OSError) as error:
            if world.size == 1 and isinstance(error, ValueError):
                raise
            if world.rank == 0 or not is_shared(error):
                _speak(error, world)
            if is_shared(error):  # whoever comes here last must not take the first to end for a loss
                take_leave()
            _end(USAGE if isinstance(error, ValueError) else FAULT)
        except DeviceFailureError as error:
            _speak(error, world)
            _end(FAULT)
        except BaseException as error:
            _end(report_error(error, world))
        try:
            code = _run(trainer, folder, world)
            if code == STOPPED:
                stop.ignore_more()
            # Ranks end their loops at different times, and the first to leave closes its connections. One that is still
            # in an exchange (rank 0 writes the manifest and says so last) would take that for a lost rank: exit code 1
            # for a run that is done. So all meet before the first one goes.
            world.barrier()
            watchdog.stop()
            leave()
            return code
        except (TrainingError, SaveError) as error:
            if world.rank == 0:
                _speak(error, world)
            if not isinstance(error, MetricsError):  # all ranks raise the others
                take_leave()
        except DeviceFailureError as error:
            # On this rank alone: the others lose contact, and say so.
            _speak(error, world)
        except BaseException as error:
            _end(report_error(error, world))
        _end(FAULT)


def _set_up(config: Config, world: World, stop: StopRequests, started: float) -> tuple[Trainer, RunFolder]:
    """A trainer that stands where the run is to begin, in five stages. Before the fifth nothing of a run is touched.

    Raises ValueError for what the user has to change, OSError for what the system refuses.
    """
    # 1. Read and check.
    config = decided(config, world)
    in_tf32 = allow_tf32(world.device, config.train.precision)
    inputs = world.on_all_ranks(read_inputs, config, world)
    progress_made("reading the inputs")
    reporter = Reporter(inputs.facts, speaks=world.rank == 0)
    # 2. Lock the folder: from here on, nobody else changes it.
    folder = RunFolder(config.run.dir, world)
    stop_file = folder.path / "stop" if world.rank == 0 else None
    stop.watch(stop_file, config.run.max_seconds, started, config.run.stop_margin)
    profile = Profile(folder.path / "profile", world, started) if config.run.profile else None
    # 3. Find what to resume.
    start = find_start(inputs, folder, world, reporter)
    # 4. Build and restore.
    with named_failures(inputs.facts, world.size):
        trainer = _build(inputs, world, reporter, stop, profile)
        progress_made("building the engine")
        if start.reader is not None:
            trainer.restore(start.reader)
            start.reader.close()
    # 5. The first change on disk.
    kept = folder.set_aside(start.left_behind)
    if kept:
        reporter.say(f"what this run had saved beyond that is now in {kept}")
    world.on_rank0(write_beginning, config, inputs, start, trainer, folder)
    reporter.say(headline(config, world, trainer, in_tf32))
    if trainer.usage is not None and trainer.usage.token_flops:
        reporter.say(f"mfu: {trainer.usage.token_flops / 1e6:,.1f} MFLOP a token, of {trainer.usage.said} a rank")
    for warning in inputs.warnings:
        reporter.say(f"WARNING: {warning}")
    progress_made("set-up")
    return trainer, folder


def _build(inputs: Inputs, world: World, reporter: Reporter, stop: StopRequests, profile: Profile | None) -> Trainer:
    """The fourth stage: the engine and what trains with it."""
    facts = inputs.facts
    lanes = facts.lanes // world.size
    model = cast(PreTrainedModel, inputs.model)
    usage = usage_of(model, world, facts.train.precision, lanes // facts.train.lane_groups)
    if isinstance(inputs.model, RecurrentLM):
        # Before the step is compiled: it would be compiled for these small windows as well.
        memory = world.on_rank0(
            measure_memory, inputs.model, world.device, facts.train.precision, facts.train.recompute_cheap
        )
        usage = replace(usage, window=memory)
        free = free_memory(world.device, world.ranks_here())
        at_once = lanes // facts.train.lane_groups
        reporter.say(memory_line(memory, at_once, facts.window, facts.train.recompute_every, free))
    if facts.train.compile == "on":
        hindered = obstacle(zero_stage(inputs.policy))
        if hindered is None:
            # The configuration refuses it for another model.
            compile_step(cast(RecurrentLM, inputs.model), reporter.say)
        else:
            reporter.say(f"train.compile on: the step is not compiled: {hindered}")
    engine = Engine(
        WindowObjective(
            inputs.model,
            facts.train.recompute_every,
            count_right=facts.is_task,
            recompute_cheap=facts.train.recompute_cheap,
        ),
        world,
        lanes=lanes,
        lane_groups=facts.train.lane_groups,
        precision=facts.train.precision,
        optim=facts.optim,
        policy=inputs.policy,
        measure_noise=facts.train.measure_noise,
        graph=facts.train.graph,
        say=reporter.say,
    )
    files = model_files(model, inputs.data.tokenizer)
    checkpointer = Checkpointer(facts, engine, inputs.data.windows, reporter, files)
    return Trainer(facts, inputs.data, engine, checkpointer, reporter, stop, usage, profile)


def _run(trainer: Trainer, folder: RunFolder, world: World) -> int:
    try:
        with named_failures(trainer.facts, world.size, _memory_left(trainer)):
            reason = trainer.loop()
    finally:
        trainer.data.windows.close()
    if trainer.profile is not None:
        table = trainer.profile.finish()
        if world.rank == 0:
            print(f"{table}\nprofile: {trainer.profile.table_file}, {trainer.profile.trace_file}", flush=True)
    if world.rank == 0:
        # Obeyed: left there, it would stop the run again each time it is continued.
        (folder.path / "stop").unlink(missing_ok=True)
        if reason is None:
            print(f"done: {trainer.state.update} updates, run in {folder.path}", flush=True)
        else:
            again = "the same command" if trainer.facts.run.resume == "auto" else "--run.resume auto"
            print(f"stopped after update {trainer.state.update}: {reason}; {again} continues", flush=True)
    folder.release()
    return DONE if reason is None else STOPPED


def _memory_left(trainer: Trainer) -> GpuMemory | None:
    """Before the first window, on a GPU. Gradients are still to come; at stage 0 moments, too."""
    engine, window = trainer.engine, trainer.usage.window if trainer.usage else None
    if engine.world.device.type != "cuda" or window is None:
        return None
    parameters = sum(torch.Size(shape).numel() for shape in engine.fp32_state.shapes().values())
    gradients = parameters // engine.world.size if engine.stage >= 2 else parameters
    moments = 2 * parameters if engine.stage == 0 else 0
    return gpu_memory(window, engine.world.device, gradients * engine.dtype.itemsize + moments * 4)


def _speak(error: BaseException, world: World) -> None:
    me = "gptb-ds train:" if world.rank == 0 else f"[rank {world.rank} on {world.host}]"
    for line in str(error).splitlines():
        print(f"{me} {line}", file=sys.stderr)


def _end(code: int) -> NoReturn:
    """Ends the process at once, without Python's or torch's goodbyes.

    An ordinary exit destroys the process group and joins the threads of collectives. With other ranks still waiting in
    one, that takes until its time-out (NCCL aborts the process meanwhile, and the exit code is its); this rank looks
    alive to its launcher. And a thread of gloo that lets the last of a message's tensors go asks for Python's lock.
    Python 3.11, when it ends, answers by ending the thread, and C++ then aborts ("terminate called without an active
    exception", exit code 134 instead of ours). `os._exit` closes the connections now: gloo's other ranks raise at once,
    and a launcher sees a dead rank and ends the rest. What is lost is what a rank has not flushed; it has flushed
    everything.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
