"""The run's configuration: its keys, their defaults, and every check that one value makes on another."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from gptb_ds.suggestions import nearest

RECIPES = Path(__file__).parent / "recipes"


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one line for each error."""


class Group(BaseModel):
    """A frozen group of keys; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, str_min_length=1)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        """`updates: true` (or YAML's `yes`) would be 1, and so would one in a list."""
        kinds = _plain_types(cls.model_fields[info.field_name or ""].annotation)
        holds_truth = any(isinstance(each, bool) for each in (value if isinstance(value, list) else [value]))
        if holds_truth and kinds & {int, float} and bool not in kinds:
            raise PydanticCustomError("bool_as_number", "Input should be a number, not a truth value")
        return value


def _plain_types(annotation: object) -> set[object]:
    parts = get_args(annotation)
    return {annotation}.union(*map(_plain_types, parts)) if parts and annotation is not None else {annotation}


def _as_switch(value: object) -> object:
    return {"true": "on", "false": "off"}.get(str(value).lower(), value)


# YAML reads `on` and `off` as truth values, and a truth value can be given for them.
_SWITCH = BeforeValidator(_as_switch)
Switch = Annotated[Literal["auto", "on", "off"], _SWITCH]


# Numbers that stand for "auto" until the run's first stage has decided: nobody can give them.
AUTO_LANES, AUTO_RECOMPUTE = 0, -1


def _auto_as(stands_for: int, least: int) -> BeforeValidator:
    """ "auto", or a whole number of at least `least`."""

    def check(value: object) -> object:
        if value == "auto":
            return stands_for
        if isinstance(value, (int, str)) and re.fullmatch(r"[+-]?\d+", str(value)) and int(value) < least:
            raise PydanticCustomError(
                "too_small", "Input should be auto, or greater than or equal to {n}", {"n": least}
            )
        return value

    return BeforeValidator(check)


class ModelConfig(Group):
    kind: Literal["gptb", "gpt2", "lstm"] = Field(
        "gptb", description="gpt2 and lstm: models to compare with, of the same n_layer and n_embd"
    )
    backbone: str = Field(
        "gpt2",
        description="whose blocks they are: gpt2, llama, qwen3, gpt_neox, gemma, ... (a decoder of transformers), or a"
        " folder or hub name, whose config.json then says the sizes",
    )
    num_slots: int = Field(20, ge=2, description="S: positions the blocks run over (S-1 state vectors and one token)")
    n_layer: int = Field(12, ge=1, description="blocks")
    n_head: int = Field(12, ge=1, description="attention heads a block")
    n_kv_head: int | None = Field(None, ge=1, description="heads of keys and values (default: as many as n_head)")
    n_inner: int | None = Field(
        None, ge=1, description="width inside a block's MLP (default: as the backbone's family has it, 4 E in GPT-2)"
    )
    n_embd: int = Field(768, ge=1, description="E: width of a hidden vector")
    rebias: bool = Field(True, description="attention between slots is bidirectional; off, the model is memoryless")
    recent_tokens: int = Field(
        0, ge=0, description="C: of the S-1 carried vectors the last C are the embeddings of the last C tokens"
    )
    carry: Literal["outputs", "shift", "nothing"] = Field(
        "outputs",
        description="the state is the outputs of slots 0..S-2 (the original), or shifted: of 1..S-1; nothing: the twin"
        " without a state, to measure its worth",
    )
    context: int | None = Field(
        None, ge=1, description="gpt2: tokens that a prediction sees at most (default: data.window)"
    )
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of the weights that are drawn")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of embeddings, attention and residuals")
    init_from: str | None = Field(
        None, description="folder or hub name of a trained decoder whose weights start the blocks"
    )

    @model_validator(mode="after")
    def _shape_holds_up(self) -> ModelConfig:
        errors = []
        if self.n_embd % self.n_head:
            errors.append(
                f"model.n_embd {self.n_embd} is not divisible by model.n_head {self.n_head}; choose a multiple"
            )
        if self.recent_tokens > self.num_slots - 2:
            errors.append(
                f"model.recent_tokens {self.recent_tokens} leaves no slot for the state; with model.num_slots"
                f" {self.num_slots} choose at most {self.num_slots - 2}"
            )
        if self.n_kv_head is not None and (self.backbone == "gpt2" or self.n_head % self.n_kv_head):
            remedy = "leave it out" if self.backbone == "gpt2" else f"choose one of {divisors(self.n_head)}"
            errors.append(
                f"model.n_kv_head {self.n_kv_head} does not fit model.backbone {self.backbone} with model.n_head"
                f" {self.n_head}; {remedy}"
            )
        if self.context is not None and self.kind != "gpt2":
            errors.append(f"model.context {self.context} is for model.kind gpt2, not {self.kind}; leave it out")
        if errors:
            raise ValueError("\n".join(errors))
        return self


class DataConfig(Group):
    path: list[str] = Field(min_length=1, description="stores made by `gptb-ds prepare` (several make a mixture)")
    weights: list[float] | None = Field(None, description="share of the tokens for each store of a mixture")
    lanes: Annotated[int, _auto_as(AUTO_LANES, 1)] = Field(
        64,
        description="L: global document streams, fixed for a run (auto: the fewest that nearly reach the best tokens/s,"
        " measured before the run)",
    )
    window: int = Field(16, ge=1, description="K: columns of one forward/backward")
    seed: int = Field(0, ge=0, description="order of the documents")
    max_document_tokens: int | None = Field(
        None, ge=1, description="cut longer documents into pieces of so many tokens"
    )
    skip: list[str] = Field(
        [], description="LANES:FROM-TO = columns that are read but not learnt from, say 0-15:20000-20479"
    )

    keep_state_probability: float = Field(
        0.0, ge=0, lt=1, description="so often a document starts on top of the state that the one before left"
    )
    stagger: Switch = Field(
        "auto",
        description="lanes out of step: each enters its first document of an epoch inside (auto: with"
        " max_document_tokens)",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_path_is_a_list(cls, values: object) -> object:
        if isinstance(values, dict):
            values = dict(values)
            if isinstance(values.get("skip"), str):
                values["skip"] = [values["skip"]]
            if isinstance(values.get("path"), str):
                values["path"] = [values["path"]]
            if isinstance(values.get("weights"), (int, float, str)):
                values["weights"] = [values["weights"]]
        return values

    @model_validator(mode="after")
    def _weights_match_stores(self) -> DataConfig:
        if self.weights is not None:
            if len(self.weights) != len(self.path):
                raise ValueError(
                    f"data.weights has {len(self.weights)} numbers for {len(self.path)} stores; give one for each"
                )
            if min(self.weights) <= 0:
                raise ValueError(
                    f"data.weights {self.weights} must all be above 0; leave out a store that has no share"
                )
        return self

    @model_validator(mode="after")
    def _skips_are_lanes_and_columns(self) -> DataConfig:
        self.skips()
        return self

    @property
    def is_staggered(self) -> bool:
        """Whether lanes are out of step."""
        return self.stagger == "on" or (self.stagger == "auto" and self.max_document_tokens is not None)

    def skips(self) -> tuple[tuple[range, range], ...]:
        """(lanes, columns) of each skip. Raises ValueError naming one that is none."""
        found = []
        for text in self.skip:
            match = re.fullmatch(r"(\d+)(?:-(\d+))?:(\d+)(?:-(\d+))?", text)
            first, last, begin, end = (int(n) if n else None for n in match.groups()) if match else (None,) * 4
            lanes = range(first or 0, (first or 0 if last is None else last) + 1)
            columns = range(begin or 0, (begin or 0 if end is None else end) + 1)
            beyond = self.lanes != AUTO_LANES and lanes.stop > self.lanes
            if first is None or not lanes or not columns or beyond:
                most = "" if self.lanes == AUTO_LANES else f" lanes of 0 to {self.lanes - 1} and"
                raise ValueError(
                    f"data.skip {text!r}: must be LANES:FROM-TO, such as 0-15:20000-20479, with{most} columns that"
                    " ascend"
                )
            found.append((lanes, columns))
        return tuple(found)


class OptimConfig(Group):
    name: Literal["adamw", "muon"] = Field("adamw", description="muon: for the blocks' matrices, AdamW for the rest")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    lr_scaling: Literal["none", "sqrt", "linear"] = Field(
        "none", description="how the rate grows with an update's tokens over optim.lr_tokens"
    )
    lr_tokens: int | None = Field(None, ge=1, description="tokens an update that optim.lr was found with")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's decay of the mean gradient, an update")
    beta2: float = Field(0.95, ge=0, lt=1, description="Adam's decay of the mean squared gradient, an update")
    beta1_half_life: float | None = Field(None, gt=0, description="instead of beta1: its half-life in tokens")
    beta2_half_life: float | None = Field(None, gt=0, description="instead of beta2: its half-life in tokens")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's Nesterov momentum, an update")
    warmup_updates: int = Field(100, ge=0, description="updates of linear warm-up")
    warmup_tokens: int | None = Field(None, ge=0, description="instead of warmup_updates: in tokens")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="after the warm-up (wsd: stable, then a decay at the end)"
    )
    decay_updates: int | None = Field(None, ge=1, description="wsd: updates of the decay (default: a fifth of the run)")
    decay_tokens: int | None = Field(None, ge=1, description="wsd: tokens of the decay")
    decay_from: int | None = Field(None, ge=0, description="wsd: the update, of a checkpoint say, that decay starts at")
    weight_decay: float = Field(0.1, ge=0, description="decay of matrices; vectors and the state are not decayed")
    clip: float = Field(1.0, ge=0, description="global gradient norm; 0 = no clipping")

    @model_validator(mode="after")
    def _one_of_each(self) -> OptimConfig:
        errors = []
        decays = [key for key in ("decay_updates", "decay_tokens", "decay_from") if getattr(self, key) is not None]
        if decays and self.schedule != "wsd":
            errors.append(f"optim.{decays[0]} needs optim.schedule wsd, not {self.schedule}; set it, or leave this out")
        if len(decays) > 1:
            errors.append(f"optim.{' and optim.'.join(decays)} each say when the decay starts; give one of them")
        if (self.lr_scaling == "none") != (self.lr_tokens is None):
            errors.append(
                f"optim.lr_scaling {self.lr_scaling} with optim.lr_tokens {self.lr_tokens}: give both, the rule and"
                " the tokens an update that optim.lr was found with, or neither"
            )
        if self.beta1_half_life is not None and self.beta2_half_life is None:
            errors.append("optim.beta1_half_life needs optim.beta2_half_life: give both, or the second alone")
        if errors:
            raise ValueError("\n".join(errors))
        return self


class TrainConfig(Group):
    updates: int = Field(1000, ge=1, description="optimizer steps of the whole run")
    tokens: int | None = Field(None, ge=1, description="instead of updates: tokens of the whole run (whole windows)")
    updates_per_window: list[str] = Field(
        ["1"],
        description="batch warm-up: N:TOKENS (or N:SHARE%) = N updates a window until so many tokens (so much of"
        " train.tokens) were trained, ..., the last without; auto:N = from N down as the measured noise allows",
    )
    measure_noise: bool = Field(
        False, description="estimate the gradient noise scale: the batch that is worth its size"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="of weights and activations in a step (auto: bf16 on GPUs, on CPUs the faster of fp32 and bf16;"
        " decided once and kept when the run resumes)",
    )
    lane_groups: int = Field(1, ge=1, description="gradient accumulation: a rank's lanes in so many groups")
    recompute_every: Annotated[int, _auto_as(AUTO_RECOMPUTE, 0)] = Field(
        0,
        description="keep states every c steps and recompute inside (0 = off; auto: off where the window fits into"
        " memory, else the largest c that does)",
    )
    recompute_cheap: bool = Field(
        False,
        description="keep products and attention of every step, and compute norms and activation functions again in the"
        " backward pass: about two thirds of the memory, a few percent of the time",
    )
    graph: Switch = Field(
        "auto",
        description="a window's forward and backward pass as CUDA graphs (auto: where it can be, at ZeRO stages 0 to 2"
        " without dropout)",
    )
    compile: Switch = Field(
        "auto",
        description="compile the step with torch.compile (auto: on CPUs, in runs estimated at twenty minutes or more)",
    )
    seed: int = Field(0, ge=0, description="initialisation and dropout")
    max_bad_updates: int = Field(10, ge=1, description="stop after so many non-finite updates in a row")

    @model_validator(mode="before")
    @classmethod
    def _one_phase_is_a_list(cls, values: object) -> object:
        if isinstance(values, dict) and "updates_per_window" in values:
            phases = values["updates_per_window"]
            phases = phases if isinstance(phases, list) else [phases]
            values = dict(values) | {"updates_per_window": [str(phase) for phase in phases]}
        return values

    @model_validator(mode="after")
    def _phases_fall(self) -> TrainConfig:
        errors = []
        numbers = [number for number, _ in self.batch_phases()]
        ends = [until for _, until in self.batch_phases() if until is not None]
        if numbers != sorted(numbers, reverse=True) or ends != sorted(set(ends)):
            errors.append(
                f"train.updates_per_window {' '.join(self.updates_per_window)}: updates a window must fall, at growing"
                " numbers of tokens"
            )
        for number in numbers:
            if number % self.lane_groups and self.lane_groups % number:
                errors.append(
                    f"train.updates_per_window {number} is no divisor and no multiple of train.lane_groups"
                    f" {self.lane_groups}; choose one"
                )
        if self.starts_adaptive and not self.measure_noise:
            errors.append("train.updates_per_window auto follows the measured noise; set train.measure_noise true")
        if self.starts_adaptive and self.tokens is None:
            errors.append(
                "train.updates_per_window auto: how many updates there will be is not known; give train.tokens"
            )
        if self.measure_noise and self.precision == "fp16":
            errors.append(
                "train.measure_noise with train.precision fp16: gradients carry a loss scale; choose bf16 or fp32"
            )
        if errors:
            raise ValueError("\n".join(errors))
        return self

    @property
    def starts_adaptive(self) -> bool:
        """Whether the updates of a window follow the measured noise."""
        return self.updates_per_window[0].startswith("auto:")

    def batch_phases(self) -> tuple[tuple[int, int | None], ...]:
        """(updates a window, until so many tokens) of each phase, the last one to the end. Raises ValueError."""
        texts = self.updates_per_window
        phases: list[tuple[int, int | None]] = []
        for position, text in enumerate(texts):
            number, _, until = text.removeprefix("auto:" if len(texts) == 1 else "").partition(":")
            last, share = position == len(texts) - 1, until.endswith("%")
            until = until.removesuffix("%")
            if not (_is_positive(number) and (until == "" if last else _is_positive(until))):
                raise ValueError(
                    f"train.updates_per_window {text!r}: must be {'N' if last else 'N:TOKENS or N:SHARE%'}, whole"
                    " numbers above 0" + (" (only the last phase has no end)" if last != (until == "") else "")
                )
            if share and self.tokens is None:
                raise ValueError(f"train.updates_per_window {text!r}: a share of the run needs train.tokens; give it")
            tokens = int(until or 0) * (self.tokens or 0) // 100 if share else int(until or 0)
            phases.append((int(number), None if last else tokens))
        return tuple(phases)

    @property
    def most_groups(self) -> int:
        """The largest number of lane groups that a window is ever taken in."""
        return max(self.lane_groups, *(number for number, _ in self.batch_phases()))


def _is_positive(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


class TaskConfig(Group):
    curriculum: Annotated[Literal["auto", "off"], _SWITCH] = Field(
        "auto", description="documents of a state-tracking task begin short and grow (text is never cut by it)"
    )
    start_length: int = Field(4, ge=1, description="tokens of the curriculum's longest documents at the start")
    grow_at: float = Field(0.95, gt=0, lt=1, description="running accuracy at which the curriculum's lengths double")


class RunConfig(Group):
    dir: str = Field("runs/run", description="folder of the run")
    resume: str = Field("auto", description="auto, never, or a checkpoint's folder")
    resume_optimizer: Literal["same", "switch"] = Field(
        "same", description="switch: a checkpoint of another optimizer is taken, and moments start anew"
    )
    save_every: int = Field(500, ge=0, description="updates between checkpoints (0 = only at the end)")
    snapshot_every: int = Field(
        0,
        ge=0,
        description="updates between snapshots in memory, which training goes back to when the loss jumps (0 = none)",
    )
    jump_deviations: float = Field(
        6.0, gt=0, description="standard deviations above its average at which a window's loss has jumped"
    )
    max_rewinds: int = Field(10, ge=0, description="how often training goes back; later jumps are reported only")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    log_every: int = Field(10, ge=1, description="updates between progress lines")
    eval_every: int = Field(
        500, ge=0, description="updates between evaluations, the first before any (0 = only at the end)"
    )
    eval_tokens: int = Field(100_000, ge=1, description="held-out tokens of an evaluation while training")
    state_health: bool = Field(True, description="measure the state's norm, worth and stability at each evaluation")
    sample_every: int = Field(0, ge=0, description="updates between text samples (0 = none)")
    sample_tokens: int = Field(200, ge=1, description="tokens of a sample")
    max_seconds: float | None = Field(None, gt=0, description="stop with a checkpoint and exit code 85 after so long")
    hang_seconds: float = Field(600, gt=0, description="end the job when nothing moves for so long")
    lost_seconds: float = Field(
        30, gt=0, description="end the job when a rank or its host gives no sign of life for so long"
    )
    profile: bool = Field(
        False, description="measure where the time goes, into RUN/profile: a table and a trace (also: --profile)"
    )
    stop_margin: float = Field(120, ge=0, description="seconds before the end of a Slurm job at which to stop")
    on_save_error: Literal["stop", "continue"] = Field("stop", description="when a checkpoint cannot be written")
    monitor: list[Literal["tensorboard", "csv", "wandb"]] = Field([], description="metric sinks beside metrics.jsonl")

    @model_validator(mode="before")
    @classmethod
    def _one_monitor_is_a_list(cls, values: object) -> object:
        if isinstance(values, dict) and isinstance(values.get("monitor"), str):
            values = dict(values) | {"monitor": [values["monitor"]]}
        return values


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
        if self.data.lanes % train.most_groups:
            key = "lane_groups" if train.most_groups == train.lane_groups else "updates_per_window"
            errors.append(
                f"train.{key} {train.most_groups} does not divide data.lanes {self.data.lanes};"
                f" choose one of {divisors(self.data.lanes)}"
            )
        errors += [
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
        errors += self._only_for_gptb()
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
        if errors:
            raise ValueError("\n".join(errors))
        return self

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


def below_one(options: object, *names: str) -> list[str]:
    """A line for each of these options of a verb that was given and is below 1."""
    values = [(name, getattr(options, name)) for name in names]
    return [
        f"--{name.replace('_', '-')} {value}: must be at least 1"
        for name, value in values
        if value is not None and value < 1
    ]


def divisors(n: int) -> list[int]:
    """All divisors of `n`, ascending: the valid choices that a message names."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def load_config(source: str | None, overrides: Mapping[str, object]) -> Config:
    """The configuration of a recipe's name or YAML file, with dotted `overrides` on top.

    Raises `ConfigError` with one line for each thing that is wrong: key, value and remedy.
    """
    if source is not None and not source.strip():
        raise ConfigError("--config '': is empty (a variable that is not set?); name a recipe or a file")
    values = _read_yaml(source) if source else {}
    for key, value in overrides.items():
        *groups, name = key.split(".")
        target = values
        for group in groups:
            inner = target.setdefault(group, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{source}: '{group}' must hold keys, not the value {inner!r}")
            target = inner
        target[name] = value
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_line(e) for e in error.errors())) from None


def save_config(config: Config) -> str:
    """`config` as YAML text; `load_config` of it gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def _check_keys(node: yaml.Node | None, seen: set[int]) -> None:
    """Raises YAMLError for a key that comes twice: of two groups of a name yaml 6.0 drops the first without a word."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    lines: dict[str, int] = {}
    for part in node.value if isinstance(node, yaml.CollectionNode) else ():
        key, value = part if isinstance(part, tuple) else (None, part)
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(f"'{key.value}' is in line {lines[key.value]} and in line {line}; join them")
            lines[key.value] = line
        _check_keys(value, seen)


def _read_yaml(source: str) -> dict[str, object]:
    path = Path(source)
    recipe = RECIPES / f"{source}.yaml"
    if not path.is_file() and recipe.is_file():
        path = recipe
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise ConfigError(f"--config {source}: no such file, and no recipe of that name (recipes: {names})")
    try:
        text = path.read_text(encoding="utf-8-sig")
        _check_keys(yaml.compose(text, yaml.SafeLoader), set())
        values = yaml.safe_load(text) or {}
    except OSError:
        raise
    except Exception as error:  # yaml raises what comes: ValueError for 2020-13-45, KeyError for !!bool x
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold groups of keys (model:, data:, ...), not {type(values).__name__}")
    return {name: value for name, value in values.items() if value is not None}


def _keys() -> list[str]:
    """Every key that a configuration may have, dotted, and its groups."""
    keys = list(Config.model_fields)
    for group, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Group):
            keys += [f"{group}.{key}" for key in field.annotation.model_fields]
    return keys


def _line(error: ErrorDetails) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{where}: required; give --{where} VALUE or set it in the configuration file"
    if error["type"] == "extra_forbidden":
        near = nearest(where, _keys())
        return f"{where}: unknown key; " + (f"did you mean {near}?" if near else "`gptb-ds train --help` lists them")
    if error["type"] == "value_error":  # a cross-field check of ours: it names the keys itself
        return str(error["ctx"]["error"])
    return f"{where}: {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"
