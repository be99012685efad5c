"""Combinations that a review found: a cache made of compressors, rows with one question, rejected calls, files."""

import copy

import numpy as np
import pytest
import torch
from generation import generate
from kinds import miniature
from tiny import tiny_model, windows
from transformers import DynamicCache

from gpt2.common.errors import BadArtefact, PluginError
from gpt2.compression.cache.keeping import from_cache
from gpt2.compression.codecs import QUANTIZERS, Compressor, IdentityCompressor, Transform
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.presets import create_cache_from_preset
from gpt2.compression.presets.any_model import preset_for_any_model
from gpt2.models.probe import probe_geometry


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def preset_of(name, model):
    return preset_for_any_model(name, "tiny", probe_geometry(model, "tiny"))


def calibrated_for(heads: int, width: int = 12) -> Compressor:
    eye = torch.eye(width).expand(heads, -1, -1).contiguous()
    return Compressor(QUANTIZERS["int8"], Transform(eye, eye, torch.zeros(heads, width)))


def padded(batch=2, length=40, padding=11):
    ids = windows(batch, length)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}  # fmt: skip


@pytest.mark.parametrize("filled", [True, False])
def test_a_cache_of_a_number_of_layers_is_coded_anew(model, filled):
    """Its geometry has no shapes: what it holds tells them."""
    ids, preset = windows(1, 150), preset_of("kv4", model)
    cache, direct = identity_cache(3), create_cache_from_preset(preset)
    if filled:
        for each in (cache, direct):
            model(ids, past_key_values=each)
    found = cache.to_preset(preset)
    assert found.get_seq_length() == cache.get_seq_length()
    if filled:  # deeper layers read what the first one lost
        assert all(map(torch.equal, found.layers[0].read(), direct.layers[0].read()))


@pytest.mark.parametrize("form", ["n", "1n"])
def test_rows_of_different_texts_are_asked_one_question(model, form):
    ids, question = windows(2, 70), windows(1, 7, seed=3)
    cache = create_cache_from_preset(preset_of("kv8", model))
    model(ids, past_key_values=cache)
    cache.held_tokens.ids = ids
    expected = cache.inputs(new=question.repeat(2, 1))
    found = cache.inputs(new=question[0] if form == "n" else question)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    model.generate(**found, past_key_values=cache, max_new_tokens=2, do_sample=False)


def test_rows_of_one_text_are_left_to_beam_search(model):
    ids, question = windows(1, 70), windows(1, 7, seed=3)
    cache = create_cache_from_preset(preset_of("kv8", model))
    model(ids, past_key_values=cache)
    cache.held_tokens.ids = ids
    cache.batch_repeat_interleave(3)
    found = cache.inputs(new=question)
    assert found["input_ids"].shape == (1, 77)
    model.generate(**found, past_key_values=cache, num_beams=3, max_new_tokens=2, do_sample=False)


def test_a_text_said_again_elsewhere_where_few_channels_have_positions():
    """As Pythia's and StableLM's: what follows has the lengths of a prompt given again, and its tokens."""
    model = tiny_model("gpt_neox", hidden_size=128, num_attention_heads=2, rotary_pct=0.25)
    said, before, after = windows(1, 40, seed=2), windows(1, 4, seed=1), windows(1, 4, seed=4)
    first = torch.cat((before, said, after), dim=1)
    for make in (lambda: identity_cache(3), lambda: create_cache_from_preset(preset_of("kv8", model))):
        cache = make()
        model(first, past_key_values=cache)
        model(said, past_key_values=cache)
        assert cache.get_seq_length() == 88
        cache = make()
        model(torch.cat((said, after), dim=1), past_key_values=cache)
        with pytest.raises(PluginError, match="a prompt of 40 tokens was given to a cache that holds it and 4"):
            generate(model, cache, said)


def test_what_is_rejected_tells_nothing_of_padding(model):
    """A cache of another model's compressors: its first batch had no padding, the next has."""
    right = tiny_model("llama", num_key_value_heads=4)
    fresh, used = (CompressedDynamicCache([calibrated_for(4)] * 3, [calibrated_for(4)] * 3) for _ in range(2))
    with pytest.raises(PluginError, match="calibrated for 4 groups"):
        model(windows(2, 20, seed=5), past_key_values=used)
    logits = [right(**padded(), past_key_values=cache).logits for cache in (fresh, used)]
    assert used.padding.tolist() == fresh.padding.tolist() == [11, 0]
    assert torch.equal(*logits)
    with pytest.raises(PluginError, match="calibrated for 4 groups"):
        model(**padded(), past_key_values=(other := CompressedDynamicCache([calibrated_for(4)] * 3,
                                                                           [calibrated_for(4)] * 3)))  # fmt: skip
    assert other.padding is None


def test_a_prompt_of_one_token_that_is_fed_again_is_no_padding(model):
    cache, ids = create_cache_from_preset(preset_of("kv8", model)), windows(1, 9)
    with pytest.raises(PluginError, match="use_cache=False"):
        generate(model, cache, ids[:, :1], use_cache=False)
    assert cache.padding is None


def test_a_file_that_does_not_fit_leaves_the_cache_empty(model, tmp_path):
    cache = CompressedDynamicCache([IdentityCompressor()] * 3, [Compressor(QUANTIZERS["int8"])] * 3)
    ids = windows(1, 90)
    model(ids, past_key_values=cache)
    path = cache.save(tmp_path / "cache.safetensors", token_ids=ids)
    into = CompressedDynamicCache([IdentityCompressor()] * 3, [calibrated_for(4)] * 3)
    with pytest.raises(BadArtefact, match="cache.safetensors: layer 0, V: the codec was calibrated for 4 groups"):
        CompressedDynamicCache.load(path, into=into)
    right = tiny_model("llama", num_key_value_heads=4)
    right(ids, past_key_values=into)
    assert [len(store) for layer in into.layers for store in layer.stores.values()] == [90] * 6


def test_a_file_of_a_preset_without_layers_and_a_model_with_windows(tmp_path):
    """Made without the model, such a cache keeps what windows forget; so does the one that is loaded."""
    model, ids = tiny_model("mistral", sliding_window=200), windows(1, 300)
    preset = {"model": "tiny", "rank": 12, "target": "kv", "bits": 8, "calibration_file": "", "head_dim": 12,
              "num_layers": 3, "codec": "identity"}  # fmt: skip
    cache = create_cache_from_preset(preset)
    model(ids, past_key_values=cache)
    path = cache.save(tmp_path / "cache.safetensors", token_ids=ids, model=model)
    for given in ({"model": model}, {"config": model.config}):
        again = CompressedDynamicCache.load(path, **given)
        assert again.get_seq_length() == 300 and again.nbytes() <= cache.nbytes()
    new = windows(1, 20, seed=1)
    assert torch.equal(model(new, past_key_values=again).logits, model(new, past_key_values=cache).logits)


def test_what_was_loaded_in_inference_mode_goes_on_outside(model, tmp_path):
    cache, ids, new = create_cache_from_preset(preset_of("kv8", model)), windows(2, 150), windows(2, 80, seed=1)
    model(ids, past_key_values=cache)
    path = cache.save(tmp_path / "cache.safetensors", token_ids=ids, model=model)
    with torch.inference_mode():
        loaded = CompressedDynamicCache.load(path, into=create_cache_from_preset(preset_of("kv8", model)))
    for each in (cache, loaded):
        each.crop(-20)
    with torch.no_grad():
        assert torch.equal(model(new, past_key_values=loaded).logits, model(new, past_key_values=cache).logits)


def test_numbers_of_numpy_are_saved(tmp_path):
    model, ids = tiny_model("mistral", sliding_window=200), windows(1, 300)
    preset = preset_of("kv8", model)
    cache = create_cache_from_preset(preset, model=model, sink_tokens=np.int64(8), recent_tokens=np.int32(5))
    model(ids, past_key_values=cache)
    path = cache.save(tmp_path / "cache.safetensors", token_ids=ids, model=model)
    assert CompressedDynamicCache.load(path, model=model).get_seq_length() == 300


def test_a_window_that_is_coded_anew_twice_knows_where_it_begins():
    model, ids = tiny_model("mistral", sliding_window=200), windows(1, 333)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(ids, past_key_values=cache)
    cache.crop(0)
    once = from_cache(cache, preset_of("kv8", model), model=model)
    twice = once.to_preset(preset_of("kv4", model), model=model)
    for each in (once, twice):
        with pytest.raises(RuntimeError, match="has forgotten what the 330 tokens that stay would see"):
            copy.deepcopy(each).crop(-3)


def test_after_a_reset_windows_forget_again():
    """Also where an answer before it was speculated, for which the past is recorded."""
    model, ids = tiny_model("mistral", sliding_window=200), windows(1, 900)
    used, fresh = (create_cache_from_preset(preset_of("kv8", model), model=model) for _ in range(2))
    generate(model, used, ids[:, :40].repeat(1, 2), prompt_lookup_num_tokens=3)
    used.reset()
    for each in (used, fresh):
        for part in ids.split(90, dim=1):
            model(part, past_key_values=each)
    assert used.nbytes() == fresh.nbytes()


def test_rows_of_a_hybrid_that_may_be_padded_need_a_mask():
    """Its first layer keeps no K and V to find padding by: without a mask, padding would count as text."""
    model, rows, new = miniature("lfm2").model, padded(length=70), windows(2, 5, seed=1)
    cache = create_cache_from_preset(preset_of("kv8", model), model=model)
    model(**rows, past_key_values=cache)
    cache.held_tokens.ids = rows["input_ids"]
    with pytest.raises(PluginError, match="give mask="):
        cache.inputs(new=new)
    mask = torch.cat((rows["attention_mask"], torch.ones_like(new)), dim=1)
    assert torch.equal(cache.inputs(new=new, mask=mask)["attention_mask"], mask)
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.inputs(new=new[1:])["attention_mask"].all()
