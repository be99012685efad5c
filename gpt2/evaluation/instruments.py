"""Instruments that look inside a forward pass: where its time goes, and its peak memory.

They take time themselves, so they are used in a pass of their own and never in one whose time is reported.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.pytorch_utils import Conv1D

from gpt2.compression.cache.token_store import TokenStore
from gpt2.compression.codecs import Compressor
from gpt2.compression.kernels import cpu
from gpt2.models.attention_function import wrapped_attention

# Part of a step, and the method that does it in a class and its subclasses. `copies` is the rest of a cache's update:
# joining the tokens held with the new ones. `folding` takes queries through a basis and sums out of it, once per step.
# `kernels` reads codes on a CPU; `attention` is then its softmax and its Python. `matmuls` are the model's own layers:
# Linear, and GPT-2's Conv1D. What is left, `rest`, is Python per layer, norms, positions and hooks, and the matmuls of
# experts, which in mixtures of experts are raw parameters. `_quantize` and `_dequantize` are of transformers' quantized
# caches.
WATCHED = (
    ("copies", Cache, "update"),
    ("compress", TokenStore, "compress"),
    ("expand", TokenStore, "reconstruct"),
    ("compress", CacheLayerMixin, "_quantize"),
    ("expand", CacheLayerMixin, "_dequantize"),
    ("folding", Compressor, "absorb_query"),
    ("folding", Compressor, "reconstruct_sum"),
    ("kernels", cpu, "scores"),
    ("kernels", cpu, "weighted_sums"),
    ("kernels", cpu, "attend"),
    ("matmuls", torch.nn.Linear, "forward"),
    ("matmuls", Conv1D, "forward"),
)
ATTENTION, SAMPLING, REST = "attention", "sampling", "rest"
PARTS = ("compress", "expand", "copies", "folding", "kernels", ATTENTION, "matmuls", SAMPLING, REST)
SAMPLE_S = 0.002


def cuda_devices(model: PreTrainedModel) -> list[torch.device]:
    """The GPUs that hold weights of a model; none on a CPU."""
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)


def synchronizer(model: PreTrainedModel) -> Callable[[], None]:
    """A function that waits until the model's GPUs have finished all work."""
    devices = cuda_devices(model)

    def wait() -> None:
        for device in devices:
            torch.cuda.synchronize(device)

    return wait


class Stopwatch:
    """Seconds per part of some work. While a part calls another, only the inner one counts, so the sum is the whole.

    wait: called before the clock is read, so that a GPU's unfinished work counts for the part that launched it.
    """

    def __init__(self, wait: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.perf_counter):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._wait, self._clock = wait, clock
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the block for a part, without the time of parts inside it."""
        self._lap()
        self._running.append(name)
        try:
            yield
        finally:
            self._lap()
            self._running.pop()

    def _lap(self) -> None:
        self._wait()
        now = self._clock()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def timed(self, name: str) -> Callable[[Callable], Callable]:
        """A decorator that counts calls of a function for a part."""

        def decorate(fn: Callable) -> Callable:
            @functools.wraps(fn)
            def call(*args, **kwargs):
                with self.part(name):
                    return fn(*args, **kwargs)

            return call

        return decorate

    def shares(self) -> dict[str, float]:
        """Every part's share of the whole; they add up to 1."""
        whole = sum(self.seconds.values())
        return {name: seconds / whole for name, seconds in self.seconds.items()}


@contextmanager
def watched(model: PreTrainedModel, watch: Stopwatch) -> Iterator[None]:
    """Time the parts of what the model does in the block; time of no other part counts as the rest.

    If the model's attention function can't be replaced, attention counts as the rest and `watch.seconds` has no such
    part.
    """
    with ExitStack() as patches:
        for part, base, method in WATCHED:
            for owner in _owners(base, method):
                patches.enter_context(_decorated(owner, method, watch.timed(part)))
        if not patches.enter_context(wrapped_attention(model, watch.timed(ATTENTION))):
            watch.seconds.pop(ATTENTION)
        with watch.part(REST):
            yield


def _owners(base: type | ModuleType, method: str) -> list[type | ModuleType]:
    """The class and its subclasses that define the method themselves; a module itself."""
    if isinstance(base, ModuleType):
        return [base]
    found, waiting = [], [base]
    while waiting:
        owner = waiting.pop()
        waiting += owner.__subclasses__()
        if method in vars(owner) and owner not in found:
            found.append(owner)
    return found


@contextmanager
def _decorated(owner: type | ModuleType, method: str, decorate: Callable[[Callable], Callable]) -> Iterator[None]:
    original = vars(owner)[method]
    setattr(owner, method, decorate(original))
    try:
        yield
    finally:
        setattr(owner, method, original)


@dataclass
class Memory:
    """Bytes in use when a block began, and the most at any time in it."""

    start: int
    peak: int


def memory_method(devices: Sequence[torch.device]) -> str:
    """How `peak_memory` measures, for results files."""
    if devices:
        return "torch.cuda.max_memory_allocated" + (", summed over the GPUs" if len(devices) > 1 else "")
    return f"resident size of the process, sampled every {1000 * SAMPLE_S:g} ms"


@contextmanager
def peak_memory(devices: Sequence[torch.device]) -> Iterator[Memory]:
    """Watch memory while the block runs: of the GPUs given, or the process's resident size if there are none.

    On GPUs it is the exact size of all tensors. The resident size is that of the whole process and is sampled, so short
    peaks may be missed; memory that earlier work has freed is returned to the system first.
    """
    gc.collect()
    if devices:
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        memory = Memory(*2 * (sum(torch.cuda.memory_allocated(device) for device in devices),))
        yield memory
        memory.peak = sum(torch.cuda.max_memory_allocated(device) for device in devices)
        return
    _return_free_memory()
    memory = Memory(*2 * (resident_bytes(),))
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_S):
            memory.peak = max(memory.peak, resident_bytes())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield memory
    finally:
        done.set()
        sampler.join()
        memory.peak = max(memory.peak, resident_bytes())


def resident_bytes() -> int:
    """Resident size of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _return_free_memory() -> None:
    """Return free memory that the C library keeps, if it can: it would count for whatever is measured next."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
