"""Time of one decode step's attention in one layer, over a filled cache: stored codes against 16-bit K and V.

Keys and values are noise, and no model is needed. Every row holds the same tokens: a prompt and GENERATED tokens after
it, so that codecs that code whole blocks have an exact tail, as in use. Rows take turns, in an order that is reversed
with every repeat, and the processor's caches are flushed before each run; ratios pair the runs of one repeat. Before
timing, the output of each row is compared with float32 attention over the same K and V.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.compression.cache import attention_math, direct_attention
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.cache.size import fill, noise
from gpt2.compression.cache.token_store import Half, TokenStore
from gpt2.compression.calibration.fit import Calibration, geometry_record
from gpt2.compression.calibration.stand_in import multi_head_stand_in
from gpt2.compression.codecs import BASES, QUANTIZERS, Compressor, adjustable_quantizers, multi_head_bases
from gpt2.compression.kernels import cpu
from gpt2.compression.presets.any_model import ANY_MODEL, SINK_TOKENS
from gpt2.compression.settings import Setting, build, compressors_for
from gpt2.evaluation.statistics import spread
from gpt2.experiments.compiled_attention import CompiledInt4Channel
from gpt2.models.geometry import Geometry

GENERATED = 33
WARM_UP = 3
COPIES = 10  # number of copies that bandwidth is measured with
SHARPNESS = 2.0  # standard deviation of the scores, so that some tokens get much more weight than others
SIXTEEN, FLOAT32, OURS, COMPILED = "16-bit", "float32", "compressed", "torch.compile"
SDPA = "sdpa"
# Bases that heads share whose codes are read directly: those here are random
SHARED = [name for name, basis in multi_head_bases().items() if not basis.unrotated or basis.frame > 1]
# Codecs to choose from: a quantizer for both K and V, a calibration-free preset, or such a basis
CODECS = (*(name for name, q in QUANTIZERS.items() if not q.calibrated), *ANY_MODEL, *SHARED)
clock = time.perf_counter


@dataclass(frozen=True)
class AttentionShape:
    """One layer's attention: query heads, KV heads, channels of a head, sequences in the batch.

    Raises PluginError unless the query heads are a multiple of the KV heads.
    """

    heads: int
    kv_heads: int
    head_dim: int
    batch: int

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise PluginError(f"{self.heads} query heads don't share {self.kv_heads} KV heads evenly")

    def __str__(self) -> str:
        return f"b{self.batch}_h{self.heads}-{self.kv_heads}x{self.head_dim}"


@dataclass
class Row:
    """One way to compute attention.

    step: returns a decode step's attention, [B, Hq, 1, d]. nbytes: bytes held, all of which a step reads. expected:
    float32 attention over K and V as this row holds them. compile_s: seconds to compile, by function; None if nothing
    is compiled. ms, host_ms: measured times.
    """

    label: str
    kind: str
    step: Callable[[], Tensor]
    nbytes: int
    expected: Tensor
    compile_s: dict[str, float] | None = None
    ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)


class Timer:
    """Measures milliseconds of a step on a device that reads everything from memory, and of the host to launch it.

    flush_bytes: size of a buffer that is written before every step; it must exceed the processor's caches. On a GPU it
    is written for longer than the host takes to launch a step, so that only the GPU's work is timed, without gaps.
    """

    def __init__(self, device: torch.device, flush_bytes: int):
        self.cuda = device.type == "cuda"
        self.buffer = torch.zeros(flush_bytes, dtype=torch.uint8, device=device)
        self.flushes = 1

    def warm_up(self, steps: Sequence[Callable[[], Tensor]]) -> None:
        """Run each step a few times, and determine how often the GPU must write the buffer before a step."""
        for step in steps:
            for _ in range(WARM_UP):
                step()
        if self.cuda:
            host = max(min(self(step)[1] for _ in range(WARM_UP)) for step in steps)
            self.flushes = 1 + math.ceil(2 * host / max(self(self.flush)[0], 1e-3))

    def flush(self) -> None:
        self.buffer.zero_()

    def __call__(self, step: Callable) -> tuple[float, float]:
        """Milliseconds of the device and of the host; the same on a CPU."""
        for _ in range(self.flushes):
            self.flush()
        if not self.cuda:
            start = clock()
            step()
            return (1000 * (clock() - start),) * 2
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        stream = torch.cuda.current_stream(self.buffer.device)  # by default that of device 0
        events[0].record(stream)
        start = clock()
        step()
        host = 1000 * (clock() - start)
        events[1].record(stream)
        events[1].synchronize()
        return events[0].elapsed_time(events[1]), host


def copy_bandwidth(timer: Timer, nbytes: int) -> float:
    """Bytes per second, read plus written, of copying a tensor of `nbytes`: the median of COPIES copies."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=timer.buffer.device)
    target = torch.zeros_like(source)  # written to once, since the first write to a memory page is slower
    copy = lambda: target.copy_(source)  # noqa: E731
    timer.warm_up([copy])
    return 2 * nbytes / statistics.median(timer(copy)[0] for _ in range(COPIES)) * 1000


@torch.no_grad()
def measure(
    shape: AttentionShape, context: int, codecs: Sequence[str], bits: Sequence[float], timer: Timer, bandwidth: float,
    *, dtype: torch.dtype = torch.bfloat16, repeats: int = 20, compiled: bool = False, seed: int = 0, progress=iter,
) -> list[dict]:  # fmt: skip
    """One results record per row, at one context length in tokens. Raises PluginError if a row's output is wrong.

    codecs: names of CODECS; adjustable ones give a row for each of `bits`. bandwidth: from `copy_bandwidth`. compiled:
    add int4_channel by torch.compile. progress: wraps the iterable of repeats, such as tqdm.
    """
    device = timer.buffer.device
    k, v, q = _noise(shape, context + GENERATED, dtype, device, seed)
    rows = [*_plain_rows(q, k, v)]
    for name in codecs:
        rows += [_stored_row(label, pair, q, k, v) for label, pair in compressors(name, bits, shape)]
    if compiled:
        rows.append(_compiled_row(q, k, v))
    for row in rows:
        check(row)
    timer.warm_up([row.step for row in rows])
    for n in progress(range(repeats)):
        for row in rows[::-1] if n % 2 else rows:
            for times, ms in zip((row.ms, row.host_ms), timer(row.step), strict=True):
                times.append(ms)
    cell = {"context_tokens": context, "tokens_held": k.shape[2], "batch_size": shape.batch}
    return [cell | record for record in _records(rows, bandwidth, timer.cuda)]


def check(row: Row) -> None:
    """Raise PluginError unless a row's output equals float32 attention over its K and V, to the dtype's rounding."""
    found = row.step()
    error = float((found.float() - row.expected).norm() / row.expected.norm())
    tolerance = max(4 * torch.finfo(found.dtype).eps, 1e-4)
    if not error <= tolerance:
        raise PluginError(
            f"{row.label}: {error:.1e} away from attention over the same K and V, more than {tolerance:.1e}"
        )


def _noise(
    shape: AttentionShape, tokens: int, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Tensor, ...]:
    """K and V [B, H, T, d], and the query [B, Hq, 1, d]."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes = [(shape.kv_heads, tokens)] * 2 + [(shape.heads, 1)]
    k, v, q = (
        noise(heads, n, shape.head_dim, batch=shape.batch, dtype=dtype, generator=generator) for heads, n in sizes
    )
    return k, v, SHARPNESS * q


# --- rows


def _plain_rows(q: Tensor, k: Tensor, v: Tensor) -> Iterator[Row]:
    """Rows for uncompressed K and V; on a CPU, whose 16-bit arithmetic may be slow, in float32 as well."""
    ways = {SDPA: _sdpa, "sdpa, heads packed": _sdpa_packed, "matmuls per KV head": _matmuls}
    expected = exact(q, k, v)
    for kind, dtype in ((SIXTEEN, k.dtype), (FLOAT32, torch.float32)):
        if kind == FLOAT32 and q.device.type != "cpu":
            continue
        held = [x.to(dtype) for x in (q, k, v)]
        for name, way in ways.items():
            label = name if kind == SIXTEEN else f"{name}, {kind}"
            yield Row(label, kind, _bound(way, *held), held[1].nbytes + held[2].nbytes, expected)


def _bound(way: Callable, *tensors) -> Callable[[], Tensor]:
    return lambda: way(*tensors)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention as transformers calls it."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def _sdpa_packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention with the queries of a KV head as tokens of one head, so that K and V are read once."""
    B, H, _, d = k.shape
    return F.scaled_dot_product_attention(q.view(B, H, -1, d), k, v).view(q.shape)


def _matmuls(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    B, H, _, d = k.shape
    x = (q * d**-0.5).view(B, H, -1, d) @ k.mT
    return (x.softmax(-1) @ v).view(q.shape)


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in float32, [B, Hq, 1, d]."""
    return attention_math.attend_reconstructed(k.float(), v.float(), q.float(), None, q.shape[-1] ** -0.5)


def compressors(
    name: str, bits: Sequence[float], shape: AttentionShape
) -> Iterator[tuple[str, tuple[Compressor, Compressor]]]:
    """Labels and compressors of K and V, for a name of CODECS."""
    layer = Geometry.uniform(1, shape.kv_heads, shape.head_dim)
    if name in ANY_MODEL:
        k, v = build(dict(zip(("k", "v"), ([setting] for setting in ANY_MODEL[name]), strict=True)), layer)
        yield name, (k[0], v[0])
        return
    if name in SHARED:
        fit = multi_head_stand_in(BASES[name], layer)
        calibration = Calibration({"codec": name, **geometry_record(layer)}, None, {}, {name: fit})
        for each in bits:
            k, v = compressors_for("kv", each, None, calibration, quantizer=adjustable_quantizers()[0])
            yield f"{name}, {each:g} bits", (k[0], v[0])
        return
    adjustable = QUANTIZERS[name].adjustable
    for each in bits if adjustable else [QUANTIZERS[name].bits]:
        setting = Setting(bits=each, quantizer=name)
        k, v = build({"k": [setting], "v": [setting]}, layer)
        yield (f"{name}, {each:g} bits" if adjustable else name), (k[0], v[0])


def _stored_row(label: str, pair: tuple[Compressor, Compressor], q: Tensor, k: Tensor, v: Tensor) -> Row:
    stores = filled_stores(pair, k, v)
    read = [store.read() for store in stores]
    expected = exact(q, *(read if len(read) == 2 else read[0].chunk(2, dim=1)))
    held = sum(store.nbytes() for store in stores)
    sides = stores if len(stores) == 2 else [Half(stores[0], index) for index in range(2)]
    return Row(label, OURS, _bound(direct_attention.attend, *sides, q, None, q.shape[-1] ** -0.5), held, expected)


def filled_stores(pair: tuple[Compressor, Compressor], k: Tensor, v: Tensor) -> list[TokenStore]:
    """Token stores filled with K and V, [B, H, T, d] each: a prompt, and then GENERATED tokens.

    One for both where they share a codec.
    """
    cache = CompressedDynamicCache(pair[:1], pair[1:], sink_tokens=SINK_TOKENS)
    parts = [k.shape[2] - GENERATED, GENERATED]
    fill(cache, zip(k.split(parts, dim=2), v.split(parts, dim=2), strict=True))
    return list(cache.layers[0].stores.values())


def _compiled_row(q: Tensor, k: Tensor, v: Tensor) -> Row:
    quantizer = CompiledInt4Channel()
    row = _stored_row("int4_channel, torch.compile", (Compressor(quantizer),) * 2, q, k, v)
    row.kind, row.compile_s = COMPILED, quantizer.compile_s
    with quantizer.compiling():
        row.step()
    return row


# --- figures


def _records(rows: Sequence[Row], bandwidth: float, cuda: bool) -> Iterator[dict]:
    stock = next(row for row in rows if row.label == SDPA)
    best = min((row for row in rows if row.kind == SIXTEEN), key=lambda row: statistics.median(row.ms))
    for row in rows:
        median = statistics.median(row.ms)
        speed = 1000 * row.nbytes / median
        yield {
            "row": row.label,
            "kind": row.kind,
            "ms": row.ms,
            **spread("ms", row.ms),
            **({"host_ms_median": statistics.median(row.host_ms)} if cuda else {}),
            "bytes_held": row.nbytes,
            "bytes_per_s": speed,
            "share_of_copy": speed / bandwidth,
            **spread("speed_against_sdpa", [a / b for a, b in zip(stock.ms, row.ms, strict=True)]),
            **spread("speed_against_best_16_bit", [a / b for a, b in zip(best.ms, row.ms, strict=True)]),
            "best_16_bit": row is best,
            **({"compile_s": row.compile_s} if row.compile_s else {}),
        }


def kernels(device: torch.device) -> str:
    """The name of what reads codes on a device: Triton, C++ or PyTorch."""
    from gpt2.compression.kernels import dispatch

    if dispatch.usable(torch.empty(0, device=device)):
        return "Triton"
    return "C++" if device.type == "cpu" and cpu.loaded() else "PyTorch"
