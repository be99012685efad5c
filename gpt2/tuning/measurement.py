"""The measurement of one candidate, for all searches: loss and compression ratio of its caches."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial

from torch import Tensor

from gpt2.common.errors import LossNotFinite
from gpt2.compression.cache import size
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.calibration.fit import Calibration
from gpt2.compression.presets.any_model import RATIO_TOKENS
from gpt2.compression.settings import Plan, build
from gpt2.evaluation.perplexity import BASELINE, CacheFactory, Scores, baseline_factory, compare, score
from gpt2.models.loading import LoadedModel
from gpt2.tuning.trials import Candidate, Trial

# Raise it when a codec, the measurement or a search changes, so that trials of older studies are ignored
TRIAL_FORMAT = 2


@dataclass(kw_only=True)
class Search(ABC):
    """Measures the candidates of one search on one model.

    calibration: None if no candidate needs one. tuning, evaluation: token segments [n, T] of two texts that don't
    overlap. chunk, batch_size: as for `perplexity.score`. bar: from a label and a unit to a progress bar that wraps an
    iterable. context_length: tokens at which ratios are measured, and for which bits are shared out over layers.
    """

    loaded: LoadedModel
    calibration: Calibration | None
    tuning: Tensor
    evaluation: Tensor
    chunk: int
    batch_size: int
    seed: int
    bar: Callable[[str, str], Callable[[Iterable], Iterable]]
    context_length: int = RATIO_TOKENS

    @abstractmethod
    def factory(self, candidate: Candidate) -> CacheFactory:
        """A factory of a candidate's caches, which share their compressors."""

    @abstractmethod
    def preset_keys(self, candidate: Candidate) -> dict:
        """The keys of a preset that describe the candidate's caches."""

    def key(self, text_sha256: str) -> dict:
        """Everything that a trial's figures depend on. Searches with different keys have different studies."""
        meta = self.calibration.meta if self.calibration else {}
        made_from = ("text_sha256", "samples", "seq_len", "seed", "sink_tokens", "dtype")
        # Compact files have other bases, and one that was made for another model fits worse
        unusual = {"compact": meta["compact"]} if meta.get("compact") else {}
        if meta.get("fingerprint", self.loaded.fingerprint) != self.loaded.fingerprint:
            unusual["calibrated_on"] = meta["fingerprint"]
        return {
            "model": self.loaded.fingerprint,
            "dtype": str(self.loaded.model.dtype),
            "chunk": self.chunk,
            "seed": self.seed,
            "text": [text_sha256, *self.tuning.shape],
            "calibration": [meta.get(name) for name in made_from],
            "device": self.loaded.device.type,
            "format": TRIAL_FORMAT,
            **unusual,
            **self.context_keys(),
        }

    def context_keys(self) -> dict:
        """The context length for results and presets, where it isn't the usual one or bits depend on it."""
        usual = self.context_length == RATIO_TOKENS and self.loaded.geometry.alike
        return {} if usual else {"context_length": self.context_length}

    def caches(self, plan: Plan, **exact: int) -> CacheFactory:
        """A factory of a plan's caches, which share their compressors. exact: arguments of CompressedDynamicCache."""
        k, v = build(
            plan, self.loaded.geometry, self.calibration, context_length=self.context_length, device=self.loaded.device
        )
        return partial(CompressedDynamicCache, k, v, geometry=self.loaded.geometry, **exact)

    def ratio(self, candidate: Candidate) -> float:
        """Compression ratio of a candidate's whole caches. No model runs, as sizes don't depend on values."""
        return size.compression_ratio(self.factory(candidate), self.loaded.geometry, self.context_length)

    def evaluate(self, candidate: Candidate, ratio: float | None = None) -> Trial:
        """Measure a candidate on tuning text, against a baseline that is scored once.

        ratio: its compression ratio; computed by `ratio` if None.
        """
        baseline, name = self._tuning_baseline, str(candidate)
        record = self._compared(lambda: (baseline, self._score(self.tuning, {name: self.factory(candidate)})[name]))
        delta = math.inf if record["ppl_delta"] is None else record["ppl_delta"]
        return Trial(candidate, delta, self.ratio(candidate) if ratio is None else ratio, record)

    def confirm(self, candidate: Candidate) -> dict:
        """Measure a candidate on evaluation text, beside the baseline, with KL and top-1 agreement."""
        caches = {BASELINE: baseline_factory(self.loaded), str(candidate): self.factory(candidate)}
        return self._compared(lambda: tuple(self._score(self.evaluation, caches)[name] for name in caches))

    def _compared(self, measure: Callable[[], tuple[Scores, Scores]]) -> dict:
        """Compare the scores that `measure` returns, the baseline's first; `ppl_delta` is None without a finite loss.

        Raises LossNotFinite if the baseline has no finite loss.
        """
        try:
            return compare(*measure(), self.seed)
        except LossNotFinite as error:
            if error.cache == BASELINE:
                raise
            return {"ppl_delta": None, "ppl_delta_interval": None, "note": str(error)}
        except OverflowError:  # the loss is finite, but its exponential is not
            return {"ppl_delta": None, "ppl_delta_interval": None, "note": "the perplexity is too large for a float"}

    @cached_property
    def _tuning_baseline(self) -> Scores:
        return self._score(self.tuning, {BASELINE: baseline_factory(self.loaded)})[BASELINE]

    def _score(self, segments: Tensor, caches: dict[str, CacheFactory]) -> dict[str, Scores]:
        bar = self.bar(" and ".join(caches), "batch")
        return score(self.loaded, segments, caches, chunk=self.chunk, batch_size=self.batch_size, progress=bar)
