"""Variations on the joint codec, simulated: the reconstruction and the number of bits, without packing any codes.

A block is y [..., r, B]: r channels of B tokens. Each channel gets a bit width from a menu and codes of that width; its
cost is all bits of codes and metadata. With all defaults the result is that of `codecs.mixed`, bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from gpt2.compression.codecs.hadamard import Hadamard
from gpt2.compression.codecs.mixed import (
    BLOCK,
    NARROW,
    OCTAVE,
    SCALE_ZERO,
    WIDE,
    WIDEST_NARROW,
    WIDTHS,
    cheapest,
    offset_unit,
    rounded_grid,
)
from gpt2.compression.codecs.multi_head import JointTransform
from gpt2.experiments import query_rounding

METADATA_BITS = {"bytes": 16, "half": 32, "nibbles": 8, "scale": 8}
AT_ONE_PRICE = ("text", "calibration")
OFFSET_BITS = 16  # for the position of a block in memory, if blocks differ in size
# Shares of the range to try at one bit: a Gaussian's best two levels are 1.6 deviations apart, a third of the range
ONE_BIT = (0.6, 0.5, 0.4, 0.3)
# Scales to try for the levels of a Gaussian, as multiples of a channel's standard deviation
GAUSSIAN = (0.8, 0.9, 1.0, 1.1, 1.2)
# Mean squared norm of vectors to try, as a share of the squared radius of the ball of lattice points: at a larger share
# the grid is finer, but more vectors lie outside the ball
FULLNESS = (0.5, 0.65, 0.8, 0.95)
LATTICE_WIDTHS = (2, 3)
E8 = 8  # dimensions


@dataclass(frozen=True)
class Variation:
    """One version of the codec; the defaults are the product.

    frame: tokens whose keys are un-rotated by one position, that of their middle: 1 for each by its own, None for keys
    as they are cached. parts: what shares a basis: each "head" of K or V, all heads of a "side", K and V of one
    head ("pair"), or all ("joint"). metric: "identity", "weighted" (the mean weight of each head's K or V), Fisher
    within "heads" only, in full ("fisher"), or with entries between heads "shrunk". widths: "fixed" at calibration;
    chosen by "block" within a fixed number of bytes; or chosen by block at one price per bit for the whole model, which
    is set on the evaluated "text" or at "calibration". metadata: scale and offset in a byte each ("bytes"), in float16
    ("half"), in four bits each ("nibbles"), or only a "scale" in a byte, with the calibrated mean as offset. narrow,
    wide: shares of the range to try, for few and for many bits. levels: "uniform", those of a "gaussian" up to 4 bits,
    or the "lattice" E8 for 2 and 3 bits. rotated: mix channels of equal width by a Hadamard matrix. query_bits: of the
    integers that queries are rounded to, for each head and block, with a frame as long as a block; None for floats.
    """

    frame: int | None = 1
    parts: str = "joint"
    metric: str = "shrunk"
    widths: str = "block"
    menu: tuple[int, ...] = WIDTHS
    block: int = BLOCK
    metadata: str = "bytes"
    narrow: tuple[float, ...] = NARROW
    wide: tuple[float, ...] = WIDE
    levels: str = "uniform"
    rotated: bool = False
    query_bits: int | None = None

    def costs(self) -> Tensor:
        """Bits of one channel of a block at each width of the menu, [widths]."""
        widths = torch.tensor(self.menu, dtype=torch.float32)
        return self.block * widths + METADATA_BITS[self.metadata] * (widths > 0)

    def overhead(self, channels: int) -> int:
        """Further bits of a block with so many channels: the channels' widths, and the block's position in memory."""
        if self.widths == "fixed":
            return 0
        planes = (len(self.menu) - 1).bit_length() * 8 * -(-channels // 8)
        return planes + (OFFSET_BITS if self.widths in AT_ONE_PRICE else 0)

    def shares(self, bits: int) -> tuple[float, ...]:
        """Shares of a channel's range to try for codes of so many bits."""
        if bits > WIDEST_NARROW:
            return self.wide
        return ONE_BIT if bits == 1 and len(self.narrow) > 1 else self.narrow


def errors(y: Tensor, variation: Variation, spread: Tensor) -> Tensor:
    """Squared error of every channel at every width: y [..., r, B] → [..., r, widths].

    spread: calibrated deviation of every channel, [..., r].
    """
    nothing = y.square().sum(-1)
    return torch.stack([coded(y, b, variation, spread)[0] if b else nothing for b in variation.menu], dim=-1)


def read_back(y: Tensor, choice: Tensor, variation: Variation, spread: Tensor) -> Tensor:
    """The reconstruction of y [n, r, B] with widths `choice` [n, r], indices into the menu. spread: [n, r]."""
    back = torch.zeros_like(y)
    for index, bits in enumerate(variation.menu):
        own = choice == index
        if not bits or not own.any():
            continue
        if not variation.rotated:
            back[own] = coded(y[own], bits, variation, spread[own])[1]
            continue
        for block in own.any(-1).nonzero()[:, 0]:
            rows = y[block, own[block]]
            H = _rotation(len(rows)).to(y)
            back[block, own[block]] = H.mT @ coded(H @ rows, bits, variation, spread[block, own[block]])[1]
    return back


@functools.cache
def _rotation(size: int) -> Tensor:
    return Hadamard().transform(size).E[0].mT.float()


def coded(y: Tensor, bits: int, variation: Variation, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Every channel of y [..., B] in the best of the codes that are tried: squared error [...], reconstruction."""
    if variation.levels == "gaussian" and bits <= WIDEST_NARROW:
        tries = _gaussian(y, bits)
    elif variation.levels == "lattice" and bits in LATTICE_WIDTHS:
        tries = _lattice(y, bits)
    else:
        tries = _uniform(y, bits, variation, spread)
    least, best = torch.full_like(y[..., 0], math.inf), y
    for back in tries:
        error = (y - back).square_().sum(-1)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better[..., None], back, best)
    return least, best


# --- uniform levels


def _uniform(y: Tensor, bits: int, variation: Variation, spread: Tensor) -> Iterable[Tensor]:
    low, high, last = y.amin(-1), y.amax(-1), 2**bits - 1
    for share in variation.shares(bits):
        step, middle = GRIDS[variation.metadata](low, high, share / last, bits, spread)
        origin = (middle - step * (last / 2))[..., None]
        codes = ((y - origin) / step[..., None]).round_().clamp_(0, last)
        yield codes.mul_(step[..., None]).add_(origin)


def _bytes(low: Tensor, high: Tensor, share: float, bits: int, spread: Tensor) -> tuple[Tensor, Tensor]:
    unit = float(offset_unit(torch.tensor(bits)))
    scale, offset = rounded_grid(low, high, share, 127, unit)
    return scale, scale * (unit * offset)


def _half(low: Tensor, high: Tensor, share: float, bits: int, spread: Tensor) -> tuple[Tensor, Tensor]:
    return ((high - low) * share).clamp_min(1e-7).half().float(), ((low + high) / 2).half().float()


def _nibbles(low: Tensor, high: Tensor, share: float, bits: int, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Steps of half an octave, 16 of them, down from four times the step that suits the calibrated spread; offsets in
    units of a sixteenth of the range."""
    unit, middle = max(2.0**bits / 16, 0.25), (low + high) / 2
    widest = 16 * spread.clamp_min(1e-12) / (2**bits - 1)
    wanted = torch.maximum((high - low) * share, middle.abs() / (7 * unit) * 2**0.25)
    step = widest * 2 ** ((wanted.clamp_min(1e-30) / widest).log2().mul(2).round().clamp(-15, 0) / 2)
    return step, step * unit * (middle / step / unit).round().clamp(-8, 7)


def _scale(low: Tensor, high: Tensor, share: float, bits: int, spread: Tensor) -> tuple[Tensor, Tensor]:
    return _to_byte(2 * torch.maximum(-low, high).clamp_min(0) * share), torch.zeros_like(low)


GRIDS = {"bytes": _bytes, "half": _half, "nibbles": _nibbles, "scale": _scale}


def _to_byte(scale: Tensor) -> Tensor:
    """A scale rounded to the values of the product's byte."""
    return ((scale.clamp_min(1e-30).log2() * OCTAVE).round().clamp(-SCALE_ZERO, 255 - SCALE_ZERO) / OCTAVE).exp2()


def _placed(y: Tensor, scale: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """Scale and mean of every channel, rounded to a byte each, [..., 1]; unit: of the mean, relative to the scale."""
    mean = y.mean(-1)
    scale = _to_byte(torch.maximum(scale, mean.abs() / (127 * unit) * 2 ** (0.5 / OCTAVE)))
    return scale[..., None], (scale * unit * (mean / scale / unit).round().clamp(-128, 127))[..., None]


# --- a Gaussian's levels


def _gaussian(y: Tensor, bits: int) -> Iterable[Tensor]:
    levels = gaussian_levels(bits).to(y)
    edges, deviation = (levels[1:] + levels[:-1]) / 2, y.std(-1, correction=0)
    for share in GAUSSIAN:
        scale, mean = _placed(y, share * deviation, 1 / 8)
        yield levels[torch.bucketize((y - mean) / scale, edges)] * scale + mean


@functools.cache
def gaussian_levels(bits: int) -> Tensor:
    """The 2^bits levels of least squared error for a standard Gaussian (Lloyd 1957, Max 1960), float64."""
    x = torch.linspace(-6, 6, 24001, dtype=torch.float64)
    weight = (-x.square() / 2).exp()
    levels = torch.linspace(-2, 2, 2**bits, dtype=torch.float64)
    for _ in range(300):
        nearest = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        mass = torch.zeros_like(levels).index_add_(0, nearest, weight)
        levels = torch.zeros_like(levels).index_add_(0, nearest, weight * x) / mass
    return levels


# --- the lattice E8


def _lattice(y: Tensor, bits: int) -> Iterable[Tensor]:
    """Eight neighbouring tokens of a channel at a time are rounded to points of E8 in a ball of at most 2^(8 bits)."""
    radius, deviation = ball(bits), y.std(-1, correction=0)
    for fullness in FULLNESS:
        scale, mean = _placed(y, deviation * math.sqrt(E8 / radius / fullness), 1 / 4)
        points = nearest_in_ball(((y - mean) / scale).unflatten(-1, (-1, E8)), radius)
        yield points.flatten(-2) * scale + mean


@functools.cache
def ball(bits: int) -> int:
    """The largest squared norm R such that at most 2^(8 bits) points of E8 have a squared norm up to R.

    E8 has 240 σ₃(n) points of squared norm 2n, σ₃ the sum of the cubes of n's divisors.
    """
    points, n = 1, 0
    while points <= 2 ** (E8 * bits):
        n += 1
        points += 240 * sum(d**3 for d in range(1, n + 1) if n % d == 0)
    return 2 * (n - 1)


def nearest_in_ball(x: Tensor, radius: int) -> Tensor:
    """For each x [..., 8] a near point of E8 with a squared norm of at most `radius`; inside the ball the nearest.

    An x outside is moved towards the origin until its nearest point is inside.
    """
    points = nearest_e8(x)
    outside = points.square().sum(-1) > radius + 0.5
    if outside.any():
        x, far = x.clone(), x[outside]
        x[outside] = far * (math.sqrt(radius) / far.norm(dim=-1, keepdim=True)).clamp_max(1)
    while outside.any():
        points[outside] = nearest_e8(x[outside])
        outside = points.square().sum(-1) > radius + 0.5
        x[outside] *= 0.95
    return points


def nearest_e8(x: Tensor) -> Tensor:
    """The nearest point of E8 = D8 ∪ (D8 + ½) to each x [..., 8] (Conway and Sloane 1982)."""
    whole, half = _nearest_d8(x), _nearest_d8(x - 0.5) + 0.5
    nearer = (x - whole).square().sum(-1) <= (x - half).square().sum(-1)
    return torch.where(nearer[..., None], whole, half)


def _nearest_d8(x: Tensor) -> Tensor:
    """The nearest integer vectors with an even sum: if the sum is odd, the worst rounding goes the other way."""
    nearest = x.round()
    rest = x - nearest
    worst = rest.abs().argmax(-1, keepdim=True)
    other_way = torch.where(rest.gather(-1, worst) < 0, -1.0, 1.0)
    odd = nearest.sum(-1, keepdim=True).remainder(2)
    return nearest.scatter_add_(-1, worst, odd * other_way)


# --- simulated in place of a cache


def led(x: Tensor, sink_tokens: int) -> Tensor:
    """x [..., T, d] with the sinks replaced by copies of the first token after them, as `TokenStore` pads them."""
    x = x.clone()
    x[..., :sink_tokens, :] = x[..., sink_tokens : sink_tokens + 1, :]
    return x


@dataclass
class Fitted:
    """A variation with its basis in every layer. spread [L, G, w]: calibrated deviation of each coordinate."""

    variation: Variation
    transforms: list[JointTransform]
    spread: Tensor

    def errors(self, layer: int, x: Tensor, start: int = 0) -> Tensor:
        """Squared error of x [B, 2H, T, d] at every width, [B, G, n, w, widths]."""
        y = self.blocks(layer, x, start)
        return errors(y, self.variation, self.spread_like(layer, y))

    def blocks(self, layer: int, x: Tensor, start: int = 0) -> Tensor:
        """Coordinates of x [B, 2H, T, d], block by block: [B, G, n, w, block]."""
        z = self.transforms[layer].forward(x, start)
        return z.unflatten(2, (-1, self.variation.block)).mT.contiguous()

    def spread_like(self, layer: int, y: Tensor) -> Tensor:
        return self.spread[layer][:, None].expand(y.shape[:-1])


@dataclass
class Plan:
    """How a budget of bits is shared out. price: squared error that one bit must save. limits: bits of a block in each
    layer. choice: index of the width of every channel, [G, w] for each layer; empty unless widths are fixed."""

    price: float
    limits: list[int]
    choice: list[Tensor]


def share_out(variation: Variation, measured: Sequence[Tensor], bits: float) -> Plan:
    """A plan of `bits` per coordinate, metadata included, on average over the layers.

    measured: squared errors of each layer's blocks, [G, n, w, widths].
    """
    costs, w = variation.costs(), measured[0].shape[2]
    if variation.widths == "fixed":
        measured = [error.mean(1, keepdim=True) for error in measured]
    wanted = bits * variation.block * w - variation.overhead(w)
    low, high = 1e-14, max(float(error.amax()) for error in measured) + 1e-12
    for _ in range(40):
        price = (low * high) ** 0.5
        spent = sum(float(costs[(e + price * costs).argmin(-1)].sum(-1).mean()) for e in measured) / len(measured)
        low, high = (low, price) if spent <= wanted else (price, high)
    choice = [(error + high * costs).argmin(-1) for error in measured]
    plane = variation.block  # budgets are whole bit planes, which have one bit for every token
    limits = [int(float(costs[own].sum(-1).mean()) // plane) * plane for own in choice]
    return Plan(high, limits, [own[:, 0] for own in choice] if variation.widths == "fixed" else [])


class Replaced(DynamicCache):
    """A cache that stores nothing: it returns what a function makes of the layer index and the model's new K and V."""

    def __init__(self, replace: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]):
        super().__init__()
        self.replace = replace

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return self.replace(layer_idx, key_states, value_states)


class Simulation:
    """A fitted variation at a budget. bits: per coordinate, counted over all K and V that went through `replace`."""

    def __init__(self, fitted: Fitted, plan: Plan, sink_tokens: int):
        self.fitted, self.plan, self.sink_tokens = fitted, plan, sink_tokens
        self.stored = self.coordinates = 0

    @property
    def bits(self) -> float:
        return self.stored / self.coordinates

    def replace(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions of k, v [B, H, T, d] of one layer."""
        x = torch.cat((k, v), dim=1)
        y = self.fitted.blocks(layer, led(x.float(), self.sink_tokens))  # [B, G, n, w, block]
        spread = self.fitted.spread_like(layer, y)
        choice = self.choose(layer, y, spread)
        self.count(layer, choice)
        back = read_back(*(part.flatten(0, 2) for part in (y, choice)), self.fitted.variation, spread.flatten(0, 2))
        z = back.view_as(y).mT.flatten(2, 3)
        read = self.fitted.transforms[layer].inverse(z, k.shape[-1]).to(k.dtype)
        read[:, :, : self.sink_tokens] = x[:, :, : self.sink_tokens]
        k, v = read.chunk(2, dim=1)
        if self.fitted.variation.query_bits:
            setattr(k, query_rounding.ATTRIBUTE, self.rounding(layer, y, choice, back.view_as(y).mT))
        return k, v

    def rounding(self, layer: int, y: Tensor, choice: Tensor, z: Tensor) -> query_rounding.QueryRounding:
        """How queries are rounded that read blocks y [B, G, n, w, block] as z [B, G, n, block, w].

        Steps are taken from each channel's whole range, of which codes may have a smaller share.
        """
        variation = self.fitted.variation
        last = 2.0 ** torch.tensor(variation.menu, device=y.device)[choice] - 1
        steps = (y.amax(-1) - y.amin(-1)) / last.clamp_min(1) * (last > 0)
        transform = self.fitted.transforms[layer]
        return query_rounding.QueryRounding(transform, z, steps, variation.query_bits, self.sink_tokens)

    def choose(self, layer: int, y: Tensor, spread: Tensor) -> Tensor:
        """Index of the width of every channel, [B, G, n, w]."""
        variation = self.fitted.variation
        if variation.widths == "fixed":
            return self.plan.choice[layer].to(y.device)[None, :, None].expand(y.shape[:-1])
        error, costs = errors(y, variation, spread), variation.costs().to(y.device)
        if variation.widths == "block":
            return cheapest(error, self.plan.limits[layer], costs)
        return (error + self.plan.price * costs).argmin(-1)

    def count(self, layer: int, choice: Tensor) -> None:
        """Count the bits of blocks: all bits of blocks of a fixed size, else only those that are used."""
        variation, blocks = self.fitted.variation, choice[..., 0].numel()
        if variation.widths == "block":
            self.stored += blocks * self.plan.limits[layer]
        else:
            self.stored += float(variation.costs().double()[choice.cpu()].sum())
        self.stored += blocks * variation.overhead(choice.shape[-1])
        self.coordinates += choice.numel() * variation.block
