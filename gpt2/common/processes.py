"""Several processes that share one task, as started by torchrun, accelerate launch or a cluster's launcher.

The environment tells each process its place: RANK, WORLD_SIZE and LOCAL_RANK, and the address MASTER_ADDR:MASTER_PORT
where they connect. All sums are of float64 tensors on the CPU, so the gloo backend serves, whatever the model runs on.
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

# Timeout of collective calls. It is long, since one process may sample a text for hours while the others wait. When a
# process ends, its connections close and the others fail at once, without waiting for the timeout
PATIENCE = timedelta(days=1)
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The place of this process: number `rank` of `size` processes. store: a key-value store that all share."""

    rank: int = 0
    size: int = 1
    store: dist.Store | None = None

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This process's share of `count` items: a contiguous range, which may be empty; ranks share in order."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over all processes, returned in each. Raises PluginError if another process has stopped."""
        if self.size == 1:
            return x
        total = x.clone(memory_format=torch.contiguous_format)
        self._wait(dist.all_reduce, total)
        return total

    def agreed(self, value: T) -> T:
        """The first process's value, returned in each; the others' values are ignored. Raises as `total` does."""
        if self.size == 1:
            return value
        values = [value]
        self._wait(dist.broadcast_object_list, values)
        return values[0]

    def first_to_fail(self) -> bool:
        """Whether this is the first process to call it. The first failure makes the others fail; only it is printed."""
        try:
            return self.store is None or self.store.add("failed", 1) == 1
        except RuntimeError:  # the process that hosted the store has ended
            return True

    def _wait(self, operation, argument) -> None:
        try:
            operation(argument)
        except RuntimeError as error:
            raise PluginError(
                f"process {self.rank} of {self.size}: another process stopped, so nothing was written: see its error"
            ) from error


ALONE = Processes()


def launched() -> Processes:
    """This process's place by the environment, without connecting to the others.

    Raises PluginError if RANK or WORLD_SIZE isn't a number.
    """
    try:
        return Processes(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    except ValueError as error:
        raise PluginError(f"RANK and WORLD_SIZE must be numbers, as torchrun sets them: {error}") from error


def local_rank() -> int | None:
    """Number of this process on its machine, which is also the index of its GPU; None if it is the only process."""
    return int(os.environ.get("LOCAL_RANK", 0)) if launched().size > 1 else None


@contextmanager
def together() -> Iterator[Processes]:
    """Connect to the other processes, if there are any, while the block runs. Raises PluginError if that fails."""
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
