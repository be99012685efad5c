"""What compresses each layer's K and V: one setting per layer and side, and the compressors made of it."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from gpt2.compression.calibration import SIDES, Calibration, load_calibration
from gpt2.compression.codecs import (
    IDENTITY,
    Compressor,
    IdentityCompressor,
    Transform,
    basis_of,
    full_rank,
    needs_calibration,
    quantizer_for_bits,
)
from gpt2.errors import PluginError

TARGETS = {"v": ("v",), "k": ("k",), "kv": ("k", "v")}


@dataclass(frozen=True)
class Setting:
    """Codec of one layer's K or V. rank: coordinates kept; None is the calibration's default, or all there are."""

    codec: str = IDENTITY
    rank: int | None = None
    bits: int = 16

    def __str__(self) -> str:
        basis = f"{self.codec} rank {self.rank}" if needs_calibration(self.codec) else self.codec
        return f"{basis}, {self.bits} bits"


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
                fixed[setting] = Compressor(quantizer_for_bits(setting.bits), transform and transform.to(device, dtype))
            return fixed[setting]
        if calibration is None:
            raise PluginError(f"layer {layer}, {side.upper()}: codec {setting.codec} needs a calibration")
        transform = calibration.transform(side, layer, setting.rank, setting.codec)
        return Compressor(quantizer_for_bits(setting.bits), transform.to(device, dtype))

    return tuple([one(side, layer, setting) for layer, setting in enumerate(plan[side])] for side in SIDES)


def fixed_transform(setting: Setting, head_dim: int) -> Transform | None:
    """Transform of a codec that needs no calibration; None for identity."""
    basis = basis_of(setting.codec)
    return basis and basis.transform(head_dim).truncate(setting.rank or full_rank(setting.codec, head_dim))


def compressors_for(
    target: str,
    bits: int,
    num_layers: int,
    calibration: Calibration | None,
    *,
    rank: int | None = None,
    codec: str | None = None,
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
    plan = uniform(target, num_layers, Setting(codec, rank, bits), layers)
    return build(plan, head_dim, calibration, dtype=dtype, device=device)


def load_calibrated_compressors(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    quantize_bits: int | None = None,
    *,
    rank: int | None = None,
    codec: str | None = None,
) -> tuple[list[Compressor], list[Compressor], dict]:
    """Compressors for every layer's K and V from a calibration file, and the file's metadata.

    quantize_bits: 16 (also None: no quantization), 8 or 4. rank: the file's default when None. The lists are the
    caller's to edit layer by layer before a CompressedDynamicCache is made of them (guide, per-layer compression).
    """
    calibration = load_calibration(path)
    L = calibration.geometry.num_layers
    k, v = compressors_for(
        "kv", quantize_bits or 16, L, calibration, rank=rank, codec=codec, dtype=dtype, device=device
    )
    return k, v, dict(calibration.meta)


def plan_record(plan: Plan) -> dict[str, list[dict | None]]:
    """A plan as a preset's `layers` key has it."""
    return {side: [setting and asdict(setting) for setting in settings] for side, settings in plan.items()}
