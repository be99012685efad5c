"""The calibration file: written atomically, and read with every key, shape and number checked.

A whole file has statistics, from which any codec can be fitted, and bases. A compact one has one multi-head basis, in
half precision: small enough to be kept beside the presets that share it. A name that ends in `.pt` gives PyTorch's
format, one that ends in `.safetensors` the same record as safetensors.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from gpt2.common import files, tensor_file
from gpt2.common.errors import CalibrationNotFound, PluginError
from gpt2.common.schema import Anything, Checked, Default, Kind, OneOf, Plain, Record, TensorOf, Text, Whole, parse
from gpt2.compression.calibration.fit import Calibration
from gpt2.compression.calibration.multi_head_fit import LARGEST, multi_head_from, multi_head_schema
from gpt2.compression.calibration.statistics import Statistics
from gpt2.compression.codecs import basis_of, full_rank, multi_head_bases, needs_calibration
from gpt2.compression.codecs.base import SIDES
from gpt2.compression.codecs.moments import Moments
from gpt2.models.geometry import Geometry

FORMAT = "kv-plugin-calibration/1"
REMEDY = "make the file again"


def _check_calibrated(codec: str) -> None:
    if not needs_calibration(codec):
        raise PluginError(f"codec {codec} needs no calibration: expected one that does, such as pca")


_NAME = Text(printable=False)  # names of text files may have any character
_SIZE = Whole(1, 1024)  # more than any model has, and few enough to loop over before the tensors are known to match
META = {
    "model": _NAME,
    "fingerprint": _NAME,
    "num_layers": _SIZE,
    "num_kv_heads": _SIZE,
    "head_dim": _SIZE,
    "rank": Whole(1),
    "codec": Checked(Text(200), _check_calibrated),
    "sink_tokens": Whole(0),
    "samples": Whole(1),
    "seq_len": Whole(1),
    "seed": Whole(),
    "text": _NAME,
    "text_spec": _NAME,
    "text_sha256": _NAME,
    "tokens": Whole(),
    "dtype": _NAME,
    "versions": Record(others=Plain()),
}


def save_calibration(calibration: Calibration, path: str | Path) -> Path:
    """Write a calibration atomically, as `.pt` or `.safetensors`."""
    record = {"format": FORMAT, "meta": calibration.meta}
    if calibration.statistics is not None:
        record |= {"bases": calibration.bases, "statistics": _statistics_record(calibration.statistics)}
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
    return _calibration_from(tensor_file.read(path, "calibration file"), path)


def _calibration_from(record: dict, path: Path) -> Calibration:
    """The calibration that a record holds, once all of it has been checked."""
    head = Record({"format": OneOf((FORMAT,)), "meta": Record(META, Plain())}, Anything())
    meta = parse(record, head, path, remedy=REMEDY)["meta"]
    geometry = Geometry.uniform(meta["num_layers"], meta["num_kv_heads"], meta["head_dim"])
    bases = {name: basis for name, basis in multi_head_bases().items() if name in (*record, meta["codec"])}
    fields: dict[str, Kind] = {"meta": Record({"rank": Whole(1, geometry.head_dim)}, Anything())}
    fields |= {name: multi_head_schema(basis, geometry) for name, basis in bases.items()}
    compact = bool(bases) and "statistics" not in record
    if not compact:
        fields |= _whole_schema(meta["codec"], geometry)
    parsed = parse(record, Record(fields, Anything()), path, remedy=REMEDY)
    multi_head = {
        name: multi_head_from(parsed[name], basis, record[name]["E"].dtype == torch.float16, str(path))
        for name, basis in bases.items()
    }
    if compact:
        return Calibration(meta, None, {}, multi_head)
    own = parsed["statistics"]
    k, v = (
        Moments(own[f"{side}_count"], own[f"{side}_mean"], own[f"{side}_scatter"], own["metrics"].get(side, {}))
        for side in SIDES
    )
    return Calibration(meta, Statistics(k, v), {side: parsed["bases"][side] for side in SIDES}, multi_head)


def _whole_schema(codec: str, geometry: Geometry) -> dict[str, Kind]:
    """What a whole calibration has beside multi-head bases: bases in single precision, statistics in double."""
    L, H, d = geometry.num_layers, geometry.num_kv_heads, geometry.head_dim
    r = full_rank(basis_of(codec).per_head, d)
    shapes = {"mean": (L, H, d), "E": (L, H, d, r), "D": (L, H, r, d), "spectrum": (L, H, r)}
    basis = Record({name: TensorOf(shape, LARGEST) for name, shape in shapes.items()})
    # The largest are sums of squares that are weighted by squares
    sums = {name: TensorOf(shape, LARGEST**4, dtype=torch.float64)
            for name, shape in {"count": (L,), "mean": (L, H, d), "scatter": (L, H, d, d)}.items()}  # fmt: skip
    metrics = Record({side: Default(Record(others=sums["scatter"])) for side in SIDES})
    statistics = {f"{side}_{name}": kind for side in SIDES for name, kind in sums.items()}
    return {
        "bases": Record(dict.fromkeys(SIDES, basis)),
        "statistics": Record({**statistics, "metrics": Default(metrics, {})}, Anything()),  # older files have more
    }


def calibration_folders() -> list[Path]:
    """Where calibrations lie: results/calibrations of the working folder and of this checkout."""
    here = Path("results") / "calibrations"
    return [here] if here.resolve() == (files.RESULTS / "calibrations") else [here, files.RESULTS / "calibrations"]
