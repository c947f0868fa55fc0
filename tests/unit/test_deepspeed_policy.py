"""What a policy leaves open is chosen by us, and what DeepSpeed would do wrongly is refused."""

from __future__ import annotations

import json

import pytest

from gptb_ds.config import ConfigError
from gptb_ds.training.deepspeed_policy import check_precision, read_policy


@pytest.mark.parametrize("content", [None, {"zero_optimization": {"stage": 2}}, {"zero_optimization": {"stage": 3}}])
def test_buckets_are_small_and_nothing_is_timed_without_being_asked(content, tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(content))
    policy = read_policy(str(path) if content else None)
    zero = policy["zero_optimization"]
    buckets = [value for key, value in zero.items() if key.endswith("bucket_size")]
    assert len(buckets) == 2 and max(buckets) <= 50_000_000
    assert zero["stage"] == (content["zero_optimization"]["stage"] if content else 1)
    assert zero["overlap_comm"] is False
    assert policy["timers"]["throughput"]["enabled"] is False


def test_a_policy_that_says_how_is_obeyed(tmp_path):
    path = tmp_path / "policy.json"
    said = {"zero_optimization": {"stage": 1, "overlap_comm": True, "reduce_bucket_size": 7}}
    said["timers"] = {"throughput": {"enabled": True}}
    path.write_text(json.dumps(said))
    policy = read_policy(str(path))
    assert policy["zero_optimization"] | said["zero_optimization"] == policy["zero_optimization"]
    assert policy["timers"] == said["timers"]


def test_fp16_is_refused_where_the_loss_would_not_be_scaled():
    with pytest.raises(ConfigError, match=r"fp16 at ZeRO stage 0: .* choose bf16, or a policy of stage 1"):
        check_precision("fp16", "cuda", {"zero_optimization": {"stage": 0}})
    with pytest.raises(ConfigError, match="fp16 at ZeRO stage 0"):
        check_precision("fp16", "cuda", {})
    with pytest.raises(ConfigError, match="on the CPU"):
        check_precision("fp16", "cpu", {"zero_optimization": {"stage": 1}})
    check_precision("fp16", "cuda", {"zero_optimization": {"stage": 1}})
    check_precision("bf16", "cpu", {})
