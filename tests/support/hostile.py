"""Keys and values that are hard to store: each a function of a generator and a shape, to [B, H, T, d] float32.

What belongs to a model, such as its biases, is the same whatever the seed; what a text brings isn't.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from gpt2.compression.codecs.rope import Rotary

Shape = tuple[int, int, int, int]
SHAPES: tuple[Shape, ...] = ((1, 2, 128, 64), (2, 1, 128, 12), (1, 1, 128, 80))


def noise(g: Generator, shape: Shape) -> Tensor:
    return torch.randn(shape, generator=g)


def of_model(shape: Shape) -> Tensor:
    """A number from -1 to 1 for every channel, [1, H, 1, d]."""
    return torch.rand(1, shape[1], 1, shape[3], generator=Generator().manual_seed(1)) * 2 - 1


def with_bias(size: float, spread: float) -> Callable[[Generator, Shape], Tensor]:
    return lambda g, shape: noise(g, shape) * spread + size * of_model(shape)


def few_biases(g: Generator, shape: Shape) -> Tensor:
    x = noise(g, shape)
    x[..., 1] += 400
    x[..., shape[3] // 2] -= 400
    x[..., -1] += 90
    return x


def rotated_biases(g: Generator, shape: Shape) -> Tensor:
    """As Qwen2.5 caches them: a bias that was added before keys were rotated by position."""
    *_, T, d = shape
    bias = 10 * of_model(shape)
    bias[..., 1], bias[..., d // 2 - 1], bias[..., -2] = 400, -300, 150
    frequencies = 1e6 ** (-torch.arange(0, d, 2) / d)
    return Rotary(frequencies).rotate(2 * noise(g, shape) + bias, 0)


def no_variance(g: Generator, shape: Shape) -> Tensor:
    x = noise(g, shape)
    x[..., ::3], x[..., 1::3] = 0, 400
    return x


def repeated(count: int) -> Callable[[Generator, Shape], Tensor]:
    """So many different tokens, the same whatever the seed, in any order."""

    def make(g: Generator, shape: Shape) -> Tensor:
        tokens = noise(Generator().manual_seed(0), (*shape[:2], count, shape[3]))
        return tokens[:, :, torch.randint(count, (shape[2],), generator=g)].contiguous()

    return make


def massive(tokens: slice, channels: slice | list[int], size: float) -> Callable[[Generator, Shape], Tensor]:
    """Some channels of some tokens so many times as large."""

    def make(g: Generator, shape: Shape) -> Tensor:
        x = noise(g, shape)
        x[:, :, tokens, channels] *= size
        return x

    return make


# Hard in channels or in all tokens alike: held to int4 in every basis
CHANNELS: dict[str, Callable[[Generator, Shape], Tensor]] = {
    "plain": noise,
    "bias of 400 in a few channels": few_biases,
    "biases up to 400 in all": with_bias(400, 0.5),
    "biases up to 400, hardly any spread": with_bias(400, 0.01),
    "the same bias in all": lambda g, shape: 400 + 0.5 * noise(g, shape),
    "biases rotated by positions": rotated_biases,
    "outlier channels": massive(slice(None), slice(None, None, 7), 100),
    "channels of 1e-6 to 1e4": lambda g, shape: noise(g, shape) * torch.logspace(-6, 4, shape[3]),
    "no variance in most channels": no_variance,
    "one token all the time": repeated(1),
    "five tokens": repeated(5),
    "zeros": lambda g, shape: torch.zeros(shape),
    "constant": lambda g, shape: torch.full(shape, -400.2),
    "near float16's end": lambda g, shape: noise(g, shape).clamp(-4, 4) * 15_000,
}
# Hard because of single tokens, which sinks are for
TOKENS: dict[str, Callable[[Generator, Shape], Tensor]] = {
    "massive first tokens": massive(slice(4), slice(None), 1000),
    "massive activations": massive(slice(2), [3, 5], 2000),
    "a massive token in the middle": massive(slice(90, 91), slice(None), 1000),
    # Cauchy, cut at some thousands
    "heavy tails": lambda g, shape: noise(g, shape) / noise(g, shape).abs().clamp_min(1e-3),
}
# Of a size that no step, or no float16, is made for: finite, and no more is promised
SIZES: dict[str, Callable[[Generator, Shape], Tensor]] = {
    f"times {size:g}": lambda g, shape, size=size: noise(g, shape) * size for size in (1e-42, 1e-30, 1e-5, 1e6, 1e17)
}
HOSTILE = CHANNELS | TOKENS | SIZES


def hostile(name: str, shape: Shape, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """One of `HOSTILE`, in a dtype as a model of that dtype would have it: finite."""
    x = HOSTILE[name](Generator().manual_seed(seed), shape)
    return x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
