"""The perplexity ablation: groups of caches that differ in one choice, and their measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.cache.size import compression_ratio
from gpt2.compression.calibration.fit import Calibration
from gpt2.compression.codecs import IDENTITY, Compressor, IdentityCompressor, Transform, quantizer_for_bits
from gpt2.compression.named_caches import from_policy
from gpt2.compression.presets.policies import KVPolicyName
from gpt2.compression.settings import Setting, compressors_for, fixed_transform
from gpt2.evaluation.perplexity import BASELINE, CacheFactory, baseline_factory, compare, score, segment_sums
from gpt2.models.geometry import Shape
from gpt2.models.loading import LoadedModel

GROUPS = ("control", "basis", "metric", "target", "rank", "bits", "sinks", "layers", "nullspace", "policies")


@dataclass(frozen=True)
class Row:
    """One cache of the ablation. The same cache may be a row of several groups; these rows have the same key."""

    group: str
    label: str
    key: tuple
    make: CacheFactory
    more: dict = field(default_factory=dict)  # further keys of its results record


@dataclass(frozen=True)
class Ablation:
    """Builds rows from one calibration.

    ranks: to compare, largest first; groups that aren't about ranks use the first one. bits: quantizer widths.
    layer_groups: number of ranges that the layers are divided into.
    """

    loaded: LoadedModel
    calibration: Calibration
    ranks: Sequence[int]
    bits: Sequence[int]
    sink_tokens: int
    layer_groups: int

    def rows(self, group: str) -> list[Row]:
        """Rows of a group of GROUPS."""
        return getattr(self, f"_{group}")()

    def _row(self, group, label, target, rank, bits=16, *, codec="pca", sinks=None, layers=None) -> Row:
        """A row whose cache has a codec on `target`, in all layers or only in those given."""
        sinks = self.sink_tokens if sinks is None else sinks
        k, v = compressors_for(
            target, bits, None, self.calibration, rank=rank, codec=codec, layers=layers, device=self.loaded.device
        )
        key = (target, rank, bits, codec, sinks, layers)
        make = partial(CompressedDynamicCache, k, v, geometry=self.loaded.geometry, sink_tokens=sinks)
        return Row(group, label, key, make)

    def _control(self) -> list[Row]:
        half = self.calibration.geometry.head_dim // 2
        lossy = f"lossy on purpose: K and V, random rank {half}"
        identity = Row("control", "identity", (IDENTITY,), lambda: identity_cache(self.loaded.geometry))
        return [identity, self._row("control", lossy, "kv", half, codec="random")]

    def _basis(self) -> list[Row]:
        bases = [(rank, codec) for rank in self.ranks[:2] for codec in ("pca", "random")]
        return [self._row("basis", f"V rank {rank}, {codec}", "v", rank, codec=codec) for rank, codec in bases]

    def _metric(self) -> list[Row]:
        """The same rank of K and of V in three metrics: variance, attention's output, and the loss."""
        return [
            self._row("metric", f"{target.upper()} rank {rank}, {codec}", target, rank, codec=codec)
            for target in ("k", "v")
            for rank in self.ranks[:2]
            for codec in ("pca", "attention", "fisher")
        ]

    def _target(self) -> list[Row]:
        return [
            self._row("target", f"{target.upper()} rank {rank}", target, rank)
            for target in ("v", "k", "kv")
            for rank in self.ranks
        ]

    def _rank(self) -> list[Row]:
        return [self._row("rank", f"V rank {rank}", "v", rank) for rank in self.ranks]

    def _bits(self) -> list[Row]:
        d = self.calibration.geometry.head_dim
        rows = []
        for bits in self.bits:
            if bits != 16:
                rows.append(self._row("bits", f"V int{bits}, no basis", "v", d, bits, codec=IDENTITY))
            for rank in (d, self.ranks[0]):
                rows.append(self._row("bits", f"V rank {rank}, {bits} bits", "v", rank, bits))
        return rows

    def _sinks(self) -> list[Row]:
        rank, d = self.ranks[0], self.calibration.geometry.head_dim
        settings = {
            f"V rank {rank}": ("v", rank, 16, "pca"),
            f"K rank {rank}": ("k", rank, 16, "pca"),
            "V int4, no basis": ("v", d, 4, IDENTITY),
        }
        counts = dict.fromkeys((0, 1, self.sink_tokens))
        return [
            self._row("sinks", f"{label}, {n} exact sinks", target, rank, bits, codec=codec, sinks=n)
            for label, (target, rank, bits, codec) in settings.items()
            for n in counts
        ]

    def _layers(self) -> list[Row]:
        """The lowest rank in one range of layers at a time, to see which layers are sensitive."""
        L, rank = self.calibration.geometry.num_layers, self.ranks[-1]
        edges = [L * i // self.layer_groups for i in range(self.layer_groups + 1)]
        ranges = [range(a, b) for a, b in zip(edges, edges[1:], strict=False) if b > a]
        return [
            self._row("layers", f"V rank {rank} in layers {part[0]}–{part[-1]} only", "v", rank, layers=part)
            for part in ranges
        ]

    def _nullspace(self) -> list[Row]:
        """Dropping the all-ones direction against dropping another direction, at equal bytes."""
        d = self.calibration.geometry.head_dim
        rows = [self._row("nullspace", f"{target.upper()} LN nullspace", target, d - 1, codec="ln_nullspace")
                for target in ("v", "k", "kv")]  # fmt: skip
        rows += [
            self._row("nullspace", "V PCA, one direction dropped", "v", d - 1),
            self._row("nullspace", "V random, one direction dropped", "v", d - 1, codec="random"),
            *self._projected("V LN nullspace", self._helmert(), about_mean=(True,)),
            *self._projected("V without the least direction of W_v", self._most_of_w_v()),
        ]
        for bits in (bits for bits in self.bits if bits < 16):
            rows += [
                self._row("nullspace", f"V int{bits}, no basis", "v", d, bits, codec=IDENTITY),
                self._row("nullspace", f"V LN nullspace, {bits} bits", "v", d - 1, bits, codec="ln_nullspace"),
                self._row(
                    "nullspace", f"V LN nullspace + PCA, {bits} bits", "v", d - 1, bits, codec="ln_nullspace+pca"
                ),
                self._row("nullspace", f"V PCA, one dropped, {bits} bits", "v", d - 1, bits),
            ]
        return rows

    def _helmert(self) -> list[Tensor | None]:
        """For each layer a basis [H, d, d − 1] of all directions but the all-ones one; None where it keeps no V."""
        shapes = [layer.v for layer in self.calibration.geometry.layers]
        setting = Setting("ln_nullspace")
        return [s and fixed_transform(setting, s.width).E.expand(s.heads, -1, -1) for s in shapes]

    def _most_of_w_v(self) -> list[Tensor | None]:
        """For each layer a basis [H, d, d − 1] of all directions but the one of each head's W_v with the smallest
        singular value; None where it keeps no V, and an empty list if the layers that do are not those with a v_proj.
        """
        weights = [module.v_proj.weight for module in self.loaded.model.modules() if hasattr(module, "v_proj")]
        shapes = [layer.v for layer in self.calibration.geometry.layers]
        if [len(w) for w in weights] != [shape.size for shape in shapes if shape]:
            return []
        each = iter(weights)
        return [shape and _without_least(next(each), shape) for shape in shapes]

    def _projected(self, label: str, bases: list[Tensor | None], about_mean=(False, True)) -> list[Row]:
        """Rows with V projected onto E [H, d, r] in every layer, without and with its mean taken off first.

        PCA takes off the mean as well. bases: E of each layer, None where it keeps no V; an empty list gives no rows.
        """
        rows, geometry = [], self.loaded.geometry
        for centred in about_mean if bases else ():
            v = [
                E if E is None else self._projecting(E, mean * float(centred))
                for E, mean in zip(bases, self.calibration.statistics.v.mean, strict=True)
            ]
            k = [own and IdentityCompressor() for own in v]
            make = partial(CompressedDynamicCache, k, v, geometry=geometry, sink_tokens=self.sink_tokens)
            name = label + (", about the mean" if centred else "")
            rows.append(Row("nullspace", name, (name,), make))
        return rows

    def _projecting(self, E: Tensor, mean: Tensor) -> Compressor:
        return Compressor(quantizer_for_bits(16), Transform(E, E.mT, mean).to(self.loaded.device, torch.float32))

    def _policies(self) -> list[Row]:
        return [
            Row(
                "policies",
                f"policy {name}",
                ("policy", name),
                from_policy(name, self.loaded).make,
                {"policy": str(name)},
            )
            for name in KVPolicyName
        ]


def _without_least(weight: Tensor, shape: Shape) -> Tensor:
    """An orthonormal basis [H, d, d − 1] of a v_proj's outputs, without each head's smallest singular direction."""
    w = weight.detach().double().cpu().view(shape.heads, shape.width, -1)
    return torch.linalg.svd(w, full_matrices=False).U[..., : shape.width - 1]


def measure(
    loaded: LoadedModel, segments: Tensor, rows: Sequence[Row], known: dict[tuple, dict], *, seed: int = 0, **scoring
) -> list[dict]:
    """Score rows beside the baseline; returns one results record per row.

    segments: token ids [n, T]. known: measurements of earlier calls by a row's key, which are not repeated; new ones
    are added. scoring: further arguments of `perplexity.score`.
    """
    new = {row.label: row for row in rows if row.key not in known}
    caches = {BASELINE: baseline_factory(loaded)} | {label: row.make for label, row in new.items()}
    scores = score(loaded, segments, caches, **scoring) if new else {}
    for label, row in new.items():
        known[row.key] = compare(scores[BASELINE], scores[label], seed) | {
            "compression_ratio_2048": compression_ratio(row.make, loaded.geometry),
            "largest_nll_change": float(np.abs(scores[label].nll - scores[BASELINE].nll).max()),
            "segment_sums": segment_sums(scores[BASELINE], scores[label]),
        }
    return [{"group": row.group, "label": row.label, **row.more, **known[row.key]} for row in rows]
