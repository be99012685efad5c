"""A cache as a file: what comes back is what was saved, for every kind of layer, and anything else is refused."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from bad_files import put
from calibrations import change
from kept import PRESETS, TINY_LLAMA, cache_of
from kinds import KINDS, cut, feed, geometry_of, ids_of, model_of
from presets import PRESET, write
from safetensors import safe_open
from sampling import ALL, covering
from stores import transform
from tiny import tiny_model
from torch import Tensor

from gpt2.common import mapped_file
from gpt2.common.errors import BadArtefact, PluginError
from gpt2.compression.cache import dynamic_cache, saved
from gpt2.compression.cache.size import exact_and_unused_bytes
from gpt2.compression.calibration.file import save_calibration
from gpt2.compression.codecs import QUANTIZERS, Compressor, IdentityCompressor
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.presets import create_cache_from_preset
from gpt2.compression.presets.any_model import preset_for_any_model
from gpt2.compression.settings import compressors_for
from gpt2.experiments.miniatures import tiny_family
from gpt2.models.geometry import Geometry

load = CompressedDynamicCache.load
IDS = ids_of(150, batch=2)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def filled(model):
    cache = cache_of(model)
    feed(model, cache, IDS)
    return cache


@pytest.fixture
def good(tmp_path, filled):
    """A file of a cache of the tiny Llama that holds `IDS`."""
    return filled.save(tmp_path / "good.safetensors", token_ids=IDS)


def rejected(message: str, call, *args, error: type = PluginError, **how) -> str:
    """The whole message of the error that the call raises."""
    with pytest.raises(error, match=message) as caught:
        call(*args, **how)
    return str(caught.value)


# --- what comes back


@pytest.mark.parametrize(("family", "name"), covering(KINDS, PRESETS))
def test_every_kind_of_layer_comes_back(family, name, tmp_path):
    """A prompt past the window, and what follows: logits to the bit, from the file, from a fork and from the cache."""
    model, ids = model_of(family), cut(family, ids_of(200))
    cache = cache_of(model, name, family, geometry_of(family))
    feed(model, cache, ids)
    again = load(cache.save(tmp_path / "c.safetensors", token_ids=ids), model=model)
    _, unused = exact_and_unused_bytes(cache)
    assert again.get_seq_length() == ids.shape[1] and of_tokens(again) == of_tokens(cache) - unused
    assert torch.equal(again.token_ids, ids) and again.recipe.fingerprint == cache.recipe.fingerprint
    feed(model, cache.fork(), cut(family, ids_of(60, seed=2)))
    fork = cache.fork()
    for more in (cut(family, ids_of(60, seed=1)), ids_of(1)):
        wanted = feed(model, cache, more)
        assert torch.equal(feed(model, again, more), wanted) and torch.equal(feed(model, fork, more), wanted)


def of_tokens(cache) -> int:
    """Bytes of K and V. Layers that share an indexer hold one each after loading."""
    return sum(store.nbytes() for layer in cache.compressed for store in layer.stores.values())


def test_left_padding_comes_back(model, tmp_path):
    ids, mask, new = IDS.clone(), torch.ones_like(IDS), ids_of(20, batch=2, seed=1)
    mask[0, :40] = ids[0, :40] = 0
    cache = cache_of(model)
    model(ids, attention_mask=mask, past_key_values=cache)
    again = load(cache.save(tmp_path / "c.safetensors", token_ids=ids), model=model)
    inputs = again.inputs(new=new)
    assert inputs["attention_mask"].tolist() == torch.cat((mask, torch.ones_like(new)), dim=1).tolist()
    how = {"max_new_tokens": 9, "do_sample": False}
    assert torch.equal(*(model.generate(**inputs, past_key_values=each, **how) for each in (cache, again)))


def test_the_file_is_as_large_as_what_is_held(tmp_path):
    """Within 2 % at 4,096 tokens, and any reader of safetensors reads it."""
    geometry = Geometry.uniform(2, 3, 64)
    cache, empty = (CompressedDynamicCache(*compressors_for("kv", 4, geometry), geometry=geometry) for _ in range(2))
    k, v = torch.randn(2, 1, 3, 4096, 64).bfloat16()
    for layer in cache.layers:
        layer.store(k, v)
    path = cache.save(tmp_path / "c.safetensors", token_ids=torch.zeros(4096))
    assert path.stat().st_size == pytest.approx(cache.nbytes(), rel=0.02)
    with safe_open(path, "pt") as file:
        assert {"token_ids", "layers.1.K.sinks", "layers.0.V.tail"} <= set(file.keys())
        assert file.get_tensor("token_ids").shape == (1, 4096)
    assert all(map(torch.equal, load(path, into=empty).layers[1].read(), cache.layers[1].read()))


def test_what_is_written_to_a_loaded_cache_stays_out_of_the_file(good, model):
    """Pages are mapped: a crop gives room back for the next block. And no folder of this machine is in the file."""
    header, size = saved.about(good)
    assert "folder" not in header["recipe"]["preset"] and os.sep + "tmp" not in json.dumps(header)
    assert size < good.stat().st_size
    before, cache = good.read_bytes(), load(good, model=model)
    cache.crop(-70)
    feed(model, cache, ids_of(100, batch=2, seed=1))
    assert good.read_bytes() == before and load(good, model=model).get_seq_length() == 150


def test_what_was_loaded_in_inference_mode_goes_on_outside(model, tmp_path):
    preset = preset_for_any_model("kv8", "llama", TINY_LLAMA)
    cache = create_cache_from_preset(preset)
    feed(model, cache, IDS)
    path = cache.save(tmp_path / "c.safetensors", token_ids=IDS, model=model)
    with torch.inference_mode():
        loaded = load(path, into=create_cache_from_preset(preset))
    for each in (cache, loaded):
        each.crop(-20)
    assert torch.equal(*(feed(model, each, ids_of(80, batch=2, seed=1)) for each in (cache, loaded)))


def test_numbers_of_numpy_are_saved(tmp_path):
    model, ids = model_of("mistral"), ids_of(300)
    preset = preset_for_any_model("kv8", "mistral", geometry_of("mistral"))
    cache = create_cache_from_preset(preset, model=model, sink_tokens=np.int64(8), recent_tokens=np.int32(5))
    feed(model, cache, ids)
    path = cache.save(tmp_path / "c.safetensors", token_ids=ids)
    assert load(path, model=model).get_seq_length() == 300


def test_a_file_of_a_preset_without_layers_and_a_model_with_windows(tmp_path):
    """Made without the model, such a cache keeps what windows forget; so does the one that is loaded."""
    model, ids, new = tiny_model("mistral", sliding_window=200), ids_of(300), ids_of(20, seed=1)
    own = {"rank": 12, "target": "kv", "codec": "identity", "calibration_file": ""}
    cache = create_cache_from_preset(PRESET | own)
    feed(model, cache, ids)
    path = cache.save(tmp_path / "c.safetensors", token_ids=ids, model=model)
    for given in ({"model": model}, {"config": model.config}):
        again = load(path, **given)
        assert again.get_seq_length() == 300 and again.nbytes() <= cache.nbytes()
    assert torch.equal(feed(model, again, new), feed(model, cache, new))


def test_a_cache_of_compressors_is_loaded_into_one_like_it(model, tmp_path):
    cache = identity_cache(3)
    feed(model, cache, ids_of(30))
    path = cache.save(tmp_path / "c.safetensors", token_ids=ids_of(30))
    assert saved.about(path)[0]["recipe"] is None
    rejected("into=", load, path, model=model)
    rejected("give model= or config=", load, path)
    rejected("holds tokens", load, path, into=cache)
    other = CompressedDynamicCache(*compressors_for("kv", 4, TINY_LLAMA))
    rejected("its codec stores", load, path, into=other, error=BadArtefact)
    assert load(path, into=identity_cache(3)).get_seq_length() == 30


def test_a_calibrated_preset_needs_its_own_calibration(llama, calibration, tmp_path, monkeypatch):
    """Looked for beside the file, as beside a preset; one that was changed since reads the codes otherwise."""
    kept = save_calibration(calibration, tmp_path / "there" / "c.pt")
    cache = create_cache_from_preset(PRESET | {"calibration_file": str(kept), "target": "kv"}, model=llama)
    feed(llama.model, cache, ids_of(150))
    path = cache.save(tmp_path / "there" / "doc.safetensors", token_ids=ids_of(150))
    monkeypatch.chdir(tmp_path)
    moved = (tmp_path / "there").rename(tmp_path / "elsewhere")
    again = load(moved / path.name, model=llama)
    assert torch.equal(feed(llama.model, again, ids_of(5)), feed(llama.model, cache, ids_of(5)))

    change(moved / "c.pt", "bases", "v", "D", value=lambda D: -D)
    rejected("calibration", load, moved / path.name, model=llama, error=BadArtefact)
    (moved / "c.pt").unlink()
    rejected("Calibration file not found", load, moved / path.name, model=llama)


def test_a_calibration_is_found_that_the_preset_names_from_its_own_folder(llama, calibration, tmp_path):
    """A cache's file in another folder names it from there, also when all folders move together."""
    save_calibration(calibration, tmp_path / "all/made/calibrations/c.pt")
    preset = write(tmp_path / "all/made/presets/p.json", PRESET | {"calibration_file": "../calibrations/c.pt"})
    cache = create_cache_from_preset(preset, model=llama)
    feed(llama.model, cache, ids_of(30))
    (tmp_path / "all/docs").mkdir()
    cache.save(tmp_path / "all/docs/doc.safetensors", token_ids=ids_of(30))
    again = load((tmp_path / "all").rename(tmp_path / "moved") / "docs/doc.safetensors", model=llama)
    assert again.get_seq_length() == 30
    again.save(tmp_path / "here.safetensors", token_ids=ids_of(30))
    assert load(tmp_path / "here.safetensors", model=llama).get_seq_length() == 30


# --- what is refused


def test_damaged_files(good, tmp_path, model):
    """A byte changed anywhere, several, or an end that is missing or too much."""
    content, dice, bad = good.read_bytes(), random.Random(0), tmp_path / "bad.safetensors"
    header = 8 + int.from_bytes(content[:8], "little")
    for number in range(200 if ALL else 48):
        changed = bytearray(content)
        if number % 4 == 3:
            cut = dice.randrange(len(content)) if number % 8 == 3 else len(content) - dice.randrange(1, 9)
            changed = changed[:cut] if number % 16 != 7 else changed + bytes(dice.randrange(1, 9))
        else:
            places = range(header) if number % 4 == 0 else range(len(content))
            for place in dice.sample(places, dice.choice([1, 1, 5])):
                changed[place] ^= dice.randrange(1, 256)
        bad.write_bytes(changed)
        said = rejected("bad.safetensors.*not a readable saved cache", load, bad, model=model, error=BadArtefact)
        assert "\n" not in said and "again" in said


def test_files_of_other_kinds_and_of_other_models(good, tmp_path, model):
    """Of the same shape with other weights by its fingerprint, of another shape by its layers."""
    other = tiny_model("llama", seed=1)
    for content in (b"", b"PK\x03\x04", b"{}", bytes(100), b"\xff" * 100):
        (tmp_path / "x").write_bytes(content)
        rejected("not a readable saved cache", load, tmp_path / "x", model=model, error=BadArtefact)
    for path in (tmp_path, tmp_path / "nowhere"):
        rejected("no such file|no regular file", load, path, model=model, error=BadArtefact)
    by_another = r"filled by llama \(fingerprint \w{16}\), not by this model"
    rejected(by_another, load, good, model=other, error=BadArtefact)
    turned = tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    by_positions = r"filled by llama with other rotary positions .*\(rope_theta 10000, not 500000\)"
    for how in ({"model": turned}, {"config": turned.config}):
        rejected(by_positions, load, good, **how, error=BadArtefact)
    header = saved.about(good)[0]
    header["recipe"].pop("rotary")
    older = rewritten(good, header)
    assert load(older, model=turned).rows == 2, "older files don't say them"
    smaller = tiny_model("llama", num_hidden_layers=2).config
    rejected("another model", load, good, config=smaller, error=BadArtefact)
    assert load(good, config=other.config).rows == 2, "a config tells layers alone"


def test_a_file_that_does_not_fit_leaves_the_cache_empty(model, tmp_path):
    """Found at a layer's V, where its K is filled."""
    exact, int8, wide = IdentityCompressor(), QUANTIZERS["int8"], transform(12, groups=4, width=12)
    cache, into = (CompressedDynamicCache([exact] * 3, [Compressor(int8, own)] * 3) for own in (None, wide))
    ids = ids_of(90)
    feed(model, cache, ids)
    path = cache.save(tmp_path / "c.safetensors", token_ids=ids)
    message = "c.safetensors: layer 0, V: the codec was calibrated for 4 groups"
    rejected(message, load, path, into=into, error=BadArtefact)
    feed(tiny_model("llama", num_key_value_heads=4), into, ids)
    assert [len(store) for layer in into.layers for store in layer.stores.values()] == [90] * 6


def rewritten(path: Path, header: dict | None = None, **tensors: Tensor | None) -> Path:
    """The file with another header, or other tensors, and right checksums: what somebody could make who wants harm."""
    own, held = mapped_file.read(path, "cache")
    parts = {name: [x.clone()] for name, x in (held | tensors).items() if x is not None}
    return mapped_file.write(path.parent / "other.safetensors", header or own, parts)


def test_wrong_values_with_right_checksums(good, model):
    header, store = saved.about(good)[0], ("contents", "layers", 1, "stores", "K")
    wrong = {
        ("format",): ("kv-plugin-cache/2", "another version"),
        ("extra",): (1, "unknown"),
        ("contents", "layers"): (header["contents"]["layers"][:-1], "2 layers, not 3"),
        ("tokens",): (149, "holds tokens"),
        (*store, "forgotten"): (64, "64 forgotten"),
        (*store, "dropped_blocks"): (-1, "dropped_blocks"),
        (*store, "fields"): (["x"], "its codec stores"),
        (*store, "sketch"): ([1.0, 1.0, 1.0, 1.0], "don't read as they did"),
        ("recipe", "preset", "codec"): ("no-such", "codec"),
        ("recipe", "preset", "bits"): ("4", "bits"),
        ("recipe", "fingerprint"): ("0" * 16, "filled by llama"),
    }
    for place, (value, message) in wrong.items():
        rejected(message, load, rewritten(good, put(header, place, value)), model=model, error=BadArtefact)


def test_wrong_tensors_with_right_checksums(good, model):
    """Any tensor that is missing, of another shape or kind, or too much."""
    _, tensors = mapped_file.read(good, "cache")
    names = [name for name in tensors if ALL or name.startswith(("layers.1.K.", "token_ids"))]
    assert len(names) >= 5
    for name in names:
        x = tensors[name]
        for other in (None, x[:1], x[None], x.to(torch.int16), x[..., :-1]):
            with pytest.raises(BadArtefact, match="other.safetensors"):
                load(rewritten(good, **{name: other}), model=model)
                pytest.fail(f"{name} may be changed")
    rejected("no layer has: more", load, rewritten(good, more=torch.ones(2)), model=model, error=BadArtefact)


def test_codes_that_reach_beyond_their_block(model, tmp_path):
    """Kernels would read what lies behind it: too many bits, and far offsets without room."""
    compressors = compressors_for("kv", 4.0, TINY_LLAMA, quantizer="mixed")
    cache = CompressedDynamicCache(*compressors)
    feed(model, cache, IDS)
    path = cache.save(tmp_path / "c.safetensors", token_ids=IDS, model=model)
    assert load(path, into=CompressedDynamicCache(*compressors)).rows == 2
    for field, value in (("widths", 255), ("block", 0)):
        name, message = f"layers.1.K.blocks.{field}", "codes that reach beyond their blocks"
        bad = rewritten(path, **{name: torch.full_like(mapped_file.read(path, "cache")[1][name], value)})
        rejected(message, load, bad, into=CompressedDynamicCache(*compressors), error=BadArtefact)


def test_layers_are_put_where_a_model_has_those_of_its_text():
    """Layers that see images come first in it, have numbers too, and may be on another device."""
    seeing = tiny_family("gemma3")
    seeing.model.vision_tower.to("meta")
    assert {saved._device_of(seeing, None)(index).type for index in range(2)} == {"cpu"}


def test_what_can_not_be_saved(model, tmp_path):
    path, cache, ids = tmp_path / "c.safetensors", cache_of(None), ids_of(30)
    rejected("holds no tokens", cache.save, path)
    feed(model, cache, ids)
    rejected("which model filled", cache.save, path, token_ids=ids)
    rejected(r"expected token_ids, the ids \[1, 30\].*got none", cache.save, path, model=model)
    rejected(r"got \[1, 29\]", cache.save, path, token_ids=ids[:, :29], model=model)
    assert load(cache.save(path, token_ids=ids, model=model), model=model).rows == 1, "with the model it can"
    rejected(r"got \[1, 29\]", cache.save, path, token_ids=ids[:, :29], model=model)
    assert torch.equal(cache.held_tokens.ids, ids), "what was known stays known"
    path.unlink()
    cache.held_tokens.ids = None
    cache.layers[1].inconsistent = True
    rejected("interrupted", cache.save, path, token_ids=ids, model=model)
    assert not list(tmp_path.iterdir())


def test_a_crash_while_saving_leaves_what_was_there(good, filled):
    """Where the header and some of the tensors, which have a checksum each, are written."""
    before = good.read_bytes()
    with mock.patch("zlib.crc32", side_effect=[*range(8), KeyboardInterrupt]), pytest.raises(KeyboardInterrupt):
        filled.save(good)
    assert good.read_bytes() == before and list(good.parent.iterdir()) == [good]


# --- which tokens a cache holds


def test_a_prompt_continues_what_is_held_or_is_refused(good, model):
    new = ids_of(9, batch=2, seed=1)
    whole = torch.cat((IDS, new), dim=1)
    for given in ({"new": new}, {"whole": whole}):
        cache = load(good, model=model)
        found = model.generate(**cache.inputs(**given), past_key_values=cache, max_new_tokens=8, do_sample=False)
        assert torch.equal(found[:, :159], whole) and found.shape == (2, 167)
        rejected("only 150 of the 166", cache.inputs, new=new)
        cache.inputs(whole=torch.cat((found, new), dim=1))
        assert cache.token_ids.shape[1] == 166, "what was said to be held is known from then on"
    cache = load(good, model=model)
    mask = torch.ones_like(whole).index_fill(1, torch.arange(3), 0)
    assert torch.equal(cache.inputs(new=new, mask=mask)["attention_mask"], mask)
    rejected("expected a mask of 0 and 1 for all 159", cache.inputs, new=new, mask=mask[:, :9])
    cache, other = load(good, model=model), whole.clone()
    other[1, 77] += 1
    rejected(r"token 77 of row 1 is (\d+) in the cache and (\d+) in the prompt", cache.inputs, whole=other)
    rejected("at least one token more", cache.inputs, whole=IDS)
    rejected("either new=", cache.inputs)
    rejected(r"token ids \[2, n\]", cache.inputs, new=ids_of(4, batch=3))


@pytest.mark.parametrize("form", ["n", "1n"])
def test_rows_of_different_texts_are_asked_one_question(good, model, form):
    cache, question = load(good, model=model), ids_of(7, seed=3)
    expected = cache.inputs(new=question.repeat(2, 1))
    found = cache.inputs(new=question[0] if form == "n" else question)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    model.generate(**found, past_key_values=cache, max_new_tokens=2, do_sample=False)


def test_rows_of_one_text_are_left_to_beam_search(model):
    cache, ids = cache_of(model), ids_of(70)
    feed(model, cache, ids)
    cache.held_tokens.ids = ids
    cache.batch_repeat_interleave(3)
    found = cache.inputs(new=ids_of(7, seed=3))
    assert found["input_ids"].shape == (1, 77)
    model.generate(**found, past_key_values=cache, num_beams=3, max_new_tokens=2, do_sample=False)


def test_rows_of_a_hybrid_that_may_be_padded_need_a_mask():
    """Its first layer keeps no K and V to find padding by: without a mask, padding would count as text."""
    model, ids, new = model_of("lfm2"), ids_of(70, batch=2), ids_of(5, batch=2, seed=1)
    mask = torch.ones_like(ids)
    mask[0, :11] = ids[0, :11] = 0
    cache = create_cache_from_preset(preset_for_any_model("kv8", "lfm2", geometry_of("lfm2")), model=model)
    model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), past_key_values=cache)
    cache.held_tokens.ids = ids
    rejected("give mask=", cache.inputs, new=new)
    mask = torch.cat((mask, torch.ones_like(new)), dim=1)
    assert torch.equal(cache.inputs(new=new, mask=mask)["attention_mask"], mask)
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.inputs(new=new[1:])["attention_mask"].all()


# --- a pickled cache is read by the version that made it, and by no other


def test_only_the_same_version_goes_on(filled, monkeypatch):
    content, before_versions = pickle.dumps(filled), object.__new__(CompressedDynamicCache)
    again = pickle.loads(content)
    assert again.get_seq_length() == 150 and again.nbytes() == filled.nbytes() and "stored_by" not in vars(again)
    for ours, theirs in zip(filled.layers, again.layers, strict=True):
        assert all(map(torch.equal, ours.read(), theirs.read()))
    rejected("pickled by another version", before_versions.__setstate__, vars(filled).copy())
    monkeypatch.setattr(dynamic_cache, "storage_version", lambda: "another")
    rejected("pickled by another version", pickle.loads, content)


def test_the_version_is_of_how_tokens_are_stored(monkeypatch, tmp_path):
    """Of every codec's source as well."""
    version, sources = dynamic_cache.storage_version.__wrapped__, Path(dynamic_cache.__file__).parents[1]
    before = version()
    shutil.copytree(sources, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(dynamic_cache, "__file__", str(tmp_path / "copy" / "cache" / "dynamic_cache.py"))
    assert version() == before
    with (tmp_path / "copy" / "codecs" / "mixed.py").open("a") as codec:
        codec.write("\n")
    assert version() != before
