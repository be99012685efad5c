"""Named trade-offs between memory, quality and speed, for people who say what they need rather than choose codecs."""

from __future__ import annotations

from enum import StrEnum


class KVPolicyName(StrEnum):
    """The tiers of the guide."""

    DEFAULT = "default"
    HIGH_COMPRESSION = "high_compression"
    MEMORY_EMERGENCY = "memory_emergency"


def preset_for_policy(model_config, model_id: str, policy_name: KVPolicyName | str) -> dict:
    raise NotImplementedError
