"""What one configuration costs: the measuring half of the tuner. Which configurations to try is `autotune`'s half."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from gpt2.compression.autotune import Cell, Trial
from gpt2.compression.calibration import Calibration
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.plan import compressors_for
from gpt2.evaluation import memory
from gpt2.evaluation.perplexity import BASELINE, CacheFactory, Scores, baseline_factory, compare, score
from gpt2.models import LoadedModel

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
        L, device = self.loaded.geometry.num_layers, self.loaded.device
        k, v = compressors_for(
            self.target,
            cell.bits,
            L,
            self.calibration,
            rank=cell.rank,
            codec=self.codec,
            device=device,
            head_dim=self.loaded.geometry.head_dim,
        )
        return lambda: CompressedDynamicCache(k, v, sink_tokens=self.sink_tokens)

    def evaluate(self, cell: Cell) -> Trial:
        """A cell on tuning text, against a baseline that is scored once."""
        make = self.factory(cell)
        measured = self._score(self.tuning, {str(cell): make})[str(cell)]
        record = compare(self._tuning_baseline, measured, self.seed)
        ratio = memory.compression_ratio(make, self.loaded.geometry, config=self.loaded.model.config)
        return Trial(cell, record["ppl_delta"], ratio, record)

    def confirm(self, cell: Cell) -> dict:
        """A cell on evaluation text, beside the baseline, with KL and agreement."""
        scores = self._score(self.evaluation, {BASELINE: baseline_factory(self.loaded), str(cell): self.factory(cell)})
        return compare(scores[BASELINE], scores[str(cell)], self.seed)

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
