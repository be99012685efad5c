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
    Quantizer,
    Transform,
    adjustable_quantizers,
    basis_of,
    full_rank,
    multi_head_bases,
    needs_calibration,
    quantizer_of,
)
from gpt2.compression.codecs.base import SIDES
from gpt2.models.geometry import Geometry

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


# Side, "k" or "v", to a setting per layer; None stores the layer's vectors as they are, where it keeps any
Plan = dict[str, list[Setting | None]]
Compressors = list[Compressor | None]  # one per layer, None for layers without K and V


def uniform(target: str, geometry: Geometry | int, setting: Setting, layers: Container[int] | None = None) -> Plan:
    """The same setting on the sides of `target` ("v", "k" or "kv") in every layer, or in some `layers` only.

    geometry: layers without K and V get no setting; a number stands for as many layers that all have both.
    """
    if isinstance(geometry, int):
        num_layers, having = geometry, range(geometry)
    else:
        num_layers, having = geometry.num_layers, geometry.attention
    coded = [setting if n in having and (layers is None or n in layers) else None for n in range(num_layers)]
    return {side: list(coded) if side in TARGETS[target] else [None] * num_layers for side in SIDES}


def needs_calibration_file(plan: Plan) -> bool:
    """Whether any layer's codec is fitted to statistics."""
    return any(needs_calibration(setting.codec) for settings in plan.values() for setting in settings if setting)


def build(
    plan: Plan,
    geometry: Geometry,
    calibration: Calibration | None = None,
    *,
    context_length: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[Compressors, Compressors]:
    """K and V compressors of a plan, one per layer of the cache, None for layers that keep no K and V.

    calibration: None only where no codec needs one. context_length: tokens for which bits are shared out over layers,
    some of which hold no more than a window of them; None where all layers count alike. dtype, device: of the
    transforms. Layers that share a fixed transform share its compressor. Raises PluginError for a plan that doesn't fit
    the layers.
    """
    if any(len(plan[side]) != geometry.num_layers for side in SIDES):
        lengths = " and ".join(str(len(plan[side])) for side in SIDES)
        raise PluginError(f"the plan has {lengths} settings of K and V, but the cache has {geometry.num_layers} layers")
    identity = IdentityCompressor()
    fixed: dict[tuple[Setting, int], Compressor] = {}

    def one(side: str, layer: int, setting: Setting | None) -> Compressor:
        if setting is None:
            return identity
        width = geometry.layers[layer].side(side).width
        _check_rank(setting, width, f"layer {layer}, {side.upper()}")
        quantizer = quantizer_for(setting)
        if not needs_calibration(setting.codec):
            if (setting, width) not in fixed:
                transform = fixed_transform(setting, width)
                fixed[setting, width] = Compressor(quantizer, transform and transform.to(device, dtype))
            return fixed[setting, width]
        if calibration is None:
            raise PluginError(f"layer {layer}, {side.upper()}: codec {setting.codec} needs a calibration")
        quantizer = calibration.quantizer(quantizer, side, layer, setting.codec, context_length)
        transform = calibration.transform(side, layer, setting.rank, setting.codec)
        bound = side == "k" and basis_of(setting.codec).bound_to_positions
        return Compressor(quantizer, transform.to(device, dtype), calibration.meta.get("seq_len") if bound else None)

    def pair(layer: int, k: Setting | None, v: Setting | None) -> tuple[Compressor | None, Compressor | None]:
        own = geometry.layers[layer]
        if not own.attends:
            if k or v:
                raise PluginError(
                    f"layer {layer}: it keeps no K and V ({own.kind}), so it can't have a codec: {k or v}"
                )
            return None, None
        joint = next((setting for setting in (k, v) if setting and basis_of(setting.codec).joint), None)
        if joint is None:
            return one("k", layer, k), one("v", layer, v)
        if k != v:
            raise PluginError(f"layer {layer}: a joint codec is for K and V together: give both sides the same setting")
        if reason := basis_of(joint.codec).misfit_of(layer, own):
            raise PluginError(reason)
        both = one("k", layer, k)
        return both, both

    pairs = [pair(layer, k, v) for layer, (k, v) in enumerate(zip(plan["k"], plan["v"], strict=True))]
    return [k for k, _ in pairs], [v for _, v in pairs]


def quantizer_for(setting: Setting) -> Quantizer:
    """The quantizer of a setting. Raises PluginError for one that doesn't exist, or that needs another codec."""
    quantizer = quantizer_of(setting.quantizer, setting.bits)
    if quantizer.calibrated and not basis_of(setting.codec).multi_head:
        shared = ", ".join(multi_head_bases())
        raise PluginError(
            f"quantizer {setting.quantizer} takes widths from a calibration, which codec {setting.codec} has none in: "
            f"use a codec that heads share ({shared}), or quantizer {adjustable_quantizers()[0]}"
        )
    return quantizer


def kept_whole(codec: str) -> bool:
    """Whether a codec stores all coordinates of any vectors, whatever the rank of its setting."""
    return codec == IDENTITY or basis_of(codec).multi_head


def _check_rank(setting: Setting, width: int, where: str) -> None:
    """Raise PluginError for a rank that a layer's K or V, of `width` channels, is too narrow for."""
    most = full_rank(setting.codec, width)
    if not kept_whole(setting.codec) and setting.rank is not None and setting.rank > most:
        raise PluginError(f"{where}: rank {setting.rank} is out of range: codec {setting.codec} has {most} coordinates "
                          f"there, use 1 to {most}")  # fmt: skip


def fixed_transform(setting: Setting, width: int) -> Transform | None:
    """Transform of a codec that needs no calibration, for heads of `width` channels; None for identity."""
    transform = basis_of(setting.codec).transform(width)
    return transform and transform.truncate(setting.rank or full_rank(setting.codec, width))


def compressors_for(
    target: str,
    bits: float,
    geometry: Geometry | None,
    calibration: Calibration | None = None,
    *,
    rank: int | None = None,
    codec: str | None = None,
    quantizer: str | None = None,
    layers: Container[int] | None = None,
    context_length: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[Compressors, Compressors]:
    """K and V compressors with one setting on the sides of `target`, identity on the other.

    geometry: the calibration's where there is one, and then may be None. codec: the calibration's when None, identity
    without one. The rest as in `uniform` and `build`.
    """
    codec = codec or (calibration.meta["codec"] if calibration else IDENTITY)
    geometry = calibration.geometry if calibration else geometry
    plan = uniform(target, geometry, Setting(codec, rank, bits, quantizer), layers)
    return build(plan, geometry, calibration, context_length=context_length, dtype=dtype, device=device)


def plan_record(plan: Plan) -> dict[str, list[dict | None]]:
    """A plan as a preset's `layers` key has it."""
    return {side: [setting and setting_record(setting) for setting in settings] for side, settings in plan.items()}


def setting_record(setting: Setting) -> dict:
    """A setting as a preset has it: without a quantizer where `bits` means it."""
    return {key: value for key, value in asdict(setting).items() if key != "quantizer" or value is not None}
