"""Bases that heads share, fitted to a model: their matrices, and what coding their coordinates costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from gpt2.common.errors import BadArtefact, PluginError, brief
from gpt2.common.schema import Anything, Checked, EachOf, Kind, ListOf, OneOf, Record, TensorOf, Whole
from gpt2.compression.calibration.bit_allocation import BitAllocation
from gpt2.compression.calibration.stacks import Stacks
from gpt2.compression.calibration.statistics import MultiHeadStatistics
from gpt2.compression.codecs import MultiHead, Quantizer, Transform
from gpt2.compression.codecs.formats import BLOCK, WIDTHS
from gpt2.compression.codecs.metric import SMALLEST_WEIGHT
from gpt2.compression.codecs.mixed import COSTS, errors
from gpt2.compression.codecs.rope import LAYOUTS, NONE, Rotary
from gpt2.models.geometry import Geometry, LayerGeometry

LARGEST_CODE = 127  # of E in eight bits
STORED = (torch.float32, torch.float16, torch.int8)  # compact files were in half precision before
LARGEST = 1e15  # numbers in a file must be below it: those of real models are far smaller
# Where K and V hardly vary, coordinates of other texts are taken to be at least so large: against the means, and
# against channels
SMALLEST_SPREAD, SMALLEST_SIZE = 0.01, 2.0**-10


@dataclass
class MultiHeadFit:
    """The bases of all layers, as `basis` numbers them, each for G groups of heads with w channels, in its own shape.

    Of every basis mean [G, w], E [G, w, w] and spectrum [G, w], the variance of each coordinate; None for layers that
    keep no K and V. rotary: each layer's rotation, empty where keys aren't un-rotated. stored: the dtype in which a
    file holds E, one of `STORED`. where: the file that it is from, for messages.
    """

    basis: MultiHead
    mean: Sequence[Tensor | None]
    E: Sequence[Tensor | None]
    spectrum: Sequence[Tensor | None]
    rotary: list[Rotary]
    allocation: BitAllocation
    stored: torch.dtype = torch.float32
    where: str = "the calibration"

    @cached_property
    def D(self) -> list[Tensor | None]:
        """The decoders: the inverse of each E as it is stored, in whatever precision."""
        return _of_each(self._inverse, self.E)

    def _inverse(self, E: Tensor) -> Tensor:
        # One by one: PyTorch 2.13 with MKL fails on batches of large matrices when it has more threads than one
        found = [torch.linalg.inv_ex(own) for own in E.double()]
        D = torch.stack([inverse for inverse, _ in found]).float()
        if any(failed for _, failed in found) or not bool(torch.isfinite(D).all()):
            raise BadArtefact(f"{self.where}: the basis has no inverse: make the calibration again")
        return D

    def transform(self, layer: int, side: str = "k") -> Transform:
        """The transform of one layer's K or V, `side` "k" or "v", on the CPU."""
        i = self.basis.basis_index(layer, side)
        rotary = self.rotary[layer] if self.rotary else NONE
        return self.basis.transform(side, self.E[i].float(), self.D[i], self.mean[i].float(), rotary)

    def quantizer(
        self, quantizer: Quantizer, layer: int, side: str = "k", weights: Sequence[float] | None = None
    ) -> Quantizer:
        """A quantizer for one layer's K or V, where its bits are meant on average over all.

        weights: of each layer, the share of all tokens that it holds; None where all hold all.
        """
        allocation = self.allocation
        if weights is not None:
            allocation = allocation.weighted(tuple(w for w in weights for _ in range(self.basis.bases_per_layer)))
        return quantizer.allocated(allocation, self.basis.basis_index(layer, side))

    def spectra(self) -> dict[str, list[Tensor | None]]:
        """Variance of each coordinate by what has a basis in a layer: "kv", or "k" and "v"; for every layer [G, w]."""
        sides = ("kv",) if self.basis.joint else ("k", "v")
        return {side: list(self.spectrum[place :: len(sides)]) for place, side in enumerate(sides)}

    def compact(self) -> MultiHeadFit:
        """The same as a file in eight bits holds it: E as integers with a scale per column, errors as bfloat16.

        The decoder is the inverse of the rounded E, so that rounding adds no error to what is decoded: coordinates only
        depend on each other a little more.
        """
        E = _of_each(lambda E: _integers(E).float() * _scale(E, torch.int8), self.E)
        errors = _of_each(lambda own: own.bfloat16().float(), self.allocation.errors)
        return replace(self, E=E, allocation=replace(self.allocation, errors=errors), stored=torch.int8)

    def record(self, geometry: Geometry) -> dict:
        """Tensors and plain types for a calibration file of a model with these layers."""
        stacks = Stacks(self.basis.shape(geometry))
        compact = self.stored == torch.int8
        E = _of_each(_integers if compact else lambda E: (E / _scale(E, self.stored)).to(self.stored), self.E)
        errors = _of_each(Tensor.bfloat16, self.allocation.errors) if compact else self.allocation.errors
        return {
            "mean": stacks.stacked(self.mean),
            "E": stacks.stacked(E),
            "scale": stacks.stacked(_of_each(lambda E: _scale(E, self.stored), self.E)),
            "spectrum": stacks.stacked(self.spectrum),
            "frequencies": [rotary.frequencies for rotary in self.rotary],
            "layouts": [rotary.layout for rotary in self.rotary],
            "widths": list(WIDTHS),
            "errors": stacks.stacked(errors),
            "prices": self.allocation.prices,
            "demand": self.allocation.demand,
        }


def _scale(E: Tensor, stored: torch.dtype) -> Tensor:
    """What numbers of E are divided by in a file that holds them as `stored`.

    Integers: the largest of a column is 127, [G, 1, w]. Else a power of two not below any number of a group's,
    [G, 1, 1]: half precision then has range enough.
    """
    if stored == torch.int8:
        return E.abs().amax(-2, keepdim=True).clamp_min(1e-30) / LARGEST_CODE
    return E.abs().amax((-1, -2), keepdim=True).clamp_min(1e-30).log2().ceil().exp2()


def _integers(E: Tensor) -> Tensor:
    return (E / _scale(E, torch.int8)).round().to(torch.int8)


def _of_each(change: Callable[[Tensor], Tensor], parts: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if part is None else change(part) for part in parts]


def fit_multi_head(statistics: MultiHeadStatistics) -> MultiHeadFit:
    """Fit the bases of all layers, and measure on the sampled blocks what each width of code costs."""
    if not statistics.sampled:
        raise PluginError(f"quantization is tried on blocks of {BLOCK} tokens: give a longer --seq-len")
    moments = statistics.moments
    fitted = [None if mean is None else statistics.basis.fit(moments, i) for i, mean in enumerate(moments.mean)]
    spectra = [found and found[1] for found in fitted]
    Es = [found and found[0].E for found in fitted]
    _weaken_unfelt(Es, spectra, [found and statistics.basis.metric_of(moments, i) for i, found in enumerate(fitted)])
    unit = _unit(*([part for part in parts if part is not None] for parts in (Es, moments.mean, spectra)))
    means, Es = _of_each(Tensor.float, moments.mean), _of_each(lambda E: (E / unit).float(), Es)

    def tried(x: Tensor | None, mean: Tensor | None, E: Tensor | None) -> Tensor | None:
        """Errors of the sample of one basis, whose coordinates are [1, G, T, w]."""
        return None if x is None else errors((x.float() - mean[:, None]) @ E[None])[0]

    allocation = BitAllocation.measured([tried(*parts) for parts in zip(statistics.blocks, means, Es, strict=True)])
    spectra = _of_each(lambda spectrum: (spectrum / unit**2).float(), spectra)
    return MultiHeadFit(statistics.basis, means, Es, spectra, statistics.rotary, allocation)


def _weaken_unfelt(Es: list[Tensor | None], spectra: list[Tensor | None], metrics: list[Tensor | None]) -> None:
    """Scale what belongs to groups that the loss doesn't feel at all, as behind an output projection of zeros.

    `fit_in_metric` gives their directions weights of 1, which would take bits from groups whose weights are losses.
    """
    felt = [None if metric is None else metric.diagonal(dim1=-2, dim2=-1).sum(-1) > 0 for metric in metrics]
    weights = [E[own].square().sum(-2) for E, own in zip(Es, felt, strict=True) if own is not None and bool(own.any())]
    if not weights:  # nothing is felt anywhere: all count alike
        return
    least = SMALLEST_WEIGHT * torch.cat([part.flatten() for part in weights]).mean()
    for E, spectrum, own in zip(Es, spectra, felt, strict=True):
        if own is not None and not bool(own.all()):
            E[~own] *= least.sqrt()
            spectrum[~own] *= least


def _unit(Es: list[Tensor], means: list[Tensor], spectra: list[Tensor]) -> Tensor:
    """One factor for the coordinates of the whole model, so that steps are well inside the range of a scale's byte.

    Where hardly anything varied, as in a text of one token, the size of the means and of the metric say how large other
    texts' coordinates may be. Of every basis E [G, w, w], mean and spectrum [G, w].
    """
    of_mean = [(mean[:, None] @ E).square() for mean, E in zip(means, Es, strict=True)]
    of_metric = [E.square().sum(-2) for E in Es]
    spread, of_mean, of_metric = (
        torch.cat([part.flatten() for part in parts]).mean() for parts in (spectra, of_mean, of_metric)
    )
    return torch.stack((spread, SMALLEST_SPREAD**2 * of_mean, SMALLEST_SIZE**2 * of_metric)).amax().sqrt()


def multi_head_schema(basis: MultiHead, geometry: Geometry, stored: torch.dtype) -> Kind:
    """What a calibration file must hold of a codec, as `MultiHeadFit.record` writes it. stored: the dtype of its E.

    Raises PluginError where the layers can't have such a basis.
    """
    shape, widths = basis.shape(geometry), list(WIDTHS)
    stacks, widest = Stacks(shape), max(shape.layers[index].k.width for index in shape.attention)

    def rotation(layer: LayerGeometry) -> Kind:
        head_dim = layer.k.width if layer.k else 0

        def check_frequencies(frequencies: Tensor) -> None:
            if 2 * len(frequencies) > head_dim:
                raise PluginError(f"expected at most {head_dim // 2} frequencies, found {len(frequencies)}")

        return Checked(TensorOf((None,), LARGEST), check_frequencies)

    def check_widths(found: list[int]) -> None:
        if found != widths:
            raise PluginError(f"expected {widths}, found {brief(found)}")

    def check_prices(record: dict) -> None:
        if not 1 < len(record["prices"]) == len(record["demand"]):
            raise PluginError("expected two or more prices, and the demand at each")

    integers = {"below": LARGEST_CODE + 1, "least": -LARGEST_CODE, "dtype": torch.int8}
    numbers = integers if stored == torch.int8 else {"below": LARGEST}
    # Every block of a cache takes as many bytes as demand says; the widest codes of all channels take the most
    fields = {
        "mean": stacks.kind(lambda s: (s.heads, s.width), LARGEST),
        "E": stacks.kind(lambda s: (s.heads, s.width, s.width), **numbers),
        "scale": stacks.kind(lambda s: (s.heads, 1, s.width if stored == torch.int8 else 1), LARGEST),
        "spectrum": stacks.kind(lambda s: (s.heads, s.width), LARGEST),
        "widths": Checked(ListOf(Whole(0)), check_widths),
        "errors": stacks.kind(lambda s: (s.heads, s.width, len(WIDTHS)), LARGEST),
        "prices": TensorOf((None,), LARGEST),
        "demand": TensorOf((None, shape.num_layers), widest * COSTS[-1] + 1, least=0),
    }
    if basis.unrotated:
        fields["frequencies"] = EachOf(tuple(map(rotation, geometry.layers)))
        fields["layouts"] = ListOf(OneOf(LAYOUTS), geometry.num_layers)
    return Checked(Record(fields, Anything()), check_prices)


def multi_head_from(
    record: dict, basis: MultiHead, geometry: Geometry, stored: torch.dtype, where: str
) -> MultiHeadFit:
    """The codec of a record that fits `multi_head_schema`. stored, where: as MultiHeadFit has them."""
    stacks = Stacks(basis.shape(geometry))
    mean, E, scale, spectrum, errors = (
        stacks.apart(record[name]) for name in ("mean", "E", "scale", "spectrum", "errors")
    )
    E = [None if own is None else own * by for own, by in zip(E, scale, strict=True)]
    rotary = zip(record["frequencies"], record["layouts"], strict=True) if basis.unrotated else ()
    shared = {}  # one object for all layers that rotate alike, because it keeps the angles of the latest step
    rotations = [shared.setdefault((tuple(of.tolist()), how), Rotary(of, how)) for of, how in rotary]
    return MultiHeadFit(
        basis, mean, E, spectrum, rotations,
        BitAllocation(errors, record["prices"], record["demand"]), stored=stored, where=where,
    )  # fmt: skip
