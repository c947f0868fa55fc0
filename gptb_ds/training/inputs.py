"""The first stage of a run's assembly: everything is read and checked, and nothing is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from gptb_ds.config import Config, ConfigError, divisors
from gptb_ds.data.collator import LaneCollator
from gptb_ds.data.corpus import Corpus, open_corpus
from gptb_ds.data.curriculum import Curriculum
from gptb_ds.data.documents import load_tokenizer
from gptb_ds.distributed.world import World, derive_seed
from gptb_ds.evaluation import HeldOut
from gptb_ds.model.backbones import build_decoder
from gptb_ds.model.configuration import GPTBConfig, inherited, warn_if_memoryless
from gptb_ds.model.decoder_configuration import GPTBDecoderConfig
from gptb_ds.model.window_model import WindowModel
from gptb_ds.model_choice import baseline_configuration, model_configuration, new_model
from gptb_ds.state_health import StateHealth
from gptb_ds.training.deepspeed_policy import Policy, check_precision, offload_devices, read_policy, zero_stage
from gptb_ds.training.engine import check_policy
from gptb_ds.training.sinks import check_sinks
from gptb_ds.training.start_from import start_from
from gptb_ds.training.train_state import RunFacts
from gptb_ds.training.trainer import RunData

_CHUNK = 1 << 24  # entries of a mask that are looked at in one go


@dataclass(frozen=True)
class Inputs:
    """What a run is made of, as this rank has read it; `warnings` are for a person."""

    facts: RunFacts
    data: RunData
    model: WindowModel
    policy: Policy
    warnings: list[str]


def read_inputs(config: Config, world: World) -> Inputs:
    """Everything that this rank can read and build on its own. Raises ValueError."""
    _check_lanes(config, world)
    if world.rank == 0:  # it alone has them
        check_sinks(config.run.monitor)
    policy = read_policy(config.deepspeed_config)
    check_policy(policy)
    check_precision(config.train.precision, world.device.type, policy)
    corpus = open_corpus(config.data.path, config.data.weights, "train")
    if not _anything_counts(corpus):
        raise ConfigError(
            f"data.path {' '.join(config.data.path)}: no target of the training split counts in the loss, there is"
            " nothing to learn; prepare it again with loss weights, or labels, that are not all masked"
        )
    model = _model(config, world, corpus)
    windows = LaneCollator(
        corpus,
        lanes=config.data.lanes,
        window=config.data.window,
        seed=config.data.seed,
        rank=world.rank,
        world_size=world.size,
        max_document_tokens=config.data.max_document_tokens,
        stagger=config.data.is_staggered,
        curriculum=_curriculum(config, corpus),
        keep_state_probability=config.data.keep_state_probability,
        ahead=2,
    )
    facts = RunFacts(
        lanes=config.data.lanes,
        window=config.data.window,
        optim=config.optim,
        train=config.train,
        run=config.run,
        bytes_per_target=corpus.bytes_per_target(config.data.max_document_tokens),
        identity=_identity(config, windows, model),
        settings=_settings(config, world, policy),
        skips=config.data.skips(),
        is_task=corpus.tokenizer.startswith("task:"),
        grow_at=config.task.grow_at,
        can_recompute=config.model.kind == "gptb",
    )
    held_out = _held_out(config, world, corpus)
    warnings = [] if held_out else [f"nothing is held out in {' '.join(config.data.path)}: no evaluation"]
    warnings += corpus.missed_shares(config.data.max_document_tokens)
    if config.run.snapshot_every and config.data.max_document_tokens and not config.data.is_staggered:
        warnings.append(
            "run.snapshot_every: lanes that begin their pieces in the same column (data.max_document_tokens) make the"
            " loss jump there each time; leave data.stagger out"
        )
    data = RunData(windows, held_out, load_tokenizer(config.data.path[0]), _state_health(config, world, held_out))
    return Inputs(facts, data, model.train(), policy, warnings)


def _curriculum(config: Config, corpus: Corpus) -> Curriculum | None:
    """A curriculum for what has an answer at each position, so that a beginning is a document of its own."""
    if config.task.curriculum == "off" or not all(store.targets is not None for store in corpus.stores):
        return None
    longest = max(store.manifest["splits"]["train"]["longest"] for store in corpus.stores)
    return Curriculum(min(config.task.start_length, longest), longest)


def _model(config: Config, world: World, corpus: Corpus) -> WindowModel:
    torch.manual_seed(derive_seed(config.train.seed, "initialisation"))
    if config.model.kind != "gptb":
        return new_model(baseline_configuration(config, corpus.vocab_size, corpus.eot_id))
    configuration = model_configuration(config, corpus.vocab_size, corpus.eot_id)
    if world.rank == 0:
        warn_if_memoryless(configuration)
    if config.model.init_from:
        return start_from(configuration, config.model.init_from, print if world.rank == 0 else lambda line: None)
    return build_decoder(configuration) if isinstance(configuration, GPTBDecoderConfig) else new_model(configuration)


def _check_lanes(config: Config, world: World) -> None:
    lanes, groups = config.data.lanes, config.train.most_groups
    key = "lane_groups" if groups == config.train.lane_groups else "updates_per_window"
    if lanes % (world.size * groups):
        valid = [d for d in divisors(lanes) if d % groups == 0]
        each = [d // groups for d in valid]
        raise ConfigError(
            f"data.lanes {lanes} cannot be shared by {world.size} ranks with train.{key} {groups}: use"
            f" {' or '.join(map(str, each))} ranks, or a multiple of {world.size * groups} as data.lanes"
        )
    most = max(number for number, _ in config.train.batch_phases())
    if config.train.measure_noise and world.size * max(config.train.lane_groups, most) < 2 * most:
        raise ConfigError(
            "train.measure_noise compares an update's parts, what each rank takes in one pass, and there is one only;"
            f" set train.lane_groups {2 * most}"
        )


def _anything_counts(corpus: Corpus) -> bool:
    """Whether any target counts. Only a store in which none does is read to its end."""
    for store in corpus.stores:
        if store.counted is None:
            return True
        # The first entry stands for the EOT that opens the store: it is no target.
        for start in range(1, len(store.counted), _CHUNK):
            if np.any(store.counted[start : start + _CHUNK]):
                return True
    return False


def _held_out(config: Config, world: World, corpus: Corpus) -> HeldOut | None:
    paths = [store.path for store in corpus.stores if store.manifest["splits"]["validation"]["documents"]]
    if not paths:
        return None
    return HeldOut(
        open_corpus(paths, None, "validation"),
        world,
        lanes=config.data.lanes // config.train.lane_groups,
        window=config.data.window,
        max_tokens=config.run.eval_tokens,
        max_document_tokens=config.data.max_document_tokens,
    )


def _state_health(config: Config, world: World, held_out: HeldOut | None) -> StateHealth | None:
    """None where there is no state, or nothing to measure it with."""
    has_state = config.model.kind != "gpt2" and config.model.carry != "nothing"
    if held_out is None or not config.run.state_health or not has_state:
        return None
    lanes = config.data.lanes // config.train.most_groups
    # An eighth of what an update keeps activations of at once, or all of a small one: lanes may be chosen to fill
    # the memory, and captured windows hold on to theirs.
    tokens = lanes * min(config.data.window, config.train.recompute_every or config.data.window)
    most = min(tokens, max(1024, tokens // 8))
    return StateHealth(held_out.corpus, world, most_tokens=most, max_tokens=config.run.eval_tokens)


def _identity(config: Config, windows: LaneCollator, model: WindowModel) -> dict[str, object]:
    """What must be the same when the run resumes."""
    corpus, data = windows.corpus, config.data
    identity: dict[str, object] = {
        "data": windows.fingerprint,
        "tokenizer": corpus.tokenizer_fingerprint,
        "vocab_size": corpus.vocab_size,
        "eot_id": corpus.eot_id,
    }
    identity |= {f"data.{key}": getattr(data, key) for key in ("lanes", "window", "seed")}
    identity |= {f"data.{key}": getattr(data, key) for key in ("max_document_tokens", "weights")}
    identity |= {"train.seed": config.train.seed}
    identity["data.stagger"] = "on" if data.is_staggered else "off"
    curriculum = windows.curriculum
    identity["task.curriculum"] = (
        "off" if curriculum is None else f"auto, documents of {curriculum.start} tokens at first"
    )
    shape: tuple[str, ...] = ("kind", "n_layer", "n_head", "n_embd")
    if config.model.kind == "gptb":
        own = model.config
        identity |= own.identity() if isinstance(own, GPTBDecoderConfig) else inherited(cast(GPTBConfig, own))
        shape += ("num_slots", "rebias", "recent_tokens", "carry")
        identity["model.init_from"] = "a decoder to begin as" if own.preserve_decoder else "none to begin as"
    if config.model.kind == "gpt2":
        identity["model.context"] = config.model.context or config.data.window
    return identity | {f"model.{key}": getattr(config.model, key) for key in shape}


def _settings(config: Config, world: World, policy: Policy) -> dict[str, object]:
    """What may differ when the run resumes, and is said then."""
    settings: dict[str, object] = {f"optim.{key}": value for key, value in config.optim.model_dump().items()}
    settings |= {f"train.{key}": value for key, value in config.train.model_dump().items() if key != "seed"}
    settings |= {
        "data.skip": config.data.skip,
        "data.keep_state_probability": config.data.keep_state_probability,
        "task.grow_at": config.task.grow_at,
        "model.dropout": config.model.dropout,
        **{f"run.{key}": getattr(config.run, key) for key in ("snapshot_every", "jump_deviations", "max_rewinds")},
        "world_size": world.size,
        "zero_stage": zero_stage(policy),
    }
    return settings | offload_devices(policy)
