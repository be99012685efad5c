"""Codecs: what comes back, what it costs, and that a new one needs no other change."""

import itertools

import pytest
import torch
from hostile import CHANNELS, hostile
from sampling import covering

from gpt2.common.errors import PluginError
from gpt2.compression import codecs
from gpt2.compression.codecs import BASES, CODECS, IDENTITY, QUANTIZERS, Compressor, JointTransform, Transform, basis_of
from gpt2.compression.codecs.mixed import MixedFixed, cheapest, errors
from gpt2.compression.codecs.moments import Moments
from gpt2.compression.codecs.per_channel import Int4Channel
from gpt2.compression.codecs.rope import NONE
from gpt2.models.geometry import Geometry

H, D, T = 4, 12, 256  # heads of K or V; of both together for a codec that takes them so
INTEGERS = [QUANTIZERS[name] for name in ("int4", "int8")]
NAMES = (*CODECS, "ln_nullspace+pca", "pca+random")
COMPLETE = [c for c in NAMES if codecs.full_rank(c, D) == D]  # the others lose a direction whatever the rank
SINGULAR = torch.linspace(2, 0.5, D)  # mild, so that every coordinate is worth its bits: errors fall with rank


def vectors(seed: int = 0, heads: int = H, tokens: int = T) -> torch.Tensor:
    """K or V that has a mean and correlated channels, another basis in every head: [2, H, T, d]."""
    torch.manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(heads, D, D)).Q
    return (torch.randn(2, heads, tokens, D) * SINGULAR) @ rotation.mT + torch.randn(heads, 1, D)


def moments_of(x: torch.Tensor) -> Moments:
    """Moments of one layer, with a mild metric of each kind, another one in every head."""
    moments = Moments.zeros(Geometry.uniform(1, x.shape[1], x.shape[3]))
    moments.update(0, x)
    generator = torch.Generator().manual_seed(1)
    for metric in ("attention", "fisher"):
        gaussian = torch.randn(1, *x.shape[1::2], x.shape[3], generator=generator, dtype=torch.float64)
        weights = torch.linspace(0.7, 1.4, x.shape[3], dtype=torch.float64)
        axes = torch.linalg.qr(gaussian).Q
        moments.metrics[metric] = axes * weights @ axes.mT
    return moments


def fit(codec: str, x: torch.Tensor) -> tuple[Transform, torch.Tensor]:
    """A codec's transform of x, in float64, and its spectrum; the first half of the heads is K where it is joint."""
    basis = basis_of(codec)
    if not basis.joint:
        return basis.fit(moments_of(x), 0)
    transform, spectrum = basis.fit(moments_of(basis.arrange(*x.chunk(2, dim=1), NONE, 0)[0]), 0)
    return JointTransform(transform.E, transform.D, transform.mean, NONE), spectrum


def compressor(codec: str, quantizer: str, x: torch.Tensor, rank: int = D) -> Compressor:
    """rank: of the D coordinates of one head; where a basis is of several, as many for each."""
    quantizer, transform = QUANTIZERS[quantizer], None
    if codec != IDENTITY:
        transform = fit(codec, x)[0].to("cpu", torch.float32)
        transform = transform.truncate(min(rank * transform.E.shape[1] // D, transform.rank))
    if isinstance(quantizer, MixedFixed):
        error = errors(transform.forward(x) if transform else x).mean((0, 2))
        quantizer = MixedFixed(quantizer.bits, cheapest(error, int(quantizer.bits * 8 * error.shape[1])))
    return Compressor(quantizer, transform)


def round_trip(c: Compressor, x: torch.Tensor) -> torch.Tensor:
    return c.reconstruct(c.compress(x), x.shape[3], x.dtype)


def error(c: Compressor, x: torch.Tensor) -> float:
    """Mean squared error relative to the variance: 1 is what storing the mean alone would cost."""
    return ((round_trip(c, x) - x).square().mean() / (x - x.mean((0, 2), keepdim=True)).square().mean()).item()


@pytest.mark.parametrize(("codec", "quantizer"), covering(COMPLETE, QUANTIZERS, times=3))
def test_round_trip_error_is_bounded_and_falls_with_rank(codec, quantizer):
    x = vectors()
    ranks = [2, 6, 9, D] if codecs.needs_calibration(codec) else [D]  # the others have no order to cut by
    lost = [error(compressor(codec, quantizer, x, rank), x) for rank in ranks]
    assert lost == sorted(lost, reverse=True) and len(set(lost)) == len(lost)
    assert lost[0] < 1, "never worse than storing the mean"
    # Uniform noise of one step in 2^bits over a range of some six deviations: (6 / 2^bits)² / 12
    metadata = 0.5 if QUANTIZERS[quantizer].adjustable else 0  # bits of an adjustable one are all that it stores
    bits = QUANTIZERS[quantizer].bits - metadata
    assert lost[-1] < 3 * 2.0 ** (-2 * bits) + 1e-10


def test_identity_is_exact_bit_for_bit():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = vectors().to(dtype)
        x[0, 0, 0, :3] = torch.tensor([-0.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny / 2], dtype=dtype)
        back = round_trip(codecs.IdentityCompressor(), x)
        assert back.dtype == dtype
        assert torch.equal(back.view(torch.uint8), x.view(torch.uint8)), "also the sign of zero and subnormals"


@pytest.mark.parametrize("codec", [name for name in NAMES if name != IDENTITY])
def test_bases_know_the_variance_of_their_coordinates(codec):
    x = vectors()
    transform, spectrum = fit(codec, x)
    assert torch.allclose(transform.forward(x.double()).var((0, 2), correction=0), spectrum, rtol=1e-4)
    assert codec != "pca" or (spectrum.diff(dim=-1) <= 0).all(), "largest first"


@pytest.mark.parametrize("codec", ["pca", "ln_nullspace+pca"])
def test_a_cut_rank_loses_exactly_the_spectrum_that_it_drops_and_less_than_random(codec):
    """A basis after another takes off both means: of the vectors, and of what the first basis makes of them."""
    x = vectors()
    kept = x - x.mean(-1, keepdim=True) if "+" in codec else x
    for rank in (3, 5, 8):
        back, random = (round_trip(compressor(name, "none", x, rank), x) for name in (codec, "random"))
        lost = (back - kept).square().mean((0, 2)).sum(-1)
        assert torch.allclose(lost, fit(codec, x)[1][:, rank:].sum(-1).float(), rtol=1e-3)
        assert lost.mean() < (random - x).square().mean((0, 2)).sum(-1).mean()


def test_the_mean_of_pca_takes_a_bias_out_which_costs_a_raw_int8_its_whole_range():
    x = vectors() + 400 * torch.eye(D)[3]
    assert error(compressor("pca", "int8", x), x) < error(compressor(IDENTITY, "int8", x), x) / 100


def test_the_nullspace_codec_loses_the_mean_over_channels_and_nothing_else():
    x = vectors()
    centred = x - x.mean(-1, keepdim=True)
    for given in (x, centred):
        assert torch.allclose(round_trip(compressor("ln_nullspace", "none", given), given), centred, atol=1e-5)
    assert not codecs.needs_calibration("ln_nullspace") and codecs.needs_calibration("ln_nullspace+pca")
    twice = basis_of("ln_nullspace+ln_nullspace")
    assert not twice.calibrated and twice.transform(D).rank == twice.full_rank(D) == D - 2
    assert codecs.full_rank("ln_nullspace", 10**12) == 10**12 - 1, "without making the basis"


def test_the_rotation_of_hadamard_is_orthonormal_and_spreads_a_channel_evenly_over_its_power_of_two():
    """Over the rest of a width, as a cosine basis spreads. It takes no mean off."""
    for d in (1, 2, 7, 12, 16, 20, 32, 40, 45, 48, 64, 80, 96, 112, 120, 128, 160, 192, 256):
        transform, power = basis_of("hadamard").transform(d), d & -d
        assert transform.E.shape == transform.D.shape == (1, d, d) and codecs.full_rank("hadamard", d) == d
        E = transform.E[0]
        assert torch.allclose(E.T @ E, torch.eye(d, dtype=torch.float64), atol=1e-12)
        assert torch.equal(transform.D[0], E.T) and not transform.mean.any()
        energy = E.square().view(power, d // power, power, d // power).sum((1, 3)) * power
        assert torch.allclose(energy / (d // power), torch.ones(power, power, dtype=torch.float64)), d
    assert not codecs.needs_calibration("hadamard")


# --- integers


SMALL = ["times 1e-05", "times 1e-42"]


@pytest.mark.parametrize(
    ("case", "dtype", "quantizer"), covering([*CHANNELS, *SMALL], [torch.float32, torch.float16], INTEGERS, times=2)
)
def test_integer_error_is_at_most_half_a_step(quantizer, dtype, case):
    x = hostile(case, (2, H, T, D), dtype=dtype)
    back = round_trip(Compressor(quantizer), x).double()
    assert torch.isfinite(back).all() and (quantizer.quantize(x)["scale"] > 0).all(), "nothing divides by zero"
    x = x.double()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / (2**quantizer.bits - 1)
    # Scale, offset and result are rounded to float16, a relative 2^-11 each; a scale is never below the smallest normal
    half_ulp = 2.0**-11
    allowed = step * (0.5 + half_ulp * 2**quantizer.bits) + half_ulp * (low.abs() + high.abs()) + 2.0**-14
    assert ((back - x).abs() <= allowed).all()


@pytest.mark.parametrize("low", [400.2, -399.85, -1e-8])
@pytest.mark.parametrize("quantizer", INTEGERS, ids=lambda q: q.name)
def test_a_large_common_bias_costs_at_most_half_a_step(quantizer, low):
    """An offset rounded down to float16 widens the range by one ulp, which the codes can cover.

    To the nearest, each of these would be rounded up, and the lowest values would have no code.
    """
    x = low + torch.linspace(0, 0.1, 8).view(1, 1, 1, 8)
    step = (0.1 + 0.25) / (2**quantizer.bits - 1)  # 0.25 is float16's spacing at 400
    assert (round_trip(Compressor(quantizer), x) - x).abs().max() <= step * 0.6


def test_float16s_ends_and_what_is_beyond_or_small():
    """Never NaN; and below float16's normal range the step doesn't stop shrinking while it still has digits."""
    for quantizer, value in itertools.product(INTEGERS, [65504.0, -65504.0, 1e6, -1e6, 1e30, -3e38]):
        for others in ([-1.0, 0.0, 1.0], [-value, 0.0, 1.0]):
            x = torch.tensor([value, *others]).view(1, 1, 1, 4)
            x = x.half() if abs(value) < 1e5 else x
            assert torch.isfinite(round_trip(Compressor(quantizer), x)).all(), (quantizer, x)
    assert all(error(Compressor(QUANTIZERS["int8"]), vectors() * size) < 1e-4 for size in (1.0, 1e-2, 1e-3))


# --- integers by channel


@pytest.mark.parametrize(("quantizer", "bits"), [("int8_channel", 8), ("int4_channel", 4)])
@pytest.mark.parametrize("r", [1, 7, 64])
def test_a_code_by_channel_is_off_by_half_a_step_of_its_own_channel(quantizer, bits, r):
    """The others' ranges, of a thousandth to a thousand times its own, don't matter; nor does where it lies."""
    torch.manual_seed(r)
    spread = torch.logspace(-3, 3, r)
    x = (torch.rand(2, 3, 128, r) + torch.randint(-30, 30, (3, 1, r))) * spread
    encoded = QUANTIZERS[quantizer].quantize(x)
    assert sum(part.nbytes for part in encoded.values()) == 2 * 3 * 2 * r * (8 * bits + 3), "codes, scale, offset"
    error = ((round_trip(Compressor(QUANTIZERS[quantizer]), x) - x) / spread).abs()
    levels = 2**bits - 1
    # A scale is rounded by up to 2^(1/16), and wider by as much where it must reach the extremes
    assert error.max() < (0.6 if quantizer == "int8_channel" else 2.5) / levels + 30 * 2**-11
    assert error.square().mean().sqrt() < 0.36 / levels + 0.01, "a step over √12, and what float16 does to offsets"


def test_the_largest_numbers_stay_finite_and_other_channels_do_not_notice():
    x = torch.randn(1, 1, 64, 4).to(torch.bfloat16)
    x[0, 0, 3, 1], x[0, 0, 4, 2] = torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).min
    for quantizer in ("int8_channel", "int4_channel"):
        back = round_trip(Compressor(QUANTIZERS[quantizer]), x)
        assert torch.isfinite(back).all() and (back - x)[..., [0, 3]].abs().max() < 1


def test_cutting_extremes_off_pays_at_four_bits_by_channel():
    """Heavy tails on both sides: reaching them would cost the many near the middle their resolution."""
    whole = type("Whole", (Int4Channel,), {"shares": (1.0,)})()
    torch.manual_seed(0)
    x = torch.distributions.Laplace(0.0, 1.0).sample((1, 4, 640, 16))
    lost = [(q.dequantize(q.quantize(x), 16) - x).square().mean().item() for q in (Int4Channel(), whole)]
    assert lost[0] < 0.98 * lost[1]


def test_nibbles_by_channel_hold_the_early_tokens_low():
    encoded = QUANTIZERS["int4_channel"].quantize(torch.linspace(0, 15, 64).view(1, 1, 64, 1))
    codes = torch.cat((encoded["codes"] & 15, encoded["codes"] >> 4), dim=3).flatten()
    assert codes.shape == (64,) and (codes.int().diff() >= 0).all() and codes[0] == 0 and codes[-1] == 15


# --- registry

UNKNOWN = {name: rf"unknown codec .*{near}.*\(there are: identity, pca" for name, near in {
    "pcaa": r"'pcaa', did you mean 'pca'\?", "identiy": rf"did you mean '{IDENTITY}'\?", "randm": "mean 'random'",
    "zzzz": "", None: "", 3: "", "identity+pca": "", "pca+": "", "": "",
}.items()}  # fmt: skip


def test_names_and_bits_are_unique_and_others_list_those_that_exist_and_suggest_the_nearest():
    assert all(name == entry.name for table in (BASES, QUANTIZERS) for name, entry in table.items())
    assert len(codecs.BITS) == sum(q.by_bits for q in QUANTIZERS.values()) and IDENTITY not in BASES
    for name, message in UNKNOWN.items():
        with pytest.raises(PluginError, match=message):
            codecs.codec_name(name)
    with pytest.raises(PluginError, match="unknown codec"):
        codecs.codec_name(["pca"])
    for bits in (0, 5, 32, "8", None):
        with pytest.raises(PluginError, match=r"not available: use 4, .*8, .*16"):
            codecs.quantizer_for_bits(bits)
    for name, message in (("pca+ln_nullspace", "can only come first"), ("pca+", "unknown codec"),
                          ("+".join(["ln_nullspace"] * D), "leaves nothing of a head_dim")):  # fmt: skip
        with pytest.raises(PluginError, match=message):
            codecs.full_rank(name, D)


@pytest.mark.parametrize("shared", [None, "all heads", "K and V"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_layout_of_a_block_is_that_of_what_is_stored(name, shared):
    """One entry per block and group: the cache relies on it to append, crop and reorder without looking inside.

    A file of a cache is checked against it, and long contexts are counted by it.
    """
    quantizer, joint = QUANTIZERS[name], shared == "K and V"
    heads, groups = (2 * H if joint else H), (1 if shared else H)
    width = heads * D // groups
    if quantizer.calibrated:
        quantizer = MixedFixed(4.0, torch.arange(groups * width).view(groups, width) % 8)
    E = torch.linalg.qr(torch.randn(groups, width, width, generator=torch.Generator().manual_seed(0))).Q
    kind = JointTransform if joint else Transform
    compressor = Compressor(quantizer, kind(E, E.mT.contiguous(), torch.zeros(groups, width)))
    x = vectors(heads=heads, tokens=2 * compressor.block_tokens)
    stored, layout = compressor.compress(x), compressor.block_layout(heads, D, x.dtype)
    assert list(layout) == list(stored)
    for field, own in stored.items():
        assert layout[field].is_meta and layout[field].dtype == own.dtype
        assert own.shape == (2, groups, 2, *layout[field].shape[3:])
        assert layout[field].shape[:3] == (1, groups, 1)
