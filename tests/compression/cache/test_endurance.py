"""Tokens appended one at a time: memory is what the account says, and a token costs the same work at any length.

`make fuzz` takes all codecs to 65,536 tokens, and more steps of a model; `make test` two of them to some thousands.
Memory is asked of the allocator, which knows nothing of caches; work is counted, since a clock would tell of the
machine.
"""

from __future__ import annotations

import ctypes
import gc
import os

import pytest
import torch
from sampling import sampled
from stores import joint, transform
from tiny import tiny_model
from torch import Tensor
from work import Work

from gpt2.compression.attention import enable_compressed_attention
from gpt2.compression.cache import attention_math, direct_attention
from gpt2.compression.cache.size import cache_bytes
from gpt2.compression.codecs import QUANTIZERS, Compressor, IdentityCompressor
from gpt2.compression.codecs.mixed import Mixed
from gpt2.compression.compressed_cache import CompressedDynamicCache

LONG = int(os.environ.get("FUZZ_HISTORIES", 100)) > 100
TOKENS = 65_536
H, D = 8, 32
CODECS = {
    "int4_channel": lambda: Compressor(QUANTIZERS["int4_channel"]),
    "kv-mixed": lambda: Compressor(Mixed(4.0), joint(2 * D, "half", D)),
    "identity": lambda: IdentityCompressor(),
    "mixed": lambda: Compressor(Mixed(4.0), transform(H * D, groups=1, width=H * D)),
    "int4": lambda: Compressor(QUANTIZERS["int4"]),
}
# Tokens in `make test`: from 2,048 on, chunks are the larger the more is held
LENGTHS = {"int4_channel": TOKENS // 16, "kv-mixed": TOKENS // 2, "identity": TOKENS // 16, "mixed": TOKENS // 16}
FEW = 2**15  # bytes of Python's own, which come and go
WARM, STEPS = 70, 4000 if LONG else 70  # of a model


def cache_of(compressor: Compressor) -> CompressedDynamicCache:
    return CompressedDynamicCache([compressor], [compressor])


def append(cache: CompressedDynamicCache, start: int, end: int) -> None:
    """Tokens `start` to `end` one at a time; which they are depends on their places alone."""
    (layer,) = cache.layers
    for at in range(start, end, 1024):
        k, v = some(cache, at, min(at + 1024, end))
        for token in zip(k.split(1, dim=2), v.split(1, dim=2), strict=True):
            layer.store(*token)


def some(cache: CompressedDynamicCache, start: int, end: int) -> Tensor:
    """K and V of at most 1024 tokens, [2, 1, H, n, D]."""
    heads = 1 if "KV" in cache.layers[0].stores else H
    return torch.randn(2, 1, heads, end - start, D, generator=torch.Generator().manual_seed(start))


# --- memory


class Mallinfo(ctypes.Structure):
    """What glibc's `mallinfo2` returns."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


def allocated() -> int:
    """Bytes that this process has asked the C library for and not given back: every tensor's, and Python's large ones.

    To the byte, where resident memory is in pages and in what the library keeps for the next.
    """
    gc.collect()
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        pytest.skip("only glibc 2.33 and later tells what is allocated")
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    library.mallinfo2.restype = Mallinfo
    # Of every small size a thread keeps seven at hand, which count as allocated: so that it has them each time
    for kept in [library.malloc(size) for size in range(24, 1033, 16) for _ in range(7)]:
        library.free(kept)
    found = library.mallinfo2()
    return found.uordblks + found.hblkhd


@pytest.mark.parametrize("name", CODECS if LONG else sampled(LENGTHS, 2))
def test_memory_is_the_account_and_nothing_is_lost(name):
    """To 1 % and what Python has of its own: of all that is allocated, and of what the second half adds."""
    length, compressor = TOKENS if LONG else LENGTHS[name], CODECS[name]()
    append(cache_of(compressor), 0, 300)  # what is made once is no part of it
    before = allocated()
    cache = cache_of(compressor)
    append(cache, 0, length // 2)
    half, half_counted = allocated() - before, cache.nbytes()
    append(cache, length // 2, length)
    whole, counted = allocated() - before, cache.nbytes()
    assert cache.get_seq_length() == length
    assert cache_bytes(cache) == counted
    assert abs(whole - counted) < 0.01 * counted + FEW
    assert abs(whole - half - (counted - half_counted)) < 0.01 * (counted - half_counted) + FEW
    assert whole - counted < half - half_counted + FEW, "beside what is counted nothing grows"
    assert_all_is_there(cache, compressor, length)
    before = allocated()
    del cache
    assert abs(before - allocated() - counted) < 0.01 * counted + FEW, "it goes with the cache"


def assert_all_is_there(cache: CompressedDynamicCache, compressor: Compressor, length: int) -> None:
    """Token by token what one prompt gives; and attention over the codes finds it."""
    prompt = cache_of(compressor)
    prompt.layers[0].store(*torch.cat([some(cache, at, at + 1024) for at in range(0, length, 1024)], dim=3))
    k, v = prompt.layers[0].read()
    torch.testing.assert_close(cache.layers[0].read(), (k, v))
    if cache.readable:
        query = torch.randn(1, H, 1, D, generator=torch.Generator().manual_seed(0))
        found = direct_attention.attend(*cache.layers[0].stores.values(), query, None, 1.0)
        expected = attention_math.attend_reconstructed(k, v, query, None, 1.0)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "reconstruction"])
def test_steps_of_a_model_leave_nothing_behind(direct):
    """No tensor at every step, not even an empty one."""
    model = enable_compressed_attention(tiny_model("llama", num_hidden_layers=1))
    cache = cache_of(Compressor(QUANTIZERS["int4_channel"]))
    cache.direct = direct
    steps(model, cache, WARM)
    before = allocated(), cache.nbytes()
    steps(model, cache, STEPS)
    after = allocated(), cache.nbytes()
    assert cache.get_seq_length() == WARM + STEPS
    assert after[0] - before[0] < after[1] - before[1] + 128 * STEPS


@torch.no_grad()
def steps(model, cache: CompressedDynamicCache, count: int) -> None:
    token = torch.tensor([[5]])
    for _ in range(count):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)


# --- work


@pytest.mark.parametrize("name", ["int4_channel", "identity"])
def test_a_token_costs_the_same_work_at_any_length(name):
    """Room is taken and chunks are joined now and then, at every length."""
    work = []
    for held in (4096, TOKENS if LONG else TOKENS // 4):
        cache = cache_of(CODECS[name]())
        cache.layers[0].store(*some(cache, 0, held))
        with Work() as counted:
            append(cache, held, held + (TOKENS // 30 if LONG else 600))
        work.append((counted.operations, counted.nbytes))
    (few, little), (many, much) = work
    assert many <= few and much <= little
