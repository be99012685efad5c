"""Triton kernels in Triton's interpreter, against PyTorch. Not collected: test_kernels.py runs it in a process of
its own, because TRITON_INTERPRET=1 has to be there before Triton is imported, and would change every other test."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from hostile import hostile
from sampling import ALL, covering, sampled
from tiny import tiny_model
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from gpt2.compression.attention import enable_compressed_attention
from gpt2.compression.cache import attention_math, direct_attention, triton_attention, triton_step
from gpt2.compression.cache.layers import CompressedSlidingLayer
from gpt2.compression.cache.token_store import Half, TokenStore
from gpt2.compression.codecs import QUANTIZERS, Compressor, JointTransform, Quantizer, Transform
from gpt2.compression.codecs.mixed import WIDTHS, Mixed, MixedFixed
from gpt2.compression.codecs.multi_head import UnrotatedTransform
from gpt2.compression.codecs.rope import Rotary
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.kernels import dispatch, triton_frames, triton_quantize

H = 2  # KV heads, where a test doesn't say otherwise
NAMES = tuple(QUANTIZERS)
# Those whose codes a kernel writes
ENCODED = tuple(name for name, q in QUANTIZERS.items() if type(q.encoding(16)) in triton_quantize.KERNELS)
HARD = ("no variance in most channels", "constant", "massive activations", "massive first tokens", "near float16's end",
        "times 1e-30", "times 1e+17")  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of an exp2 that is rightly 0


@pytest.fixture(autouse=True, scope="module")
def bfloat16_as_gpus_have_it():
    """The interpreter holds bfloat16 as its bits, of which tl.dot would make products, and cuts floats off to these."""
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def exact(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounded(self, x: TensorHandle, to: tl.dtype) -> TensorHandle:
        if (x.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, to)
        bits = x.data.view(np.uint32)
        return TensorHandle(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16), to.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", rounded)
        patch.setenv("KV_CPU_PRODUCTS", "float")  # what kernels for GPUs are compared with
        patch.setattr(InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, exact(a), exact(b), *rest))
        yield


def quantizer(name: str, rank: int, groups: int = H) -> Quantizer:
    if name != "mixed_fixed":
        return QUANTIZERS[name]
    every = torch.arange(groups * rank) * 5 % len(WIDTHS)
    return MixedFixed(4.0, every.view(groups, rank))


def transform(rank: int, width: int, groups: int = H) -> Transform:
    generator = torch.Generator().manual_seed(rank)
    E = torch.linalg.qr(torch.randn(groups, width, width, generator=generator)).Q[..., :rank].contiguous()
    return Transform(E, E.mT.contiguous(), torch.randn(groups, width, generator=generator))


def compressor(name: str, d: int, rank: int | None = None) -> Compressor:
    return Compressor(quantizer(name, rank or d), transform(rank, d) if rank else None)


def tokens(n: int, d: int, batch: int = 1, heads: int = H, seed: int = 0) -> Tensor:
    """[B, H, n, d], channels of very different size, so that mixed gives them all widths."""
    x = torch.randn(batch, n, heads, d, generator=torch.Generator().manual_seed(seed))
    return (x * torch.logspace(0.5, -1, d)).transpose(1, 2)


def store(
    own: Compressor, x: Tensor, chunks: tuple[int, ...], sinks: int = 4, recent: int = 0, padding: Tensor | None = None
) -> TokenStore:  # fmt: skip
    """Coded without Triton, whose interpreter takes minutes for that: tests of quantizing have what it writes."""
    made = TokenStore(own, sinks, recent)
    if padding is not None:
        made.own_sinks.set_padding(padding)
    made.prepare(x, "test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "interpreted", lambda: False)
        for chunk in x.split(chunks, dim=2):
            made.append(chunk)
    return made


def make(
    k: Compressor, v: Compressor, d: int, *, n: int = 150, chunks=(), queries: int = 1, per_head: int = 1,
    batch: int = 1, heads: int = H, dtype=torch.float32, device="cpu", **layout,
):  # fmt: skip
    """K's store, V's store and a query [B, Hq, Q, d]."""
    chunks = chunks or (n,)
    sides = (tokens(sum(chunks), d, batch, heads, seed).to(device, dtype) for seed in (1, 2))
    stores = (store(own, x, chunks, **layout) for own, x in zip((k, v), sides, strict=True))
    return *stores, tokens(queries, d, batch, heads * per_head, seed=3).to(device, dtype)


def compare(monkeypatch, k, v, query, mask=None, tolerance: float | None = None, **options) -> None:
    """Attention gives by a kernel, which it takes, what it gives through PyTorch."""
    tolerance = tolerance or (1.2e-5 if query.dtype == torch.float32 else 6 * torch.finfo(query.dtype).eps)
    by_kernel, attend = [], triton_attention.attend
    with monkeypatch.context() as patch:
        patch.setattr(
            triton_attention, "attend", lambda *a, **how: by_kernel.append(attend(*a, **how)) or by_kernel[-1]
        )
        found = direct_attention.attend(k, v, query, mask, 0.3, **options)
        assert len(by_kernel) == 1 and by_kernel[0] is found
        patch.setattr(dispatch, "usable", lambda x: False)
        expected = direct_attention.attend(k, v, query, mask, 0.3, **options)
        assert len(by_kernel) == 1, "PyTorch's"
    assert (found.shape, found.dtype) == (expected.shape, query.dtype)
    error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error < tolerance


WIDTHS_AND_RANKS = sampled([(64, 60), (80, None), (96, 90), (128, None), (256, None), (64, None)], 2)
# K's quantizer and V's, head_dim, ranks of K and V, and how stores and queries are made
STEPS = [
    *((k, NAMES[(NAMES.index(k) + step) % len(NAMES)], 16, (None, 9), {"sinks": 0 if step == 1 else 4})
      for k, step in covering(NAMES, (0, 1, 4))),
    *((name, name, d, (rank, rank), {"n": 80, "per_head": 3})
      for name, (d, rank) in covering(("int4", "int4_channel"), WIDTHS_AND_RANKS)),
    *sampled([(name, name, 64, (60, 60), {"n": 80, "per_head": 3}) for name in ("mixed", "none", "int8")], 1),
    *sampled([("none", "none", 32, (30, 30), {"dtype": torch.float16}),
              *((name, name, 32, (30, 30), {"dtype": torch.bfloat16}) for name in NAMES)], 1),
]  # fmt: skip


@pytest.mark.parametrize(("k", "v", "d", "ranks", "how"), STEPS)
def test_every_quantizer_width_rank_and_dtype(k, v, d, ranks, how, monkeypatch):
    own = (compressor(name, d, rank) for name, rank in zip((k, v), ranks, strict=True))
    compare(monkeypatch, *make(*own, d, **how))


def joint(rank: int, rotary: Rotary, groups: int = H) -> JointTransform:
    """A basis for K and V together, whose keys are rotated back by a position for every block."""
    return JointTransform(*vars(transform(rank, rank, groups)).values(), rotary, 64)


def test_a_basis_of_384_channels(monkeypatch):
    """As the embedded model's: K and V of three heads of 64 channels, coded together."""
    own = Compressor(quantizer("mixed", 384), joint(384, Rotary(torch.logspace(0, -2, 32)), groups=1))
    held = store(own, tokens(70, 64, heads=6), (70,))
    compare(monkeypatch, Half(held, 0), Half(held, 1), tokens(1, 64, heads=9, seed=3))


@pytest.mark.parametrize(("d", "bits"), sampled([(16, 4.5), (80, 3.0), (12, 1.5), (80, 4.0), (12, 8.0)], 1))
def test_mixed_widths_of_any_budget_and_far_from_zero(d, bits, monkeypatch):
    """Some channels' offsets lie behind the metadata, and are found among those that don't."""
    own = Compressor(Mixed(bits))
    bias = 400 * torch.linspace(-1, 1, d) * (torch.arange(d) % 3 > 0)
    keys, values = (tokens(150, d, seed=seed) + bias for seed in (1, 2))
    k, v = (store(own, x, (150,)) for x in (keys, values))
    assert bits < 4 or (k.read() - keys).abs().amax() < 1, "nearer than an offset in a byte comes"
    compare(monkeypatch, k, v, tokens(1, d, seed=3) / 400)


@pytest.mark.parametrize(
    ("sinks", "pair"), sampled(covering((0, 4, 70), [("int8", "int4"), ("mixed", "int4"), ("none", "int4_channel")]), 1)
)
def test_sinks_chunks_and_recent_tokens(sinks, pair, monkeypatch):
    k, v = (compressor(name, 16) for name in pair)
    stores = make(k, v, 16, chunks=(140, 60, 1, 1, 1, 130), sinks=sinks, recent=5)
    assert max(len(list(own.chunks())) for own in stores[:2]) > 2
    compare(monkeypatch, *stores)


MASKS = {
    "bool": lambda seen: seen,
    "smallest float": lambda seen: torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min),
    "minus infinity": lambda seen: torch.zeros(seen.shape).masked_fill(~seen, float("-inf")),
}


@pytest.mark.parametrize(("per_head", "queries", "mask"), covering((3, 1), (3, 1), MASKS))
def test_left_padding(per_head, queries, mask, monkeypatch):
    own = compressor("int4_channel", 16), compressor("int8", 16)
    stores = make(*own, 16, n=140, batch=2, per_head=per_head, queries=queries)
    seen = torch.ones(2, 1, queries, 145, dtype=torch.bool).tril(140 - queries)  # wider than the cache, as static masks
    seen[1, ..., :90] = False
    compare(monkeypatch, *stores, MASKS[mask](seen))
    if mask == "bool":
        seen[1, ..., :140] = False
        assert triton_attention.attend(*stores, seen, 0.3).isfinite().all(), "a row that sees nothing"


@pytest.mark.parametrize(
    ("names", "mask", "queries"),
    sampled(
        covering(
            [("int4_channel", "int8"), ("none", "int4"), ("int8", "int8"), ("mixed", "none"), ("framed",) * 2],
            [None, *MASKS],
            (1, 3),
        ),
        4,
    ),
)
def test_sinks_of_padded_rows(names, mask, queries, monkeypatch):
    """Exact, of each row its own, in the place of what blocks hold there; also the padding that a mask doesn't hide."""
    heads = 4 if names[0] == "framed" else H
    padding, x = torch.tensor([0, 100]), tokens(140, 16, 2, heads)
    hidden = torch.arange(140) < padding[:, None]
    x = torch.where(hidden[:, None, :, None], x[:1, :, :1] + 5, x)
    if names[0] == "framed":
        own = Compressor(quantizer("mixed", 64), joint(64, Rotary(torch.ones(4))))
        held = store(own, x.repeat(1, 2, 1, 1), (x.shape[2],), padding=padding)
        stores = [Half(held, 0), Half(held, 1)]
    else:
        stores = [store(compressor(name, 16), x, (x.shape[2],), padding=padding) for name in names]
    query, seen = tokens(queries, 16, 2, 2 * heads, seed=3), None
    if mask:
        seen = MASKS[mask](~hidden[:, None, None] & torch.ones(queries, 140, dtype=torch.bool).tril(140 - queries))
    # Values that are coded by token lose in padding what keys by channel don't, where no mask hides it
    compare(monkeypatch, *stores, query, seen, tolerance=None if mask or names[1] != "int8" else 2e-3)


@pytest.mark.parametrize(("softcap", "sinks"), sampled([(5.0, True), (2.0, False), (None, True)], 1), ids=str)
def test_softcap_and_sink_logits(softcap, sinks, monkeypatch):
    own = compressor("int8_channel", 16, 12)
    sinks = torch.linspace(-1, 3, 3 * H) if sinks else None
    compare(monkeypatch, *make(own, own, 16, per_head=3, queries=2), softcap=softcap, sinks=sinks)


def test_one_basis_for_two_heads_and_a_mask_of_each_query_head(monkeypatch):
    own = [Compressor(quantizer(name, 40, 1), transform(40, 64, groups=1)) for name in ("mixed_fixed", "int4")]
    bias = torch.randn(1, 3 * H, 2, 150, generator=torch.Generator().manual_seed(5))
    compare(monkeypatch, *make(*own, 32, per_head=3, queries=2), bias)


@pytest.mark.parametrize("names", sampled([("int4_channel", "int8"), ("int8", "int4_channel"), ("none", "int4")], 1))
def test_steps_after_steps(names, monkeypatch):
    """Tokens that are coded one by one, where the other side's wait for a block; cut off, and rows change places."""
    k, v, query = make(*(compressor(name, 16) for name in names), 16, n=130, batch=2)
    x = tokens(66, 16, 2, seed=5)
    parts = x[:, :, :32], x[:, :, 32:33], None, x[:, :, 33:65], x[:, :, 65:]
    for part in parts:
        for side in (k, v):
            if part is None:
                side.crop(3)
                side.map_(lambda held: held[[1, 0]])
                continue
            with monkeypatch.context() as patch:
                patch.setattr(dispatch, "interpreted", lambda: False)  # as `store` has it
                side.append(part)
        compare(monkeypatch, k, v, query)


def test_a_token_that_widens_scales_alone_is_left_to_pytorch(monkeypatch):
    """Codes grow in the room that there is, of V; K's wait for a block."""
    k, v, query = make(compressor("int4_channel", 16), compressor("int8", 16), 16, n=200)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "interpreted", lambda: False)
        for side in (k, v):
            side.append(tokens(1, 16))
    assert triton_attention.attend(k, v, query, None, 0.3) is not None
    for side in (k, v):
        side.append(1e6 * tokens(1, 16))
    assert triton_attention.attend(k, v, query, None, 0.3) is None


def test_after_crop_and_batch_selection(monkeypatch):
    own = compressor("int4_channel", 16), compressor("int4_channel", 16)
    k, v, query = make(*own, 16, n=140, batch=3)
    for side in (k, v):
        side.crop(40)
        side.map_(lambda x: x[[2, 0]])
    compare(monkeypatch, k, v, query[:2])
    for side in (k, v):
        side.map_(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1))  # not as kernels expect
    compare(monkeypatch, k, v, query[:2])


def test_a_model_generates_the_same(monkeypatch):
    model = enable_compressed_attention(tiny_model(num_hidden_layers=1))
    ids = torch.arange(3, 3 + 64)[None] % model.config.vocab_size

    def generate() -> Tensor:
        cache = CompressedDynamicCache(*([Compressor(QUANTIZERS[name])] for name in ("int8_channel", "int8")))
        return model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False)

    attended, attend = [], triton_attention.attend_stored
    monkeypatch.setattr(triton_attention, "attend_stored", lambda *args: attended.append(1) or attend(*args))
    found = generate()
    assert attended
    monkeypatch.setattr(dispatch, "usable", lambda x: False)
    assert torch.equal(found, generate())


@pytest.mark.parametrize(
    ("name", "sinks", "queries"), sampled([("mixed", 70, 3), ("mixed", 4, 1), ("int4_channel", 0, 3)], 1)
)
def test_codes_that_k_and_v_share_and_a_query_for_every_frame(name, sinks, queries, monkeypatch):
    """Two groups of two heads, after whole blocks were dropped and new ones appended."""
    own = Compressor(quantizer(name, 32), joint(32, Rotary(torch.logspace(0, -2, 3))))
    x = tokens(300, 8, heads=8) + 3
    held, query = store(own, x[:, :, :200], (70, 130), sinks=sinks), tokens(queries, 8, heads=8, seed=3)
    for change in (lambda: None, lambda: held.append(x[:, :, 200:]), lambda: held.drop_front(held.droppable(150))):
        change()
        if ALL or held.forgotten:
            compare(monkeypatch, Half(held, 0), Half(held, 1), query)
    assert held.forgotten


@pytest.mark.parametrize(
    ("layout", "d", "pairs", "own"),
    sampled([("half", 80, 10, True), ("interleaved", 12, 6, False), ("half", 160, 80, False)], 2),
)
def test_queries_are_absorbed_for_every_frame(layout, d, pairs, own):
    """Channels without a rotation among them; rows at positions of their own; a mean far larger than the rest."""
    basis, rotary = transform(20, 2 * d), Rotary(torch.logspace(0, -3, pairs), layout)
    turned = UnrotatedTransform(basis.E, basis.D, 100 * basis.mean, rotary, 64)
    q, first, frames = tokens(3, d, 2, heads=4), 64, 23  # of which queries fill a tile and a part of another
    first = first + torch.tensor([0, 7]) if own else first
    starts = 64 * torch.arange(frames) + (first[:, None] if own else first)
    expected = turned.absorb_query(q, starts)
    read = turned.read_basis(d)
    found, bias = triton_frames.absorbed(q, read, *turned.frame_rotation(first, frames))
    assert found.shape == (2, 2, frames, 2 * 3, 20) and found.is_contiguous()
    torch.testing.assert_close(found, expected[..., :-1], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(bias, expected[..., -1], rtol=1e-4, atol=1e-2)
    rounded, same = triton_frames.absorbed(q, read, *turned.frame_rotation(first, frames), rounded=True)
    assert torch.equal(rounded, found.bfloat16()) and torch.equal(same, bias), "the interpreter multiplies exactly"


@pytest.mark.parametrize(
    ("codec", "bits"), sampled([("framed", 6.0), ("plain", 4.0), ("framed", 4.0), ("plain", 6.0)], 2)
)
def test_queries_in_16_bits_cost_little_beside_what_codes_lose(codec, bits, monkeypatch):
    """A tenth, and what a bfloat16 result is rounded by."""
    d, x = 32, tokens(300, 32, heads=4).bfloat16()
    if codec == "framed":
        basis = transform(2 * d, 2 * d)
        turned = JointTransform(basis.E, basis.D, 3 * basis.mean, Rotary(torch.logspace(0, -2, d // 2)), 64)
        held = store(Compressor(Mixed(bits), turned), x, (300,))
        k, v = Half(held, 0), Half(held, 1)
    else:
        k, v = (store(Compressor(Mixed(bits), transform(d, d)), part, (300,)) for part in x.chunk(2, dim=1))
    query = tokens(1, d, heads=4, seed=3).bfloat16()
    found = direct_attention.attend(k, v, query, None, 0.3).float()
    monkeypatch.setattr(dispatch, "usable", lambda x: False)
    floats = direct_attention.attend(k, v, query.float(), None, 0.3)
    exact = attention_math.attend_reconstructed(*x.float().chunk(2, dim=1), query.float(), None, 0.3)
    rounding = torch.finfo(torch.bfloat16).eps / 4 * floats.norm()
    assert (found - floats).norm() <= 0.1 * (floats - exact).norm() + rounding


def test_a_kernel_that_does_not_fit(monkeypatch):
    own, d = compressor("int8", 20), 20  # a head_dim that no other test has
    stores = make(own, own, d)

    def too_large(*args):
        raise triton_attention.OutOfResources(300_000, 232_448, "shared memory")

    for attend_stored in (too_large, None):  # it isn't tried again
        monkeypatch.setattr(triton_attention, "attend_stored", attend_stored)
        assert triton_attention.attend(*stores, None, 1.0) is None


def test_pytorch_takes_what_has_no_kernel():
    own = compressor("int8", 16)
    k, v, query = make(own, own, 16)
    assert triton_attention.attend(k, v, query.double(), None, 1.0) is None
    assert triton_attention.attend(k, v, query.expand(1, H, 65, 16), None, 1.0) is None  # more rows than a tile has
    assert triton_attention.attend(k, v, query.clone().requires_grad_(), None, 1.0) is None
    shared = Compressor(own.quantizer, transform(20, 32, groups=1))  # K by head, V by pairs of heads
    assert not triton_step.supported(own, shared, H, 16)
    rotated = JointTransform(*vars(transform(20, 32)).values(), Rotary(torch.ones(8)))
    assert not triton_step.supported(Compressor(own.quantizer, rotated), own, H, 16)
    other = type("Other", (type(own.quantizer),), {"memory_format": None})()
    assert not triton_step.supported(Compressor(other), own, H, 16)
    assert triton_attention.attend(*make(own, own, 16, n=3)[:2], query, None, 1.0) is None  # sinks alone


def both_ways(name: str, z: Tensor, monkeypatch) -> tuple[list[dict[str, Tensor]], list[float]]:
    """What a kernel stores of z, and what PyTorch does; and the share of every part that is the same."""
    found = dispatch.quantize(QUANTIZERS[name], z)
    monkeypatch.setattr(dispatch, "usable", lambda x: False)
    expected = QUANTIZERS[name].quantize(z)
    shapes = [{part: (x.shape, x.dtype) for part, x in encoded.items()} for encoded in (found, expected)]
    assert shapes[0] == shapes[1]
    return [found, expected], [float((found[part] == value).double().mean()) for part, value in expected.items()]


@pytest.mark.parametrize(
    ("dtype", "rank", "name"),
    covering((torch.float32, torch.bfloat16), (1, 9, 64, 80), ENCODED),
)
def test_quantizing(name, rank, dtype, monkeypatch):
    z = (tokens(128, rank, 2) + torch.arange(rank) % 7 * 5).to(dtype)  # not contiguous
    z[0, 0, :70] = 3.0  # no range at all
    z[1, 1, 3] *= 1e6  # beyond float16
    _, alike = both_ways(name, z, monkeypatch)
    assert set(alike) == {1.0}


@pytest.mark.parametrize(
    ("bits", "rank", "dtype"),
    [*covering((4.0, 1.0), (40, 9), (torch.float32, torch.bfloat16)), *([(10.0, 264, torch.float32)] if ALL else [])],
)
def test_bit_planes(bits, rank, dtype, monkeypatch):
    """Of channels of very different size, of which some are far from zero and one has no range at all."""
    n, heads = (128, H) if ALL else (128, 1) if rank == 9 else (64, H)
    z = (tokens(n, rank, heads=heads) + 400 * torch.linspace(-1, 1, rank) * (torch.arange(rank) % 3 > 1)).to(dtype)
    z[..., 0] = 3.0
    monkeypatch.setitem(QUANTIZERS, "mixed", Mixed(bits))
    _, alike = both_ways("mixed", z, monkeypatch)
    assert set(alike) == {1.0}


@pytest.mark.parametrize(("case", "name"), sampled(covering(HARD, (*ENCODED, "mixed")), 2))
def test_quantizing_what_is_hard(name, case, monkeypatch):
    z = hostile(case, (1, 2, 128, 16))
    stored, alike = both_ways(name, z, monkeypatch)
    assert min(alike) > (0.99 if QUANTIZERS[name].block_tokens > 1 else 1 - 1e-9), alike
    one, other = ((QUANTIZERS[name].dequantize(f, 16) - z).double().square().sum() for f in stored)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("sinks", sampled([70, 0, 4], 1))
def test_windows_that_have_forgotten(sinks):
    """Tokens that are held behind the window are hidden by the mask, of the K that forgot in blocks and of V."""
    own = (Compressor(QUANTIZERS[name]) for name in ("int4_channel", "int8"))
    layer = CompressedSlidingLayer(*own, sinks, 0, 0, window=200)
    g = torch.Generator().manual_seed(sinks)
    for n in (300, 1, 64, 130, 1):
        layer.store(*torch.randn(2, 1, H, n, 32, generator=g))
        if not ALL and n != 130:
            continue
        q = torch.randn(1, 2 * H, 1, 32, generator=g)
        k, v = layer.stores["K"], layer.stores["V"]
        mask = attention_math.behind_hidden(None, k.hidden, 1, len(k), q.device) if k.hidden else None
        found = triton_attention.attend(k, v, q, mask, 0.2)
        expected = attention_math.attend_reconstructed(*layer.read(), q, None, 0.2)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert ALL or mask is not None
    assert k.hidden
