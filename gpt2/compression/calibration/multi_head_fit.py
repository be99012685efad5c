"""Bases that heads share, fitted to a model: their matrices, and what coding their coordinates costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from gpt2.common.errors import BadArtefact, PluginError, brief
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


def parse_measured(record, basis: MultiHead, geometry: Geometry, expect) -> MultiHeadFit:
    """Check a file's record and make the codec of it. expect(good, field, expected, found) raises."""
    name = basis.name

    def tensor(key: str, *shape: int) -> Tensor:
        value = record.get(key)
        found = brief(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
        expect(isinstance(value, Tensor) and list(value.shape) == list(shape), f"{name}.{key}", list(shape), found)
        expect(value.is_floating_point(), f"{name}.{key}", "floating-point numbers", value.dtype)
        within = float(value.abs().max()) < LARGEST  # which NaN isn't
        expect(within, f"{name}.{key}", f"finite numbers below {LARGEST:g}", "NaN or larger ones")
        return value.float()

    expect(isinstance(record, dict), name, "a dict", type(record).__name__)
    E = record.get("E")
    expect(isinstance(E, Tensor) and E.ndim == 4, f"{name}.E", "a tensor [L, G, w, w]", type(E).__name__)
    channels = 2 * geometry.num_kv_heads * geometry.head_dim // basis.bases_per_layer
    expect(E.shape[1] * E.shape[2] == channels, f"{name}.E", f"{channels} channels", E.shape[1] * E.shape[2])
    shape = basis.shape(geometry)
    L, G, w = shape.num_layers, shape.num_kv_heads, shape.head_dim
    widths = record.get("widths")
    plain = isinstance(widths, list) and all(type(width) is int for width in widths)
    expect(plain and widths == list(WIDTHS), f"{name}.widths", list(WIDTHS), brief(widths))
    n = record["prices"].numel() if isinstance(record.get("prices"), Tensor) else 0
    expect(n > 1, f"{name}.prices", "two or more numbers", n)
    demand, most = tensor("demand", n, L), w * COSTS[-1]
    # A cache takes so many for every block; rounded, they may be some more
    within = float(demand.min()) >= 0 and float(demand.max()) <= most + 1
    expect(within, f"{name}.demand", f"0 to {most:,} bytes, which all channels at the widest take", "others")
    return MultiHeadFit(
        basis, tensor("mean", L, G, w), tensor("E", L, G, w, w) * tensor("scale", L, G, 1, 1),
        tensor("spectrum", L, G, w),
        _parse_rotary(record, name, geometry, expect) if basis.unrotated else [],
        BitAllocation(tensor("errors", L, G, w, len(WIDTHS)), tensor("prices", n), demand),
        half=E.dtype == torch.float16,
    )  # fmt: skip


def _parse_rotary(record: dict, name: str, geometry: Geometry, expect) -> list[Rotary]:
    layouts, frequencies, d = record.get("layouts"), record.get("frequencies"), geometry.head_dim
    for key, value in (("layouts", layouts), ("frequencies", frequencies)):
        right = isinstance(value, list) and len(value) == geometry.num_layers
        expect(right, f"{name}.{key}", f"a list of {geometry.num_layers}", type(value).__name__)
    for layout, own in zip(layouts, frequencies, strict=True):
        expect(layout in LAYOUTS, f"{name}.layouts", " or ".join(LAYOUTS), brief(layout))
        right = isinstance(own, Tensor) and own.ndim == 1 and 2 * len(own) <= d
        right = right and bool((own.abs() < LARGEST).all())  # which NaN isn't
        expect(right, f"{name}.frequencies", f"at most {d // 2} numbers below {LARGEST:g}", type(own).__name__)
    return [Rotary(own.float(), layout) for layout, own in zip(layouts, frequencies, strict=True)]
