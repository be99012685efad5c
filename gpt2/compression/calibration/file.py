"""The calibration file: written atomically, read with every shape checked, found again when it fits.

A whole file has statistics and bases for every codec; a compact one has a measured codec alone, with its basis in half
precision: small enough to be kept beside the presets that share it. `.pt` is PyTorch's format; a name that ends in
`.safetensors` has the same as safetensors.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from gpt2.common import files, tensor_file
from gpt2.common.errors import BadArtefact, CalibrationNotFound, PluginError, brief
from gpt2.compression.calibration.bit_allocation import LARGEST, parse_measured
from gpt2.compression.calibration.fit import Calibration
from gpt2.compression.calibration.statistics import Statistics
from gpt2.compression.codecs import full_rank, is_measured, multi_head_bases, needs_calibration, single_heads
from gpt2.compression.codecs.base import SIDES
from gpt2.compression.codecs.moments import Moments
from gpt2.models.geometry import Geometry

FORMAT = "kv-plugin-calibration/1"
META = {
    "model": str,
    "fingerprint": str,
    "num_layers": int,
    "num_kv_heads": int,
    "head_dim": int,
    "rank": int,
    "codec": str,
    "sink_tokens": int,
    "samples": int,
    "seq_len": int,
    "seed": int,
    "text": str,
    "text_spec": str,
    "text_sha256": str,
    "tokens": int,
    "dtype": str,
    "versions": dict,
}
# In what numbers are kept, and what none of a real model comes near
STORED = {"bases": torch.float32, "statistics": torch.float64}
REACH = {"bases": LARGEST, "statistics": LARGEST**4}  # sums of squares, weighted by squares
LEAST = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1, "sink_tokens": 0, "samples": 1, "seq_len": 1}


def save_calibration(calibration: Calibration, path: str | Path) -> Path:
    """Write a calibration atomically, as `.pt` or `.safetensors`."""
    record = {"format": FORMAT, "meta": calibration.meta}
    if calibration.statistics is not None:
        record |= {
            "bases": calibration.bases,
            "statistics": _statistics_record(calibration.statistics),
        }
    record |= {name: codec.record() for name, codec in calibration.multi_head.items()}
    return tensor_file.write(path, record)


def _statistics_record(statistics: Statistics) -> dict:
    record: dict = {"metrics": {}}
    for side in SIDES:
        moments = getattr(statistics, side)
        record |= {f"{side}_{name}": getattr(moments, name) for name in ("count", "mean", "scatter")}
        record["metrics"][side] = dict(moments.metrics)
    return record


def load_calibration(path: str | Path) -> Calibration:
    """Read a calibration. Raises BadArtefact, naming file, field, expected and found; never runs code from the file."""
    path = Path(path)
    if not os.path.exists(path):  # which takes any name, a pathlib.Path no long one
        raise CalibrationNotFound(
            f"Calibration file not found: {path}. Give its full path, or make it: "
            f"python scripts/calibrate_kv_lowrank.py --output {path}"
        )
    return _parse(tensor_file.read(path, "calibration file"), path)


def _parse(record, path: Path) -> Calibration:
    def expect(good: bool, field: str, expected, found) -> None:
        if not good:
            raise BadArtefact(f"{path}: field {brief(field)}: expected {expected}, found {found}: make the file again")

    expect(isinstance(record, dict), "file", "a dict", type(record).__name__)
    expect(record.get("format") == FORMAT, "format", repr(FORMAT), brief(record.get("format")))
    meta = record.get("meta")
    expect(isinstance(meta, dict), "meta", "a dict", type(meta).__name__)
    for name, kind in META.items():
        expect(type(meta.get(name)) is kind, f"meta.{name}", kind.__name__, brief(meta.get(name)))
    tensors = [name for name, value in meta.items() if isinstance(value, Tensor)]
    expect(not tensors, f"meta.{''.join(tensors[:1])}", "a plain value", "a tensor")
    for name, least in LEAST.items():
        expect(meta[name] >= least, f"meta.{name}", f"{least} or more", meta[name])
    L, H, d = meta["num_layers"], meta["num_kv_heads"], meta["head_dim"]
    expect(1 <= meta["rank"] <= d, "meta.rank", f"1 to {d}", meta["rank"])
    expect(_is_calibrated(meta["codec"]), "meta.codec", "a calibrated codec, such as pca", brief(meta["codec"]))
    measured = {
        name: parse_measured(record[name], basis, Geometry(L, H, d), expect)
        for name, basis in multi_head_bases().items()
        if name in record
    }
    for codec in measured.values():
        codec.where = str(path)
    own = meta["codec"]
    expect(own in measured or not is_measured(own), own, f"a {own} codec, as meta.codec says", "none")
    if measured and "statistics" not in record:
        return Calibration(meta, None, {}, measured)

    def tensor(group: str, name: str, *shape: int) -> Tensor:
        value = record.get(group)
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        found = brief(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
        expect(isinstance(value, Tensor) and list(value.shape) == list(shape), f"{group}.{name}", list(shape), found)
        expect(value.is_floating_point(), f"{group}.{name}", "floating-point numbers", value.dtype)
        value = value.to(STORED[group])
        within = float(value.abs().max()) < REACH[group]  # which NaN isn't
        expect(within, f"{group}.{name}", f"finite numbers below {REACH[group]:g}", "NaN or larger ones")
        return value

    r = full_rank(single_heads(meta["codec"]), d)
    shapes = {"mean": (L, H, d), "E": (L, H, d, r), "D": (L, H, r, d), "spectrum": (L, H, r)}
    bases = {
        side: {name: tensor("bases", f"{side}.{name}", *shape) for name, shape in shapes.items()} for side in SIDES
    }
    moments = [
        Moments(
            tensor("statistics", f"{side}_count", L),
            tensor("statistics", f"{side}_mean", L, H, d),
            tensor("statistics", f"{side}_scatter", L, H, d, d),
        )
        for side in SIDES
    ]
    metrics = record["statistics"].get("metrics", {})  # older files have none
    for side, own in zip(SIDES, moments, strict=True):
        names = metrics.get(side, {}) if isinstance(metrics, dict) else metrics
        expect(isinstance(names, dict), "statistics.metrics", "a dict of each side", type(names).__name__)
        own.metrics = {name: tensor("statistics", f"metrics.{side}.{name}", L, H, d, d) for name in names}
    return Calibration(meta, Statistics(*moments), bases, measured)


def _is_calibrated(codec: str) -> bool:
    try:
        return needs_calibration(codec)
    except PluginError:
        return False


def calibration_folders() -> list[Path]:
    """Where calibrations lie: results/calibrations of the working folder and of this checkout."""
    here = Path("results") / "calibrations"
    return [here] if here.resolve() == (files.RESULTS / "calibrations") else [here, files.RESULTS / "calibrations"]
