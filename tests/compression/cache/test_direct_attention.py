"""Scores, weighted sums and whole decode steps over stores: what the kernels and PyTorch compute from codes."""

import functools
import itertools
import logging
import os
import pickle
import shutil

import pytest
import torch
from sampling import covering
from stores import filled

from gpt2.common.errors import PluginError
from gpt2.compression.cache import attention_math, direct_attention, token_store
from gpt2.compression.cache.token_store import Half
from gpt2.compression.codecs import QUANTIZERS, Compressor, JointTransform, Transform
from gpt2.compression.codecs.multi_head import UnrotatedTransform
from gpt2.compression.codecs.rope import Rotary
from gpt2.compression.kernels import cpu, dispatch

STORED = ["int8", "int4", "int8_channel", "int4_channel", "mixed"]
QUANTIZED = ["int8", "int4", "int8_channel", "int4_channel", "none"]
WIDTHS = [0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0]  # bits of "mixed"
# What codes are multiplied as, and how far the kernels' result may be from PyTorch's
PRODUCTS = {"float": 3e-5, "integer": 4e-3}


@pytest.fixture
def compiled():
    if not cpu.loaded():
        pytest.skip("no compiler on this machine")


def drawing(seed: int):
    """A function that draws noise of a shape."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def stores_of(name: str, bits: float, transform: Transform, sinks: int, parts: list) -> tuple:
    """K's store and V's: halves of one where a basis is of both, otherwise V coded without a basis."""
    q = QUANTIZERS[name]
    store = filled(Compressor(q.at(bits) if q.adjustable else q, transform), (sinks, 0), parts)
    return (Half(store, 0), Half(store, 1)) if transform.joint else (store, filled(Compressor(q), (sinks, 0), parts))


@pytest.mark.parametrize(
    ("head_dim", "quantizer", "heads", "M"),
    covering([20, 64, 80, 96, 128, 256], [*QUANTIZED, *WIDTHS], [1, 2], range(1, 8)),
)
def test_scores_and_sums(quantizer, head_dim, heads, M, kernels):
    """Ranks of any length, codes of any width, heads that share a basis, a mean, sinks that a block shares."""
    B, H, T, w, draw = 2, 4, 64 * 3 + 9, head_dim * heads, drawing(head_dim)
    q = QUANTIZERS["mixed"].at(quantizer) if quantizer in WIDTHS else QUANTIZERS[quantizer]
    rank = min(w - 3, 200) if M % 2 else min(w, 256)  # rows of codes that fill whole vectors, and others
    transform = Transform(draw(H // heads, w, rank), draw(H // heads, rank, w) / w, draw(H // heads, w))
    store = filled(Compressor(q, transform), (4, 0), [draw(B, H, T, head_dim)])
    held, queries, p = store.read(), draw(B, H, M, head_dim), draw(B, H, M, T).softmax(-1)
    for found, expected in (
        (direct_attention.scores(store, queries), queries @ held.mT),
        (direct_attention.weighted_sum(store, p.clone()), p @ held),
    ):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize(
    ("k", "v", "shape", "mask"),
    covering(STORED, STORED, [(64, 1), (128, 4), (80, 3), (256, 7), (64, 11)], [None, "bool", "float", "sink logits"],
             times=2),
)  # fmt: skip
def test_a_decode_step_in_one_pass(k, v, shape, mask, products, monkeypatch):
    """Blocks of K beside single tokens of V and the other way round, groups of heads, several sequences, any mask."""
    monkeypatch.setenv("KV_CPU_PRODUCTS", products)
    d, M = shape
    B, H, T, draw = 2, 4, 64 * 3 + 9, drawing(d + M)
    stores = []
    for name, heads in ((k, 1), (v, 2)):
        E = torch.linalg.qr(draw(H // heads, d * heads, d * heads)).Q
        transform = Transform(E, E.mT.contiguous(), draw(H // heads, d * heads))
        quantizer = QUANTIZERS[name].at(5.0) if QUANTIZERS[name].adjustable else QUANTIZERS[name]
        stores.append(filled(Compressor(quantizer, transform), (4, 0), [draw(B, H, T, d)]))
    query, how = draw(B, H * M, 1, d), {"mask": None, "scaling": d**-0.5}
    hidden = torch.arange(T) < torch.tensor([[0], [70]])
    if mask == "sink logits":
        how["sinks"] = draw(H * M)
    elif mask:
        lowest = torch.finfo(torch.float32).min
        how["mask"] = ~hidden[:, None, None] if mask == "bool" else (hidden * lowest)[:, None, None]
    found = direct_attention.attend(*stores, query, **how)
    with monkeypatch.context() as patch:
        patch.setattr(direct_attention, "scores", None)
        assert torch.equal(found, direct_attention.attend(*stores, query, **how)), "one pass needs no scores"
    monkeypatch.setattr(cpu, "attend", lambda *args, **kwargs: None)
    error = (found - direct_attention.attend(*stores, query, **how)).abs().max()
    assert error <= PRODUCTS[products] * found.abs().max()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize(
    ("quantizer", "layout", "heads", "d", "M", "sinks", "joint", "bits"),
    covering(["mixed", "int4_channel", "int8_channel"], ["half", "interleaved"], [(4, 1), (4, 2), (2, 2)], [64, 80],
             [1, 3, 7], [0, 4], [True, False], [5.0, 1.0, 8.0], times=2),
)  # fmt: skip
def test_a_decode_step_absorbs_queries_for_every_frame(
    quantizer, layout, heads, d, M, sinks, joint, bits, products, monkeypatch
):
    """Of more blocks than are absorbed together, in several chunks; part of the channels has no position.

    Coordinates spread less and less, so that at one bit the last of them have no codes in any block.
    """
    monkeypatch.setenv("KV_CPU_PRODUCTS", products)
    (H, groups), B, T, draw = heads, 2, 64 * 17 + 9, drawing(d + M)
    w = (2 if joint else 1) * H // groups * d
    Q, spread = torch.linalg.qr(draw(groups, w, w)).Q, torch.logspace(0, -2, w)
    how = {"rotary": Rotary(torch.logspace(0, -3, 24), layout), "shared": 64}
    kind = JointTransform if joint else UnrotatedTransform
    transform = kind(Q * spread, (Q / spread).mT.contiguous(), draw(groups, w), **how)
    parts = draw(B, 2 * H if joint else H, T, d).split([700, T - 700], dim=2)
    stores, query = stores_of(quantizer, bits, transform, sinks, parts), draw(B, H * M, 1, d)
    found = direct_attention.attend(*stores, query, None, d**-0.5)
    monkeypatch.setattr(cpu, "attend", lambda *args, **kwargs: None)
    error = (found - direct_attention.attend(*stores, query, None, d**-0.5)).abs().max()
    assert error <= PRODUCTS[products] * found.abs().max()


@pytest.mark.usefixtures("compiled")
def test_frames_whose_queries_only_pytorch_can_absorb_take_two_passes(monkeypatch):
    """As of a transform that doesn't say how it rotates."""
    draw = drawing(0)
    transform = UnrotatedTransform(torch.eye(64)[None], torch.eye(64)[None], draw(1, 64), Rotary(torch.ones(8)), 64)
    stores = functools.partial(stores_of, "mixed", 5.0, transform, 4, [draw(1, 1, 300, 64)])
    query = draw(1, 3, 1, 64)
    found = direct_attention.attend(*stores(), query, None, 1 / 8)
    monkeypatch.setattr(UnrotatedTransform, "frame_rotation", lambda *_: None)
    monkeypatch.setattr(cpu, "attend", None)
    error = (found - direct_attention.attend(*stores(), query, None, 1 / 8)).abs().max()
    assert error <= PRODUCTS["integer"] * found.abs().max()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("quantizer", "heads", "d", "M", "bits"),
    covering(["mixed", "int4_channel"], [1, 2, "joint"], [(64, 64), (80, 41), (128, 128)], [1, 2, 4, 7, 13], [4, 1.5]),
)  # fmt: skip
def test_codes_are_multiplied_as_integers_where_the_processor_adds_these_in_pairs(
    quantizer, heads, d, M, bits, monkeypatch
):
    """Nearly as precise as floats; odd ranks, rows of codes that fill whole vectors, and others.

    V's basis is rounded as well, which shows here: what it gives cancels a mean ten times as large as what is left.
    """
    (d, rank), H, T, draw = d, 4, 64 * 9 + 9, drawing(M)
    joint = heads == "joint"
    h, sides = 2 if joint else heads, 2 if joint else 1
    w = d * h * sides
    E = torch.linalg.qr(draw(H // h, w, w)).Q[..., : rank * h * sides]
    matrices = E, E.mT.contiguous(), draw(H // h, w)
    how = {"rotary": Rotary(torch.logspace(0, -3, 24)), "shared": 64}
    transform = JointTransform(*matrices, **how) if joint else Transform(*matrices)
    parts = [x.bfloat16() for x in draw(2, H * sides, T, d).split([500, T - 500], dim=2)]
    query = draw(2, H * M, 1, d)
    stores = functools.partial(stores_of, quantizer, bits, transform, 4, parts)
    found, precise = (products_of(name, stores(), query, monkeypatch) for name in ("integer", "float"))
    assert (found - precise).norm() <= 1e-3 * precise.norm()
    in_pairs = "avx2" in cpu.instruction_sets() and os.environ.get("KV_CPU_ISA") != "generic"
    if in_pairs and (quantizer == "mixed" or E.shape[2] % 64 == 0):
        assert not torch.equal(found, precise), "otherwise nothing was tested"


def products_of(name: str, stores: tuple, query: torch.Tensor, monkeypatch) -> torch.Tensor:
    """Attention over stores that were never read, with codes multiplied as integers, or as floats."""
    monkeypatch.setenv("KV_CPU_PRODUCTS", name)
    return direct_attention.attend(*stores, query, None, query.shape[-1] ** -0.5)


@pytest.mark.usefixtures("compiled")
def test_sums_of_integers_never_overflow(monkeypatch):
    """Wide codes that all have the query's sign, in many channels."""
    d = 512
    x = torch.ones(1, 1, 64, d) * torch.linspace(-1, 1, 64)[:, None]
    x[..., 256:] = 0  # whose bits the others have
    stores = [filled(Compressor(QUANTIZERS["mixed"].at(10.0)), (0, 0), [x]) for _ in range(2)]
    assert (stores[0].read() - x).abs().max() < 1 / 512, "ten bits"
    query = torch.full((1, 1, 1, d), 0.01)
    each = zip(("integer", "float"), stores, strict=True)
    found, precise = (products_of(name, (store, store), query, monkeypatch) for name, store in each)
    assert (found - precise).abs().max() < 1e-3


def test_products_have_a_name(monkeypatch):
    monkeypatch.setenv("KV_CPU_PRODUCTS", "double")
    with pytest.raises(PluginError, match="^KV_CPU_PRODUCTS='double': integer or float was expected$"):
        cpu.integer_products()


@pytest.mark.usefixtures("compiled")
def test_parts_for_the_kernel_are_made_once_a_block_and_never_pickled(monkeypatch):
    made, coded = [], cpu.coded
    monkeypatch.setattr(cpu, "coded", lambda *args, **kwargs: made.append(0) or coded(*args, **kwargs))
    x = torch.randn(1, 2, 200, 32)
    store = filled(Compressor(QUANTIZERS["int4_channel"]), (4, 0), [x[:, :, :100]])
    steps = []
    for n in range(100, 200):
        store.append(x[:, :, n : n + 1])
        direct_attention.attend(store, store, torch.randn(1, 4, 1, 32), None, 1.0)
        steps.append(len(made))
    assert [at for at, (before, after) in enumerate(itertools.pairwise([0, *steps])) if after > before] == [0, 27, 91]
    store.append(x[:, :, -64:])  # a block, of which no parts have been made yet
    pickled = len(pickle.dumps(store))
    direct_attention.attend(store, store, torch.randn(1, 4, 1, 32), None, 1.0)
    assert len(pickle.dumps(store)) == pickled


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("names", [("int8_channel", "int8"), ("none", "int4"), ("int4", "mixed"), ("framed", "framed")])
def test_steps_share_what_lies_where_it_did(names, monkeypatch):
    """While tokens are coded into room that there is, cut off, and replaced by others; rows change places."""
    made, layer = [], cpu.layer
    monkeypatch.setattr(cpu, "layer", lambda *args, **how: made.append(0) or layer(*args, **how))
    draw, heads = drawing(0), 2
    if names[0] == "framed":
        E = torch.linalg.qr(draw(1, 64, 64)).Q
        turned = JointTransform(E, E.mT.contiguous(), draw(1, 64), Rotary(torch.logspace(0, -2, 8)), 64)
        held = filled(Compressor(QUANTIZERS["mixed"], turned), (4, 0), [draw(2, 2 * heads, 300, 16)])
        stores, sides = [held], [Half(held, 0), Half(held, 1)]
    else:
        stores = sides = [filled(Compressor(QUANTIZERS[name]), (4, 0), [draw(2, heads, 300, 16)]) for name in names]
    steps = 0
    for change in (lambda s: None, lambda s: s.crop(20), lambda s: s.map_(lambda x: x[[1, 0]]), lambda s: s.crop(90)):
        for store in stores:
            change(store)
        for _ in range(70):
            for store in stores:
                store.append(draw(2, *store.sinks.shape[1:2], 1, 16))
            query, steps = draw(2, 2 * heads, 1, 16), steps + 1
            found = direct_attention.attend(*sides, query, None, 0.3)
            if steps % 5 == 0:
                with monkeypatch.context() as patch:
                    patch.setattr(cpu, "usable", lambda x: False)
                    expected = direct_attention.attend(*sides, query, None, 0.3)
                torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert 0 < len(made) < steps / 5


@pytest.mark.parametrize("names", [("int8", "int8"), ("int8_channel", "int8"), ("int8", "int4_channel")])
def test_a_token_beyond_float16_is_read_by_the_steps_after_it(names):
    """It widens scales alone, and codes stay where they lie."""
    draw = drawing(0)
    k, v = (filled(Compressor(QUANTIZERS[name]), (4, 0), [draw(1, 2, 200, 16)]) for name in names)
    for n in range(6):
        for store in (k, v):
            store.append(draw(1, 2, 1, 16) * (1e6 if n == 2 else 1))
        query = draw(1, 4, 1, 16) / 1e6
        found = direct_attention.attend(k, v, query, None, 1.0)
        expected = attention_math.attend_reconstructed(k.read(), v.read(), query, None, 1.0)
        assert (found - expected).norm() <= 1e-2 * expected.norm()


def test_tokens_are_stored_where_their_size_is_not_looked_at(monkeypatch):
    """As on a GPU, of few tokens: it would wait for them."""
    monkeypatch.setattr(token_store, "waits", lambda z: True)
    x = drawing(0)(1, 2, 130, 16)
    store = filled(Compressor(QUANTIZERS["int8"]), (4, 0), list(x.split(1, dim=2)))
    assert len(store) == 130 and (store.read() - x).abs().max() < 0.1


def test_what_kernels_made_of_a_basis_is_never_pickled():
    """Another machine's kernels may read it in another way."""
    transform = JointTransform(torch.eye(8)[None], torch.eye(8)[None], torch.zeros(1, 8), Rotary(torch.ones(2)), 64)
    transform.derived("panels", 4, lambda: torch.zeros(1000))
    again = pickle.loads(pickle.dumps(transform))
    assert again.derived("panels", 4, lambda: torch.ones(1)) == 1
    assert torch.equal(again.E, transform.E) and transform.derived("panels", 4, lambda: torch.ones(1)).numel() == 1000


def test_any_number_of_threads_gives_the_same(kernels):
    store = filled(Compressor(QUANTIZERS["int4_channel"]), (4, 0), [drawing(0)(1, 3, 640, 64)])
    q, p = torch.randn(1, 3, 3, 64), torch.rand(1, 3, 3, 640)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((direct_attention.scores(store, q), direct_attention.weighted_sum(store, p.clone())))
    finally:
        torch.set_num_threads(before)
    for scores, sums in found[1:]:
        assert torch.allclose(scores, found[0][0], atol=1e-5) and torch.allclose(sums, found[0][1], atol=1e-4)


@pytest.mark.parametrize(("story", "reason"), [
    ("no compiler here\nand a long story", "no compiler here"),
    ("Error building\nc++ kernels.cpp\na.h:9:3: error: not there\nb.h:1:1: error: more", "a.h:9:3: error: not there"),
])  # fmt: skip
def test_without_a_compiler_one_line_says_so(story, reason, monkeypatch, caplog):
    def fails(*args, **kwargs):
        raise RuntimeError(story)

    monkeypatch.setattr("torch.utils.cpp_extension.load", fails)
    with caplog.at_level(logging.WARNING):
        assert cpu.loaded.__wrapped__() is False
    (record,) = caplog.records
    assert record.message.startswith("no CPU kernels (") and record.message.endswith(f"slower: {reason}")


def test_the_ninja_of_an_environment_that_isnt_activated_builds_the_kernels(monkeypatch):
    found = []
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("torch.utils.cpp_extension.load", lambda *args, **how: found.append(shutil.which("ninja")))
    assert cpu.loaded.__wrapped__() and found[0]
    assert os.environ["PATH"] == "/nowhere", "PATH is as it was"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_dont_crash_the_kernels(value):
    quantizer = QUANTIZERS["mixed"].at(4.0)
    for token in (0, 5):
        x = torch.randn(1, 2, 128, 16)
        x[0, 0, token, 3] = value
        encoded = dispatch.quantize(quantizer, x)
        assert encoded["block"].shape[2] == 2
        assert torch.isfinite(quantizer.dequantize(encoded, 16)[0, 1]).all(), "other heads are as they were"
