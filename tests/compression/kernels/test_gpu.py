"""On a GPU: kernels against PyTorch on the same device, and caches of a model there. gpu_check.sh runs it.

Without a GPU all is skipped; with TRITON_INTERPRET=1 it runs on the CPU in Triton's interpreter, to try the tests.
"""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model, windows
from torch import Tensor

from gpt2.compression.cache.token_store import Half
from gpt2.compression.codecs import QUANTIZERS, Compressor
from gpt2.compression.codecs.rope import Rotary
from gpt2.compression.kernels import dispatch

pytest.importorskip("triton", reason="kernels need Triton, which isn't installed: pip install triton")

from direct import SETTINGS, both, cache_of, close  # noqa: E402
from kernels_interpreted import (  # noqa: E402
    ENCODED,
    NAMES,
    bfloat16_as_gpus_have_it,  # noqa: F401
    compare,
    compressor,
    joint,
    make,
    quantizer,
    store,
    tokens,
)

from gpt2.common.errors import PluginError  # noqa: E402
from gpt2.compression.cache import triton_attention
from gpt2.compression.cache.storages import storages_of  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TOLERANCES = {torch.float32: 5e-5, torch.bfloat16: 6 * 2**-7, torch.float16: 6 * 2**-10}
pytestmark = [
    pytest.mark.skipif(not CUDA and not dispatch.interpreted(), reason="no GPU on this machine"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
only_cuda = pytest.mark.skipif(not CUDA, reason="too slow in the interpreter")


def layer(k: str, v: str, d: int, rank: int | None = None, *, chunks=(150, 70, 1), per_head=3, **how):
    """K's store, V's store and a query of one token, [B, Hq, 1, d], on the device."""
    own = (compressor(name, d, rank) for name in (k, v))
    return make(*own, d, chunks=chunks, per_head=per_head, device=DEVICE, **how)


# --- kernels


@pytest.mark.parametrize(("dtype", "rank"), [*((dtype, None) for dtype in TOLERANCES), (torch.bfloat16, 60)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_quantizer(name, dtype, rank, monkeypatch):
    made = layer(name, "int4" if rank else name, 64, rank, dtype=dtype)
    compare(monkeypatch, *made, tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_codes_that_k_and_v_share_and_a_query_for_every_frame(dtype, layout, monkeypatch):
    rotary = Rotary(torch.logspace(0, -3, 24), layout)  # of 64 channels 48 rotate
    own = Compressor(quantizer("mixed", 256), joint(256, rotary))
    x = (tokens(1000 if CUDA else 300, 64, 2, heads=8) + 3).to(DEVICE, dtype)
    held, query = store(own, x, (200, x.shape[2] - 200)), tokens(1, 64, 2, heads=8, seed=3).to(DEVICE, dtype)
    compare(monkeypatch, Half(held, 0), Half(held, 1), query, tolerance=max(TOLERANCES[dtype], 2e-4))


@only_cuda
@pytest.mark.parametrize("name", [name for name in NAMES if name != "mixed_fixed"])
def test_a_long_context_of_a_real_shape(name, monkeypatch):
    made = layer(name, name, 128, dtype=torch.bfloat16, chunks=(9000, 500, 1, 1), per_head=4, batch=2, heads=8)
    compare(monkeypatch, *made, tolerance=TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("own_sinks", [False, True])
def test_left_padding(own_sinks, monkeypatch):
    k, v, query = layer("int4_channel", "int8", 64, batch=2)
    seen = torch.ones(2, 1, 1, len(k), dtype=torch.bool, device=DEVICE)
    seen[1, ..., :90] = False
    if own_sinks:
        padding = torch.tensor([0, 90], device=DEVICE)
        k, v = (store(own.compressor, own.read(), (len(own),), padding=padding) for own in (k, v))
    compare(monkeypatch, k, v, query, seen, tolerance=TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", ENCODED)
def test_quantizing(name, dtype, monkeypatch):
    """The same to the bit by token. By channel two steps or shares that are as good may be chosen differently."""
    z = (tokens(256, 80, 2) + torch.arange(80) % 7 * 5).to(DEVICE, dtype)
    quantizer = QUANTIZERS[name]
    found = dispatch.quantize(quantizer, z)
    monkeypatch.setattr(dispatch, "usable", lambda x: False)
    expected = quantizer.quantize(z)
    assert found.keys() == expected.keys()
    same = min(float((found[part] == value).float().mean()) for part, value in expected.items())
    assert same == 1.0 if quantizer.block_tokens == 1 else same > 0.99
    lost = [float((quantizer.dequantize(encoded, 80) - z.float()).square().mean()) for encoded in (found, expected)]
    assert lost[0] == pytest.approx(lost[1], rel=1e-3)


@pytest.mark.parametrize("bits", (2.0, 4.0))
def test_mixed_loses_as_much_as_on_the_cpu(bits):
    z = tokens(256, 32, 2)
    quantizer = QUANTIZERS["mixed"].at(bits)
    there = quantizer.dequantize(dispatch.quantize(quantizer, z.to(DEVICE)), 32).cpu()
    here = quantizer.dequantize(quantizer.quantize(z), 32)
    assert float((there - z).square().mean()) == pytest.approx(float((here - z).square().mean()), rel=1e-3)


@only_cuda  # the interpreter's argmin raises where all is NaN
def test_what_is_not_a_number_stays_within_its_block():
    z = tokens(256, 32, 2).to(DEVICE)
    whole = dispatch.quantize(QUANTIZERS["mixed"], z)["block"]
    z[0, 0, 70, 3] = float("nan")
    block = dispatch.quantize(QUANTIZERS["mixed"], z)["block"]
    same = (block == whole).all(-1)
    assert not same[0, 0, 1] and int((~same).sum()) == 1


# --- a model


@pytest.fixture(scope="module")
def model():
    return tiny_model().to(DEVICE)


def fed(model, chunks=(90, 7, 1, 1, 41)):
    """A function that feeds two sequences to a cache in chunks and gives their logits."""
    ids = windows(2, sum(chunks)).to(DEVICE)

    @torch.no_grad()
    def run(cache) -> Tensor:
        return torch.cat([model(x, past_key_values=cache).logits for x in ids.split(chunks, dim=1)], dim=1)

    return run


@pytest.mark.parametrize("name", SETTINGS)
def test_attention_over_codes_is_attention_over_reconstructions(name, model, monkeypatch):
    used, attend = [], triton_attention.attend_stored
    monkeypatch.setattr(triton_attention, "attend_stored", lambda *args: used.append(1) or attend(*args))
    assert close(*both(model, lambda: cache_of(model, SETTINGS[name], SETTINGS[name]), fed(model)))
    assert used, "by kernels"


@pytest.mark.parametrize("beams", (1, 3))
@pytest.mark.parametrize("name", ("identity", "int8", "int4_channel"))
def test_generating(name, beams, model):
    ids = windows(2, 80).to(DEVICE)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "num_beams": beams, "do_sample": False}

    def generate(cache) -> Tensor:
        return model.generate(ids, past_key_values=cache, **how)

    found = both(model, lambda: cache_of(model, SETTINGS[name], SETTINGS[name]), generate)
    assert torch.equal(*found)
    if name == "identity":
        assert torch.equal(found[0], model.generate(ids, **how))


@pytest.mark.parametrize("name", ("identity", "int8", "int4_channel", "mixed"))
def test_cropping_and_reordering(name, model):
    cache = cache_of(model, SETTINGS[name], SETTINGS[name])
    fed(model)(cache)
    before = [x.clone() for x in cache.layers[1].read()]
    cache.crop(-9)
    cache.reorder_cache(torch.tensor([1, 0], device=DEVICE))
    assert cache.get_seq_length() == 131
    for now, then in zip(cache.layers[1].read(), before, strict=True):
        assert now.device.type == DEVICE
        torch.testing.assert_close(now, then[[1, 0], :, :131], rtol=1e-3, atol=1e-5)


@only_cuda
@pytest.mark.parametrize("name", ("identity", "int4_channel", "mixed"))
def test_parking(name, model):
    """All of a cache is on the GPU, leaves it and comes back as it was, and the stream waits for it."""
    cache = cache_of(model, SETTINGS[name], SETTINGS[name])
    fed(model)(cache)
    before = [x.clone() for x in cache.layers[1].read()]
    held = cache.nbytes()
    assert cache.offload() == held and cache.parked
    torch.cuda.synchronize()
    assert {device.type for device, _ in storages_of(cache.layers)} == {"cpu"}
    with pytest.raises(PluginError, match="prefetch"):
        fed(model, (1,))(cache)
    assert cache.prefetch() == held and not cache.parked
    assert all(map(torch.equal, cache.layers[1].read(), before))
    fed(model, (70, 1))(cache)


@only_cuda
def test_a_parked_fork_leaves_the_other_where_it_is(model):
    cache = cache_of(model, SETTINGS["int8"], SETTINGS["int8"])
    fed(model)(cache)
    before, fork = [x.clone() for x in cache.layers[1].read()], cache.fork()
    assert fork.offload() > 0
    assert all(map(torch.equal, cache.layers[1].read(), before))
    fork.prefetch()
    assert all(map(torch.equal, fork.layers[1].read(), before))
