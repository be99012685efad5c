"""From how many tokens on reading codes pays: measured once per machine and kind of decode step, and kept in a file.

A kind of step is all that its time depends on besides the tokens held: machine, kernels, shapes, dtypes, and how K and
V lie in memory. Steps of one layer over noise are timed both ways at a few lengths: reading codes, and attention over a
reconstruction. The crossover is the number of tokens below which the reconstruction takes less time.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2.common import files, machine, schema
from gpt2.common.errors import PluginError, first_line, is_out_of_memory
from gpt2.compression.cache.layers import CompressedLayer, StoredKV
from gpt2.compression.cache.size import noise
from gpt2.compression.cache.token_store import Half, TokenStore
from gpt2.compression.kernels import cpu, dispatch
from gpt2.models.embedded import cache_folder

log = logging.getLogger(__name__)
FILE = "crossovers.json"
LENGTHS = (256, 1024, 4096)  # tokens held at which steps are timed
# On a GPU also these: below, a step takes as long as the host needs to launch it, whichever way is taken
GPU_LENGTHS = (16384, 65536)
REPEATS = 3  # timed steps of each way at each length, of which the fastest counts
BUDGET_S = 1.0  # a length that would exceed it is left out, except for the first
# Written before each step: between two steps of a layer, the rest of a model fills the caches
FLUSH_BYTES, GPU_FLUSH_BYTES = 32 << 20, 256 << 20
FORMATS = ("exact", "by token", "by channel", "bit planes", "fixed bit planes")  # of `codecs.formats`, for people
clock = time.perf_counter

# Attention of a query [B, Hq, 1, d] over what a layer stores
Step = Callable[[Tensor, StoredKV], Tensor]
TIMES = schema.ListOf(schema.Number(above=0))
SCHEMA = schema.Record({"tokens": schema.ListOf(schema.Whole(1)), "direct_ms": TIMES, "reconstructed_ms": TIMES})


@dataclass(frozen=True)
class Crossover:
    """Milliseconds of a decode step in one layer both ways, by the number of tokens held, in ascending order."""

    tokens: list[int] = field(default_factory=list)
    direct_ms: list[float] = field(default_factory=list)
    reconstructed_ms: list[float] = field(default_factory=list)

    @functools.cached_property
    def direct_from(self) -> int | None:
        """Tokens from which on reading codes isn't slower, 0 if it never is; None where it is at the largest length."""
        gaps = [own - other for own, other in zip(self.direct_ms, self.reconstructed_ms, strict=True)]
        slower = [place for place, gap in enumerate(gaps) if gap > 0]
        if not slower:
            return 0
        if (last := slower[-1]) == len(gaps) - 1:
            return None
        share = gaps[last] / (gaps[last] - gaps[last + 1])  # of the way to the next length
        return round(self.tokens[last] + share * (self.tokens[last + 1] - self.tokens[last]))

    def pays(self, tokens: int) -> bool:
        """Whether codes of so many tokens are read at least as fast as they are reconstructed."""
        return self.direct_from is not None and tokens >= self.direct_from

    def __str__(self) -> str:
        where = {None: "at every length measured", 0: "at no length measured"}
        slower = where.get(self.direct_from, f"below {self.direct_from:,} tokens" if self.direct_from else "")
        times = (
            f"{own:.3g} against {other:.3g} ms at {n:,} tokens"
            for n, own, other in zip(self.tokens, self.direct_ms, self.reconstructed_ms, strict=True)
        )
        return f"slower than reconstruction {slower} ({', '.join(times)}, in one layer)"


class Kind(NamedTuple):
    """What the time of a decode step depends on, besides the tokens held."""

    machine: str
    kernels: str
    threads: int
    dtype: str
    batch: int
    query_heads: int
    kv_heads: int
    k: str
    v: str

    def __str__(self) -> str:
        return (
            f"{self.machine}; {self.kernels}; {self.threads} thread{'s' * (self.threads > 1)}; {self.dtype}; batch of "
            f"{self.batch}; {self.query_heads} query and {self.kv_heads} KV heads; K {self.k}; V {self.v}"
        )


def kind(key: StoredKV, query: Tensor) -> Kind:
    """The kind of a step with a query [B, Hq, Q, d], which may hold several tokens: it is treated as one would be."""
    k, v = key.stores()
    stored = k.keep_reconstructed, k.memory_format, v.memory_format, k.sinks.dtype, k.sinks.shape[1]
    short = (query.shape[:2], query.dtype, torch.get_num_threads(), stored)
    if short not in key.kinds:  # the full name takes a good part of a decode step to put together
        key.kinds[short] = _kind(k, v, query)
    return key.kinds[short]


def found(key: StoredKV, query: Tensor) -> Crossover | None:
    """What is known of steps like this one, as `Crossovers.find` has it; once it is known, a layer keeps it."""
    asked = (query.shape[0], query.dtype, key.stores()[0].sinks.dtype, torch.get_num_threads())
    if asked not in key.kinds:
        if (known := KNOWN.find(kind(key, query))) is None:
            return None
        key.kinds[asked] = known
    return key.kinds[asked]


def _kind(k: TokenStore | Half, v: TokenStore | Half, query: Tensor) -> Kind:
    dtype = str(query.dtype) if query.dtype == k.sinks.dtype else f"{query.dtype} over {k.sinks.dtype}"
    heads = k.sinks.shape[1]
    return Kind(
        _machine(query.device), _kernels(query), torch.get_num_threads(), dtype.replace("torch.", ""), query.shape[0],
        query.shape[1], heads, _layout(k), _layout(v),
    )  # fmt: skip


def measure(key: StoredKV, query: Tensor, direct: Step, reconstructed: Step) -> Crossover:
    """Time steps of both ways over noise, stored as `key` is, with queries like `query` [B, Hq, Q, d].

    Without times where memory doesn't suffice, which counts as if reading codes always paid: it takes the least.
    """
    found = Crossover()
    try:
        _measure(found, key, query, (direct, reconstructed))
    except Exception as error:  # out of memory has another type on each device
        if not is_out_of_memory(error):
            raise
    return found


def _measure(found: Crossover, key: StoredKV, query: Tensor, ways: tuple[Step, Step]) -> None:
    """Add the times of one length after another, as far as the budget goes."""
    generator = torch.Generator(query.device).manual_seed(0)
    B, heads, _, width = query.shape
    q = noise(heads, 1, width, batch=B, dtype=query.dtype, generator=generator)
    gpu = query.device.type == "cuda"  # whose second-level cache has up to 126 MB
    layer = _empty_like(key)
    flushed = torch.empty(GPU_FLUSH_BYTES if gpu else FLUSH_BYTES, dtype=torch.uint8, device=query.device)
    began = 0.0
    for tokens in LENGTHS + GPU_LENGTHS * gpu:
        started = clock()
        fill(layer, key, tokens, generator)
        for way in ways:
            way(q, StoredKV(layer))
        if not found.tokens:  # begin here, after kernels were compiled
            started = began = clock()
        times = [_milliseconds(way, q, layer, flushed) for _ in range(REPEATS) for way in ways]
        found.tokens.append(tokens)
        found.direct_ms.append(min(times[::2]))
        found.reconstructed_ms.append(min(times[1::2]))
        now = clock()
        if now - began + 4 * (now - started) > BUDGET_S:  # the next length has four times as many tokens
            break


class Crossovers:
    """Crossovers by kind of step: those that a file holds, and those measured since.

    path: gives the file. One that is damaged, of another kind or can't be read counts as empty, and where it can't be
    written, crossovers are kept for this process alone.
    """

    def __init__(self, path: Callable[[], Path] = lambda: cache_folder() / FILE):
        self._path = path
        self._held: dict[str, Crossover] | None = None  # None: not read yet
        self._slower: bool | None = None
        self._found: dict[Kind, Crossover | None] = {}  # looked up before: names of kinds take time to put together
        self._lock = threading.RLock()

    @property
    def some_slower(self) -> bool:
        """Whether reading codes is the slower way at some length, in any kind of step that is known."""
        if self._slower is None:
            self._slower = any(crossover.direct_from != 0 for crossover in self._all().values())
        return self._slower

    def find(self, kind: Kind) -> Crossover | None:
        """What was measured of a kind of step, by any process before this one, or in this one."""
        if kind not in self._found:
            self._found[kind] = self._all().get(str(kind))
        return self._found[kind]

    def measured(self, kind: Kind, measure: Callable[[], Crossover]) -> Crossover:
        """As `find`; what isn't known is measured now, and kept."""
        if (found := self.find(kind)) is not None:
            return found
        with self._lock:
            if self._found[kind] is None:  # another thread may have measured it meanwhile
                self._held = self.read() | self._all()  # and so may another process
                found = self._all().get(str(kind)) or self._keep(kind, measure())
                self._found[kind], self._slower = found, None
            return self._found[kind]

    def _all(self) -> dict[str, Crossover]:
        with self._lock:
            if self._held is None:
                self._held = self.read()
            return self._held

    def read(self) -> dict[str, Crossover]:
        """All that the file holds; nothing of a file that is missing or damaged."""
        try:
            held = schema.read_json(self._path(), "file of crossovers")["crossovers"]
            parsed = schema.Record(others=SCHEMA).parse(held, ())
            return {name: Crossover(**record) for name, record in parsed.items() if _even(record)}
        except (PluginError, OSError, KeyError, TypeError, schema.Mismatch, RuntimeError):  # the last: no home folder
            return {}

    def _keep(self, kind: Kind, crossover: Crossover) -> Crossover:
        kept = "not kept, as memory ran out"
        if crossover.tokens:
            self._held[str(kind)] = crossover
            kept = self._written()
        log.warning(
            "measured once for this machine whether reading codes pays (%s): it is %s; %s", kind, crossover, kept
        )
        return crossover

    def _written(self) -> str:
        """Write all crossovers; returns where they are, or why they aren't."""
        try:
            path = self._path()
            held = {name: asdict(crossover) for name, crossover in self._held.items()}
            files.write_json(path, {"what": __doc__.partition("\n")[0], "crossovers": held})
        except (PluginError, OSError, RuntimeError) as error:
            return f"kept in this process alone ({first_line(error)})"
        return f"kept in {path}"


KNOWN = Crossovers()


def _even(record: dict) -> bool:
    """Whether a record has both times for each length, and at least one length, in ascending order."""
    tokens = record["tokens"]
    lengths = {len(value) for value in record.values()}
    return bool(tokens) and lengths == {len(tokens)} and tokens == sorted(set(tokens))


@functools.cache
def _machine(device: torch.device) -> str:
    name = f"{machine.processor()}, {machine.cores()} cores"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {name}"
    return name if device.type == "cpu" else f"{device.type}, {name}"


def _kernels(query: Tensor) -> str:
    """What attends over codes: which kernels, with a hash of their sources, as other kernels take other times."""
    versions = f"PyTorch {torch.__version__}"
    if dispatch.usable(query):
        return f"Triton kernels {_sources()}, {versions}"
    if cpu.usable(query):
        products = "integers" if cpu.integer_products() else "floats"
        return f"C++ kernels {_sources()} for {os.environ.get('KV_CPU_ISA') or 'native'}, {products}, {versions}"
    return f"no kernels, {versions}"


@functools.cache
def _sources() -> str:
    paths = sorted(path for path in Path(cpu.__file__).parent.rglob("*") if path.suffix in (".py", ".cpp", ".h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:8]


@functools.cache
def _format(kind: int | None, bits: int, groups: int, width: int, kept: bool) -> str:
    word = "read by PyTorch" if kind is None else FORMATS[kind] + f" in {bits} bits" * bool(bits)
    return f"{word}, {groups} groups of {width}" + ", reconstructions kept" * kept


def _layout(store: TokenStore | Half) -> str:
    """How K or V lies in memory: the codes' format, and the width of the groups of heads that share a basis."""
    kind, bits = store.memory_format or (None, 0)
    heads, head_dim = store.sinks.shape[1], store.sinks.shape[3]
    groups = store.compressor.groups(heads, head_dim)
    return _format(kind, bits, groups, heads * head_dim // groups, store.keep_reconstructed)


def _empty_like(key: StoredKV) -> CompressedLayer:
    """An empty layer with the codecs of another, without its window."""
    k, v = key.stores()
    sinks, recent = (max(getattr(k, name), getattr(v, name)) for name in ("sink_tokens", "recent_tokens"))
    layer = CompressedLayer(k.compressor, v.compressor, sinks, recent, index=0)
    for own in layer.stores.values():
        own.keep_reconstructed = k.keep_reconstructed
    return layer


def fill(layer: CompressedLayer, key: StoredKV, tokens: int, generator: torch.Generator) -> None:
    """Append noise until a layer holds so many tokens, in the shapes of `key`."""
    more = tokens - layer.get_seq_length() if layer.is_initialized else tokens
    x = [
        noise(like.shape[1], more, like.shape[3], batch=like.shape[0], dtype=like.dtype, generator=generator)
        for like in (store.sinks for store in key.stores())
    ]
    layer.store(*x)


def _milliseconds(way: Step, query: Tensor, layer: CompressedLayer, flushed: Tensor) -> float:
    flushed.zero_()
    _wait(query.device)
    start = clock()
    way(query, StoredKV(layer))
    _wait(query.device)
    return 1000 * (clock() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
