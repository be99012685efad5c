"""The storage against a plain model of it: what is read back, what it costs, and that nothing moves."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.compression.cache import token_store
from gpt2.compression.cache.size import cache_bytes
from gpt2.compression.cache.token_store import GrowingTensor, TokenStore
from gpt2.compression.codecs import QUANTIZERS, Compressor, IdentityCompressor, JointTransform, Quantizer, Transform
from gpt2.compression.codecs.rope import Rotary
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.kernels import dispatch

H, D = 2, 16  # KV heads and channels, where a test doesn't say otherwise


class BlockInt8(Quantizer):
    """Min and max of every channel over four tokens: a codec that can't encode a token by itself."""

    name, bits, block_tokens = "block-int8", 8, 4

    def quantize(self, z: Tensor) -> dict[str, Tensor]:
        z = z.float().unflatten(2, (-1, self.block_tokens))
        low = z.amin(3, keepdim=True)
        scale = ((z.amax(3, keepdim=True) - low) / 255).clamp_min(1e-6)
        return {"codes": ((z - low) / scale).round().to(torch.uint8), "low": low, "scale": scale}

    def dequantize(self, fields: dict[str, Tensor], rank: int) -> Tensor:
        return (fields["codes"] * fields["scale"] + fields["low"]).flatten(2, 3)


def transform(rank: int, groups: int = H, width: int = D) -> Transform:
    """A random orthonormal basis. In float64, so that the shape of a matmul can't tip a code over."""
    generator = torch.Generator().manual_seed(rank)
    E = torch.linalg.qr(torch.randn(groups, width, width, generator=generator, dtype=torch.float64)).Q[..., :rank]
    return Transform(E, E.mT, torch.randn(groups, width, generator=generator, dtype=torch.float64))


def joint(rank: int, layout: str, d: int = D) -> JointTransform:
    """One basis for K and V of a single head, keys turned by their position."""
    basis = transform(rank, groups=1, width=2 * d)
    return JointTransform(basis.E, basis.D, basis.mean, Rotary(torch.logspace(0, -2, d // 2), layout))


COMPRESSORS = {
    "identity": IdentityCompressor(),
    "int8": Compressor(QUANTIZERS["int8"]),
    "int4": Compressor(QUANTIZERS["int4"]),
    "block": Compressor(BlockInt8()),
    "low-rank": Compressor(QUANTIZERS["none"], transform(9)),
    "low-rank-int4": Compressor(QUANTIZERS["int4"], transform(5)),  # an odd rank: half of the last byte is empty
    "joint-int8": Compressor(QUANTIZERS["int8"], transform(20, groups=1, width=H * D)),
    "low-rank-block": Compressor(BlockInt8(), transform(7)),
    "kv-int8": Compressor(QUANTIZERS["int8"], joint(20, "half")),
    "kv-block": Compressor(BlockInt8(), joint(2 * D, "interleaved")),
}
every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS)
NOTHING_EXACT_BESIDE, USUAL, BOTH_ENDS = (0, 0), (4, 0), (5, 6)  # 5 sinks cut into a block
every_layout = pytest.mark.parametrize("layout", [NOTHING_EXACT_BESIDE, USUAL, BOTH_ENDS], ids=str)


def tokens(n: int, batch: int = 2, heads: int = H, d: int = D, seed: int = 0, dtype=torch.float32) -> Tensor:
    """[B, H, n, d] as attention makes it: heads and tokens transposed, not contiguous."""
    x = torch.randn(batch, n, heads, d, generator=torch.Generator().manual_seed(seed))
    return (x * (1 + torch.arange(d))).to(dtype).transpose(1, 2)


def make_store(compressor: Compressor, layout: tuple[int, int], x: Tensor) -> TokenStore:
    store = TokenStore(compressor, *layout)
    store.prepare(x, "test")
    return store


def filled(compressor: Compressor, layout: tuple[int, int], chunks: list[Tensor] | tuple[Tensor, ...]) -> TokenStore:
    store = make_store(compressor, layout, chunks[0])
    for chunk in chunks:
        store.append(chunk)
    return store


def as_sides(compressor: Compressor, x: Tensor) -> tuple[Tensor, Tensor]:
    """K, and V alike, as a model gives them to a layer, and what its stores hold of them."""
    if not compressor.joint:
        return x, x
    side = x[:, : H // 2]
    return side, torch.cat((side, side), dim=1)


class Reference:
    """All tokens in a list, coded anew, one block at a time, whenever they are read."""

    def __init__(self, compressor: Compressor, layout: tuple[int, int]):
        self.compressor, self.block = compressor, compressor.block_tokens
        self.sinks, self.recent = (0, 0) if compressor.exact else layout
        self.lead = self.sinks % self.block  # places of the first block that sinks have
        self.tokens: list[Tensor] = []  # each [B, H, 1, d]
        self.blocks = 0

    def append(self, x: Tensor) -> None:
        self.tokens += x.split(1, dim=2) if x.shape[2] else ()
        self.blocks = max(self.blocks, (len(self.tokens) - self.start(0) - self.recent) // self.block)

    def start(self, block: int) -> int:
        return self.sinks - self.lead + block * self.block

    def decoded(self, block: int) -> tuple[Tensor, ...]:
        """Tokens of a block behind the sinks, as decoded."""
        start = self.start(block)
        own = self.tokens[max(start, self.sinks) : start + self.block]
        x = torch.cat([own[0]] * (self.block - len(own)) + own, dim=2)
        back = self.compressor.reconstruct(dispatch.compress(self.compressor, x, start), x.shape[3], x.dtype, start)
        return back.split(1, dim=2)[self.block - len(own) :]

    def read(self) -> Tensor:
        coded = [token for block in range(self.blocks) for token in self.decoded(block)]
        return torch.cat(self.tokens[: self.sinks] + coded + self.tokens[self.sinks + len(coded) :], dim=2)

    def crop(self, n: int) -> None:
        length = len(self.tokens) - n
        whole = (length - self.start(0)) // self.block if length > self.sinks else 0
        if whole < self.blocks:  # what stays of a block that is cut is only known as it was decoded
            start = self.start(whole)
            self.tokens[max(start, self.sinks) : start + self.block] = self.decoded(whole)
            self.blocks = whole
        del self.tokens[length:]

    def map_(self, fn) -> None:
        self.tokens = [fn(token) for token in self.tokens]


def assert_same(store: TokenStore, reference: Reference) -> None:
    assert len(store) == len(reference.tokens)
    if reference.tokens:
        torch.testing.assert_close(store.read(), reference.read())
    else:
        assert store.read().shape[2] == 0


# What is read back


@every_layout
@every_compressor
def test_reading_is_the_plain_models_reading(compressor, layout):
    x = tokens(41)
    store, reference = make_store(compressor, layout, x), Reference(compressor, layout)
    for chunk in x.split([2, 1, 1, 20, 0, 7, 3, 7], dim=2):
        store.append(chunk)
        reference.append(chunk)
        assert_same(store, reference)


@every_layout
@every_compressor
def test_chunking_changes_nothing(compressor, layout):
    x = tokens(30)
    whole = filled(compressor, layout, [x]).read()
    for chunks in (x.split(1, dim=2), x.split(7, dim=2), x.split([3, 26, 1], dim=2)):
        torch.testing.assert_close(filled(compressor, layout, chunks).read(), whole)


@every_layout
@every_compressor
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


@pytest.mark.parametrize("n", [1, 2, 3])
@every_compressor
def test_prompts_shorter_than_the_sinks(compressor, n):
    x = tokens(12)
    store = filled(compressor, USUAL, [x[:, :, :n]])
    assert torch.equal(store.read(), x[:, :, :n])
    store.append(x[:, :, n:])
    torch.testing.assert_close(store.read(), filled(compressor, USUAL, [x]).read())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_compressor
def test_16_bit_dtypes(compressor, dtype):
    x = tokens(23, dtype=dtype)
    store, reference = make_store(compressor, BOTH_ENDS, x), Reference(compressor, BOTH_ENDS)
    for chunk in x.split(6, dim=2):
        store.append(chunk)
        reference.append(chunk)
    assert store.read().dtype == dtype
    assert_same(store, reference)
    store.crop(13)
    reference.crop(13)
    assert_same(store, reference)


@pytest.mark.parametrize("d", [80, 5, 1])
@pytest.mark.parametrize("name", ["int8", "int4", "block"])
def test_any_head_dim(name, d):
    x = tokens(9, d=d)
    store, reference = filled(COMPRESSORS[name], USUAL, x.split(2, dim=2)), Reference(COMPRESSORS[name], USUAL)
    reference.append(x)
    assert_same(store, reference)


# Cropping and the batch


@pytest.mark.parametrize("length", [0, 2, 3, 4, 7, 8, 10, 11, 20, 24, 26, 29, 30], ids=lambda n: f"to-{n}")
@every_layout
@every_compressor
def test_crop(compressor, layout, length):
    """In the tail, on a block's edge, inside a block, into the sinks, everything: then it grows again."""
    x = tokens(30)
    store, reference = filled(compressor, layout, x.split(11, dim=2)), Reference(compressor, layout)
    reference.append(x)
    before = store.read()
    for side in (store, reference):
        side.crop(30 - length)
    assert_same(store, reference)
    assert torch.equal(store.read(), before[:, :, :length]), "what stays is read as before"
    for chunk in tokens(20, seed=1).split(3, dim=2):
        store.append(chunk)
        reference.append(chunk)
        assert_same(store, reference)


def test_crop_of_nothing_and_of_too_much():
    cache = make_cache("int4")
    cache.crop(-3)
    assert cache.get_seq_length() == 0, "empty: nothing to crop"
    fill(cache, tokens(10))
    before = cache.layers[0].stores["K"].read()
    cache.crop(0)
    assert torch.equal(cache.layers[0].stores["K"].read(), before)
    with pytest.raises(PluginError, match="11 tokens from a cache of 10"):
        cache.crop(-11)


BATCH_OPERATIONS = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([2, 1])),
}
ROWS = {"reorder": [2, 0, 0], "repeat": [0, 0, 1, 1, 2, 2], "select": [2, 1]}


@pytest.mark.parametrize("operation", BATCH_OPERATIONS)
@every_layout
@every_compressor
def test_batch_operations_move_sinks_blocks_and_tail(compressor, layout, operation):
    x, more, rows = tokens(30, batch=3), tokens(9, batch=3, seed=1), ROWS[operation]
    cache = CompressedDynamicCache([compressor], [compressor], sink_tokens=layout[0], recent_tokens=layout[1])
    (x, held), (more, later) = as_sides(compressor, x), as_sides(compressor, more)
    fill(cache, x)
    BATCH_OPERATIONS[operation](cache)
    fill(cache, more[rows])
    expected = filled(compressor, layout, [held[rows], later[rows]]).read()
    for store in cache.layers[0].stores.values():
        torch.testing.assert_close(store.read(), expected)


def test_a_cache_reordered_in_inference_mode_goes_on_without_it():
    """Beam search under inference_mode, then another turn."""
    cache, x = make_cache("int4"), tokens(30)
    with torch.inference_mode():
        fill(cache, x[:, :, :20])
        cache.reorder_cache(torch.tensor([1, 0]))
    fill(cache, x[[1, 0], :, 20:])
    assert torch.equal(cache.layers[0].stores["K"].read(), filled(COMPRESSORS["int4"], USUAL, [x[[1, 0]]]).read())


@pytest.mark.parametrize("operation", BATCH_OPERATIONS)
def test_batch_operations_on_an_empty_cache_do_nothing(operation):
    cache = make_cache("int4")
    BATCH_OPERATIONS[operation](cache)
    fill(cache, tokens(5))
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("seed", range(2))
@every_layout
@every_compressor
def test_long_histories(compressor, layout, seed, monkeypatch):
    """Whatever happens in whatever order, as beam search and assisted decoding mix it; over many small pieces."""
    monkeypatch.setattr(token_store, "SMALLEST_CHUNK", 3)
    choose = torch.Generator().manual_seed(seed)

    def pick(n: int) -> int:
        return int(torch.randint(n, (), generator=choose))

    batch = 2
    store, reference = make_store(compressor, layout, tokens(1)), Reference(compressor, layout)
    for step in range(25):
        operation = ("append", "append", "append", "crop", "rows")[pick(5)]
        if operation == "append":
            arguments = ("append", tokens(1 + pick(9), batch=batch, seed=step))
        elif operation == "crop":
            arguments = ("crop", pick(min(len(store), 12) + 1))
        else:
            rows = torch.randint(batch, (1 + pick(3),), generator=choose)
            batch = len(rows)
            arguments = ("map_", lambda t, rows=rows: t.index_select(0, rows))
        for side in (store, reference):
            getattr(side, arguments[0])(arguments[1])
        assert_same(store, reference)


# Reconstructions that are kept


@pytest.mark.parametrize("seed", range(2))
@every_layout
@every_compressor
def test_keeping_reconstructions_changes_no_reading(compressor, layout, seed):
    """Whatever happens in whatever order, read after some of it."""
    choose = torch.Generator().manual_seed(100 + seed)

    def pick(n: int) -> int:
        return int(torch.randint(n, (), generator=choose))

    batch = 2
    plain, kept = (make_store(compressor, layout, tokens(1)) for _ in range(2))
    kept.keep_reconstructed = True
    for step in range(25):
        operation = ("append", "append", "crop", "rows", "clear")[pick(5) if step % 9 == 8 else pick(4)]
        rows = torch.randint(batch, (1 + pick(3),), generator=choose)
        x, n = tokens(1 + pick(9), batch=batch, seed=step), pick(min(len(plain), 12) + 1)
        for store in (plain, kept):
            if operation == "append":
                store.append(x)
            elif operation == "crop":
                store.crop(n)
            elif operation == "rows":
                store.map_(lambda t, rows=rows: t.index_select(0, rows))
            else:
                store.clear()
                store.prepare(x[:1], "test")
        batch = {"rows": len(rows), "clear": 1}.get(operation, batch)
        if pick(3):
            torch.testing.assert_close(kept.read(), plain.read())
            held = 0 if kept.reconstructed is None else kept.reconstructed.nbytes
            blocks = 0 if compressor.exact else kept.compressed_blocks * compressor.block_tokens
            assert held == blocks * (tokens(1, batch=batch).nbytes if blocks else 0), "what is kept is all of it"
            assert kept.nbytes() == plain.nbytes() + held, "and counted"


def test_kept_reconstructions_are_made_once(monkeypatch):
    expanded, reconstruct = [], Compressor.reconstruct

    def counted(self, fields, *args):
        expanded.append(fields["codes"].shape[2])
        return reconstruct(self, fields, *args)

    monkeypatch.setattr(Compressor, "reconstruct", counted)
    cache = make_cache("block").keep_reconstructed()
    for token in tokens(40).split(1, dim=2):
        cache.update(token, token, 0)
    assert expanded == [1] * 2 * (36 // 4), "K and V, each block as it becomes full"
    assert cache_bytes(cache) == cache.nbytes() > make_cache("block").nbytes()


# Where blocks lie


@pytest.mark.parametrize("recent", [0, 3])
@pytest.mark.parametrize("sinks", [0, 1, 3, 4, 6, 70])
def test_blocks_end_at_multiples_of_their_length(sinks, recent):
    """So that a prompt of whole blocks leaves no tail, whatever the sinks."""
    store = make_store(COMPRESSORS["block"], (sinks, recent), tokens(1))
    for n, token in enumerate(tokens(90).split(1, dim=2), start=1):
        store.append(token)
        behind = max(n - sinks, 0)
        expected = min((n - recent) % 4 + recent, behind) if n - recent >= sinks - sinks % 4 + 4 else behind
        assert (store.tail.shape[2], len(store)) == (expected, n)
        assert store.compressed_tokens == behind - expected


@pytest.mark.parametrize("layout", [(0, 0), (4, 0), (70, 0), (63, 5), (70, 64)], ids=str)
@pytest.mark.parametrize("name", ["mixed", "kv-mixed"])
def test_blocks_of_64_tokens(name, layout):
    """The longest there are, from sinks within the first block and beyond it."""
    basis = joint(2 * D, "half") if name == "kv-mixed" else transform(D)
    compressor = Compressor(QUANTIZERS["mixed"].at(5), basis)
    store, reference = make_store(compressor, layout, tokens(1)), Reference(compressor, layout)
    for step, n in enumerate([3, 59, 1, 1, 1, 70, 10, 130]):
        for side in (store, reference):
            side.append(tokens(n, seed=step))
        assert_same(store, reference)
    for n in (9, 70, 100, 40):
        for operation, argument in (("crop", n), ("append", tokens(20, seed=n))):
            for side in (store, reference):
                getattr(side, operation)(argument)
            assert_same(store, reference)


# Nothing moves


def parts_of(store: TokenStore) -> list[tuple[Tensor, int, int, Tensor]]:
    """Every piece: the tensor, its address, how much of it is in use, and a copy of that."""
    return [
        (part, part.data_ptr(), view.shape[2], view.clone())
        for pieces in store.blocks.values()
        for part, view in zip(pieces.chunks, pieces.views(), strict=True)
    ]


@every_compressor
def test_appending_never_touches_what_is_stored(compressor):
    store = filled(compressor, BOTH_ENDS, [tokens(40)])
    for step in range(60):
        before = parts_of(store)
        store.append(tokens(1 + step % 7, seed=step))
        held = {id(part) for pieces in store.blocks.values() for part in pieces.chunks}
        for part, address, used, content in before:
            assert id(part) in held and part.data_ptr() == address, "moved"
            assert torch.equal(part[:, :, :used], content), "changed"
    assert len(parts_of(store)) > len(store.blocks), "it grew beyond its first pieces"


def test_appending_codes_each_block_once(monkeypatch):
    """The cost of a token doesn't depend on what is held."""
    coded, compress = [], Compressor.coordinates
    monkeypatch.setattr(
        Compressor, "coordinates", lambda self, x, start: (coded.append(x.shape[2]), compress(self, x))[1]
    )
    store = filled(COMPRESSORS["block"], (4, 0), tokens(200).split(1, dim=2))
    assert coded == [4] * 49 and len(store) == 200


def test_pieces_read_as_one_tensor():
    """Cut anywhere, on and beside every piece's edge, then grown again."""
    x = tokens(310)
    for length in range(301):
        pieces = GrowingTensor()
        for chunk in x[:, :, :300].split(50, dim=2):
            pieces.append(chunk)
        assert len(pieces.chunks) == 5
        pieces.truncate(length)
        held = torch.cat((x[:, :, :0], *pieces.views()), dim=2)
        assert pieces.length == length and torch.equal(held, x[:, :, :length])
        pieces.append(x[:, :, 300:])
        assert torch.equal(torch.cat(pieces.views(), dim=2), torch.cat((x[:, :, :length], x[:, :, 300:]), dim=2))


def test_pieces_stay_few():
    """A read joins the pieces: their number grows with the logarithm of the length."""
    pieces, counts = GrowingTensor(), {}
    for n in range(1, 8193):
        pieces.append(torch.zeros(1, 1, 1, 1))
        counts[n] = len(pieces.chunks)
    assert counts[2048] <= 32 and counts[8192] - counts[4096] <= counts[4096] - counts[2048] + 1 < 32


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
}


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("name", PER_TOKEN)
def test_bytes_are_what_a_hand_counts(name, sinks):
    cache = make_cache(name, layers=2, sink_tokens=sinks, recent_tokens=8)
    fill(cache, tokens(200, batch=3, dtype=torch.float16))
    exact = 0 if name == "identity" else sinks + 8
    sides, rows = 2 * 2, 3 * H
    assert cache.nbytes() == cache_bytes(cache) == sides * rows * (exact * 2 * D + (200 - exact) * PER_TOKEN[name])


def test_a_joint_basis_has_one_scale_for_all_heads():
    cache = make_cache("joint-int8", sink_tokens=0)
    fill(cache, tokens(200, batch=1, dtype=torch.float16))
    assert cache_bytes(cache) == 2 * 200 * (20 + 2 + 2)
    assert cache.codec_bytes() == 2 * 8 * (2 * (H * D) * 20 + H * D), "transforms are counted apart"


@pytest.mark.parametrize("chunk", [1, 64])
@pytest.mark.parametrize("name", ["identity", "int4"])
def test_unused_room_is_under_5_percent(name, chunk):
    cache = make_cache(name)
    x = tokens(3000, batch=1, heads=1, dtype=torch.float16)
    worst = 0.0
    for step, part in enumerate(x.split(chunk, dim=2)):
        fill(cache, part)
        n = cache.get_seq_length()
        if n >= 2048 and (chunk > 1 or step % 13 == 0):
            exact = 0 if name == "identity" else 4
            needed = 2 * (exact * 2 * D + (n - exact) * PER_TOKEN[name])
            worst = max(worst, cache_bytes(cache) / needed - 1)
    assert 0 < worst < 0.05


@every_layout
@every_compressor
def test_slices_of_large_tensors_are_let_go(compressor, layout):
    """A view that is kept would keep a whole prompt's activations alive."""
    huge, _ = as_sides(compressor, tokens(4000))
    cache = CompressedDynamicCache([compressor], [compressor], sink_tokens=layout[0], recent_tokens=layout[1])
    for start in range(0, 120, 3):
        fill(cache, huge[:, :, start : start + 3])
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


def test_reset_forgets_everything():
    cache = make_cache("low-rank-block", layers=2, recent_tokens=3)
    fill(cache, tokens(50))
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes() == cache_bytes(cache) == 0
    x = tokens(20, batch=1, dtype=torch.float16, seed=1)  # another batch, another dtype
    fill(cache, x)
    fresh = make_cache("low-rank-block", recent_tokens=3)
    fill(fresh, x)
    assert torch.equal(cache.layers[1].stores["V"].read(), fresh.layers[0].stores["V"].read())


def test_layers_and_sides_have_their_own_compressor():
    names = [("identity", "int4"), ("int4", "identity"), ("block", "low-rank")]
    cache = CompressedDynamicCache([COMPRESSORS[k] for k, _ in names], [COMPRESSORS[v] for _, v in names], num_layers=3)
    x = tokens(30)
    fill(cache, x)
    for layer, pair in zip(cache.layers, names, strict=True):
        for store, name in zip(layer.stores.values(), pair, strict=True):
            assert torch.equal(store.read(), filled(COMPRESSORS[name], USUAL, [x]).read())
    cache.crop(-9)
    assert {layer.get_seq_length() for layer in cache.layers} == {21}


def test_caches_share_compressors_but_no_state():
    compressors = [COMPRESSORS["low-rank-int4"]]
    one, other = (CompressedDynamicCache(compressors, compressors) for _ in range(2))
    fill(one, tokens(20))
    assert other.get_seq_length() == 0 and cache_bytes(other) == 0
    before = one.layers[0].stores["K"].read()
    fill(other, tokens(9, batch=1, seed=1))
    other.crop(-3)
    assert torch.equal(one.layers[0].stores["K"].read(), before)


@every_compressor
def test_a_deep_copy_goes_its_own_way(compressor):
    """How a shared prompt is kept and continued more than once."""
    cache = CompressedDynamicCache([compressor], [compressor], recent_tokens=2)
    x, held = as_sides(compressor, tokens(30))
    fill(cache, x[:, :, :20])
    fork = copy.deepcopy(cache)
    fill(cache, x[:, :, 3:10] + 1)  # would write into the room that both have, if they shared it
    cache.reorder_cache(torch.tensor([1, 1]))
    fill(fork, x[:, :, 20:])
    for store in fork.layers[0].stores.values():
        torch.testing.assert_close(store.read(), filled(compressor, (4, 2), [held]).read())


def test_offload_and_prefetch_keep_the_content():
    cache = make_cache("block", recent_tokens=3)
    cache.layers[0].prefetch()
    fill(cache, tokens(20))
    before = cache.layers[0].stores["K"].read()
    cache.layers[0].offload()
    cache.layers[0].prefetch()
    assert torch.equal(cache.layers[0].stores["K"].read(), before)


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 2, "v": 3}, "got 2 and 3"),
        ({"k": 3, "v": 3, "num_layers": 4}, "num_layers=4"),
        ({"k": 0, "v": 0}, "got 0 and 0"),
        ({"k": 1, "v": 1, "sink_tokens": -1}, "sink_tokens=-1"),
        ({"k": 1, "v": 1, "recent_tokens": -1}, "recent_tokens=-1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    sides = [[IdentityCompressor()] * arguments.pop(side) for side in "kv"]
    with pytest.raises(PluginError, match=message):
        CompressedDynamicCache(*sides, **arguments)


@pytest.mark.parametrize(("heads", "d"), [(2, 20), (3, 16), (1, 16), (4, 16)], ids=str)
@pytest.mark.parametrize("side", "KV")
def test_a_transform_of_another_model_is_refused(side, heads, d):
    """By layer, side and both shapes."""
    identity = [IdentityCompressor()] * 2
    sides = {"K": identity, "V": identity} | {side: [IdentityCompressor(), COMPRESSORS["low-rank"]]}
    cache = CompressedDynamicCache(sides["K"], sides["V"])
    x = tokens(5, heads=heads, d=d)
    cache.update(x, x, 0)
    with pytest.raises(PluginError) as refusal:
        cache.update(x, x, 1)
    for part in (f"layer 1, {side}", f"{H} groups of {D}", f"{heads} KV heads of {d}"):
        assert part in str(refusal.value)


def test_a_model_of_another_shape_is_refused():
    model = tiny_model("llama")  # 2 KV heads of 12 channels
    with pytest.raises(PluginError, match="layer 0, K: .* 2 groups of 16 .* 2 KV heads of 12"):
        model(torch.tensor([[5, 6]]), past_key_values=make_cache("low-rank-int4", layers=3))


def test_a_crop_lets_go_of_the_tail():
    """An empty slice of it would keep all of it alive, unseen by a count of elements."""
    compressors = [Compressor(QUANTIZERS["int8"])]
    cache = CompressedDynamicCache(compressors, compressors, recent_tokens=512)
    x = tokens(600, batch=1)
    cache.layers[0].store(x, x)
    cache.crop(-590)
    assert cache.get_seq_length() == 10 and cache_bytes(cache) == cache.nbytes()


def test_unused_room_of_a_block_codec_is_counted_in_tokens():
    block = BlockInt8()
    cache = CompressedDynamicCache([Compressor(block)], [Compressor(block)], sink_tokens=0)
    x = tokens(2048, batch=1)
    for token in x.split(1, dim=2):
        cache.layers[0].store(token, token)
    pieces = cache.layers[0].stores["K"].blocks["codes"]
    assert pieces.unused < 0.05 * pieces.length


def test_a_model_with_more_layers_is_refused():
    model = tiny_model("llama")
    cache = CompressedDynamicCache([IdentityCompressor()] * 2, [IdentityCompressor()] * 2)
    with pytest.raises(PluginError, match="has a layer 2, but this cache was made for 2 layers"):
        model(torch.tensor([[2, 3]]), past_key_values=cache)
    with pytest.raises(PluginError, match="num_layers=0"):
        CompressedDynamicCache([IdentityCompressor()], [IdentityCompressor()], num_layers=0)


def test_crop_takes_a_tensor():
    """transformers 5.17 counts the tokens to remove on the device."""
    cache = CompressedDynamicCache([IdentityCompressor()], [IdentityCompressor()])
    x = tokens(9)
    cache.layers[0].store(x, x)
    cache.crop(torch.tensor(-4))
    assert cache.get_seq_length() == 5
    cache.crop(torch.tensor(0))
    torch.testing.assert_close(cache.layers[0].stores["K"].read(), x[:, :, :5])


@every_compressor
def test_autocast_is_for_models(compressor):
    """In it a basis would be applied with 8 bits, and float16 scales can't be joined."""
    x, held = as_sides(compressor, tokens(50))
    cache = CompressedDynamicCache([compressor], [compressor], recent_tokens=3)
    with torch.autocast("cpu", torch.bfloat16):
        for piece in x.split([29, 1, 20], dim=2):
            fill(cache, piece)
        cache.crop(-2)
        read = torch.cat(cache.layers[0].read(), dim=1) if compressor.joint else cache.layers[0].read()[0]
    whole = filled(compressor, (4, 3), held.split([29, 1, 20], dim=2))
    whole.crop(2)
    assert torch.equal(read, whole.read())
