"""Shapes: models of random weights made from a few fields, and what is no shape."""

import json

import pytest
import torch
from sampling import sampled
from tiny import FAMILIES, tiny_loaded, tiny_model, write_shape
from transformers import AutoConfig, AutoModelForCausalLM

from gpt2.common.errors import PluginError
from gpt2.compression.named_caches import from_preset
from gpt2.models import geometry, loading, probe, random_weights

# Parameters of the published models, and layers of those that have others than K and V of one shape; DeepSeek's many
# experts, which take seconds, are not where a sample of three is taken from
PUBLISHED = {
    "gemma-2-2b": (2_614_341_888, ""),
    "deepseek-v3": (671_026_404_352, "61 layers: full_attention, K 1 x 512, V 1 x 64"),
    "gemma-3-4b": (3_880_263_168, "29 layers: sliding_attention, window 1024, K 4 x 256, V 4 x 256; "
                                  "5 layers: full_attention, K 4 x 256, V 4 x 256"),
    "gpt-oss-20b": (20_914_757_184, "12 layers: sliding_attention, window 128, K 8 x 64, V 8 x 64; "
                                    "12 layers: full_attention, K 8 x 64, V 8 x 64"),
    "llama-3.1-8b": (8_030_261_248, ""),
    "mistral-7b-v0.1": (7_241_732_096, ""),
    "qwen2.5-0.5b": (494_032_768, ""),
    "qwen2.5-7b": (7_615_616_512, ""),
    "qwen2.5-72b": (72_706_203_648, ""),
    "qwen3.5-4b": (4_205_751_296, "24 layers: linear_attention; 8 layers: full_attention, K 4 x 256, V 4 x 256"),
}  # fmt: skip


def test_every_shape_is_expected():
    assert {path.stem for path in random_weights.FOLDER.glob("*.json")} == set(PUBLISHED)


@pytest.mark.parametrize("name", sampled(PUBLISHED, 3))
def test_an_outline_has_the_parameters_and_layers_of_the_published_model_and_no_weights(name):
    loaded, (parameters, layers) = random_weights.outline(f"{name}.json"), PUBLISHED[name]
    config, fields = loaded.model.config, json.loads((random_weights.FOLDER / f"{name}.json").read_text())
    assert loaded.model.num_parameters() == parameters and layers in str(loaded.geometry)
    assert all(parameter.is_meta for parameter in loaded.model.parameters())
    assert (loaded.spec, loaded.slug, loaded.device) == (name, name, torch.device("cpu")) and loaded.random_weights
    rope = config.rope_parameters
    assert config.max_position_embeddings >= 8192 and rope.get("full_attention", rope)["rope_theta"] >= 10_000
    known = vars(AutoConfig.for_model(**fields)).keys() | {"model_type", "rope_theta", "rope_scaling"}
    assert fields.keys() <= known, "plain config fields"


def test_an_outline_of_a_few_layers_says_so():
    loaded = random_weights.outline("gpt-oss-20b.json", layers=3)
    assert (loaded.spec, loaded.slug) == ("gpt-oss-20b (3 layers)", "gpt-oss-20b-3-layers")
    assert [layer.window for layer in loaded.geometry.layers] == [128, None, 128]
    assert loaded.geometry == probe.geometry_of(loaded.model.config, "gpt-oss")[0]
    assert loaded.fingerprint != random_weights.outline("llama-3.1-8b.json", 1).fingerprint


@pytest.fixture(scope="module")
def shape_file(tmp_path_factory):
    return write_shape(tmp_path_factory.mktemp("shapes") / "tiny-shape.json")


@pytest.mark.parametrize(("layers", "found"), [(None, "3 layers"), (1, "1 layer")])
def test_a_shape_becomes_a_model_with_random_weights(shape_file, layers, found):
    loaded = random_weights.load(str(shape_file), "cpu", "bfloat16", layers)
    assert loaded.geometry == geometry.Geometry.uniform(int(found[0]), 2, 12)
    assert loaded.random_weights and loaded.tokenizer is None
    assert loaded.spec == f"tiny-shape.json (random weights, {found})"
    assert loaded.slug == f"tiny-shape-random-weights-{found.replace(' ', '-')}"
    assert loaded.model.dtype == torch.bfloat16 and not loaded.model.training and loaded.max_context == 512
    logits = loaded.model(torch.arange(40)[None]).logits
    assert logits.isfinite().all() and logits.std() > 0


@pytest.mark.parametrize("family", sampled(sorted(set(FAMILIES) - {"llama"}), 4))
def test_a_shape_of_any_family_gives_finite_logits(family, tmp_path):
    loaded = random_weights.load(str(write_shape(tmp_path / "s.json", family)), "cpu")
    assert loaded.model.dtype == torch.float32 and loaded.geometry == tiny_loaded(family).geometry
    assert loaded.model(torch.arange(40)[None]).logits.isfinite().all()


def test_a_shape_has_the_positions_of_its_config_and_ties_weights(tmp_path):
    """Rotary frequencies are no weights: skipping initialization must not skip them."""
    tied = write_shape(tmp_path / "tied.json", tie_word_embeddings=True)
    model = random_weights.load(str(tied), "cpu").model
    assert torch.equal(model.model.rotary_emb.inv_freq, tiny_model("llama").model.rotary_emb.inv_freq)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_spec_that_is_no_shape_is_loaded_as_ever(model_folder):
    loaded = random_weights.load(str(model_folder), "cpu")
    assert not loaded.random_weights and loaded.tokenizer is not None
    with pytest.raises(PluginError, match="--layers is for a shape such as configs/models/.*has weights"):
        random_weights.load(str(model_folder), "cpu", layers=2)


def test_a_shape_that_isnt_there_or_has_fewer_layers_is_rejected(shape_file):
    with pytest.raises(PluginError, match="no shape 'none.json'.*configs/models/qwen2.5-7b.json"):
        random_weights.load("none.json", "cpu")
    with pytest.raises(PluginError, match="--layers 4: tiny-shape.json has 3 layers"):
        random_weights.load(str(shape_file), "cpu", layers=4)
    with pytest.raises(PluginError, match="is a shape without weights"):
        loading.load(str(shape_file))


FIELDS = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 2,
          "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 100}  # fmt: skip


def test_any_built_in_preset_serves_a_shape(tmp_path):
    """Speed doesn't depend on what a basis says: noise stands in for the calibration of another model."""
    loaded = random_weights.load(str(write_shape(tmp_path / "shape.json", **FIELDS)), "cpu")
    for name, shown in (("r120-vonly", "Compressor(none, rank=60)"), ("int4-vonly", "Compressor(int4)")):
        choice = from_preset(name, loaded)
        cache = choice.make()
        loaded.model(torch.arange(20)[None], past_key_values=cache, use_cache=True)
        assert repr(cache.layers[0].stores["V"].compressor) == shown
        assert not {"ppl_delta", "figures"} & choice.record().keys()
    with pytest.raises(PluginError, match="no preset 'int4-vonli'.*did you mean 'int4-vonly'"):
        from_preset("int4-vonli", loaded)


# Of fewer than no layers some versions of transformers make a model, without a cache
NO_MODEL = [{"num_hidden_layers": -1}, {"head_dim": 0}, {"num_key_value_heads": 3}, {"vocab_size": 0},
            {"hidden_act": "x"}, {"rope_scaling": {"type": []}}, {"hidden_size": -4}]  # fmt: skip
BAD_SHAPES = {
    "{": "not a readable model's shape",
    "[1]": "expected a dict, found list",
    "{}": "field 'model_type': expected text",
    '{"model_type": "zzz"}': "not a model's shape.*zzz",
    '{"model_type": "llama", "num_hidden_layers": "three"}': "field 'num_hidden_layers': expected a whole number",
    '{"model_type": "t5"}': "encoder-decoder",
    **{json.dumps(FIELDS | wrong): "bad.json" for wrong in NO_MODEL},
}


@pytest.mark.parametrize("content", BAD_SHAPES)
def test_what_is_no_shape_is_rejected(content, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(PluginError, match=BAD_SHAPES[content]) as error:
        random_weights.load(str(path), "cpu")
    assert "bad.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, None])
def test_experts_are_laid_out_whatever_the_dtype(dtype):
    """Without values, products of experts are there in bfloat16 alone."""
    config = AutoConfig.for_model("mixtral", hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=99,
                                  num_attention_heads=4, num_key_value_heads=2, dtype=dtype)  # fmt: skip
    found, size = probe.geometry_of(config, "experts")
    assert found == geometry.Geometry.uniform(2, 2, 16)
    with torch.device("meta"):
        assert size == AutoModelForCausalLM.from_config(config).num_parameters() * (4 if dtype is torch.float32 else 2)
