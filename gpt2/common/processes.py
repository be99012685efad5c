"""Several processes that share one piece of work, as torchrun, accelerate launch or a cluster's launcher start them.

Each reads from the environment which it is: RANK, WORLD_SIZE and LOCAL_RANK, with MASTER_ADDR and MASTER_PORT to meet.
What they add up lies on the CPU, in double precision, so gloo carries it, whatever the model runs on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gpt2.common.errors import PluginError

# For one that waits until another has sampled a text. One that stops is noticed at once, not by this
PATIENCE = timedelta(days=1)
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process is number `rank` of `size`; alone unless told."""

    rank: int = 0
    size: int = 1
    store: dist.Store | None = None

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` items are this process's: neighbours, in the order of ranks; maybe none."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def total(self, x: Tensor) -> Tensor:
        """Sum of all processes' x, in each of them. Raises PluginError where another one has stopped."""
        if self.size == 1:
            return x
        total = x.clone(memory_format=torch.contiguous_format)
        self._wait(dist.all_reduce, total)
        return total

    def agreed(self, value: T) -> T:
        """The first process's value, in each of them; the others' is not looked at. Raises as `total` does."""
        if self.size == 1:
            return value
        values = [value]
        self._wait(dist.broadcast_object_list, values)
        return values[0]

    def first_to_fail(self) -> bool:
        """Whether no other process has said so before: what takes the rest down is told once."""
        try:
            return self.store is None or self.store.add("failed", 1) == 1
        except RuntimeError:  # the store is gone with the process that kept it
            return True

    def _wait(self, operation, argument) -> None:
        try:
            operation(argument)
        except RuntimeError as error:
            raise PluginError(
                f"process {self.rank} of {self.size}: another one stopped, so nothing was written: see what it said"
            ) from error


ALONE = Processes()


def launched() -> Processes:
    """What the environment says of this process; nothing is sent."""
    try:
        return Processes(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    except ValueError as error:
        raise PluginError(f"RANK and WORLD_SIZE must be numbers, as torchrun sets them: {error}") from error


def local_rank() -> int | None:
    """Number of this process on its machine, which is that of its GPU; None where it is alone."""
    return int(os.environ.get("LOCAL_RANK", 0)) if launched().size > 1 else None


@contextmanager
def together() -> Iterator[Processes]:
    """Meet the other processes, where there are any, for as long as the block runs."""
    own = launched()
    if own.size == 1:
        yield own
        return
    try:
        store, rank, size = next(dist.rendezvous("env://"))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise PluginError(f"process {own.rank} of {own.size} can't meet the others: {first_line}") from error
    try:
        yield Processes(rank, size, store)
    finally:
        dist.destroy_process_group()
