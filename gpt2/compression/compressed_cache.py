"""The compressed KV cache, under the names that people import. What lies behind them is in `gpt2.compression.cache`."""

from __future__ import annotations

from pathlib import Path

import torch

from gpt2.common.errors import PluginError, brief
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.cache.recipe import FROM_PRESETS
from gpt2.compression.codecs import Compressor, IdentityCompressor

__all__ = ["CompressedDynamicCache", "IdentityCompressor", "identity_cache", "load_calibrated_compressors"]


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
    # Here, so that a cache without a calibration doesn't load what reads and fits them
    from gpt2.compression.calibration.file import load_calibration
    from gpt2.compression.settings import compressors_for

    if not isinstance(dtype, torch.dtype):
        raise PluginError(f"dtype: expected a dtype of PyTorch, such as torch.float32, got {brief(dtype)}: "
                          "the number of bits is quantize_bits")  # fmt: skip
    calibration = load_calibration(path)
    k, v = compressors_for(
        "kv", quantize_bits or 16, None, calibration, rank=rank, codec=codec, dtype=dtype, device=device
    )
    return k, v, dict(calibration.meta)


def _create(*args, **how) -> CompressedDynamicCache:
    from gpt2.compression.presets import create_cache_from_preset  # loaded by caches that are read from files alone

    return create_cache_from_preset(*args, **how)


def _fingerprint_of(model) -> str:
    from gpt2.compression.presets.build import fingerprint_of

    return fingerprint_of(model)


if FROM_PRESETS.create is None:
    FROM_PRESETS.create, FROM_PRESETS.fingerprint_of = _create, _fingerprint_of
