"""The calibration file: written atomically, and read with every key, shape and number checked.

A whole file has statistics, from which any codec can be fitted, and bases. A compact one has one multi-head basis, in
eight bits: small enough to be kept beside the presets that share it. A name that ends in `.pt` gives PyTorch's
format, one that ends in `.safetensors` the same record as safetensors.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2.common import files, tensor_file
from gpt2.common.errors import BadArtefact, CalibrationNotFound, PluginError
from gpt2.common.schema import Anything, Checked, Default, Kind, OneOf, Plain, Record, String, TensorOf, Whole, parse
from gpt2.compression.calibration.fit import Calibration, described_geometry
from gpt2.compression.calibration.multi_head_fit import LARGEST, STORED, multi_head_from, multi_head_schema
from gpt2.compression.calibration.stacks import Stacks
from gpt2.compression.calibration.statistics import Statistics
from gpt2.compression.codecs import basis_of, full_rank, multi_head_bases, needs_calibration
from gpt2.compression.codecs.base import SIDES
from gpt2.compression.codecs.moments import Moments
from gpt2.models.geometry import LAYERS, Geometry, Shape
from gpt2.models.probe import ROTARY

FORMAT = "kv-plugin-calibration/1"
REMEDY = "make the file again"


def _check_calibrated(codec: str) -> None:
    if not needs_calibration(codec):
        raise PluginError(f"codec {codec} needs no calibration: expected one that does, such as pca")


def _check_hexadecimal(text: str) -> None:
    if re.fullmatch("[0-9a-f]*", text) is None:
        raise PluginError("expected hexadecimal digits")


_NAME = String(printable=False)  # names of text files may have any character
_HEX = Checked(String(1 << 20), _check_hexadecimal)
_SIZE = Whole(1, 1024)  # more than any model has, and few enough to loop over before the tensors are known to match
META = {
    "model": _NAME,
    "fingerprint": _NAME,
    "sketch": Default(Record({"config": _HEX, "signs": _HEX})),  # files made before it have none
    "rotary": Default(ROTARY),  # nor this
    "num_layers": _SIZE,
    "num_kv_heads": _SIZE,
    "head_dim": _SIZE,
    "layers": Default(LAYERS),  # where not all are alike
    "rank": Whole(1),
    "codec": Checked(String(200), _check_calibrated),
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
    """Write a calibration atomically, as `.pt` or `.safetensors`. A compact `.pt` is compressed, by about a sixth."""
    record, geometry = {"format": FORMAT, "meta": calibration.meta}, calibration.geometry
    if calibration.statistics is not None:
        record |= {"bases": {}, "statistics": {"metrics": {}}}
        for side in SIDES:
            stacks, moments = Stacks(geometry, side), getattr(calibration.statistics, side)
            own = {"mean": stacks.stacked(moments.mean), "scatter": stacks.stacked(moments.scatter)}
            record["statistics"] |= {f"{side}_{name}": part for name, part in (own | {"count": moments.count}).items()}
            metrics = {name: stacks.stacked(metric) for name, metric in moments.metrics.items()}
            record["statistics"]["metrics"][side] = metrics
            record["bases"][side] = {name: stacks.stacked(part) for name, part in calibration.bases[side].items()}
    record |= {name: codec.record(geometry) for name, codec in calibration.multi_head.items()}
    return tensor_file.write(path, record, compress=calibration.statistics is None)


def load_calibration(path: str | Path, model: str = "MODEL") -> Calibration:
    """Read a calibration. Raises BadArtefact, naming file, field, expected and found; never runs code from the file.

    model: whose it is to be, as of --model, for the advice where there is no file.
    """
    path = Path(path)
    if not os.path.exists(path):  # which takes any name, a pathlib.Path no long one
        raise CalibrationNotFound(
            f"Calibration file not found: {path}. Give its full path, or make it: "
            f"python scripts/calibrate_kv_lowrank.py {shlex.join(['--model', model, '--output', str(path)])}"
        )
    return _calibration_from(tensor_file.read(path, "calibration file"), path)


def _calibration_from(record: dict, path: Path) -> Calibration:
    """The calibration that a record holds, once all of it has been checked."""
    head = Record({"format": OneOf((FORMAT,)), "meta": Record(META, Plain())}, Anything())
    meta = parse(record, head, path, remedy=REMEDY)["meta"]
    geometry = described_geometry(meta)
    checked = Record({"layers": Default(Checked(Anything(), lambda _: _check_layers(geometry, meta)))}, Anything())
    parse(record, Record({"meta": checked}, Anything()), path, remedy=REMEDY)
    bases = {name: basis for name, basis in multi_head_bases().items() if name in (*record, meta["codec"])}
    for reason in filter(None, (basis.misfit(geometry) for basis in bases.values())):
        raise BadArtefact(f"{path}: {reason}: {REMEDY}")
    widest = max(shape.width for _, _, shape in geometry.sides())
    fields: dict[str, Kind] = {"meta": Record({"rank": Whole(1, widest)}, Anything())}
    stored = {name: _stored(record.get(name)) for name in bases}
    fields |= {name: multi_head_schema(basis, geometry, stored[name]) for name, basis in bases.items()}
    compact = bool(bases) and "statistics" not in record
    if not compact:
        fields |= _whole_schema(meta["codec"], geometry)
    parsed = parse(record, Record(fields, Anything()), path, remedy=REMEDY)
    multi_head = {
        name: multi_head_from(parsed[name], basis, geometry, stored[name], str(path)) for name, basis in bases.items()
    }
    if compact:
        return Calibration(meta, None, {}, multi_head)
    own, bases, statistics = parsed["statistics"], {}, {}
    for side in SIDES:
        stacks = Stacks(geometry, side)
        mean, scatter = (stacks.apart(own[f"{side}_{name}"]) for name in ("mean", "scatter"))
        metrics = {name: stacks.apart(metric) for name, metric in own["metrics"].get(side, {}).items()}
        statistics[side] = Moments(own[f"{side}_count"], mean, scatter, metrics)
        bases[side] = {name: stacks.apart(part) for name, part in parsed["bases"][side].items()}
    return Calibration(meta, Statistics(**statistics), bases, multi_head)


def _stored(fit: Any) -> torch.dtype:
    """The dtype in which a record holds the E of a multi-head basis; single precision for what is none of them."""
    E = fit.get("E") if isinstance(fit, dict) else None
    E = E[0] if isinstance(E, list) and E else E
    return E.dtype if isinstance(E, Tensor) and E.dtype in STORED else torch.float32


def _check_layers(geometry: Geometry, meta: dict) -> None:
    """Raise PluginError unless layers of a file have the shapes of their kinds, and agree with the numbers beside."""
    if geometry.num_layers != meta["num_layers"]:
        raise PluginError(f"expected {meta['num_layers']} layers, as num_layers says, found {geometry.num_layers}")
    for index, layer in enumerate(geometry.layers):
        shapes = (layer.k, layer.v)
        if None in shapes if layer.attends else any(shapes):
            expected = "shapes of K and V" if layer.attends else "no shapes"
            raise PluginError(f"layer {index}: expected {expected} for {layer.kind}, found {layer}")
    if not geometry.attention:
        raise PluginError("expected a layer that keeps K and V, found none")
    for name in ("head_dim", "num_kv_heads"):
        if getattr(geometry, name) != meta[name]:
            raise PluginError(f"expected {name} {meta[name]} in the first layer with K and V, found "
                              f"{getattr(geometry, name)}")  # fmt: skip


def _whole_schema(codec: str, geometry: Geometry) -> dict[str, Kind]:
    """What a whole calibration has beside multi-head bases: bases in single precision, statistics in double."""
    codec = basis_of(codec).per_head

    def rank(shape: Shape) -> int:
        return full_rank(codec, shape.width)

    basis_sizes = {
        "mean": lambda s: (s.heads, s.width),
        "E": lambda s: (s.heads, s.width, rank(s)),
        "D": lambda s: (s.heads, rank(s), s.width),
        "spectrum": lambda s: (s.heads, rank(s)),
    }
    bases, statistics, metrics = {}, {}, {}
    for side in SIDES:
        stacks = Stacks(geometry, side)
        bases[side] = Record({name: stacks.kind(sizes, LARGEST) for name, sizes in basis_sizes.items()})
        # The largest are sums of squares that are weighted by squares
        sums = {"below": LARGEST**4, "dtype": torch.float64}
        statistics[f"{side}_count"] = TensorOf((geometry.num_layers,), **sums)
        statistics[f"{side}_mean"] = stacks.kind(basis_sizes["mean"], **sums)
        statistics[f"{side}_scatter"] = stacks.kind(_square, **sums)
        metrics[side] = Default(Record(others=stacks.kind(_square, nullable=True, **sums)))
    return {
        "bases": Record(bases),
        # Older files have more
        "statistics": Record({**statistics, "metrics": Default(Record(metrics), {})}, Anything()),
    }


def _square(shape: Shape) -> tuple[int, int, int]:
    return shape.heads, shape.width, shape.width


def calibration_folder() -> Path:
    """Where a new calibration goes: results/calibrations of this checkout, where presets and runs go too."""
    return files.RESULTS / "calibrations"


def calibration_folders() -> list[Path]:
    """Where calibrations are looked for: results/calibrations of the working folder and of this checkout."""
    here = Path("results") / "calibrations"
    return [here] if here.resolve() == calibration_folder() else [here, calibration_folder()]
