"""The storage: what is exact, what it costs, and that nothing moves. What is read back: test_cache_machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sampling import ALL, covering
from stores import COMPRESSORS, D, H, Plain, as_sides, filled, tokens
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.compression.cache.growing_tensor import GrowingTensor
from gpt2.compression.cache.size import cache_bytes
from gpt2.compression.cache.token_store import TokenStore
from gpt2.compression.codecs import QUANTIZERS, Compressor, IdentityCompressor
from gpt2.compression.compressed_cache import CompressedDynamicCache

every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS)
USUAL = (4, 0)
# Exact sinks and recent tokens: none, the usual, sinks that cut a block, and more of either than a block has
LAYOUTS = [(0, 0), USUAL, (5, 6), (9, 3)]


every_layout = pytest.mark.parametrize(
    ("compressor", "layout"),
    [
        pytest.param(COMPRESSORS[name], layout, id=f"{name}-{layout}")
        for name, layout in covering(COMPRESSORS, LAYOUTS, times=2)
    ],
)


@every_layout
def test_exact_ends(compressor, layout):
    """Bit for bit, however the tokens came; and nothing else is exact, or the test would prove nothing."""
    sinks, recent = layout
    x = tokens(31)
    for chunks in ([x], x.split(4, dim=2)):
        read = filled(compressor, layout, chunks).read()
        exact = (read == x).all(dim=3).all(dim=(0, 1)).tolist()
        if compressor.exact:
            assert all(exact)
            continue
        unfinished = (31 - recent) % compressor.block_tokens
        coded = 31 - sinks - recent - unfinished
        assert exact == [True] * sinks + [False] * coded + [True] * (recent + unfinished)


@pytest.mark.parametrize(("d", "name"), covering([80, 5, 1], ["int8", "int4", "block"]))
def test_any_head_dim(name, d):
    x = tokens(9, d=d)
    reference = Plain(COMPRESSORS[name], *USUAL)
    reference.append(x)
    torch.testing.assert_close(filled(COMPRESSORS[name], USUAL, x.split(2, dim=2)).read(), reference.seen)


# What is cut off

LENGTHS = [0, 2, 3, 4, 7, 8, 10, 11, 20, 24, 26, 29, 30]


@pytest.mark.parametrize(("name", "layout", "length"), covering(COMPRESSORS, LAYOUTS, LENGTHS, times=4), ids=str)
def test_crop(name, layout, length):
    """In the tail, on a block's edge, inside a block, into the sinks, everything: then it grows again."""
    x, reference = tokens(30), Plain(COMPRESSORS[name], *layout)
    store = filled(COMPRESSORS[name], layout, x.split(11, dim=2))
    reference.append(x)
    for side in (store, reference):
        side.crop(30 - length)
    for chunk in (x[:, :, :0], *tokens(20, seed=1).split(3, dim=2)):
        store.append(chunk)
        reference.append(chunk)
        torch.testing.assert_close(store.read(), reference.seen)


def test_crop_of_nothing_and_of_too_much():
    cache = make_cache("int4")
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([2, 1]))
    assert cache.get_seq_length() == 0, "empty: nothing to crop or to reorder"
    fill(cache, tokens(10))
    before = cache.layers[0].stores["K"].read()
    for nothing in (0, torch.tensor(0)):
        cache.crop(nothing)
        assert torch.equal(cache.layers[0].stores["K"].read(), before)
    with pytest.raises(PluginError, match="11 tokens from a cache of 10"):
        cache.crop(-11)
    cache.crop(torch.tensor(-4))  # transformers 5.17 counts the tokens to remove on the device
    assert torch.equal(cache.layers[0].stores["K"].read(), before[:, :, :6])
    cache = make_cache("int8", recent_tokens=512)
    fill(cache, tokens(600, batch=1))
    for removed in (300, 290):  # a part of the tail, then all of it
        cache.crop(-removed)
        exact = [x for store in cache.layers[0].stores.values() for x in (store.sinks, store.tail)]
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in exact), "a slice would keep all of it alive"


def test_a_cache_reordered_in_inference_mode_goes_on_without_it():
    """Beam search under inference_mode, then another turn."""
    cache, x = make_cache("int4"), tokens(30)
    with torch.inference_mode():
        fill(cache, x[:, :, :20])
        cache.reorder_cache(torch.tensor([1, 0]))
    fill(cache, x[[1, 0], :, 20:])
    assert torch.equal(cache.layers[0].stores["K"].read(), filled(COMPRESSORS["int4"], USUAL, [x[[1, 0]]]).read())


# Reconstructions that are kept


def test_kept_reconstructions_are_made_once(monkeypatch):
    made, reconstruct = [], Compressor.reconstruct

    def counted(self, encoded, *args):
        made.append(encoded["codes"].shape[2])
        return reconstruct(self, encoded, *args)

    monkeypatch.setattr(Compressor, "reconstruct", counted)
    cache = make_cache("block").keep_reconstructed()
    for token in tokens(40).split(1, dim=2):
        cache.update(token, token, 0)
    assert made == [1] * 2 * (36 // 4), "K and V, each block as it becomes full"
    assert cache_bytes(cache) == cache.nbytes() > make_cache("block").nbytes()


# Nothing moves


def parts_of(store: TokenStore) -> list[tuple[Tensor, int, int, Tensor]]:
    """Every chunk: the tensor, its address, how much of it is in use, and a copy of that."""
    return [
        (part, part.data_ptr(), view.shape[2], view.clone())
        for grown in store.blocks.values()
        for part, view in zip(grown.chunks, grown.views(), strict=True)
    ]


@every_compressor
def test_appending_never_touches_what_is_stored(compressor):
    store = filled(compressor, (5, 6), [tokens(40)])
    for step in range(60):
        before = parts_of(store)
        store.append(tokens(1 + step % 7, seed=step))
        held = {id(part) for grown in store.blocks.values() for part in grown.chunks}
        for part, address, used, content in before:
            assert id(part) in held and part.data_ptr() == address, "moved"
            assert torch.equal(part[:, :, :used], content), "changed"
    assert len(parts_of(store)) > len(store.blocks), "it grew beyond its first chunk"


def test_chunks_read_as_one_tensor():
    """Cut anywhere, on and beside every chunk's edge, then grown again."""
    x = tokens(310)
    for length in (*range(0, 301, 1 if ALL else 7), 49, 50, 51, 99, 100, 101, 299, 300):
        grown = GrowingTensor()
        for chunk in x[:, :, :300].split(50, dim=2):
            grown.append(chunk)
        assert len(grown.chunks) == 5
        grown.truncate(length)
        held = torch.cat((x[:, :, :0], *grown.views()), dim=2)
        assert grown.length == length and torch.equal(held, x[:, :, :length])
        grown.append(x[:, :, 300:])
        assert torch.equal(torch.cat(grown.views(), dim=2), torch.cat((x[:, :, :length], x[:, :, 300:]), dim=2))


def test_chunks_stay_few():
    """A read joins them: their number grows with the logarithm of the length."""
    grown, counts = GrowingTensor(), {}
    for n in range(1, 4097):
        grown.append(torch.zeros(1, 1, 1, 1))
        counts[n] = len(grown.chunks)
    assert counts[1024] <= 32 and counts[4096] - counts[2048] <= counts[2048] - counts[1024] + 1 < 32


# What it costs


def make_cache(name: str, layers: int = 1, **how) -> CompressedDynamicCache:
    compressors = [COMPRESSORS[name]] * layers
    return CompressedDynamicCache(compressors, compressors, **how)


def fill(cache: CompressedDynamicCache, x: Tensor) -> None:
    for layer in cache.layers:
        layer.store(x, x)


PER_TOKEN = {  # bytes of one token of one KV head, float16: codes, then scale and offset
    "identity": 2 * D,
    "int8": D + 2 + 2,
    "int4": D // 2 + 2 + 2,
    "low-rank": 2 * 9,
    "low-rank-int4": 3 + 2 + 2,
    "joint-int8": 20 + 2 + 2,  # of both heads
}


@pytest.mark.parametrize(("name", "sinks"), covering(PER_TOKEN, [4, 0]))
def test_bytes_are_what_a_hand_counts(name, sinks):
    cache = make_cache(name, layers=2, sink_tokens=sinks, recent_tokens=8)
    fill(cache, tokens(200, batch=3, dtype=torch.float16))
    exact, heads = 0 if name == "identity" else sinks + 8, 1 if name == "joint-int8" else H
    coded = 2 * 2 * 3 * heads * (200 - exact) * PER_TOKEN[name]  # layers, sides, rows
    assert cache.nbytes() == cache_bytes(cache) == coded + 2 * 2 * 3 * H * exact * 2 * D
    if name == "joint-int8":  # transforms are counted apart
        shared = COMPRESSORS[name]
        own = Compressor(shared.quantizer, replace(shared.transform))  # without what other tests let it derive
        cache = CompressedDynamicCache([own] * 2, [own] * 2)
        assert cache.codec_bytes() == 8 * (2 * (H * D) * 20 + H * D), "once where layers, K and V share it"


@pytest.mark.parametrize(("name", "chunk"), covering(["int4", "identity", "block"], [1, 64, 4]))
def test_unused_room_is_under_5_percent(name, chunk):
    cache, worst = make_cache(name), 0.0
    for step, part in enumerate(tokens(2500, batch=1, heads=1, dtype=torch.float16).split(chunk, dim=2)):
        fill(cache, part)
        n = cache.get_seq_length()
        if n >= 2048 and (chunk > 1 or step % 13 == 0):
            (grown, *_) = cache.layers[0].stores["K"].blocks.values()
            worst = max(worst, grown.unused / grown.length)
            if name != "block":
                exact = 0 if name == "identity" else 4
                needed = 2 * (exact * 2 * D + (n - exact) * PER_TOKEN[name])
                assert 0 <= cache_bytes(cache) / needed - 1 < 0.05
    assert 0 < worst < 0.05


@every_layout
def test_slices_of_large_tensors_are_let_go(compressor, layout):
    """A view that is kept would keep a whole prompt's activations alive."""
    huge, _ = as_sides(compressor, tokens(4000))
    cache = CompressedDynamicCache([compressor], [compressor], sink_tokens=layout[0], recent_tokens=layout[1])
    for chunk in huge[:, :, :120].split(3, dim=2):
        fill(cache, chunk)
    kept = 4 * 120 * huge[:, :, :1].nbytes  # two sides, and as much again for room
    assert cache_bytes(cache) <= kept < huge.untyped_storage().nbytes() / 5
    cache.crop(-50)
    cache.batch_select_indices(torch.tensor([0]))
    assert cache_bytes(cache) <= kept / 2


# The cache as a whole


def test_update_returns_what_is_stored():
    """Also for the tokens that were just written, and in prefill: one forward pass measures the real error."""
    cache = make_cache("int4", layers=2)
    k, v = tokens(20), tokens(20, seed=1)
    for chunk in (slice(0, 12), slice(12, 20)):
        for layer in range(2):
            keys, values = cache.update(k[:, :, chunk], v[:, :, chunk], layer)
    for read, x in ((keys, k), (values, v)):
        assert torch.equal(read, filled(COMPRESSORS["int4"], USUAL, [x]).read())
        assert not torch.equal(read, x)
    assert cache.get_seq_length() == 20 and cache.get_mask_sizes(3, 0) == (23, 0)


# What is rejected


def test_bad_arguments_are_rejected():
    for k, v, name, value in ((2, 3, "", ""), (0, 0, "", ""), (3, 3, "num_layers", 4), (1, 1, "num_layers", 0),
                              (1, 1, "sink_tokens", -1), (1, 1, "recent_tokens", -1)):  # fmt: skip
        sides = ([IdentityCompressor()] * count for count in (k, v))
        with pytest.raises(PluginError, match=f"{name}={value}" if name else f"got {k} and {v}"):
            CompressedDynamicCache(*sides, **({name: value} if name else {}))


@pytest.mark.parametrize(("heads", "d", "side"), [(2, 20, "K"), (2, 12, "V"), (3, 16, "K"), (1, 16, "V"), (4, 16, "K")])
def test_a_transform_of_another_model_is_rejected(side, heads, d):
    identity = [IdentityCompressor()] * 2
    sides = {"K": identity, "V": identity} | {side: [IdentityCompressor(), COMPRESSORS["low-rank"]]}
    cache = CompressedDynamicCache(sides["K"], sides["V"])
    x = tokens(5, heads=heads, d=d)
    cache.update(x, x, 0)
    with pytest.raises(PluginError, match=f"layer 1, {side}.* {H} groups of {D} .* {heads} KV heads of {d}"):
        cache.update(x, x, 1)


@pytest.mark.parametrize(("n", "blocks", "exact"), [(3, 0, 3), (63, 0, 63), (64, 1, 4), (65, 1, 5), (192, 3, 4)])
def test_blocks_of_64_by_hand(n, blocks, exact):
    """The lead takes the place of sinks in the first block: 64 tokens are 4 sinks and one block."""
    compressor = Compressor(QUANTIZERS["int4_channel"])
    cache, x = CompressedDynamicCache([compressor], [compressor]), tokens(n, batch=1)
    k, _ = cache.update(x, x, 0)
    assert cache_bytes(cache) == 2 * H * (blocks * (32 * D + D + 2 * D) + exact * D * 4), "K and V"
    tail = n - exact + 4
    assert torch.equal(k[:, :, :4], x[:, :, :4]) and torch.equal(k[:, :, tail:], x[:, :, tail:])
    assert torch.equal(k, x) == (blocks == 0)
