"""Bases that heads share, fitted to a model: their matrices, and what coding their coordinates costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from gpt2.common.errors import BadArtefact, PluginError, brief
from gpt2.common.schema import Anything, Checked, Kind, ListOf, OneOf, Record, TensorOf, Whole
from gpt2.compression.calibration.bit_allocation import BitAllocation
from gpt2.compression.calibration.statistics import MultiHeadStatistics
from gpt2.compression.codecs import MultiHead, Quantizer, Transform
from gpt2.compression.codecs.formats import BLOCK, WIDTHS
from gpt2.compression.codecs.mixed import COSTS, errors
from gpt2.compression.codecs.rope import LAYOUTS, NONE, Rotary
from gpt2.models.geometry import Geometry

LARGEST = 1e15  # numbers in a file must be below it: those of real models are far smaller
# Where K and V hardly vary, coordinates of other texts are taken to be at least so large: against the means, and
# against channels
SMALLEST_SPREAD, SMALLEST_SIZE = 0.01, 2.0**-10


@dataclass
class MultiHeadFit:
    """The N bases of all layers, as `basis` numbers them, for G groups of heads with w channels each.

    mean [N, G, w], E [N, G, w, w], spectrum [N, G, w]: variance of each coordinate. rotary: each layer's rotation,
    empty where keys aren't un-rotated. half: whether a file holds E in half precision. where: the file that it is from,
    for messages.
    """

    basis: MultiHead
    mean: Tensor
    E: Tensor
    spectrum: Tensor
    rotary: list[Rotary]
    allocation: BitAllocation
    half: bool = False
    where: str = "the calibration"

    @cached_property
    def D(self) -> Tensor:
        """The decoder: the inverse of E as it is stored, in whatever precision."""
        # One by one: PyTorch 2.13 with MKL fails on batches of large matrices when it has more threads than one
        found = [torch.linalg.inv_ex(E) for E in self.E.double().flatten(0, 1)]
        D = torch.stack([inverse for inverse, _ in found]).view_as(self.E).float()
        if any(failed for _, failed in found) or not bool(torch.isfinite(D).all()):
            raise BadArtefact(f"{self.where}: the basis has no inverse: make the calibration again")
        return D

    def transform(self, layer: int, side: str = "k") -> Transform:
        """The transform of one layer's K or V, `side` "k" or "v", on the CPU."""
        i = self.basis.basis_index(layer, side)
        rotary = self.rotary[layer] if self.rotary else NONE
        return self.basis.transform(side, self.E[i].float(), self.D[i], self.mean[i].float(), rotary)

    def quantizer(self, quantizer: Quantizer, layer: int, side: str = "k") -> Quantizer:
        """A quantizer for one layer's K or V, where its bits are meant on average over all."""
        return quantizer.allocated(self.allocation, self.basis.basis_index(layer, side))

    def spectra(self) -> dict[str, Tensor]:
        """Variance of each coordinate by what has a basis in a layer: "kv", or "k" and "v"; [layers, G, w] each."""
        sides = ("kv",) if self.basis.joint else ("k", "v")
        return dict(zip(sides, self.spectrum.unflatten(0, (-1, len(sides))).unbind(1), strict=True))

    def compact(self) -> MultiHeadFit:
        """The same, with E as a file in half precision holds it."""
        scale = self._scale()
        return replace(self, E=(self.E / scale).half().float() * scale, half=True)

    def _scale(self) -> Tensor:
        """A power of two not below any number of a group's E, [N, G, 1, 1]: half precision then has range enough."""
        return self.E.abs().amax((-1, -2), keepdim=True).clamp_min(1e-30).log2().ceil().exp2()

    def record(self) -> dict:
        """Tensors and plain types for a calibration file."""
        E, scale = self.E / self._scale(), self._scale()
        return {
            "mean": self.mean,
            "E": E.half() if self.half else E,
            "scale": scale,
            "spectrum": self.spectrum,
            "frequencies": [rotary.frequencies for rotary in self.rotary],
            "layouts": [rotary.layout for rotary in self.rotary],
            "widths": list(WIDTHS),
            "errors": self.allocation.errors,
            "prices": self.allocation.prices,
            "demand": self.allocation.demand,
        }


def fit_multi_head(statistics: MultiHeadStatistics) -> MultiHeadFit:
    """Fit the bases of all layers, and measure on the sampled blocks what each width of code costs."""
    if not statistics.blocks.shape[2]:
        raise PluginError(f"quantization is tried on blocks of {BLOCK} tokens: give a longer --seq-len")
    moments = statistics.moments
    fitted = [statistics.basis.fit(moments, i) for i in range(len(moments.count))]
    spectrum = torch.stack([variances for _, variances in fitted])
    E = torch.stack([transform.E for transform, _ in fitted])
    unit = _unit(E, moments.mean, spectrum)
    mean, E = moments.mean.float(), (E / unit).float()
    # The coordinates of the sample, [1, G, T, w], basis by basis
    coordinates = ((x.float() - mean[i, :, None]) @ E[i][None] for i, x in enumerate(statistics.blocks))
    allocation = BitAllocation.measured([errors(z)[0] for z in coordinates])
    return MultiHeadFit(statistics.basis, mean, E, (spectrum / unit**2).float(), statistics.rotary, allocation)


def _unit(E: Tensor, mean: Tensor, spectrum: Tensor) -> Tensor:
    """One factor for the coordinates of the whole model, so that steps are well inside the range of a scale's byte.

    Where hardly anything varied, as in a text of one token, the size of the means and of the metric say how large other
    texts' coordinates may be. E [N, G, w, w], mean and spectrum [N, G, w].
    """
    of_mean = (mean[:, :, None] @ E).square().mean()
    of_metric = E.square().sum(-2).mean()
    return torch.stack((spectrum.mean(), SMALLEST_SPREAD**2 * of_mean, SMALLEST_SIZE**2 * of_metric)).amax().sqrt()


def multi_head_schema(basis: MultiHead, geometry: Geometry) -> Kind:
    """What a calibration file must hold of a codec, as `MultiHeadFit.record` writes it."""
    shape, layers, widths = basis.shape(geometry), geometry.num_layers, list(WIDTHS)
    L, G, w = shape.num_layers, shape.num_kv_heads, shape.head_dim

    def check_frequencies(frequencies: Tensor) -> None:
        if 2 * len(frequencies) > geometry.head_dim:
            raise PluginError(f"expected at most {geometry.head_dim // 2} frequencies, found {len(frequencies)}")

    def check_widths(found: list[int]) -> None:
        if found != widths:
            raise PluginError(f"expected {widths}, found {brief(found)}")

    def check_prices(record: dict) -> None:
        if not 1 < len(record["prices"]) == len(record["demand"]):
            raise PluginError("expected two or more prices, and the demand at each")

    # Every block of a cache takes as many bytes as demand says; the widest codes of all channels take the most
    fields = {
        "mean": TensorOf((L, G, w), LARGEST),
        "E": TensorOf((L, G, w, w), LARGEST),
        "scale": TensorOf((L, G, 1, 1), LARGEST),
        "spectrum": TensorOf((L, G, w), LARGEST),
        "widths": Checked(ListOf(Whole(0)), check_widths),
        "errors": TensorOf((L, G, w, len(WIDTHS)), LARGEST),
        "prices": TensorOf((None,), LARGEST),
        "demand": TensorOf((None, L), w * COSTS[-1] + 1, least=0),
    }
    if basis.unrotated:
        fields["frequencies"] = ListOf(Checked(TensorOf((None,), LARGEST), check_frequencies), layers)
        fields["layouts"] = ListOf(OneOf(LAYOUTS), layers)
    return Checked(Record(fields, Anything()), check_prices)


def multi_head_from(record: dict, basis: MultiHead, half: bool, where: str) -> MultiHeadFit:
    """The codec of a record that fits `multi_head_schema`. half, where: as MultiHeadFit has them."""
    rotary = zip(record["frequencies"], record["layouts"], strict=True) if basis.unrotated else ()
    return MultiHeadFit(
        basis, record["mean"], record["E"] * record["scale"], record["spectrum"], [Rotary(*own) for own in rotary],
        BitAllocation(record["errors"], record["prices"], record["demand"]), half=half, where=where,
    )  # fmt: skip
