"""The run's configuration: its keys, their defaults, and every check that one value makes on another."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

RECIPES = Path(__file__).parent / "recipes"


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one line for each error."""


class Group(BaseModel):
    """A frozen group of keys; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class ModelConfig(Group):
    num_slots: int = Field(20, ge=2, description="S: positions the blocks run over (S-1 state vectors and one token)")
    n_layer: int = Field(12, ge=1, description="GPT-2 blocks")
    n_head: int = Field(12, ge=1, description="attention heads a block")
    n_embd: int = Field(768, ge=1, description="E: width of a hidden vector")
    rebias: bool = Field(True, description="attention between slots is bidirectional; off, the model is memoryless")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of embeddings, attention and residuals")
    init_from: str | None = Field(None, description="GPT-2 folder or hub name whose weights start the blocks")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.n_embd % self.n_head:
            raise ValueError(
                f"model.n_embd {self.n_embd} is not divisible by model.n_head {self.n_head}; choose a multiple"
            )
        return self


class DataConfig(Group):
    path: list[str] = Field(min_length=1, description="stores made by `gptb-ds prepare` (several make a mixture)")
    weights: list[float] | None = Field(None, description="share of the tokens for each store of a mixture")
    lanes: int = Field(64, ge=1, description="L: global document streams, fixed for a run")
    window: int = Field(16, ge=1, description="K: columns of one forward/backward")
    seed: int = Field(0, ge=0, description="order of the documents")
    max_document_tokens: int | None = Field(
        None, ge=1, description="cut longer documents into pieces of so many tokens"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_path_is_a_list(cls, values: Any) -> Any:
        if isinstance(values, dict):
            values = dict(values)
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


class OptimConfig(Group):
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    warmup_updates: int = Field(100, ge=0, description="updates of linear warm-up")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="after the warm-up")
    weight_decay: float = Field(0.1, ge=0, description="AdamW decay of matrices; vectors and the state are not decayed")
    clip: float = Field(1.0, ge=0, description="global gradient norm; 0 = no clipping")


class TrainConfig(Group):
    updates: int = Field(1000, ge=1, description="optimizer steps of the whole run")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of weights and activations in a step")
    lane_groups: int = Field(1, ge=1, description="gradient accumulation: a rank's lanes in so many groups")
    recompute_every: int = Field(0, ge=0, description="keep states every c steps and recompute inside (0 = off)")
    compile: bool = Field(False, description="compile the model step with torch.compile")
    seed: int = Field(0, ge=0, description="initialisation and dropout")
    max_bad_updates: int = Field(10, ge=1, description="stop after so many non-finite updates in a row")


class RunConfig(Group):
    dir: str = Field("runs/run", description="folder of the run")
    resume: str = Field("auto", description="auto, never, or a checkpoint's folder")
    save_every: int = Field(500, ge=0, description="updates between checkpoints (0 = only at the end)")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    log_every: int = Field(10, ge=1, description="updates between progress lines")
    eval_every: int = Field(
        500, ge=0, description="updates between evaluations, the first before any (0 = only at the end)"
    )
    eval_tokens: int = Field(100_000, ge=1, description="held-out tokens of an evaluation while training")
    sample_every: int = Field(0, ge=0, description="updates between text samples (0 = none)")
    sample_tokens: int = Field(200, ge=1, description="tokens of a sample")
    max_seconds: float | None = Field(None, gt=0, description="stop with a checkpoint and exit code 85 after so long")
    hang_seconds: float = Field(600, gt=0, description="end the job when nothing moves for so long")
    stop_margin: float = Field(120, ge=0, description="seconds before the end of a Slurm job at which to stop")
    on_save_error: Literal["stop", "continue"] = Field("stop", description="when a checkpoint cannot be written")
    monitor: list[Literal["tensorboard", "csv", "wandb"]] = Field([], description="metric sinks beside metrics.jsonl")

    @model_validator(mode="before")
    @classmethod
    def _one_monitor_is_a_list(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("monitor"), str):
            values = dict(values) | {"monitor": [values["monitor"]]}
        return values


class Config(Group):
    """A resolved run: `RUN/config.yaml` holds it, enough to repeat the run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    run: RunConfig = RunConfig()
    deepspeed_config: str | None = Field(None, description="DeepSpeed policy (JSON file, see ds_configs/)")

    @model_validator(mode="after")
    def _groups_fit(self) -> Config:
        errors = []
        if self.optim.warmup_updates > self.train.updates:
            errors.append(
                f"optim.warmup_updates {self.optim.warmup_updates} is above train.updates {self.train.updates};"
                " lower it or train longer"
            )
        if self.data.lanes % self.train.lane_groups:
            errors.append(
                f"train.lane_groups {self.train.lane_groups} does not divide data.lanes {self.data.lanes};"
                f" choose one of {divisors(self.data.lanes)}"
            )
        if self.train.recompute_every > self.data.window:
            errors.append(
                f"train.recompute_every {self.train.recompute_every} is above data.window {self.data.window};"
                " choose at most the window, or 0 for off"
            )
        if errors:
            raise ValueError("\n".join(errors))
        return self


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


def load_config(source: str | None, overrides: dict[str, Any]) -> Config:
    """The configuration of a recipe's name or YAML file, with dotted `overrides` on top.

    Raises `ConfigError` with one line for each thing that is wrong: key, value and remedy.
    """
    values = _read_yaml(source) if source else {}
    for key, value in overrides.items():
        *groups, name = key.split(".")
        target = values
        for group in groups:
            target = target.setdefault(group, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{source}: '{group}' must hold keys, not the value {target!r}")
        target[name] = value
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_line(e) for e in error.errors())) from None


def save_config(config: Config) -> str:
    """`config` as YAML text; `load_config` of it gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def _read_yaml(source: str) -> dict[str, Any]:
    path = Path(source)
    recipe = RECIPES / f"{source}.yaml"
    if not path.is_file() and recipe.is_file():
        path = recipe
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise ConfigError(f"--config {source}: no such file, and no recipe of that name (recipes: {names})")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold groups of keys (model:, data:, ...), not {type(values).__name__}")
    return {name: value for name, value in values.items() if value is not None}


def _line(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{where}: required; give --{where} VALUE or set it in the configuration file"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key; `gptb-ds train --help` lists them"
    if error["type"] == "value_error":  # a cross-field check of ours: it names the keys itself
        return str(error["ctx"]["error"])
    return f"{where}: {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"
