"""Policies: named trade-offs between memory, quality and speed, under the names that people import.

What lies behind them is `gpt2.compression.presets.policies`.
"""

from gpt2.compression.presets.policies import (
    KVPolicyName,
    build_compressor_config_for_policy,
    choose_policy_for_run,
    create_cache_from_policy,
)

__all__ = [
    "KVPolicyName",
    "build_compressor_config_for_policy",
    "choose_policy_for_run",
    "create_cache_from_policy",
]
