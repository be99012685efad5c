"""Hard keys and values (`hostile.py`): never NaN, never worse than int4 per token, and the same every time.

Worse is judged in total squared error, for joint and metric codecs in the metric that they were fitted to: that is the
error they minimise. Held to int4 per token without a basis, on the same tensor, is whatever stores a whole vector:

- without a basis every quantizer, on everything that float16 can hold;
- in any basis of full rank what is coded by block (by channel, and mixed widths), whether the basis was calibrated on a
  sample of the same, on plain noise that knows nothing of a bias, or not at all;
- in an orthonormal basis calibrated on a sample of the same, also what is coded by token, where that has variance in
  more than a few directions.

Not held, since it can't be: by token in a basis that gathers what varies, or a bias that it knows nothing of, in few
coordinates, whose step all others share; nor in a metric, for the same reason. Fixed widths on other data than they
were chosen on. In a basis, massive tokens outside the sinks, since it spreads them over all channels. In one fitted to
plain noise, vectors of 15,000 times its size. A lower rank loses what it drops, as `test_a_cut_rank_...` has it.

A bit is worth a factor of 4: codecs with fewer bits than int4 and its metadata may lose that much more.
"""

import functools

import numerics
import pytest
import torch
from hostile import CHANNELS, HOSTILE, SHAPES, SIZES, hostile
from numerics import BY_BLOCK, CODED, END, SMALL, allowed, compressor, given, held, lost, round_trip
from sampling import covering, sampled
from stores import filled
from torch import Tensor

from gpt2.compression.cache import attention_math, direct_attention
from gpt2.compression.codecs import IDENTITY, QUANTIZERS, Compressor, basis_of, needs_calibration
from gpt2.compression.codecs.base import HALF_MAX
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.kernels import cpu, dispatch

# --- never NaN, never worse than int4


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
IN_16_BITS = [*((IDENTITY, quantizer) for quantizer in CODED), ("hadamard", "int4_channel"), ("pca", "mixed")]


@pytest.mark.parametrize(("case", "shape"), sampled(covering(HOSTILE, SHAPES), 7))
def test_finite_and_never_worse_than_int4_per_token(shape, case):
    """Also of 16-bit models, which may lose as much again as rounding does."""
    worse = []
    for codec in numerics.BASIS_NAMES if shape == SHAPES[0] else (IDENTITY, "hadamard", "pca", "fisher"):
        for fitted_on in numerics.FITTED_ON[: 1 + needs_calibration(codec)]:
            for quantizer in (*CODED, "mixed_fixed") if basis_of(codec).multi_head else CODED:
                c = compressor(codec, quantizer, case, shape, fitted_on)
                for dtype in DTYPES if (codec, quantizer) in IN_16_BITS else DTYPES[:1]:
                    own = given(codec, hostile(case, shape, dtype=dtype), case)
                    back = round_trip(c, own)
                    assert back.dtype == dtype and torch.isfinite(back).all(), (codec, quantizer, fitted_on)
                    if held(codec, quantizer, case, fitted_on):
                        rounded = float((torch.finfo(dtype).eps * own.double()).square().sum())
                        ratio = lost(codec, back, own) / (allowed(codec, c.quantizer, own) + rounded)
                        worse += [f"{codec} {quantizer} {dtype}, fitted on {fitted_on}: {ratio:.3g}"] * (ratio > 1)
    assert not worse


@pytest.mark.parametrize("codec", numerics.BASIS_NAMES)
def test_massive_tokens_in_the_sinks_touch_nothing_else(codec):
    """Whatever they are, in the place of the first block's lead there is a copy of the first token behind them."""
    x = given(codec, hostile("plain", SMALL), "plain")
    spoiled = x.clone()
    spoiled[:, :, :4] *= 1e4
    for quantizer in CODED:
        c = compressor(codec, quantizer, "plain", SMALL)
        plain, other = (filled(c, (4, 0), [own]).read() for own in (x, spoiled))
        assert torch.equal(other[:, :, :4], spoiled[:, :, :4]) and torch.equal(other[:, :, 4:], plain[:, :, 4:])


@pytest.mark.parametrize(
    ("codec", "quantizer", "shape"), covering([IDENTITY, "hadamard", "pca"], BY_BLOCK, SHAPES, times=2)
)
def test_a_massive_token_outside_the_sinks_costs_its_own_block_alone(codec, quantizer, shape):
    """In a block the others may become their mean, and itself is off by a step of 16."""
    x = hostile("plain", shape)
    spoiled = x.clone()
    spoiled[:, :, 70, 3] = 2000
    c = compressor(codec, quantizer, "plain", shape)
    z = c.transform.forward(spoiled) if c.transform else spoiled
    encoded, others = c.compress(spoiled), c.compress(x)
    assert all(torch.equal(encoded[name][:, :, 0], others[name][:, :, 0]) for name in encoded)
    block = z[:, :, 64:].double()
    rest = torch.cat((block[:, :, :6], block[:, :, 7:]), dim=2)
    collapsed = (rest - rest.mean(2, keepdim=True)).square().sum()
    step = (block.amax(2) - block.amin(2)) / 15 * 2 ** (3 / 8)
    error = (c.reconstruct(encoded, shape[3], x.dtype) - spoiled).double()[:, :, 64:].square().sum()
    assert error <= numerics.TOLERANCE * collapsed + (step / 2).square().sum()


@pytest.mark.parametrize(("case", "quantizer"), sampled(covering(CHANNELS, CODED, times=2), 10))
def test_a_cut_rank_loses_what_it_drops_and_what_quantizing_loses(case, quantizer):
    x = hostile(case, SMALL).double()
    full = compressor("pca", quantizer, case, SMALL)
    transform = full.transform.to("cpu", torch.float64).truncate(9)
    c = Compressor(full.quantizer, transform)
    z = transform.forward(x)
    dropped = (transform.inverse(z, SMALL[3]) - x).square().sum()
    quantized = (c.quantizer.dequantize(c.quantizer.quantize(z), 9) - z).square().sum()
    error = (round_trip(c, x) - x).square().sum()
    torch.testing.assert_close(error, dropped + quantized, rtol=1e-3, atol=1e-9 * float(x.square().sum()) + 1e-12)


# --- through the cache


def attended(c: Compressor, k: Tensor, v: Tensor, *queries: Tensor, scale: float = 1.0) -> tuple[tuple, list[Tensor]]:
    """K and V as a cache with one codec gives them back, and what each query finds in it as they are stored."""
    cache = CompressedDynamicCache([c], [c])
    return cache.update(k, v, 0), [
        direct_attention.attend(*cache.layers[0].stores.values(), q, None, scale) for q in queries
    ]


@pytest.mark.parametrize(("dtype", "case"), sampled(covering([torch.float32, torch.bfloat16], HOSTILE), 8))
def test_attention_reads_what_is_stored(case, dtype, kernels):
    """Directly, as by reconstruction: sinks, blocks and a tail, for every quantizer."""
    shape = (1, 2, 150, 16)
    k, v = (hostile(case, shape, seed, dtype) for seed in (0, 1))
    q = torch.randn(1, 4, 1, 16, generator=torch.Generator().manual_seed(2))
    q = (q / k.float().abs().amax().clamp_min(1e-30) / 4).to(dtype)  # scores that a softmax can tell apart
    if not torch.isfinite(q).all():
        pytest.skip("keys so small that no query could read them")
    for codec, quantizer in [*((IDENTITY, name) for name in CODED), ("pca", "mixed"), ("hadamard", "int4_channel")]:
        c = compressor(codec, quantizer, case, (1, 2, 128, 16))
        read, (found,) = attended(c, k, v, q)
        expected = attention_math.attend_reconstructed(*(x.float() for x in read), q.float(), None, 1.0)
        assert torch.isfinite(found).all() and all(torch.isfinite(x).all() for x in read)
        size = read[1].float().abs().amax()
        eps = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        assert ((found.float() - expected).abs() <= eps * size + 1e-30).all(), (codec, quantizer)


@pytest.mark.parametrize("case", sampled(HOSTILE, 8))
def test_kernels_store_mixed_widths_as_pytorch_does(case, monkeypatch):
    """The same grids and the same budget; only between two that are as good may the order of a sum decide."""
    if not cpu.loaded():
        pytest.skip("no compiler on this machine: PyTorch does it all")
    by_kernel, quantized = [], cpu.quantized
    monkeypatch.setattr(cpu, "quantized", lambda *args: by_kernel.append(quantized(*args)) or by_kernel[-1])
    x = hostile(case, SMALL)
    for codec in (IDENTITY, "pca"):
        c = compressor(codec, "mixed", case, SMALL, "noise")
        found, expected = dispatch.compress(c, x), c.compress(x)
        assert found is by_kernel.pop() and not by_kernel
        assert found.keys() == expected.keys()
        assert all(found[name].shape == expected[name].shape for name in found)
        one, other = (lost(codec, c.reconstruct(encoded, SMALL[3], x.dtype), x) for encoded in (found, expected))
        assert one == pytest.approx(other, rel=1e-2, abs=1e-6 * float(x.double().square().sum()) * numerics.HALF_ULP)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_kernels_store_integers_by_token_as_pytorch_does(name, monkeypatch):
    """Bit for bit, or not at all: numbers beyond float16 are left to PyTorch, as what isn't a number."""
    if not cpu.loaded():
        pytest.skip("no compiler on this machine: PyTorch does it all")
    by_kernel, quantized = [], cpu.quantized
    monkeypatch.setattr(cpu, "quantized", lambda *args: by_kernel.append(quantized(*args)) or by_kernel[-1])
    coded = 0
    for case in HOSTILE:
        for dtype, rank in zip(DTYPES, (15, 64, 80), strict=True):
            z = hostile(case, (2, 3, 70, 80), dtype=dtype).transpose(0, 1)[..., :rank]  # not contiguous
            found, expected = dispatch.quantize(QUANTIZERS[name], z), QUANTIZERS[name].quantize(z)
            fits = float(z.abs().amax()) <= HALF_MAX
            assert (by_kernel[-1] is found) == fits and (by_kernel[-1] is None) == (not fits)
            assert all(torch.equal(found[part], x) and found[part].dtype == x.dtype for part, x in expected.items())
            coded += fits
    assert coded > len(HOSTILE)
    z = torch.randn(1, 1, 3, 16).index_fill(2, torch.tensor([1]), float("nan"))
    dispatch.quantize(QUANTIZERS[name], z)
    assert by_kernel[-1] is None


@pytest.mark.parametrize(
    ("case", "codec"),
    covering(["plain", "biases up to 400 in all", "massive activations", "constant"], [IDENTITY, "pca", "joint"]),
)
def test_the_same_bytes_whatever_else_is_stored(codec, case):
    """Twice, alone or in a batch, all at once or in parts, with one thread or two; by PyTorch and by kernels."""
    x = given(codec, hostile(case, SMALL), case)
    compressors = [compressor(codec, quantizer, case, SMALL) for quantizer in CODED]
    by_kernel = functools.partial(dispatch.compress, compressors[CODED.index("mixed")])
    for compress in (*(c.compress for c in compressors), by_kernel):
        encoded = compress(x)
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        again = compress(x)
        torch.set_num_threads(threads)
        alone = compress(x[1:])
        parts = [compress(part, start) for part, start in zip(x.split(64, dim=2), (0, 64), strict=True)]
        for name, tensor in encoded.items():
            assert torch.equal(again[name], tensor)
            assert torch.equal(alone[name], tensor[1:]), (compress, name)
            assert torch.equal(torch.cat([part[name] for part in parts], dim=2), tensor), (compress, name)


@pytest.mark.parametrize(
    ("case", "dtype"),
    sampled(covering([case for case in HOSTILE if case not in (*SIZES, END)], [torch.bfloat16, torch.float32]), 6),
)
def test_integer_products_cost_little_beside_what_codes_lose(case, dtype, monkeypatch):
    """A tenth, and a quarter of rounding the result to 16 bits."""
    if not cpu.loaded():
        pytest.skip("no compiler on this machine")
    shape = (1, 2, 256, 64)
    k, v = (hostile(case, shape, seed, dtype) for seed in (0, 1))
    q = torch.randn(1, 4, 1, 64, generator=torch.Generator().manual_seed(2))
    # Scores that differ between tokens: not by a bias, which all of them have
    spread = (k.float() - k.float().mean(2, keepdim=True)).square().sum(-1).mean().sqrt()
    q = (2 * q / spread.maximum(k.float().abs().amax() / 1e3).clamp_min(1e-30)).to(dtype)
    exact = attention_math.attend_reconstructed(k.float(), v.float(), q.float(), None, 1.0)
    results, attend = [], cpu.attend
    monkeypatch.setattr(cpu, "attend", lambda *args, **how: results.append(attend(*args, **how)) or results[-1])
    named = [(IDENTITY, "int4_channel"), (IDENTITY, "mixed"), ("pca", "mixed")]
    finer = [Compressor(QUANTIZERS["mixed"].at(bits)) for bits in (6.0, 8.0)]
    for c in [*(compressor(codec, quantizer, case, shape) for codec, quantizer in named), *finer]:
        for products in ("integer", "float"):
            monkeypatch.setenv("KV_CPU_PRODUCTS", products)
            attended(c, k, v, q)
        if not results:  # PyTorch reads what float16 can't hold
            continue
        found, floats = (results.pop(0).view(exact.shape) for _ in range(2))
        rounding = torch.finfo(torch.bfloat16).eps / 4 * floats.norm()
        assert (found - floats).norm() <= 0.1 * (floats - exact).norm() + 0.25 * rounding, c


@pytest.mark.parametrize("quantizer", ["int4_channel", "mixed"])
def test_biases_of_keys_take_nothing_from_integer_products(quantizer, monkeypatch):
    """A bias has hundreds of times what tells keys apart, and would move whole blocks against each other."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 2, 2048, 64, generator=generator) for _ in range(2))
    k[..., :6] += 200 * torch.tensor([1, -0.7, 0.5, 0.9, -1, 0.6])
    q, found = torch.randn(1, 4, 1, 64, generator=generator), []
    for products in ("integer", "float"):
        monkeypatch.setenv("KV_CPU_PRODUCTS", products)
        found += attended(Compressor(QUANTIZERS[quantizer]), k, v, q, scale=1 / 8)[1]
    exact = attention_math.attend_reconstructed(k, v, q, None, 1 / 8)
    assert (found[0] - found[1]).norm() < 0.01 * (found[1] - exact).norm()
