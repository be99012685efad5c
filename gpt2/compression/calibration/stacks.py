"""Tensors of layers as a file holds them: those of one shape stacked, however many layers there are.

A model whose layers are all alike has one tensor with layers as its first dimension, as files had before layers could
differ. Any other has a list of such tensors, one for each shape in the order in which the layers first have it; layers
without K and V are in none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpt2.common.schema import EachOf, Kind, Nullable, TensorOf
from gpt2.models.geometry import Geometry, Shape


@dataclass(frozen=True)
class Stacks:
    """How the tensors of one side's layers are stacked. geometry: of a model's layers, or of bases in their place."""

    geometry: Geometry
    side: str = "k"

    @property
    def groups(self) -> dict[Shape, list[int]]:
        """Every shape to the layers that have it."""
        groups: dict[Shape, list[int]] = {}
        for index in self.geometry.attention:
            groups.setdefault(self.geometry.layers[index].side(self.side), []).append(index)
        return groups

    def stacked(self, parts: Sequence[Tensor | None]) -> Any:
        """A tensor of every layer as a file has them; None in place of a stack whose first layer has no tensor."""
        found = [_stack([parts[index] for index in group]) for group in self.groups.values()]
        return found[0] if self.geometry.alike else found

    def apart(self, stacks: Any) -> list[Tensor | None]:
        """The inverse of `stacked`, None for layers without a tensor."""
        parts: list[Tensor | None] = [None] * self.geometry.num_layers
        for group, stack in zip(self.groups.values(), [stacks] if self.geometry.alike else stacks, strict=True):
            for place, index in enumerate(group):
                parts[index] = None if stack is None else stack[place]
        return parts

    def whole(self, parts: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The parts without those of a shape of which some layers have none, because a stack has all or nothing."""
        parts = list(parts)
        for group in self.groups.values():
            if any(parts[index] is None for index in group):
                for index in group:
                    parts[index] = None
        return parts

    def kind(self, sizes: Callable[[Shape], tuple[int, ...]], below: float, *, nullable: bool = False, **how) -> Kind:
        """What a file must hold: tensors of `sizes` by layer. nullable: a stack may be missing. how: as `TensorOf`."""
        kinds = [TensorOf((len(group), *sizes(shape)), below, **how) for shape, group in self.groups.items()]
        if self.geometry.alike:
            return kinds[0]
        return EachOf(tuple(Nullable(kind) if nullable else kind for kind in kinds))


def _stack(parts: list[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.stack(parts)
