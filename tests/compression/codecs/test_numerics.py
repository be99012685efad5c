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

import pytest
import torch
from hostile import CHANNELS, HOSTILE, SHAPES, SIZES, hostile
from sampling import covering
from torch import Tensor

from gpt2.compression.cache import attention_math, direct_attention
from gpt2.compression.cache.token_store import TokenStore
from gpt2.compression.calibration.multi_head_fit import MultiHeadFit, fit_multi_head
from gpt2.compression.calibration.statistics import MultiHeadStatistics
from gpt2.compression.codecs import (
    BASES,
    IDENTITY,
    QUANTIZERS,
    Compressor,
    Quantizer,
    Transform,
    basis_of,
    needs_calibration,
)
from gpt2.compression.codecs.mixed import MixedFixed
from gpt2.compression.codecs.moments import Moments
from gpt2.compression.codecs.rope import Rotary
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.kernels import cpu
from gpt2.models.geometry import Geometry

BY_TOKEN, BY_BLOCK = ("int8", "int4"), ("int8_channel", "int4_channel", "mixed")
CODED = (*BY_TOKEN, *BY_BLOCK)
BASIS_NAMES = (IDENTITY, "hadamard", "ln_nullspace", "pca", "random", "attention", "fisher", "grouped", "joint")
EXACT_BASES = [name for name in BASIS_NAMES if name not in (IDENTITY, "ln_nullspace")]
FITTED_ON = ("the same", "noise")
HALF_ULP = 2.0**-11  # of float16: what a 16-bit cache loses anyway
SMALLEST_STEP = 2.0**-17
TOLERANCE = 1.1
GATHERED = ("five tokens", "channels of 1e-6 to 1e4", "outlier channels")
END = "near float16's end"
TURNED = "biases turned by positions"
SMALL: tuple[int, int, int, int] = (2, 2, 128, 16)


# --- codecs as a user has them


@functools.cache
def metric(groups: int, w: int) -> Tensor:
    """What loss or queries feel of errors: some directions a hundred times as much as others, [G, w, w] float64."""
    g = torch.Generator().manual_seed(3)
    axes = torch.linalg.qr(torch.randn(groups, w, w, generator=g, dtype=torch.float64)).Q
    return axes * torch.logspace(0, -4, w, dtype=torch.float64) @ axes.mT


def moments_of(x: Tensor, codec: str = "pca", weights: Tensor | None = None) -> Moments:
    """Of x [B, G, T, w], with the metric that a codec needs."""
    moments = Moments.zeros(Geometry.uniform(1, x.shape[1], x.shape[3]))
    moments.update(0, x)
    if basis_of(codec).metric != "pca":
        moments.metrics[basis_of(codec).metric] = (metric(x.shape[1], x.shape[3]) if weights is None else weights)[None]
    return moments


def rotary(d: int) -> Rotary:
    return Rotary(1e6 ** (-torch.arange(0, d, 2) / d))


def fit_of_measured(codec: str, x: Tensor, case: str, weights: Tensor | None = None) -> MultiHeadFit:
    """Fitted to keys x [B, H, T, d], and for the joint codec to other values of the same kind."""
    basis, turn = BASES[codec], rotary(x.shape[3])
    k, v = halves(x, case) if basis.joint else (x, x)
    entry = basis.arrange(k, v, turn, 0)[0]
    sample = entry.transpose(0, 1).flatten(1, 2).clamp(-65504, 65504).half()
    turns = [turn] if basis.unrotated else []
    moments = moments_of(entry, codec, weights)
    if not basis.joint:  # K and V of a layer are two entries: twice the same
        moments = Moments(moments.count.repeat(2), moments.mean * 2, moments.scatter * 2,
                          {name: [m[0]] * 2 for name, m in moments.metrics.items()})  # fmt: skip
        sample = torch.stack((sample, sample))
    else:
        sample = sample[None]
    return fit_multi_head(MultiHeadStatistics(basis, moments, turns, sample))


def halves(x: Tensor, case: str) -> tuple[Tensor, Tensor]:
    """Keys, which positions have turned, and values of the same kind in another order."""
    return x if case == TURNED else rotary(x.shape[3]).rotate(x, 0), x.flip(2)


def given(codec: str, x: Tensor, case: str) -> Tensor:
    """x as a codec takes it: keys and values side by side where it is joint."""
    return torch.cat(halves(x, case), dim=1) if basis_of(codec).joint else x


def compressor(codec: str, quantizer: str, case: str, shape: tuple, fitted_on: str = "the same") -> Compressor:
    """Fitted to another sample than seed 0 gives; mixed widths have the bits that int4 takes with its metadata."""
    sample = case if fitted_on == "the same" else "plain"
    own = QUANTIZERS[quantizer].at(int4_bits(shape)) if QUANTIZERS[quantizer].adjustable else QUANTIZERS[quantizer]
    if isinstance(own, MixedFixed):
        own = MixedFixed(own.bits, measured_codec(codec, sample, shape).allocation.widths(own.bits)[0])
    return Compressor(own, transform_of(codec, sample, shape))


@functools.cache
def transform_of(codec: str, sample: str, shape: tuple) -> Transform | None:
    if codec == IDENTITY:
        return None
    if basis_of(codec).multi_head:
        return measured_codec(codec, sample, shape).transform(0)
    basis = basis_of(codec)
    if not basis.calibrated:
        return basis.transform(shape[3]).to("cpu", torch.float32)
    return basis.fit(moments_of(sampled(sample, shape), codec), 0)[0].to("cpu", torch.float32)


@functools.cache
def measured_codec(codec: str, case: str, shape: tuple) -> MultiHeadFit:
    return fit_of_measured(codec, sampled(case, shape), case)


def sampled(case: str, shape: tuple) -> Tensor:
    """What is calibrated on: more tokens than a joint basis has channels."""
    B, H, T, d = shape
    return hostile(case, (B, H, 3 * T, d), seed=1)


def int4_bits(shape: tuple) -> float:
    return 4 + 32 / shape[3]


def stored_bits(quantizer: Quantizer, shape: tuple) -> float:
    metadata = {"int8": 32 / shape[3], "int4": 32 / shape[3], "int8_channel": 24 / 64, "int4_channel": 24 / 64}
    return quantizer.bits + metadata.get(quantizer.name, 0)


def round_trip(c: Compressor, x: Tensor) -> Tensor:
    return c.reconstruct(c.compress(x), x.shape[3], x.dtype)


def lost(codec: str, back: Tensor, x: Tensor) -> float:
    """Squared error in total, in the codec's metric; x as `given`, [B, H, T, d]."""
    error = back.double() - x.double()
    if basis_of(codec).metric == "pca":
        return float(error.square().sum())
    if basis_of(codec).multi_head:
        k, v = error.chunk(2, dim=1) if basis_of(codec).joint else (error, error)
        error = BASES[codec].arrange(k, v, rotary(x.shape[3]), 0)[0]
    return float(torch.einsum("bgti,gij,bgtj->", error, metric(error.shape[1], error.shape[3]), error))


def allowed(codec: str, quantizer: Quantizer, x: Tensor) -> float:
    """What int4 per token loses of x, with the worth of bits that a codec has less, and what 16 bits lose anyway."""
    int4 = lost(codec, round_trip(Compressor(QUANTIZERS["int4"]), x), x)
    worth = 4 ** max(int4_bits(x.shape) - stored_bits(quantizer, x.shape), 0)
    return TOLERANCE * worth * int4 + float(((HALF_ULP * x.double()).square() + SMALLEST_STEP**2).sum())


def held(codec: str, quantizer: str, case: str, fitted_on: str) -> bool:
    """Whether the claim of this module is about them."""
    if codec == IDENTITY:
        return case not in SIZES
    if codec == "ln_nullspace" or case not in CHANNELS or (case == END and fitted_on == "noise"):
        return False
    if quantizer in BY_BLOCK or fitted_on == "noise":
        return quantizer in BY_BLOCK
    return quantizer == "mixed_fixed" or (codec in ("pca", "random") and case not in GATHERED)


# --- never NaN, never worse than int4


@pytest.mark.parametrize(("case", "shape"), covering(HOSTILE, SHAPES))
def test_finite_and_never_worse_than_int4_per_token(shape, case):
    x = hostile(case, shape)
    worse = []
    for codec in BASIS_NAMES if shape == SHAPES[0] else (IDENTITY, "hadamard", "pca", "fisher"):
        own = given(codec, x, case)
        for fitted_on in FITTED_ON[: 1 + needs_calibration(codec)]:
            for quantizer in (*CODED, "mixed_fixed") if basis_of(codec).multi_head else CODED:
                c = compressor(codec, quantizer, case, shape, fitted_on)
                back = round_trip(c, own)
                assert torch.isfinite(back).all(), (codec, quantizer, fitted_on)
                if not held(codec, quantizer, case, fitted_on):
                    continue
                ratio = lost(codec, back, own) / allowed(codec, c.quantizer, own)
                worse += [f"{codec} {quantizer}, fitted on {fitted_on}: {ratio:.3g}"] * (ratio > 1)
    assert not worse


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", HOSTILE)
def test_16_bit_models(case, dtype):
    x = hostile(case, SMALL, dtype=dtype)
    for codec, quantizer in [*((IDENTITY, q) for q in CODED), ("hadamard", "int4_channel"), ("pca", "mixed")]:
        c = compressor(codec, quantizer, case, SMALL)
        back = round_trip(c, x)
        assert back.dtype == dtype and torch.isfinite(back).all()
        if held(codec, quantizer, case, "the same"):
            rounded = float((torch.finfo(dtype).eps * x.double()).square().sum())
            assert lost(codec, back, x) <= allowed(codec, c.quantizer, x) + rounded, (codec, quantizer)


@pytest.mark.parametrize("case", [name for name in CHANNELS if "bias" in name or name == "outlier channels"])
def test_scores_of_biased_keys_are_never_further_off_than_with_int4(case):
    """The worst of all queries and tokens, not the sum."""
    x, q = hostile(case, SHAPES[0]), torch.randn(1, 2, 40, 64, generator=torch.Generator().manual_seed(5))
    worst = {name: (q @ (round_trip(compressor(IDENTITY, name, case, SHAPES[0]), x) - x).mT).abs().max()
             for name in CODED}  # fmt: skip
    assert all(worst[name] <= TOLERANCE * worst["int4"] for name in CODED)


@pytest.mark.parametrize("codec", BASIS_NAMES)
def test_massive_tokens_in_the_sinks_touch_nothing_else(codec):
    """Whatever they are, in the place of the first block's lead there is a copy of the first token behind them."""
    x = given(codec, hostile("plain", SMALL), "plain")
    spoiled = x.clone()
    spoiled[:, :, :4] *= 1e4
    for quantizer in CODED:
        c = compressor(codec, quantizer, "plain", SMALL)
        stores = [TokenStore(c, 4, 0) for _ in range(2)]
        for store, own in zip(stores, (x, spoiled), strict=True):
            store.prepare(own, "test")
            store.append(own)
        plain, other = (store.read() for store in stores)
        assert torch.equal(other[:, :, :4], spoiled[:, :, :4]) and torch.equal(other[:, :, 4:], plain[:, :, 4:])


@pytest.mark.parametrize("codec", [IDENTITY, "hadamard", "pca"])
@pytest.mark.parametrize("quantizer", BY_BLOCK)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"d{shape[3]}")
def test_a_massive_token_outside_the_sinks_costs_its_own_block_alone(codec, quantizer, shape):
    """In a block the others may become their mean, and itself is off by a step of 16."""
    x = hostile("plain", shape)
    spoiled = x.clone()
    spoiled[:, :, 70, 3] = 2000
    c = compressor(codec, quantizer, "plain", shape)
    z = c.transform.forward(spoiled) if c.transform else spoiled
    fields, others = c.compress(spoiled), c.compress(x)
    assert all(torch.equal(fields[name][:, :, 0], others[name][:, :, 0]) for name in fields)
    block = z[:, :, 64:].double()
    rest = torch.cat((block[:, :, :6], block[:, :, 7:]), dim=2)
    collapsed = (rest - rest.mean(2, keepdim=True)).square().sum()
    step = (block.amax(2) - block.amin(2)) / 15 * 2 ** (3 / 8)
    error = (c.reconstruct(fields, shape[3], x.dtype) - spoiled).double()[:, :, 64:].square().sum()
    assert error <= TOLERANCE * collapsed + (step / 2).square().sum()


@pytest.mark.parametrize("quantizer", CODED)
@pytest.mark.parametrize("case", CHANNELS)
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


@pytest.mark.parametrize(("dtype", "case"), covering([torch.float32, torch.bfloat16], HOSTILE))
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
        cache = CompressedDynamicCache([c], [c])
        read = cache.update(k, v, 0)
        stores = cache.layers[0].stores
        found = direct_attention.attend(stores["K"], stores["V"], q, None, 1.0)
        expected = attention_math.attend_reconstructed(*(x.float() for x in read), q.float(), None, 1.0)
        assert torch.isfinite(found).all() and all(torch.isfinite(x).all() for x in read)
        size = read[1].float().abs().amax()
        eps = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        assert ((found.float() - expected).abs() <= eps * size + 1e-30).all(), (codec, quantizer)


@pytest.mark.parametrize("case", HOSTILE)
def test_kernels_store_mixed_widths_as_pytorch_does(case, monkeypatch):
    """The same grids and the same budget; only between two that are as good may the order of a sum decide."""
    if not cpu.loaded():
        pytest.skip("no compiler on this machine: PyTorch does it all")
    for codec in (IDENTITY, "pca"):
        c = compressor(codec, "mixed", case, SMALL, "noise")
        x = hostile(case, SMALL)
        fields = c.compress(x)
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "loaded", lambda: False)
            expected = c.compress(x)
            read_by_other = round_trip(c, x)
        assert all(fields[name].shape == expected[name].shape for name in fields)
        one, other = (lost(codec, back, x) for back in (round_trip(c, x), read_by_other))
        assert one == pytest.approx(other, rel=1e-2, abs=1e-6 * float(x.double().square().sum()) * HALF_ULP)


@pytest.mark.parametrize("case", ["plain", "biases up to 400 in all", "massive activations", "constant"])
@pytest.mark.parametrize("codec", [IDENTITY, "pca", "joint"])
def test_the_same_bytes_whatever_else_is_stored(codec, case):
    """Twice, alone or in a batch, all at once or in parts, with one thread or two."""
    x = given(codec, hostile(case, SMALL), case)
    for quantizer in CODED:
        c = compressor(codec, quantizer, case, SMALL)
        fields = c.compress(x)
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        again = c.compress(x)
        torch.set_num_threads(threads)
        alone = c.compress(x[1:])
        parts = [c.compress(part, start) for part, start in zip(x.split(64, dim=2), (0, 64), strict=True)]
        for name, field in fields.items():
            assert torch.equal(c.compress(x)[name], field) and torch.equal(again[name], field)
            assert torch.equal(alone[name], field[1:]), (quantizer, name)
            assert torch.equal(torch.cat([part[name] for part in parts], dim=2), field), (quantizer, name)
