"""Calibrations of hard keys and values: sums that don't cancel, bases of degenerate text, the same files every time."""

import json

import numerics
import optuna
import pytest
import torch
from calibrations import TEXT, identical
from hostile import CHANNELS, TOKENS, hostile
from numerics import SMALL, allowed, compressor, given, int4_bits, lost, moments_of, round_trip
from sampling import ALL, covering, sampled
from script_runs import SMALL as FEW
from script_runs import SMALL_EVAL, run
from tiny import tiny_model, word_tokenizer

from gpt2.common.trial_queue import TrialQueue
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.file import load_calibration, save_calibration
from gpt2.compression.calibration.statistics import Tap
from gpt2.compression.codecs import Compressor, basis_of, multi_head_bases
from gpt2.compression.codecs.mixed import Mixed
from gpt2.compression.codecs.moments import Moments
from gpt2.compression.settings import compressors_for
from gpt2.models.geometry import Geometry
from gpt2.models.loading import LoadedModel, wrap

BIASED = torch.tensor([400.0, -300, 0, 0, 150, 0, 0, 90, 0, 0, 0, 0])  # of a head's 12 channels


def biased_model(dtype: torch.dtype = torch.float32, with_gradients: bool = True) -> LoadedModel:
    """Qwen2.5 in small: a few channels of its keys have biases of hundreds. with_gradients: else its loss has none."""
    model = tiny_model("qwen2")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias += BIASED.repeat(2)
            layer.self_attn.q_proj.weight *= 1e-3  # or attention would be one token's, and no key would matter
        model.lm_head.weight *= float(with_gradients)
    return wrap(model.to(dtype), word_tokenizer(), "tiny-biased")


# --- sums


@pytest.mark.parametrize(
    ("case", "parts"), sampled(covering([*CHANNELS, *TOKENS], [[128], [1, 127], [7] * 18 + [2]]), 9)
)
def test_moments_are_those_of_float64(case, parts):
    """Also where a bias is 40,000 times the spread: Σxxᵀ − nμμᵀ would have no digit left in float32."""
    x = hostile(case, SMALL)
    moments = Moments.zeros(Geometry.uniform(1, *x.shape[1::2]))
    for part in x.split(parts, dim=2):
        moments.update(0, part)
    exact = x.double().transpose(0, 1).flatten(1, 2)
    mean = exact.mean(1)
    centred = exact - mean[:, None]
    covariance = centred.mT @ centred / exact.shape[1]
    size = covariance.diagonal(dim1=1, dim2=2).sqrt()
    rounding = 2e-7 * mean.abs()  # of the mean of each part, in float32
    assert moments.count[0] == exact.shape[1], "of every sequence of the batch"
    torch.testing.assert_close(moments.mean[0], mean, rtol=1e-6, atol=1e-6 * float(size.max()))
    either = size[:, None] + rounding[:, None], size[..., None] + rounding[..., None]
    products = either[0] * either[1] - size[:, None] * size[..., None]
    assert ((moments.covariance(0) - covariance).abs() <= 1e-5 * size[:, None] * size[..., None] + products).all()


# --- bases


@pytest.mark.parametrize("codec", [name for name in numerics.EXACT_BASES if not basis_of(name).multi_head])
def test_fewer_tokens_than_channels(codec):
    basis, other = basis_of(codec), hostile("plain", (1, 2, 64, 16), seed=2).double()
    for tokens in (1, 5):
        moments = moments_of(hostile("plain", (1, 2, tokens, 16)), codec)
        transform = basis.fit(moments, 0)[0] if basis.calibrated else basis.transform(16)
        torch.testing.assert_close(transform.D @ transform.E, torch.eye(16).double().expand(len(transform.E), -1, -1))
        torch.testing.assert_close(transform.inverse(transform.forward(other), 16), other)


@pytest.mark.parametrize("sample", sampled(CHANNELS, 6))
def test_a_basis_of_any_text_serves_ordinary_text(sample):
    """Calibrated where nothing varied, or on biases that the run hasn't: no worse than int4 all the same."""
    for codec in numerics.EXACT_BASES:
        x = given(codec, hostile("plain", SMALL), "plain")
        for quantizer in ("int4_channel", "mixed"):
            c = compressor(codec, quantizer, sample, SMALL)
            back = round_trip(c, x)
            if sample != "near float16's end":  # 15,000 times as large: then its steps are of another world
                assert lost(codec, back, x) <= allowed(codec, c.quantizer, x), (codec, quantizer)
            assert torch.isfinite(back).all()


@pytest.mark.parametrize("codec", ["attention", "fisher", *multi_head_bases()])
def test_the_size_of_gradients_says_nothing(codec):
    """Of a long text they may be tiny: what is stored is the same but for a power of two, and loses no more."""
    x, sample = given(codec, hostile("plain", SMALL), "plain"), hostile("plain", SMALL, seed=1)
    shared, joint = basis_of(codec).multi_head, basis_of(codec).joint
    groups, w = (1, SMALL[3] * SMALL[1] * (1 + joint)) if shared else (SMALL[1], SMALL[3])

    def error(factor: float) -> float:
        weights = factor**2 * numerics.metric(groups, w)
        if shared:
            transform = numerics.fit_heads(codec, sample, "plain", weights).transform(0)
        else:
            transform = basis_of(codec).fit(moments_of(sample, codec, weights), 0)[0]
        c = Compressor(Mixed(int4_bits(SMALL)), transform.to("cpu", torch.float32))
        return lost(codec, round_trip(c, x), x)

    expected = pytest.approx(error(1.0), rel=0.1)
    assert [error(size) for size in (1e-20, 1e8)] == [expected] * 2


def test_a_sample_beyond_float16_is_fitted_all_the_same():
    """It is held in float16, where a step beyond the end would be infinite, and no file with it could be read."""
    loaded = biased_model()
    with torch.no_grad():
        for layer in loaded.model.model.layers:
            layer.self_attn.v_proj.weight *= 1e6
            layer.self_attn.o_proj.weight *= 1e-6
    made = calibrate(loaded, TEXT, rank=9, codec="joint", samples=2, seq_len=140)
    for codec in multi_head_bases():
        fit = made.fit_of(codec)
        found = (*fit.allocation.errors, fit.allocation.prices, fit.allocation.demand, *fit.E, *fit.D)
        assert all(torch.isfinite(x).all() for x in found), codec


# --- calibrations of a model


@pytest.mark.parametrize(
    ("dtype", "with_gradients"), covering([torch.float32, torch.bfloat16], [True, False]), ids=str
)  # as it is, and in 16 bits without gradients
def test_a_model_with_biased_keys(dtype, with_gradients, tmp_path):
    """From its text to its cache: finite, saved and read, and no worse than int4 per token."""
    loaded = biased_model(dtype, with_gradients)
    made = calibrate(loaded, TEXT, rank=9, codec="joint", samples=3, seq_len=140)
    made = load_calibration(save_calibration(made, tmp_path / "c.pt"))
    d, kept = loaded.geometry.head_dim, {}  # K and V of every layer behind the sinks, of text that took no part
    with torch.no_grad():
        record = Tap(lambda layer, k, v: kept.setdefault(layer, (k[:, :, 4:], v[:, :, 4:])))
        window = TEXT.segments("evaluation", loaded, 132, 1, 0)[0]
        loaded.model.base_model(input_ids=window[None], past_key_values=record, use_cache=True)
    for codec, quantizer in [
        *(("joint", name) for name in ("mixed", "mixed_fixed")), ("grouped", "mixed"), ("framed", "mixed"),
        ("fisher", "int4_channel"), ("attention", "mixed"), ("pca", "int4_channel"), ("pca", "int4"),
    ]:  # fmt: skip
        bits = int4_bits((1, 1, 1, d)) if quantizer.startswith("mixed") else 4
        k, v = compressors_for("kv", bits, None, made, codec=codec, quantizer=quantizer, rank=d)
        total = reference = 0.0
        for layer, (keys, values) in kept.items():
            assert keys.abs().amax() > 100, "or they have no bias"
            sides = [(k[layer], keys), (v[layer], values)]
            if basis_of(codec).joint:
                sides = [(k[layer], torch.cat((keys, values), 1))]
            for c, x in sides:
                back = c.reconstruct(c.compress(x, 4), d, x.dtype, 4)
                assert torch.isfinite(back).all()
                total += lost("pca", back, x)
                reference += allowed("pca", c.quantizer, x) + lost("pca", x * (1 + torch.finfo(dtype).eps), x)
        assert total <= reference, (codec, quantizer)


def test_calibrating_twice_gives_the_same(tmp_path):
    """Every tensor to the bit, in memory and read from a file."""
    loaded, how = biased_model(), {"rank": 9, "codec": "joint", "samples": 2, "seq_len": 140}
    made, again, other = (calibrate(loaded, TEXT, **how, seed=seed) for seed in (0, 0, 1))
    files = [save_calibration(c, tmp_path / name / "c.pt") for name, c in (("one", made), ("other", again))]
    assert identical(*(torch.load(path, weights_only=True) for path in files))
    assert not torch.equal(*(torch.stack(one.multi_head["joint"].E) for one in (other, made))), "or nothing was drawn"


def test_the_search_twice_is_the_same(tiny_flags):
    """The same seed, the same candidates in the same order, and losses to the last digit."""
    common, found = [*tiny_flags, *FEW[:2], "--seq-len", 100], []
    assert run("calibrate_kv_lowrank", *common, "--codec", "framed", "--rank", 12, "--output", "c.pt") == 0
    flags = [*common, *SMALL_EVAL, "--chunk", 32, "--target-ppl-delta", 0.5, "--calibration", "c.pt"]
    flags += ["--search", "codec", "--codecs", "framed+mixed,pca", "--num-trials", 3]
    for name in ("one", "other"):
        out = ["--study", f"{name}/s.db", "--output", f"{name}/preset.json"]
        assert run("auto_tune_kv_compression", *flags, *out) == 0
        (study,) = optuna.get_all_study_names(f"sqlite:///{name}/s.db")
        found.append([(t.params, t.values, t.state) for t in TrialQueue(f"{name}/s.db", study).trials()])
    assert found[0] == found[1] and len(found[0]) >= 3


@pytest.mark.skipif(not ALL, reason="only in make test-all")
def test_presets_by_ratio_twice_are_the_same(tiny_flags, tmp_path):
    scored = ["--seq-len", 100, "--eval-tokens", 128, "--eval-seq-len", 64, "--ratios", "6.4"]
    for name in ("one", "other"):
        assert run("make_presets", *tiny_flags, *FEW[:2], *scored, "--output", name) == 0
    one, other = (tmp_path / name / "runs/ratio_presets_tiny-llama.json" for name in ("one", "other"))
    assert json.loads(one.read_text())["rows"] == json.loads(other.read_text())["rows"]
