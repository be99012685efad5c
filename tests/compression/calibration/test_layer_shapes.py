"""Calibrations of models whose layers differ: in shape, in whether they keep K and V, in windows, latent attention."""

import hashlib
from pathlib import Path

import pytest
import torch
from calibrations import SINKS, TEXT, change, close, direct_gradients, identical, rejected, scatter
from layer_shapes import MODELS, ONE_SHAPE, lost, made, model_of, shapes_of, vectors
from sampling import covering, sampled
from tiny import tiny_model, windows, word_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from gpt2.common import tensor_file
from gpt2.common.errors import PluginError
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.file import load_calibration, save_calibration
from gpt2.compression.calibration.fisher import collect_fisher
from gpt2.compression.calibration.statistics import collect
from gpt2.compression.codecs import BASES, QUANTIZERS
from gpt2.compression.settings import compressors_for
from gpt2.experiments.miniatures import tiny_config
from gpt2.models.attention_function import wrapped_attention
from gpt2.models.geometry import FULL, NOTHING, SLIDING, Geometry, LayerGeometry, Shape
from gpt2.models.loading import wrap

MIXED = QUANTIZERS["mixed"]

# --- statistics


@pytest.mark.parametrize("family", sampled(MODELS, 3))
def test_statistics_are_of_every_layer_in_its_own_shape(family):
    loaded, batches = model_of(family), windows(2, 30)
    statistics = collect(loaded, batches, SINKS)
    gathered = collect_fisher(loaded, batches, statistics, SINKS, {"grouped": BASES["grouped"]})["grouped"]
    expected = direct_gradients(loaded, batches)
    assert list(expected) == loaded.geometry.attention
    for side, place in (("k", 0), ("v", 1)):
        moments = getattr(statistics, side)
        shapes = [layer.side(side) for layer in loaded.geometry.layers]
        assert shapes_of(moments.mean) == [shape and (shape.heads, shape.width) for shape in shapes]
        for layer, parts in expected.items():
            x, g = parts[place], parts[place + 2]
            assert moments.count[layer] == 2 * (30 - SINKS)
            assert torch.allclose(moments.mean[layer], x.mean(1), rtol=1e-4, atol=1e-5)
            assert close(moments.scatter[layer], scatter(x))
            assert close(moments.metrics["fisher"][layer], g.mT @ g / g.shape[1], 1e-3) and g.norm() > 0
            basis = 2 * layer + place
            joined = x.transpose(0, 1).flatten(1)  # all heads of these layers fit into one group
            assert gathered.moments.mean[basis].shape == (1, joined.shape[1])
            assert torch.allclose(gathered.moments.mean[basis][0], joined.mean(0), rtol=1e-4, atol=1e-5)


def test_the_attention_metric_is_of_the_queries_that_read_a_layers_keys():
    """Also of later layers, where they read the keys of an earlier one."""
    loaded, batches = model_of("gemma4_text"), windows(2, 40)
    assert [layer.kind for layer in loaded.geometry.layers] == [SLIDING, FULL, NOTHING, NOTHING]
    seen: dict[int, list[Tensor]] = {0: [], 1: []}

    def tap(attention):
        def attend(module, query, *args, **kwargs):
            seen[module.layer_idx % 2].append(query[0, :, SINKS:].double())
            return attention(module, query, *args, **kwargs)

        return attend

    metric = collect(loaded, batches, SINKS).k.metrics["attention"]
    with torch.no_grad(), wrapped_attention(loaded.model, tap):
        for tokens in batches:
            loaded.model(tokens[None], use_cache=True)
    for layer, queries in seen.items():
        q = torch.cat(queries, dim=1)
        assert len(queries) == 4
        for head in range(2):
            mine = q[2 * head : 2 * head + 2].flatten(0, 1)
            assert close(metric[layer][head], mine.mT @ mine / len(mine))
    assert metric[2:] == [None, None]


def test_queries_of_a_model_with_flash_attention_are_seen(monkeypatch):
    """Its function looks for its kernel by the name in the config; so another is wrapped."""
    model, seen = tiny_model("llama"), []
    monkeypatch.setattr(
        model, "set_attn_implementation", lambda name: setattr(model.config, "_attn_implementation", name)
    )
    model.set_attn_implementation("flash_attention_2")

    def tap(attention):
        return lambda module, query, *args, **kwargs: seen.append(query) or attention(module, query, *args, **kwargs)

    with torch.no_grad(), wrapped_attention(model, tap):
        model(torch.arange(3, 9)[None])
    assert len(seen) == model.config.num_hidden_layers and model.config._attn_implementation == "flash_attention_2"


def test_latent_attention_has_no_attention_metric_and_says_so():
    found = made("deepseek_v3")
    assert set(found.statistics.k.metrics) == set(found.statistics.v.metrics) == {"fisher"}
    with pytest.raises(PluginError, match="codec attention needs statistics that this calibration doesn't have"):
        found.transform("k", 1, 4, "attention")
    metrics = found.statistics.k.metrics
    with pytest.raises(PluginError, match="layer 1: codec fisher has no metric there"):
        found.statistics.k.metrics = {"fisher": [metrics["fisher"][0], None, metrics["fisher"][2]]}
        BASES["fisher"].fit(found.statistics.k, 1)
    found.statistics.k.metrics = metrics


def test_checkpointing_beside_recurrent_layers_gives_the_same():
    """And is rejected where attention reads something else."""
    for family in ("deepseek_v3", "gemma4_text"):
        with pytest.raises(PluginError, match="leave --gradient-checkpointing out"):
            collect_fisher(model_of(family), windows(1, 40), None, SINKS, {}, checkpointing=True)
    loaded, batches = model_of("qwen3_next"), windows(2, 40)
    found = []
    for checkpointing in (False, True):
        statistics = collect(loaded, batches, SINKS)
        collect_fisher(loaded, batches, statistics, SINKS, {}, checkpointing=checkpointing)
        found.append(statistics.v.metrics["fisher"][2])
    assert close(*found)


# --- files


@pytest.mark.parametrize(("family", "suffix"), covering(MODELS, [".pt", ".safetensors"]))
def test_what_is_loaded_is_what_was_saved(family, suffix, tmp_path):
    calibration = made(family)
    path = save_calibration(calibration, tmp_path / f"c{suffix}")
    back = load_calibration(path)
    assert back.geometry == calibration.geometry == model_of(family).geometry
    assert identical(tensor_file.read(save_calibration(back, tmp_path / f"again{suffix}")), tensor_file.read(path))
    assert list(back.multi_head) == (["framed", "grouped", "joint"] if family in ONE_SHAPE else ["grouped"])
    for layer in calibration.geometry.attention:
        for side in "kv":
            for codec in ("pca", "fisher", *back.multi_head):
                one, other = (c.transform(side, layer, codec=codec) for c in (calibration, back))
                assert torch.equal(one.E, other.E) and torch.equal(one.D, other.D) and torch.equal(one.mean, other.mean)
                bits = {c.quantizer(MIXED.at(3.0), side, layer, codec).bits for c in (calibration, back)}
                assert len(bits) == 1


@pytest.mark.parametrize("family", sampled(MODELS, 2))
def test_a_compact_calibration_has_a_quarter_of_the_bytes_of_its_basis(family, tmp_path):
    whole = made(family)
    back = load_calibration(save_calibration(whole.compact("grouped"), tmp_path / "c.pt"))
    assert back.geometry == whole.geometry and back.statistics is None and list(back.multi_head) == ["grouped"]
    stored, single = tensor_file.read(tmp_path / "c.pt")["grouped"], whole.multi_head["grouped"].record(whole.geometry)
    # A stack of all layers, or a list of stacks where layers differ in shape
    E, errors, scale, single_E = (
        part if isinstance(part, list) else [part]
        for part in (stored["E"], stored["errors"], stored["scale"], single["E"])
    )
    assert {own.dtype for own in E} == {torch.int8} and {own.dtype for own in errors} == {torch.bfloat16}
    assert [4 * own.nbytes for own in E] == [own.nbytes for own in single_E]
    assert [tuple(own.shape) for own in scale] == [(*own.shape[:2], 1, own.shape[3]) for own in E]
    assert identical(tensor_file.read(save_calibration(back, tmp_path / "again.pt"))["grouped"], stored)
    variance = back.kept_variance()
    k, v = compressors_for("kv", 8, None, back, quantizer="mixed")
    for layer, (keys, values) in vectors(family).items():
        assert close(back.transform("k", layer).E, whole.transform("k", layer, codec="grouped").E, 1e-2)
        assert lost(k[layer], keys) < 0.06 and lost(v[layer], values) < 0.06
        assert torch.allclose(variance["v"][layer][..., -1], torch.ones(()).double())
    assert [own is None for own in variance["k"]] == [not layer.attends for layer in back.geometry.layers]


LATENT, KEY = Shape(1, 16), Shape(1, 8)
RECORD = Geometry((LayerGeometry(FULL, LATENT, KEY),) * 3).record()


WRONG_LAYERS = [  # and what is said of them
    (RECORD[:2], "expected 3 layers, as num_layers says, found 2"), (RECORD + RECORD, "expected 3 layers"),
    ([RECORD[0] | {"v": None}, *RECORD[1:]], "layer 0: expected shapes of K and V for full_attention"),
    ([*RECORD[:2], RECORD[0] | {"type": "linear_attention"}], "layer 2: expected no shapes for linear_attention"),
    ([{"type": "dummy"}] * 3, "expected a layer that keeps K and V, found none"),
    ([record | {"k": [1, 12]} for record in RECORD], "expected head_dim 16"),
    ([record | {"k": [2, 16]} for record in RECORD], "expected num_kv_heads 1"),
    ([record | {"v": [1, 16]} for record in RECORD], "expected"),
    ([record | {"k": [1, 4096]} for record in RECORD], "expected a whole number from 1 to 1024"),
    ([{**RECORD[0], "type": "else"}] * 3, "expected 'full_attention' or"), ([{}] * 3, "expected"),
    (3, "expected a list"), (None, "expected a list"),
]  # fmt: skip
# How to spoil the means of two layers of different shapes
WRONG_STACKS = [
    lambda own: own[:1], lambda own: own[::-1], lambda own: own[0], lambda own: [own[0], None],
    lambda own: [own[0], own[1] * float("nan")], lambda own: [*own, own[0]],
]  # fmt: skip
WRONG = [
    *(("deepseek_v3", "meta.layers", layers, words) for layers, words in WRONG_LAYERS),
    *(("gemma4_text", "statistics.k_mean", change, "field 'statistics.k_mean") for change in WRONG_STACKS),
    ("gemma4_text", "joint.E", lambda own: own[::-1], "field 'joint.E[0]'"),
]


def test_layers_and_stacks_that_dont_fit_the_rest_of_a_file(tmp_path):
    path = tmp_path / "c.pt"
    for family, place, value, words in WRONG:
        save_calibration(made(family), path)
        change(path, *place.split("."), value=value)
        rejected(path, words)
    record = tensor_file.read(save_calibration(made("deepseek_v3"), path))
    tensor_file.write(path, record | {"joint": record["grouped"]})
    rejected(path, "layer 0: codec joint needs K and V of one shape, got 1 x 16 and 1 x 8")


# Of matrices, means and rotations of the committed file: later versions must read the same
BUILT_IN = "304e590ec9cb1772adf7ebf3d80a1b577ba8544e551b6805f881ae2b3b5396ca"


def test_committed_files_read_as_they_did(tmp_path):
    """Transforms are the same, and what is written is the same file."""
    path = Path(__file__).parents[3] / "results" / "calibrations" / "kv_framed_smollm2-135m.pt"
    calibration = load_calibration(path)
    assert calibration.geometry == Geometry.uniform(30, 3, 64)
    digest = hashlib.sha256()
    for layer in range(30):
        for side in "kv":
            transform = calibration.transform(side, layer)
            for part in (transform.E, transform.mean, transform.rotary.frequencies):
                digest.update(part.contiguous().numpy().tobytes())
    assert digest.hexdigest() == BUILT_IN
    again = save_calibration(calibration, tmp_path / "again.pt")
    assert identical(tensor_file.read(again), tensor_file.read(path))


# --- values that are their keys before norm and rotation (Gemma 4's `attention_k_eq_v`)


@pytest.mark.parametrize("tied", [True, False])
def test_a_joint_basis_stores_keys_and_values_once_where_they_are_tied(tied):
    """Un-rotated keys are values times the norm's weights: half of the coordinates is constant, and takes no bits."""
    config = tiny_config("gemma4_text")
    config.attention_k_eq_v = tied
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loaded = wrap(AutoModelForCausalLM.from_config(config), word_tokenizer(), "gemma4")
    calibration = calibrate(loaded, TEXT, rank=16, samples=3, seq_len=132, codec="joint", compact=True)
    full = next(i for i in loaded.geometry.attention if loaded.geometry.layers[i].window is None)
    spectrum = calibration.multi_head["joint"].spectra()["kv"][full].double()
    share_of_the_last_half = float(spectrum[..., spectrum.shape[-1] // 2 :].sum() / spectrum.sum())
    assert share_of_the_last_half < 1e-6 if tied else share_of_the_last_half > 1e-4
