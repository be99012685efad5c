"""Rotary positions (RoPE) taken off keys and put back, so that a codec sees keys that don't depend on their position.

It is correct with any rotation: keys are rotated again by the angles that they were un-rotated by. A rotation that
isn't the model's own only costs compression, so the one that compresses best is chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

KEPT = 2  # answers of `frame_angles`: layers with and without a window hold different tokens
LAYOUTS = ("none", "half", "interleaved")  # which two channels rotate together: c and c + n/2, or 2c and 2c + 1


@dataclass(frozen=True)
class Rotary:
    """Rotation of a layer's keys: radians per position of each pair of channels, [n / 2], and how pairs lie."""

    frequencies: Tensor
    layout: str = "half"

    @property
    def rotates(self) -> bool:
        """Whether it rotates any channel."""
        return self.layout != "none" and self.frequencies.shape[0] > 0  # len of a tensor takes microseconds

    def rotate(self, x: Tensor, start: int | Tensor, sign: int = 1, frame: int = 1) -> Tensor:
        """x [..., T, d] rotated by sign · position; the first token is at position `start`, [B] of each row's own.

        frame: tokens that all rotate by the position of their middle (`middles`).
        """
        if not self.rotates:
            return x
        return self.rotate_by(x, middles(x.shape[-2], start, frame, x.device), sign)

    def rotate_by(self, x: Tensor, positions: Tensor, sign: int = 1) -> Tensor:
        """x [..., d] rotated by sign · positions, which broadcast to its dimensions before the last."""
        if not self.rotates:
            return x
        cos, sin = self.angles(positions.to(x.device)).to(x.dtype).unbind(-2)
        shape = torch.broadcast_shapes(x.shape[:-1], positions.shape)
        rotated = x.expand(*shape, -1).clone(memory_format=torch.contiguous_format)
        n = 2 * len(self.frequencies)
        # In place: new memory for a long prompt costs more time than the arithmetic
        a, b = rotated[..., :n].chunk(2, -1) if self.layout == "half" else (rotated[..., 0:n:2], rotated[..., 1:n:2])
        from_a = a * sin
        a.mul_(cos).addcmul_(b, sin, value=-sign)
        b.mul_(cos).add_(from_a, alpha=sign)
        return rotated

    def angles(self, positions: Tensor) -> Tensor:
        """Cosines and sines of the angles at positions [...], float32 [..., 2, n / 2]."""
        angle = positions.float()[..., None] * self.frequencies.to(positions.device, torch.float32)
        return torch.stack((angle.cos(), angle.sin()), dim=-2)

    def frame_angles(self, first: int | Tensor, frames: int, frame: int) -> Tensor:
        """`angles` at the middles of frames of `frame` tokens, [frames, 2, n / 2], or [B, frames, 2, n / 2].

        first: position of the first frame's first token; [B] where rows have their own. All layers ask for the same, at
        every step until another block is full, so that the latest answers are kept.
        """
        kept, asked = self.__dict__.setdefault("_kept", {}), (first, frames, frame)
        # Asked once: another thread may clear what is kept
        if not isinstance(first, Tensor) and (found := kept.get(asked)) is not None:
            return found
        middle = (frame - 1) / 2 + frame * torch.arange(frames, dtype=torch.float32, device=self.frequencies.device)
        if isinstance(first, Tensor):
            return self.angles(middle + first[:, None].to(middle.device))
        angles = self.angles(middle + first)
        if len(kept) >= KEPT:  # two threads may both have added
            kept.clear()
        kept[asked] = angles  # the dataclass is frozen, and this is not one of its fields
        return angles

    def unrotate(self, x: Tensor, start: int | Tensor, frame: int = 1) -> Tensor:
        """The inverse of `rotate`; with frames of one token, pre-RoPE keys."""
        return self.rotate(x, start, -1, frame)

    def to(self, device: torch.device | str) -> Rotary:
        """This rotation on a device: itself if it is there already, else a copy that all layers there share."""
        if self.frequencies.device == torch.device(device):
            return self
        there = self.__dict__.setdefault("_there", {})  # as `_kept` above
        if str(device) not in there:
            there[str(device)] = Rotary(self.frequencies.to(device), self.layout)
        return there[str(device)]

    def nbytes(self) -> int:
        """Bytes of its frequencies and of the angles that are kept."""
        kept = list(self.__dict__.get("_kept", {}).values())  # to which another thread may add
        return self.frequencies.nbytes + sum(angles.nbytes for angles in kept)


NONE = Rotary(torch.zeros(0), "none")


def middles(tokens: int, start: int | Tensor, frame: int, device: torch.device | str = "cpu") -> Tensor:
    """Position of the middle of the frame that each of `tokens` is in, float32 [T], or [B, 1, T] where rows differ.

    start: position of the first token. A number: frames begin at its multiples, so that it doesn't matter how tokens
    were cut into chunks. [B], of each row: the first token begins a frame, wherever that is in the row.
    """
    before = 0 if isinstance(start, Tensor) else start % frame  # tokens of the first frame that aren't there
    place = torch.arange(before, before + tokens, device=device)
    middle = (place // frame * frame - before).float() + (frame - 1) / 2
    return middle + (start.to(device)[:, None, None] if isinstance(start, Tensor) else start)


def candidates(model: nn.Module, head_dim: int) -> list[Rotary]:
    """No rotation, and every one that the model's buffers of frequencies allow, in both layouts.

    Copies, as some models overwrite their buffers where a text is longer or shorter than the one before.
    """
    found = [NONE]
    seen = set()
    for name, buffer in model.named_buffers():
        fits = name.endswith("inv_freq") and buffer.ndim == 1 and 0 < 2 * len(buffer) <= head_dim
        key = tuple(buffer.tolist()) if fits else None
        if fits and key not in seen:
            seen.add(key)
            frequencies = buffer.detach().float().cpu().clone()
            found += [Rotary(frequencies, layout) for layout in LAYOUTS[1:]]
    return found


def best_fit(keys: Tensor, start: int, choices: list[Rotary]) -> Rotary:
    """The rotation without which keys [H, T, d] take the fewest bits: the least log-determinant of their covariance."""

    def bits(rotary: Rotary) -> float:
        x = rotary.unrotate(keys.double(), start)
        x = x - x.mean(-2, keepdim=True)
        covariance = x.mT @ x / x.shape[-2]
        if not torch.isfinite(covariance).all():  # statistics of such keys raise an error that says what to do
            return math.inf
        floor = 1e-6 * covariance.diagonal(dim1=-2, dim2=-1).mean() * torch.eye(x.shape[-1], dtype=x.dtype)
        return float(torch.linalg.eigvalsh(covariance + floor).clamp_min(1e-300).log().sum())

    return min(choices, key=bits)
