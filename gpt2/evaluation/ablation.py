"""The rows of the perplexity ablation: which caches are compared, by group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpt2.compression.calibration import Calibration, compressors_for
from gpt2.compression.codecs import IDENTITY
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.evaluation.perplexity import CacheFactory

GROUPS = ("control", "basis", "target", "rank", "bits", "sinks", "layers")


@dataclass(frozen=True)
class Row:
    """One cache of the ablation."""

    group: str
    label: str
    make: CacheFactory


@dataclass(frozen=True)
class Ablation:
    """Builds rows from one calibration. ranks: the ladder, best first; the first also serves the other groups."""

    calibration: Calibration
    ranks: Sequence[int]
    bits: Sequence[int]
    sink_tokens: int
    layer_groups: int

    def rows(self, group: str) -> list[Row]:
        """Rows of a group, by the method of its name."""
        return getattr(self, f"_{group}")()

    def _cache(self, target: str, rank: int, bits: int, *, codec: str = "pca", sinks: int | None = None, layers=None):
        """Factory of a cache with `target` compressed, in `layers` only when given."""
        k, v = compressors_for(
            target,
            bits,
            self.calibration.geometry.num_layers,
            self.calibration,
            rank=rank,
            codec=codec,
            layers=layers,
        )
        sinks = self.sink_tokens if sinks is None else sinks
        return lambda: CompressedDynamicCache(k, v, sink_tokens=sinks)

    def _control(self) -> list[Row]:
        half = self.calibration.geometry.head_dim // 2
        lossy = self._cache("kv", half, 16, codec="random")
        return [
            Row("control", "identity", lambda: identity_cache(self.calibration.geometry.num_layers)),
            Row("control", f"lossy on purpose: K and V, random rank {half}", lossy),
        ]

    def _basis(self) -> list[Row]:
        return [
            Row("basis", f"V rank {rank}, {codec}", self._cache("v", rank, 16, codec=codec))
            for rank in self.ranks[:2]
            for codec in ("pca", "random")
        ]

    def _target(self) -> list[Row]:
        rank = self.ranks[0]
        return [
            Row("target", f"{target.upper()} rank {rank}", self._cache(target, rank, 16)) for target in ("v", "k", "kv")
        ]

    def _rank(self) -> list[Row]:
        return [Row("rank", f"V rank {rank}", self._cache("v", rank, 16)) for rank in self.ranks]

    def _bits(self) -> list[Row]:
        d = self.calibration.geometry.head_dim
        rows = []
        for bits in self.bits:
            if bits != 16:
                rows.append(Row("bits", f"V int{bits}, no basis", self._cache("v", d, bits, codec=IDENTITY)))
            rows += [
                Row("bits", f"V rank {rank}, {bits} bits", self._cache("v", rank, bits)) for rank in (d, self.ranks[0])
            ]
        return rows

    def _sinks(self) -> list[Row]:
        rank, d = self.ranks[0], self.calibration.geometry.head_dim
        settings = (("v", rank, 16, "pca"), ("k", rank, 16, "pca"), ("v", d, 4, IDENTITY))
        return [
            Row(
                "sinks",
                f"{target.upper()} rank {r}, {bits} bits, {sinks} exact sinks",
                self._cache(target, r, bits, codec=codec, sinks=sinks),
            )
            for target, r, bits, codec in settings
            for sinks in dict.fromkeys((0, 1, self.sink_tokens))
        ]

    def _layers(self) -> list[Row]:
        """The lowest rank of the ladder in a few neighbouring layers at a time: which layers are sensitive."""
        L, rank = self.calibration.geometry.num_layers, self.ranks[-1]
        edges = [L * i // self.layer_groups for i in range(self.layer_groups + 1)]
        return [
            Row("layers", f"V rank {rank} in layers {a}–{b - 1} only", self._cache("v", rank, 16, layers=range(a, b)))
            for a, b in zip(edges, edges[1:], strict=False)
            if b > a
        ]
