"""DeepSpeed policy files: what they may say, and that they don't say what the run's configuration owns."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from gptb_ds.config import ConfigError

# What a policy file holds: DeepSpeed's keys.
Policy = dict[str, Any]

# What the run's configuration owns; a policy file that sets one of them would be a second, silent source.
_OWNED = {
    "train_batch_size": "data.lanes",
    "train_micro_batch_size_per_gpu": "data.lanes and train.lane_groups",
    "gradient_accumulation_steps": "train.lane_groups",
    "gradient_clipping": "optim.clip",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "optimizer": "the optim group",
    "scheduler": "optim.schedule",
    "tensorboard": "run.monitor",
    "csv_monitor": "run.monitor",
    "wandb": "run.monitor",
    "steps_per_print": "run.log_every",
    "zero_force_ds_cpu_optimizer": "the engine",
}
# DeepSpeed 0.19 ignores a key that it doesn't know: "zero_optimisation" would train at stage 0.
_KNOWN = {
    *("zero_optimization", "zero_allow_untested_optimizer", "communication_data_type", "prescale_gradients"),
    *("seq_parallel_communication_data_type", "gradient_predivide_factor", "sparse_gradients", "aio", "comms_logger"),
    *("flops_profiler", "wall_clock_breakdown", "memory_breakdown", "dump_state", "timers", "data_types", "checkpoint"),
}


# DeepSpeed's own buckets of 5e8 values take 1 to 2 GB of a GPU's memory, whatever the model. A window's gradients are
# complete only at the end of its backward pass, so that overlapping their exchange with it gains nothing either.
_BUCKET = 50_000_000
_ZERO_DEFAULTS: dict[int, Policy] = {
    0: {},
    1: {"overlap_comm": False, "reduce_bucket_size": _BUCKET, "allgather_bucket_size": _BUCKET},
    3: {"overlap_comm": False, "reduce_bucket_size": _BUCKET, "stage3_prefetch_bucket_size": _BUCKET},
}
_ZERO_DEFAULTS[2] = _ZERO_DEFAULTS[1]


def read_policy(path: str | None) -> Policy:
    """The DeepSpeed policy of a JSON file (ZeRO stage, offload, buckets); stage 1 when there is none.

    Raises ConfigError with one line for each key that belongs to the run's configuration, or that is none.
    """
    return with_defaults({"zero_optimization": {"stage": 1}} if path is None else _read(path))


def with_defaults(policy: Policy) -> Policy:
    """`policy`, and what it leaves open as we choose it and not DeepSpeed."""
    zero = policy.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    zero = _ZERO_DEFAULTS.get(stage if isinstance(stage, int) else -1, {}) | zero
    # Its throughput timer waits for the device twice a lane group, for a figure that nobody reads.
    return {"timers": {"throughput": {"enabled": False}}} | policy | {"zero_optimization": zero}


def check_precision(precision: str, device: str, policy: Policy) -> None:
    """Raises ConfigError for a precision that DeepSpeed refuses, or trains wrongly in without a word."""
    if precision != "fp16":
        return
    if device == "cpu":
        raise ConfigError("train.precision fp16: DeepSpeed refuses it on the CPU; choose bf16 or fp32")
    if zero_stage(policy) == 0:
        # `DeepSpeedEngine.backward` scales the loss only for its ZeRO optimizers, but FP16_UnfusedOptimizer
        # (runtime/fp16/unfused_optimizer.py:244) divides the gradients by the scale: they come out 65,536 times too
        # small, and clipping never acts (upstream PR 8393).
        raise ConfigError(
            "train.precision fp16 at ZeRO stage 0: DeepSpeed does not scale the loss there; choose bf16, or a policy of"
            " stage 1 (--deepspeed_config ds_configs/zero1.json)"
        )


def _read(path: str) -> Policy:
    twice: set[str] = set()

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = [name for name, _ in pairs]
        twice.update(name for name in names if names.count(name) > 1)
        return dict(pairs)

    try:
        policy = json.loads(Path(path).read_text(), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--deepspeed_config {path}: cannot be read as JSON: {error}") from None
    if not isinstance(policy, dict):
        raise ConfigError(f"--deepspeed_config {path}: must be a JSON object")
    wrong = [f"{path}: '{key}' is there more than once; which is meant?" for key in sorted(twice)]
    for key in policy:
        if key in _OWNED:
            wrong.append(f"{path}: '{key}' belongs to {_OWNED[key]}; remove it here")
        elif key not in _KNOWN:
            choices = get_close_matches(key, _KNOWN) or sorted(_KNOWN)
            wrong.append(f"{path}: '{key}' is no key of a policy; choose out of {', '.join(choices)}")
    if not isinstance(policy.get("zero_optimization", {}), dict):
        wrong.append(f"{path}: 'zero_optimization' must be an object, such as {{\"stage\": 2}}")
    if wrong:
        raise ConfigError("\n".join(wrong))
    return policy


def offload_devices(policy: Policy) -> dict[str, str]:
    """Where a policy keeps the optimizer and the parameters, beside the ranks' devices."""
    zero = policy.get("zero_optimization", {})
    return {name: zero.get(name, {}).get("device", "none") for name in ("offload_optimizer", "offload_param")}


def zero_stage(policy: Policy) -> int:
    """The ZeRO stage of a policy."""
    return int(policy.get("zero_optimization", {}).get("stage", 0))
