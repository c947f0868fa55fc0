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


def read_policy(path: str | None) -> Policy:
    """The DeepSpeed policy of a JSON file (ZeRO stage, offload, buckets); stage 1 when there is none.

    Raises ConfigError with one line for each key that belongs to the run's configuration, or that is none.
    """
    if path is None:
        return {"zero_optimization": {"stage": 1, "overlap_comm": False}}
    try:
        policy = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--deepspeed_config {path}: cannot be read as JSON: {error}") from None
    if not isinstance(policy, dict):
        raise ConfigError(f"--deepspeed_config {path}: must be a JSON object")
    wrong = []
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
