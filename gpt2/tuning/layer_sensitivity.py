"""How far each layer can be compressed: each layer is measured alone, and plans with a setting per layer are proposed.

One layer's K or V at a time is compressed, and the KL divergence of the model's predictions from the uncompressed
model's is measured on tuning text. Small errors add up nearly independently, so the sum over layers predicts the loss
of a plan well enough to select plans. A selected plan is then measured itself; the sum is never reported as its loss.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from gpt2.common import files, provenance
from gpt2.common.errors import BadArtefact, LossNotFinite
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.cache.size import held_bytes
from gpt2.compression.calibration.fit import Calibration
from gpt2.compression.codecs import Compressor
from gpt2.compression.codecs.base import SIDES
from gpt2.compression.settings import TARGETS, Plan, Setting, build, uniform
from gpt2.evaluation.perplexity import BASELINE, Scores, baseline_factory, compare, score, segment_sums
from gpt2.models.geometry import Geometry, Shape
from gpt2.models.loading import LoadedModel

ROW = {"side", "layer", "codec", "rank", "bits", "bytes_per_token", "kl_nats", "ppl_delta"}


def ablate(
    loaded: LoadedModel,
    segments: Tensor,
    calibration: Calibration | None,
    target: str,
    settings: Sequence[Setting],
    *,
    path: Path,
    key: dict,
    sink_tokens: int,
    progress: Callable[[Iterable], Iterable] = iter,
    made_by: dict | None = None,
    **scoring,
) -> list[dict]:
    """Compress each layer alone in every setting and measure; returns rows with the keys of ROW.

    segments: tuning tokens [n, T]. path: results JSON, written after every layer; if it has the same `key`, its rows
    are kept and not measured again. made_by: its provenance. scoring: further arguments of `perplexity.score`. A row
    whose loss isn't finite has None as its KL and `ppl_delta`, and a note. Raises BadArtefact if `path` exists and
    isn't a layer ablation, and LossNotFinite if no row has a finite loss.
    """
    rows = _known(path, key)
    resumed = bool(rows)
    done = {(row["side"], row["layer"], setting_of(row)) for row in rows}
    geometry = loaded.geometry
    for layer in progress(geometry.attention):
        todo = [(side, s) for side in TARGETS[target] for s in settings if (side, layer, s) not in done]
        if not todo:
            continue
        caches, sizes = {BASELINE: baseline_factory(loaded)}, {}
        for side, setting in todo:
            k, v = build(uniform(side, geometry, setting, [layer]), geometry, calibration, device=loaded.device)
            make = partial(CompressedDynamicCache, k, v, geometry=geometry, sink_tokens=sink_tokens)
            caches[f"{side} {setting}"] = make
            shape = geometry.layers[layer].side(side)
            sizes[side, setting] = _bytes_per_token((k if side == "k" else v)[layer], shape)
        failed: dict[str, Exception] = {}
        scores = score(loaded, segments, caches, failed=failed, **scoring)
        for side, setting in todo:
            name, figures = f"{side} {setting}", {"bytes_per_token": sizes[side, setting]}
            figures |= _unmeasured(failed[name]) if name in failed else _measured(scores[BASELINE], scores[name])
            rows.append({"side": side, "layer": layer, **asdict(setting), **figures})
        made = (made_by or {}) | {"wall_s": provenance.taken(resumed)}
        files.write_json(path, {**made, "model": loaded.spec, "key": key, "rows": rows})
    if not finite(rows):
        raise LossNotFinite(f"{rows[0]['note']}, and so with every other layer", f"layer {rows[0]['layer']}")
    return rows


def finite(rows: Sequence[dict]) -> list[dict]:
    """The rows of `ablate` whose loss is finite."""
    return [row for row in rows if row["kl_nats"] is not None]


def _measured(baseline: Scores, scores: Scores) -> dict:
    try:
        return compare(baseline, scores) | {"segment_sums": segment_sums(baseline, scores)}
    except OverflowError as error:  # the loss is finite, but its exponential is not
        return _unmeasured(error)


def _unmeasured(error: Exception) -> dict:
    """Figures of a row without a finite loss, which one layer may have where others don't."""
    if not isinstance(error, (LossNotFinite, OverflowError)):
        raise error
    return {"kl_nats": None, "ppl_delta": None, "note": str(error)}


def _known(path: Path, key: dict) -> list[dict]:
    """Rows of an earlier run with the same key. Raises BadArtefact for a file that isn't a layer ablation."""
    if not path.exists():
        return []
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        whole = all(row.keys() >= ROW for row in record["rows"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadArtefact(f"{path}: not a layer ablation: give another file, or remove it") from error
    # JSON turns tuples into lists, so convert the key in the same way before comparing
    return record["rows"] if whole and record.get("key") == json.loads(json.dumps(key)) else []


class Option(NamedTuple):
    """A way to store one layer's K or V: its setting, KL in nats if only this layer is compressed, bytes per token.

    setting: None for the model's own 16-bit vectors.
    """

    setting: Setting | None
    kl: float
    size: float


def setting_of(row: dict) -> Setting:
    """The setting of a row of results."""
    return Setting(row["codec"], row["rank"], row["bits"], row.get("quantizer"))


def plans(rows: Sequence[dict], geometry: Geometry, budget: float, count: int = 6) -> list[Plan]:
    """Plans whose loss, predicted from the rows of `ablate`, is near `budget`.

    For a price λ of a byte every layer takes the setting with the least KL + λ · bytes; sweeping λ gives the lower
    convex hull of (bytes, ΣKL) over all assignments. budget: relative rise of perplexity; its logarithm in nats is
    compared with ΣKL. Returns at most `count` plans with losses from a quarter of the budget to twice it, least loss
    first, and always the smallest plan below twice it; none if every plan loses more.
    """
    items, nats = _choices(rows, geometry), math.log1p(budget)
    found: list[tuple[float, Plan]] = []
    for price in _prices(items):
        picks = {place: min(options, key=lambda o: o.kl + price * o.size) for place, options in items.items()}
        loss, plan = sum(o.kl for o in picks.values()), _plan(picks, geometry.num_layers)
        if loss <= 2 * nats and any(map(any, plan.values())) and plan not in [other for _, other in found]:
            found.append((loss, plan))
    # Prices are in ascending order, so losses rise and the last plan is the smallest
    near = [plan for index, (loss, plan) in enumerate(found) if loss >= nats / 4 or index == len(found) - 1]
    return [near[i] for i in np.linspace(0, len(near) - 1, min(count, len(near))).round().astype(int)]


def _choices(rows: Sequence[dict], geometry: Geometry) -> dict[tuple[str, int], list[Option]]:
    """(side, layer) to its options; the first option is the model's own 16-bit vectors."""
    items: dict[tuple[str, int], list[Option]] = {}
    for row in finite(rows):
        plain = geometry.layers[row["layer"]].side(row["side"]).size * 2.0
        options = items.setdefault((row["side"], row["layer"]), [Option(None, 0.0, plain)])
        # A slightly negative KL is noise, not a gain
        options.append(Option(setting_of(row), max(row["kl_nats"], 0.0), row["bytes_per_token"]))
    return items


def _prices(items: dict) -> list[float]:
    """All λ at which some layer changes its option: KL lost per byte saved, for each pair of its options."""
    slopes = {
        (b.kl - a.kl) / (a.size - b.size)
        for options in items.values()
        for a, b in itertools.permutations(options, 2)
        if b.size < a.size and b.kl > a.kl
    }
    # Slightly above each slope, since at the slope itself both options cost the same
    return sorted(slope * (1 + 1e-9) for slope in slopes)


def _plan(picks: dict[tuple[str, int], Option], num_layers: int) -> Plan:
    def setting(side: str, layer: int) -> Setting | None:
        pick = picks.get((side, layer))
        return pick.setting if pick else None

    return {side: [setting(side, layer) for layer in range(num_layers)] for side in SIDES}


def _bytes_per_token(compressor: Compressor, shape: Shape, tokens: int = 256) -> float:
    """Bytes per token that a compressor stores of one layer's K or V of a 16-bit model."""
    make = partial(CompressedDynamicCache, [compressor], [compressor], sink_tokens=0)
    one_layer = Geometry.uniform(1, shape.heads, shape.width)
    return held_bytes(make, one_layer, tokens) / 2 / tokens  # K and V alike
