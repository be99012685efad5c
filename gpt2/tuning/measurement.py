"""What one configuration costs: the measuring half of the tuner. Which configurations to try is `autotune`'s half."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from torch import Tensor

from gpt2.common.errors import LossNotFinite
from gpt2.compression.cache import size
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.calibration.fit import Calibration
from gpt2.compression.settings import TARGETS, Plan, Setting, build, plan_record
from gpt2.evaluation.perplexity import BASELINE, CacheFactory, Scores, baseline_factory, compare, score
from gpt2.models.loading import LoadedModel
from gpt2.tuning.grid_search import Cell, Trial
from gpt2.tuning.layer_sensitivity import ablate, plans

TRIAL_FORMAT = 1  # raise it when a codec or the measurement changes: trials of an older study then count no longer


@dataclass
class Search:
    """Measures cells of one model and calibration.

    calibration: None for a codec that needs none. tuning, evaluation: token segments [n, T] of two texts that don't
    overlap. bar: from a label and a unit to the wrapper of an iterable.
    """

    loaded: LoadedModel
    calibration: Calibration | None
    tuning: Tensor
    evaluation: Tensor
    target: str
    codec: str
    sink_tokens: int
    chunk: int
    batch_size: int
    seed: int
    bar: Callable[[str, str], Callable[[Iterable], Iterable]]

    def factory(self, cell: Cell) -> CacheFactory:
        """Caches of a cell, which share their compressors."""
        plan = cell.plan(self.target, self.codec, self.loaded.geometry.num_layers)
        return self.caches(plan, sink_tokens=self.sink_tokens)

    def caches(self, plan: Plan, **windows: int) -> CacheFactory:
        """Caches of a plan, which share their compressors. windows: as CompressedDynamicCache has them."""
        k, v = build(plan, self.loaded.geometry.head_dim, self.calibration, device=self.loaded.device)
        return partial(CompressedDynamicCache, k, v, **windows)

    def ablate(self, cells: Sequence[Cell], path: Path, text_sha256: str, provenance: dict) -> list[dict]:
        """Every layer alone in the setting of every cell, on a quarter of the tuning text; resumes and writes `path`.

        KL needs fewer tokens than perplexity for the same precision, and this is by far the most of a search.
        """
        part = self.tuning[: max(1, len(self.tuning) // 4)]
        settings = [Setting(self.codec, cell.rank, cell.bits) for cell in cells]
        key = self.key(text_sha256) | {"ablated": list(part.shape)}
        rows = ablate(
            self.loaded, part, self.calibration, self.target, settings, path=path, key=key,
            sink_tokens=self.sink_tokens, provenance=provenance, progress=self.bar("layer by layer", "layer"),
            chunk=self.chunk, batch_size=self.batch_size,
        )  # fmt: skip
        return [row for row in rows if Setting(row["codec"], row["rank"], row["bits"]) in settings]

    def per_layer(self, rows: Sequence[dict], budget: float) -> list[Cell]:
        """Cells with a setting of its own for every layer, predicted near the budget by the rows of `ablate`."""
        found = plans(rows, self.loaded.geometry, budget)
        mixed = [plan for plan in found if len({s for side in TARGETS[self.target] for s in plan[side]}) > 1]
        return [Cell.of_plan(plan) for plan in mixed]  # the others are in the grid already

    def ratio(self, cell: Cell) -> float:
        """Whole-KV compression of a cell's caches. No model runs: sizes don't depend on values."""
        return size.compression_ratio(self.factory(cell), self.loaded.geometry, config=self.loaded.model.config)

    def evaluate(self, cell: Cell, ratio: float | None = None) -> Trial:
        """A cell on tuning text, against a baseline that is scored once. ratio: of `ratio`, where it is known."""
        baseline = self._tuning_baseline
        record = self._compared(
            lambda: (baseline, self._score(self.tuning, {str(cell): self.factory(cell)})[str(cell)])
        )
        delta = math.inf if record["ppl_delta"] is None else record["ppl_delta"]
        return Trial(cell, delta, self.ratio(cell) if ratio is None else ratio, record)

    def confirm(self, cell: Cell) -> dict:
        """A cell on evaluation text, beside the baseline, with KL and agreement."""
        caches = {BASELINE: baseline_factory(self.loaded), str(cell): self.factory(cell)}
        return self._compared(lambda: tuple(self._score(self.evaluation, caches)[name] for name in caches))

    def _compared(self, measure: Callable[[], tuple[Scores, Scores]]) -> dict:
        """Figures of what `measure` returns, baseline first; without a finite loss `ppl_delta` is None.

        A baseline that has none is an error as everywhere.
        """
        try:
            return compare(*measure(), self.seed)
        except LossNotFinite as error:
            if error.cache == BASELINE:
                raise
            return {"ppl_delta": None, "ppl_delta_interval": None, "note": str(error)}
        except OverflowError:  # finite, but its exponential is not
            return {"ppl_delta": None, "ppl_delta_interval": None, "note": "the perplexity is beyond all numbers"}

    def preset_keys(self, cell: Cell) -> dict:
        """What a preset says of the cache that a cell makes."""
        plan = cell.plan(self.target, self.codec, self.loaded.geometry.num_layers)
        keys = {"target": self.target, **cell.record(), "codec": self.codec, "sink_tokens": self.sink_tokens}
        return keys | {"layers": cell.layers and plan_record(plan)}

    @cached_property
    def _tuning_baseline(self) -> Scores:
        return self._score(self.tuning, {BASELINE: baseline_factory(self.loaded)})[BASELINE]

    def _score(self, segments: Tensor, caches: dict[str, CacheFactory]) -> dict[str, Scores]:
        bar = self.bar(" and ".join(caches), "batch")
        return score(self.loaded, segments, caches, chunk=self.chunk, batch_size=self.batch_size, progress=bar)

    def key(self, text_sha256: str) -> dict:
        """All that a trial's figures depend on: a search with another key is another study."""
        meta = self.calibration.meta if self.calibration else {}
        return {
            "model": self.loaded.fingerprint,
            "dtype": str(self.loaded.model.dtype),
            "target": self.target,
            "codec": self.codec,
            "chunk": self.chunk,
            "seed": self.seed,
            "text": [text_sha256, *self.tuning.shape],
            "sink_tokens": self.sink_tokens,
            "calibration": [
                meta.get(name) for name in ("text_sha256", "samples", "seq_len", "seed", "sink_tokens", "dtype")
            ],
            "device": self.loaded.device.type,
            "format": TRIAL_FORMAT,
        }
