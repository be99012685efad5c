"""Calibration: files that are checked, and reuse only of what matches."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
from calibrations import TEXT, identical
from sampling import sampled
from tiny import tiny_loaded, tiny_model, windows, word_text, word_tokenizer

from gpt2.common.errors import BadArtefact, PluginError
from gpt2.compression.calibration import file, reuse
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.file import load_calibration, save_calibration
from gpt2.compression.calibration.fit import Calibration
from gpt2.compression.calibration.statistics import Statistics
from gpt2.compression.codecs import QUANTIZERS, IdentityCompressor
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache, load_calibrated_compressors
from gpt2.compression.settings import compressors_for
from gpt2.models.loading import wrap
from gpt2.models.probe import likeness, sketch
from gpt2.text.sources import by_position

SMALL = {"samples": 3, "seq_len": 48, "seed": 0, "sink_tokens": 4}


@pytest.fixture(scope="module")
def made(llama) -> Calibration:
    return calibrate(llama, TEXT, rank=9, **SMALL)


@pytest.fixture
def path(made, tmp_path):
    return save_calibration(made, tmp_path / "c.pt")


def same(a: Calibration, b: Calibration) -> bool:
    """Everything with numbers in them."""
    return identical(*([c.bases, vars(c.statistics.k), vars(c.statistics.v)] for c in (a, b)))


# --- calibrate


def test_meta_says_what_it_was_made_from(llama, made):
    expected = SMALL | {
        "model": "tiny-llama", "fingerprint": llama.fingerprint, "rank": 9, "codec": "pca", "tokens": 3 * 48,
        "num_layers": 3, "num_kv_heads": 2, "head_dim": 12, "text": "words", "text_spec": "words.txt",
        "text_sha256": TEXT.sha256("calibration"), "dtype": "float32",
    }  # fmt: skip
    assert expected.items() <= made.meta.items()
    assert set(made.meta["versions"]) == {"torch", "transformers"}
    assert set(made.meta) == {*file.META, "metric"} - {"layers"}
    for side in ("k", "v"):
        kept = torch.stack(made.kept_variance()[side])
        assert (kept.diff(dim=-1) >= 0).all() and torch.allclose(kept[..., -1], torch.ones(()).double())


def test_only_the_calibration_part_is_read_and_all_of_it_where_it_is_short(llama, made):
    """Other words after 60 % of the text change nothing; fewer segments than samples are all used."""
    head = TEXT.calibration
    other = by_position("words", "words.txt", head + word_text(1200, seed=9))
    assert other.calibration == head and other.evaluation != TEXT.evaluation
    assert same(calibrate(llama, other, rank=9, **SMALL), made)
    available = len(TEXT.tokens("calibration", llama)) // 300
    meta = calibrate(llama, TEXT, rank=9, samples=100, seq_len=300).meta
    assert 0 < available < 100 and meta["samples"] == 100 and meta["tokens"] == available * 300


REJECTED = [
    ({"rank": 0}, "rank 0 is out of range: tiny-llama has head_dim 12"),
    ({"rank": 13}, "rank 13 is out of range: tiny-llama has head_dim 12"),
    ({"seq_len": 513}, "513 tokens is longer than the 512 that tiny-llama was trained for: use --seq-len 512"),
    ({"seq_len": 500, "text": by_position("short", "s", word_text(300))}, "fewer than one segment of 500"),
    ({"seq_len": 4}, "longer than the 4 sink tokens"), ({"codec": "identity"}, "codec identity needs no calibration"),
    ({"codec": "ln_nullspace"}, "codec ln_nullspace needs no calibration"),
    ({"codec": "ln_nullspace+pca", "rank": 12}, "head_dim 12, of which .* stores 11"),
    ({"codec": "pcaa"}, "unknown codec 'pcaa', did you mean 'pca'"),
]  # fmt: skip


@pytest.mark.parametrize(("samples", "codec", "warned"), [(2, "pca", 12), (3, "pca", None), (1, "framed", 24)])
def test_too_few_tokens_for_a_basis_are_warned_of(samples, codec, warned, llama, caplog):
    seq_len = 24 if codec == "pca" else 68  # 4 sinks among them, which don't count
    calibrate(llama, TEXT, rank=9, samples=samples, seq_len=seq_len, codec=codec)
    counted = samples * (seq_len - 4)
    said = caplog.text
    assert (f"a basis of {warned} dimensions is fitted to {counted} tokens" in said) == bool(warned)
    assert ("dimensions" in said) == bool(warned)


def test_calibrate_rejects(llama):
    for changed, message in REJECTED:
        settings = SMALL | {"rank": 9, "text": TEXT} | changed
        with pytest.raises(PluginError, match=message):
            calibrate(llama, settings.pop("text"), **settings)


# --- files


def test_what_is_loaded_is_what_was_saved(made, path):
    """Also without queries, as of families with hard-wired attention; parts that only older files have are ignored."""
    back = load_calibration(path)
    assert same(back, made) and back.meta == made.meta
    record = torch.load(path, weights_only=True)
    record["energy"] = {"k": torch.ones(3, 2, 12), "v": torch.ones(3, 2, 12)}
    record["statistics"] |= {"queries": record["statistics"]["metrics"]["k"]["attention"], "query_count": 288}
    torch.save(record, path)
    assert same(load_calibration(path), made)
    statistics = Statistics(replace(made.statistics.k, metrics={}), made.statistics.v)
    assert not load_calibration(save_calibration(replace(made, statistics=statistics), path)).statistics.k.metrics


def test_the_default_device_is_of_no_matter(made):
    """A caller may have set a GPU's, while a model and its cache are on the CPU."""
    x, read, loaded = torch.randn(1, 2, 100, 12), {}, tiny_loaded("llama")
    for device in ("cpu", "meta"):
        with torch.device(device):
            cache = CompressedDynamicCache(*compressors_for("kv", 4, None, made))
            tokens = [(part, layer) for part in x.split(70, dim=2) for layer in range(3)]
            read[device] = [kept for part, layer in tokens for kept in cache.update(part, part, layer)]
    assert all(map(torch.equal, *read.values()))
    with torch.device("meta"):
        again = calibrate(loaded, TEXT, rank=6, samples=2, seq_len=80, codec="framed")
    assert again.multi_head["framed"].E[0].device.type == "cpu"


def test_every_rank_is_cut_from_one_file(made, path):
    for rank in (1, 5, 12):
        for side, compressors in zip("kv", load_calibrated_compressors(path, rank=rank)[:2], strict=True):
            for layer, c in enumerate(compressors):
                assert torch.equal(c.transform.E, made.bases[side]["E"][layer][..., :rank])
                assert torch.equal(c.transform.mean, made.bases[side]["mean"][layer])
    for rank in (13, -1, 0):
        with pytest.raises(PluginError, match=f"rank {rank} is out of range"):
            load_calibrated_compressors(path, rank=rank)
    with pytest.raises(PluginError, match="dtype: expected a dtype .* got 8: the number of bits is quantize_bits"):
        load_calibrated_compressors(path, "cpu", 8)
    k, _, _ = load_calibrated_compressors(path, codec="random")
    default, _, _ = load_calibrated_compressors(path)
    assert k[0].transform.rank == 9 and torch.equal(k[0].transform.mean, default[0].transform.mean)
    assert not torch.allclose(k[0].transform.E, default[0].transform.E)
    assert load_calibrated_compressors(path, codec="identity")[0][0].transform is None


# --- use


@pytest.mark.parametrize(("bits", "name"), sampled([(None, "none"), (16, "none"), (8, "int8"), (4, "int4")], 3))
def test_guide_use(path, llama, bits, name):
    """`k, v, metadata = load_calibrated_compressors(path, device, dtype, quantize_bits)`, edited layer by layer."""
    dtype = torch.bfloat16 if bits == 8 else torch.float32  # of the transforms
    k, v, metadata = load_calibrated_compressors(path, torch.device("cpu"), dtype, quantize_bits=bits)
    assert len(k) == len(v) == metadata["num_layers"] == 3 and metadata["head_dim"] == 12
    assert {(c.quantizer, c.transform.rank, c.transform.E.dtype) for c in k + v} == {(QUANTIZERS[name], 9, dtype)}
    k = [IdentityCompressor() for _ in k]
    v[0] = IdentityCompressor()
    cache = CompressedDynamicCache(k, v, num_layers=metadata["num_layers"])
    out = llama.model.generate(windows(1, 20), past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert out.shape == (1, 25)
    exact = [(layer.stores["K"].compressor.exact, layer.stores["V"].compressor.exact) for layer in cache.layers]
    assert exact == [(True, True), (True, False), (True, False)]
    plain = identity_cache(3)
    llama.model(out[:, :-1], past_key_values=plain)
    stores = [[layer.stores["V"].read() for layer in each.layers] for each in (cache, plain)]
    assert {values.dtype for values in stores[0]} == {torch.float32}, "the model's own"
    same = [torch.allclose(ours, models, atol=1e-4) for ours, models in zip(*stores, strict=True)]
    assert same[0] and not same[2], "of rank 9 of 12"
    metadata["rank"] = 1
    assert load_calibrated_compressors(path)[2]["rank"] == 9, "the metadata is the caller's own"


# --- reuse


def obtain(loaded, text=TEXT, **changes):
    return reuse.obtain_calibration(loaded, text, **{"given": None, "rank": 9} | SMALL | changes)


def test_a_new_calibration_goes_to_results_and_is_used_again(space, llama, made, monkeypatch):
    first, path = obtain(llama)
    assert path.parent == space / "checkout/results/calibrations" and "tiny-llama" in path.name and same(first, made)
    monkeypatch.setattr(reuse, "calibrate", None)  # it would fail
    second, again = obtain(llama)
    assert again == path and same(second, first)
    assert obtain(llama, rank=5)[1] == path, "the file serves every rank"


def test_where_a_calibration_is_found(space, llama, made, monkeypatch):
    """Also an older one, which doesn't say rotary positions."""
    monkeypatch.setattr(reuse, "calibrate", None)
    older = replace(made, meta={key: value for key, value in made.meta.items() if key != "rotary"})
    for folder in ("work", "work/results/calibrations", "checkout/results/calibrations"):
        for each in (made, older):
            path = save_calibration(each, space / folder / "any_name.pt")
            assert obtain(llama)[1].resolve() == path
        path.unlink()


def test_reuse_is_only_on_a_full_match(space, llama, made, monkeypatch):
    """Otherwise this model is calibrated anew, with these settings, and the old file stays."""
    old, asked = save_calibration(made, space / "work" / "old.pt"), []
    monkeypatch.setattr(reuse, "calibrate", lambda loaded, text, **how: asked.append((loaded, text, how)) or made)
    others = [
        *((llama, TEXT, own) for own in ({"samples": 2}, {"seq_len": 40}, {"seed": 1}, {"sink_tokens": 3})),
        (llama, by_position("words", "words.txt", word_text(3000, seed=1)), {}),
        (tiny_loaded("llama", num_hidden_layers=2), TEXT, {}),
        (tiny_loaded("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}), TEXT, {}),
        (wrap(tiny_model("llama").bfloat16(), word_tokenizer(), "tiny-llama"), TEXT, {}),
    ]
    for loaded, text, changed in others:
        _, path = obtain(loaded, text, **changed)
        *called_with, how = asked.pop()
        assert called_with == [loaded, text] and how.items() >= (SMALL | changed).items()
        assert path.resolve() != old and load_calibration(old).meta == made.meta
        path.unlink()


def test_files_that_cannot_be_used_are_rejected(space, llama, made):
    """One that was found damaged, which says how to get another; one that was given, for another model."""
    path = save_calibration(made, space / "work" / "z.pt")
    part = torch.stack(made.statistics.v.scatter).numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(part, bytes(len(part))))
    with pytest.raises(BadArtefact, match="z.pt: not a readable .*or move it away, and this command makes another"):
        obtain(llama)
    path.unlink()
    assert obtain(llama)[1] != path
    given = save_calibration(made, space / "work" / "given" / "c.pt")
    assert obtain(llama, given=given, samples=2, seed=5)[1] == given, "used as it is"
    with pytest.raises(BadArtefact, match="calibrated on tiny-llama"):
        obtain(tiny_loaded("qwen2"), given=given)


def test_output_that_cannot_be_written_is_rejected_before_the_work(space, llama, monkeypatch):
    (space / "work" / "file").write_text("")
    monkeypatch.setattr(reuse, "calibrate", None)
    with pytest.raises(PluginError, match="can't make the folder"):
        obtain(llama, output=space / "work" / "file" / "c.pt")


@pytest.mark.parametrize("projection", ["k_proj", "v_proj", "q_proj"])
def test_nan_activations_are_rejected_by_layer_and_nothing_is_written(projection, space):
    broken = tiny_loaded("llama")
    attention, layer = broken.model.config._attn_implementation, 2 if projection == "q_proj" else 1
    # After the last layer's queries comes no K or V that would show them
    getattr(broken.model.model.layers[layer].self_attn, projection).weight[0, 0] = float("nan")
    with pytest.raises(PluginError, match=f"^layer {layer}: NaN or infinite activations.*--dtype float32"):
        obtain(broken, output=space / "c.pt")
    assert not list(space.rglob("*.*"))
    assert broken.model.config._attn_implementation == attention


# --- which models may use one: its own, and with a warning copies whose weights differ a little


def rounded(loaded, bits: int):
    """A copy whose matrices have so many bits a weight, with one scale for each row."""
    model = copy.deepcopy(loaded.model)
    for weight in model.parameters():
        if weight.dim() > 1:
            step = weight.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
            weight.data = (weight / step).round() * step
    return wrap(model, loaded.tokenizer, "a copy")


def test_a_quantized_copy_may_use_it_with_a_warning(calibration, llama, caplog):
    other = rounded(llama, 8)
    assert other.fingerprint != llama.fingerprint
    with caplog.at_level(logging.WARNING):
        calibration.check_model(llama, "own.pt")
        assert not caplog.records
        for _ in range(2):
            calibration.check_model(other, "copy.pt")
    assert len(caplog.records) == 1, "once for each file and model"
    assert "copy.pt: calibrated on tiny-llama with other weights than those of a copy" in caplog.text


OTHER_THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}


def test_other_models_are_rejected(calibration):
    """Of other weights, and of the same weights at other positions, where a file says them.

    Older files don't, and keep their model's fingerprint, which has only scaled positions.
    """
    for change in ({"seed": 1}, LINEAR):
        with pytest.raises(BadArtefact, match=r"calibrated on tiny-llama .*calibrate this model"):
            calibration.check_model(tiny_loaded("llama", **change), "c.pt")
    other = tiny_loaded("llama", **OTHER_THETA)
    positions = r"on tiny-llama with other rotary positions .*\(rope_theta 10000, not 500000\): calibrate this model"
    with pytest.raises(BadArtefact, match=positions):
        calibration.check_model(other, "c.pt")
    older = {key: value for key, value in calibration.meta.items() if key != "rotary"}
    replace(calibration, meta=older).check_model(other, "c.pt")


def test_likeness_is_the_share_of_signs_in_common(llama):
    own = sketch(llama.model)
    model = copy.deepcopy(llama.model)
    model.lm_head.weight.data.flatten()[:16].neg_()
    signs = 4 * len(own["signs"])
    assert likeness(own, own) == 1
    assert likeness(own, sketch(model)) == pytest.approx(1 - 16 / signs)
    assert likeness(own, sketch(tiny_model("llama", hidden_size=96))) == 0
