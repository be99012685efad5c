"""What compresses each layer's K and V: one setting per layer and side, and the compressors made of it."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from gpt2.common.errors import PluginError
from gpt2.compression.codecs import (
    IDENTITY,
    Compressor,
    IdentityCompressor,
    Transform,
    basis_of,
    full_rank,
    needs_calibration,
    quantizer_of,
)
from gpt2.compression.codecs.base import SIDES

if TYPE_CHECKING:
    from gpt2.compression.calibration.fit import Calibration

TARGETS = {"v": ("v",), "k": ("k",), "kv": ("k", "v")}


@dataclass(frozen=True)
class Setting:
    """Codec of one layer's K or V; K and V of a layer have the same where it is joint.

    rank: coordinates kept; None is the calibration's default, or all there are. bits: per coordinate; of an adjustable
    quantizer, everything counted and on average over the layers. quantizer: the one that `bits` means when None.
    """

    codec: str = IDENTITY
    rank: int | None = None
    bits: float = 16
    quantizer: str | None = None

    def __str__(self) -> str:
        basis = f"{self.codec} rank {self.rank}" if basis_of(self.codec).ranked else self.codec
        return f"{basis}, {self.bits:g} bits" + (f" {self.quantizer}" if self.quantizer else "")


# Side, "k" or "v", to a setting per layer; None stores the layer's vectors as they are
Plan = dict[str, list[Setting | None]]


def uniform(target: str, num_layers: int, setting: Setting, layers: Container[int] | None = None) -> Plan:
    """The same setting on the sides of `target` ("v", "k" or "kv") in every layer, or in some `layers` only."""
    coded = [setting if layers is None or layer in layers else None for layer in range(num_layers)]
    return {side: list(coded) if side in TARGETS[target] else [None] * num_layers for side in SIDES}


def needs_calibration_file(plan: Plan) -> bool:
    """Whether any layer's codec is fitted to statistics."""
    return any(needs_calibration(setting.codec) for settings in plan.values() for setting in settings if setting)


def build(
    plan: Plan,
    head_dim: int,
    calibration: Calibration | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[list[Compressor], list[Compressor]]:
    """K and V compressors of a plan, one per layer. calibration: None only where no codec needs one.

    dtype, device: of the transforms. Layers that share a fixed transform share its compressor.
    """
    fixed: dict[Setting | None, Compressor] = {None: IdentityCompressor()}

    def one(side: str, layer: int, setting: Setting | None) -> Compressor:
        if setting is None or not needs_calibration(setting.codec):
            if setting not in fixed:
                transform = fixed_transform(setting, head_dim)
                quantizer = quantizer_of(setting.quantizer, setting.bits)
                fixed[setting] = Compressor(quantizer, transform and transform.to(device, dtype))
            return fixed[setting]
        if calibration is None:
            raise PluginError(f"layer {layer}, {side.upper()}: codec {setting.codec} needs a calibration")
        quantizer = quantizer_of(setting.quantizer, setting.bits)
        quantizer = calibration.quantizer(quantizer, side, layer, setting.codec)
        transform = calibration.transform(side, layer, setting.rank, setting.codec)
        return Compressor(quantizer, transform.to(device, dtype))

    def pair(layer: int, k: Setting | None, v: Setting | None) -> tuple[Compressor, Compressor]:
        if not any(setting and basis_of(setting.codec).joint for setting in (k, v)):
            return one("k", layer, k), one("v", layer, v)
        if k != v:
            raise PluginError(f"layer {layer}: a joint codec is for K and V together: give both sides the same setting")
        both = one("k", layer, k)
        return both, both

    pairs = [pair(layer, k, v) for layer, (k, v) in enumerate(zip(plan["k"], plan["v"], strict=True))]
    return [k for k, _ in pairs], [v for _, v in pairs]


def fixed_transform(setting: Setting, head_dim: int) -> Transform | None:
    """Transform of a codec that needs no calibration; None for identity."""
    transform = basis_of(setting.codec).transform(head_dim)
    return transform and transform.truncate(setting.rank or full_rank(setting.codec, head_dim))


def compressors_for(
    target: str,
    bits: float,
    num_layers: int,
    calibration: Calibration | None,
    *,
    rank: int | None = None,
    codec: str | None = None,
    quantizer: str | None = None,
    head_dim: int | None = None,
    layers: Container[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[list[Compressor], list[Compressor]]:
    """K and V compressors with one setting on the sides of `target`, identity on the other.

    codec: the calibration's when None, identity without one. head_dim: needed where there is no calibration and the
    codec has a basis. The rest as in `uniform` and `build`.
    """
    codec = codec or (calibration.meta["codec"] if calibration else IDENTITY)
    head_dim = calibration.geometry.head_dim if calibration else head_dim
    plan = uniform(target, num_layers, Setting(codec, rank, bits, quantizer), layers)
    return build(plan, head_dim, calibration, dtype=dtype, device=device)


def plan_record(plan: Plan) -> dict[str, list[dict | None]]:
    """A plan as a preset's `layers` key has it."""
    return {side: [setting and setting_record(setting) for setting in settings] for side, settings in plan.items()}


def setting_record(setting: Setting) -> dict:
    """A setting as a preset has it: without a quantizer where `bits` means it."""
    return {key: value for key, value in asdict(setting).items() if key != "quantizer" or value is not None}
