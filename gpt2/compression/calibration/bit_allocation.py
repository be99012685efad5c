"""The calibrated part of a measured codec: its basis, and how bytes are shared out between layers and channels.

Squared error in its coordinates is loss, so one price per byte is fair to all layers, to K and to V: a layer gets the
bytes that it would buy at the price at which the whole model meets its budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from gpt2.common.errors import BadArtefact, PluginError, brief
from gpt2.common.schema import Anything, Checked, Kind, ListOf, OneOf, Record, TensorOf, Whole
from gpt2.compression.calibration.fisher import MultiHeadStatistics
from gpt2.compression.codecs import MultiHead, Quantizer, Transform
from gpt2.compression.codecs.mixed import BLOCK, COSTS, PLANE, WIDTHS, Mixed, MixedFixed, errors, width_bytes
from gpt2.compression.codecs.rope import LAYOUTS, NONE, Rotary
from gpt2.models.geometry import Geometry

LARGEST = 1e15  # numbers in a file must be below it: those of real models are far smaller
PRICES = 64  # at which the layers' demand is measured
# What a calibration's unit is made for at the least: a spread of so much of the means, and of so much in channels
SMALLEST_SPREAD, SMALLEST_SIZE = 0.01, 2.0**-10


@dataclass
class MultiHeadFit:
    """Basis of every entry and group, [L, G, w, w], and what its quantization was measured to cost.

    L are the entries of all layers, as `basis` has them. rotary: each layer's rotation, empty where keys keep theirs.
    mean [L, G, w]; spectrum [L, G, w]: variance of each coordinate. errors [L, G, w, widths]: mean squared error of a
    coordinate in a block at each of `mixed.WIDTHS`. prices [N], demand [N, L]: bytes per block that a group of a layer
    buys at each price when every block chooses for itself. half: whether a file holds E in half precision. where: the
    file that it is from, for messages.
    """

    basis: MultiHead
    mean: Tensor
    E: Tensor
    spectrum: Tensor
    rotary: list[Rotary]
    errors: Tensor
    prices: Tensor
    demand: Tensor
    half: bool = False
    where: str = "the calibration"
    _widths: dict[float, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def D(self) -> Tensor:
        """The way back: the inverse of E as it is stored, in whatever precision."""
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
        """A quantizer of one entry, of a budget that is meant for the mean of all."""
        entry = self.basis.basis_index(layer, side)
        if isinstance(quantizer, MixedFixed):
            if quantizer.bits not in self._widths:
                self._widths[quantizer.bits] = self.widths(quantizer.bits)
            return MixedFixed(quantizer.bits, self._widths[quantizer.bits][entry])
        return Mixed(self.layer_bits(quantizer.bits)[entry]) if isinstance(quantizer, Mixed) else quantizer

    def layer_bits(self, bits: float) -> list[float]:
        """Bits per coordinate of each entry, `bits` on average: all buy at one price."""
        w = self.E.shape[-1]
        wanted = bits * BLOCK * w / 8 - width_bytes(w)
        total = self.demand.double().mean(1)  # falls with the price
        if not float(total[-1]) <= wanted <= float(total[0]):
            low, high = self.bits_range()
            raise PluginError(f"bits {bits:g}: this codec takes {low:.2f} to {high:.2f} bits per coordinate")
        after = int((total > wanted).sum())
        before = max(after - 1, 0)
        gap = float(total[before] - total[after])
        share = (float(total[before]) - wanted) / gap if gap else 0.0
        spent = torch.lerp(self.demand[before].double(), self.demand[after].double(), share)
        planes = (spent / PLANE).floor() * PLANE
        return [(float(p) + width_bytes(w)) * 8 / BLOCK / w + 1e-9 for p in planes]

    def bits_range(self) -> tuple[float, float]:
        """Least and most bits per coordinate, on average over the layers, that `layer_bits` can share out."""
        w, total = self.E.shape[-1], self.demand.double().mean(1)
        low, high = ((float(t) + width_bytes(w)) * 8 / BLOCK / w for t in (total[-1], total[0]))
        return low, high

    def widths(self, bits: float) -> Tensor:
        """Width index of every channel, [L, G, w], for codes and metadata of `bits` per coordinate on average.

        Of least total error within the budget: Lagrangian, by bisection on the price.
        """
        costs = torch.tensor(COSTS, dtype=torch.float64)
        budget = bits * BLOCK / 8 * self.errors[..., 0].numel()
        low, high = -60.0, 60.0
        for _ in range(100):
            middle = (low + high) / 2
            taken = costs[self._at_price(math.exp(middle))].sum(-1)  # [L, G]
            spent = float((taken.amax(1) * taken.shape[1]).sum())  # a layer's groups are stored alike
            low, high = (low, middle) if spent <= budget else (middle, high)
        return self._at_price(math.exp(high))

    def _at_price(self, price: float) -> Tensor:
        return (self.errors.double() + price * torch.tensor(COSTS, dtype=torch.float64)).argmin(-1)

    def spectra(self) -> dict[str, Tensor]:
        """Variance of each coordinate by what shares a basis in a layer: "kv", or "k" and "v"; [layers, G, w] each."""
        sides = ("k", "v")[: self.basis.bases_per_layer] if self.basis.bases_per_layer > 1 else ("kv",)
        return dict(zip(sides, self.spectrum.unflatten(0, (-1, len(sides))).unbind(1), strict=True))

    def compact(self) -> MultiHeadFit:
        """This codec with its basis as a file in half precision holds it."""
        scale = self._scale()
        return replace(self, E=(self.E / scale).half().float() * scale, half=True)

    def _scale(self) -> Tensor:
        """A power of two not below any entry of a group's basis, [L, G, 1, 1]: half precision then has range enough."""
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
            "errors": self.errors,
            "prices": self.prices,
            "demand": self.demand,
        }


def fit_multi_head(statistics: MultiHeadStatistics) -> MultiHeadFit:
    """Fit the basis of every entry, and measure on the reservoir what each width costs."""
    if not statistics.reservoir.shape[2]:
        raise PluginError(f"this codec is measured on blocks of {BLOCK} tokens: give a longer --seq-len")
    moments = statistics.moments
    fitted = [statistics.basis.fit(moments, layer) for layer in range(len(moments.count))]
    spectrum = torch.stack([variances for _, variances in fitted])
    E = torch.stack([transform.E for transform, _ in fitted])
    unit = _unit(E, moments.mean, spectrum)
    E = E / unit
    codec = MultiHeadFit(
        statistics.basis, moments.mean.float(), E.float(), (spectrum / unit**2).float(), statistics.rotary,
        torch.empty(0), torch.empty(0), torch.empty(0),
    )  # fmt: skip
    per_layer = [errors(_coordinates(codec, statistics.reservoir, layer))[0] for layer in range(len(fitted))]
    codec.errors = torch.stack([error.mean(1) for error in per_layer])  # [L, G, w, widths]
    codec.prices, codec.demand = _demand(per_layer)
    return codec


def _unit(E: Tensor, mean: Tensor, spectrum: Tensor) -> Tensor:
    """One factor for the whole model, so that steps lie well inside what a scale's byte can say.

    Where hardly anything varied, as in a text of one token, the size of the means and of the metric say how large other
    texts' coordinates may be. E [L, G, w, w], mean and spectrum [L, G, w].
    """
    of_mean = (mean[:, :, None] @ E).square().mean()
    of_metric = E.square().sum(-2).mean()
    return torch.stack((spectrum.mean(), SMALLEST_SPREAD**2 * of_mean, SMALLEST_SIZE**2 * of_metric)).amax().sqrt()


def stand_in(basis: MultiHead, geometry: Geometry) -> MultiHeadFit:
    """A codec of no model: the cost of one doesn't depend on its values."""
    shape, d = basis.shape(geometry), geometry.head_dim
    L, G, w = shape.num_layers, shape.num_kv_heads, shape.head_dim
    E = torch.linalg.qr(torch.randn(w, w, generator=torch.Generator().manual_seed(0))).Q
    rotary = Rotary(10_000 ** -(torch.arange(0, d // 2 * 2, 2) / d))
    error = torch.logspace(0, -4, w)[:, None] * 0.25 ** torch.tensor(WIDTHS)
    prices, demand = _demand([error[None, None]])
    return MultiHeadFit(
        basis, torch.zeros(L, G, w), E.expand(L, G, w, w), torch.ones(L, G, w),
        [rotary] * geometry.num_layers if basis.unrotated else [], error.expand(L, G, w, -1), prices,
        demand.expand(-1, L),
    )  # fmt: skip


def _coordinates(codec: MultiHeadFit, reservoir: Tensor, layer: int) -> Tensor:
    """The reservoir of one layer in its basis, [1, G, T, w]."""
    return (reservoir[layer].float() - codec.mean[layer, :, None]) @ codec.E[layer][None]


def _demand(per_layer: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Prices [N], and bytes per block that each layer [G, n, w, widths] buys at them, [N, L]."""
    costs = torch.tensor(COSTS, dtype=torch.float32)
    highest = max(float(error.amax()) for error in per_layer)
    prices = torch.logspace(-12, math.log10(highest + 1e-30) + 1, PRICES)
    demand = [
        torch.stack([costs[(error + price * costs).argmin(-1)].sum(-1).mean() for error in per_layer])
        for price in prices
    ]
    return prices, torch.stack(demand)


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
        record["errors"], record["prices"], record["demand"], half=half, where=where,
    )  # fmt: skip
