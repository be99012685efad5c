"""A cache as a file: what comes back is what was saved, for every kind of layer, and anything else is refused."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from calibrations import change
from kept import PRESETS, cache_of
from kinds import KINDS, feed, geometry_of, ids_of, model_of
from presets import PRESET
from safetensors import safe_open
from sampling import ALL, covering, sampled
from tiny import tiny_model

from gpt2.common import mapped_file
from gpt2.common.errors import BadArtefact, PluginError
from gpt2.compression.cache import dynamic_cache, saved
from gpt2.compression.cache.storages import storages_of
from gpt2.compression.calibration.file import save_calibration
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.presets import create_cache_from_preset
from gpt2.compression.settings import compressors_for
from gpt2.models.geometry import Geometry

load = CompressedDynamicCache.load


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def good(tmp_path, model):
    """A file of a cache of the tiny Llama, and the cache."""
    cache = cache_of(model)
    feed(model, cache, ids_of(150, batch=2))
    return cache.save(tmp_path / "good.safetensors", token_ids=ids_of(150, batch=2)), cache


@pytest.mark.parametrize(("family", "name"), covering(KINDS, PRESETS))
def test_every_kind_of_layer_comes_back(family, name, tmp_path):
    """A prompt past the window, and what follows: logits to the bit, from the file and from the cache itself."""
    model, ids = model_of(family), ids_of(200, batch=2)
    cache = cache_of(model, name, family, geometry_of(family))
    feed(model, cache, ids)
    path = cache.save(tmp_path / "c.safetensors", token_ids=ids)
    again = load(path, model=model)
    assert again.get_seq_length() == 200 and of_tokens(again) == of_tokens(cache) - unused(cache)
    assert torch.equal(again.token_ids, ids) and again.recipe.fingerprint == cache.recipe.fingerprint
    for more in ids_of(71, batch=2, seed=1).split([70, 1], dim=1):
        assert torch.equal(feed(model, again, more), feed(model, cache, more))


def of_tokens(cache) -> int:
    """Bytes of K and V. Layers that share an indexer hold one each after loading."""
    stores = [store.tensors() for layer in cache.compressed for store in layer.stores.values()]
    return sum(storages_of(stores).values())


def unused(cache) -> int:
    growing = [stored for layer in cache.compressed for s in layer.stores.values() for stored in s.blocks.values()]
    return sum(stored.unused * stored.chunks[-1][:, :, :1].nbytes for stored in growing)


def test_left_padding_comes_back(model, tmp_path):
    ids, mask = ids_of(150, batch=2), torch.ones(2, 150, dtype=torch.long)
    mask[0, :40] = 0
    ids[0, :40] = 0
    cache = cache_of(model)
    model(ids, attention_mask=mask, past_key_values=cache)
    again = load(cache.save(tmp_path / "c.safetensors", token_ids=ids), model=model)
    new = ids_of(20, batch=2, seed=1)
    inputs = again.inputs(new=new)
    assert inputs["attention_mask"].tolist() == torch.cat((mask, torch.ones_like(new)), dim=1).tolist()
    how = {"max_new_tokens": 30, "do_sample": False}
    answers = [model.generate(**inputs, past_key_values=each, **how) for each in (cache, again)]
    assert torch.equal(*answers)


def test_the_file_is_as_large_as_what_is_held(tmp_path):
    """Within 2 % at 4,096 tokens, and any reader of safetensors reads it."""
    geometry = Geometry.uniform(4, 3, 64)
    cache = CompressedDynamicCache(*compressors_for("kv", 4, geometry), geometry=geometry)
    k, v = torch.randn(2, 1, 3, 4096, 64).bfloat16()
    for layer in range(4):
        cache.update(k, v, layer)
    path = cache.save(tmp_path / "c.safetensors", token_ids=torch.zeros(4096))
    assert path.stat().st_size == pytest.approx(cache.nbytes(), rel=0.02)
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        assert {"token_ids", "layers.3.K.sinks", "layers.0.V.tail"} <= names
        assert file.get_tensor("token_ids").shape == (1, 4096)
    empty = CompressedDynamicCache(*compressors_for("kv", 4, geometry), geometry=geometry)
    again = load(path, into=empty)
    assert all(map(torch.equal, again.layers[2].read(), cache.layers[2].read()))


def test_what_is_written_to_a_loaded_cache_stays_out_of_the_file(good, model):
    """Pages are mapped: a crop gives room back for the next block. And no folder of this machine is in the file."""
    path, _ = good
    header, size = saved.about(path)
    assert "folder" not in header["recipe"]["preset"] and os.sep + "tmp" not in json.dumps(header)
    assert size < path.stat().st_size
    before, cache = path.read_bytes(), load(path, model=model)
    cache.crop(-70)
    feed(model, cache, ids_of(100, batch=2, seed=1))
    assert path.read_bytes() == before and load(path, model=model).get_seq_length() == 150


# --- what is refused


def test_damaged_files(good, tmp_path, model):
    """A byte changed anywhere, several, or an end that is missing or too much."""
    content, dice, bad = good[0].read_bytes(), random.Random(0), tmp_path / "bad.safetensors"
    header = 8 + int.from_bytes(content[:8], "little")
    for number in range(200 if ALL else 80):
        changed = bytearray(content)
        if number % 4 == 3:
            cut = dice.randrange(len(content)) if number % 8 == 3 else len(content) - dice.randrange(1, 9)
            changed = changed[:cut] if number % 16 != 7 else changed + bytes(dice.randrange(1, 9))
        else:
            places = range(header) if number % 4 == 0 else range(len(content))
            for place in dice.sample(places, dice.choice([1, 1, 5])):
                changed[place] ^= dice.randrange(1, 256)
        bad.write_bytes(changed)
        with pytest.raises(BadArtefact, match="bad.safetensors.*not a readable saved cache") as error:
            load(bad, model=model)
        assert "\n" not in str(error.value) and "again" in str(error.value)


def test_files_of_other_kinds_and_of_other_models(tmp_path, model, good):
    """Of the same shape with other weights by its fingerprint, of another shape by its layers."""
    for content in (b"", b"PK\x03\x04", b"{}", bytes(100), b"\xff" * 100):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(BadArtefact, match="not a readable saved cache"):
            load(tmp_path / "x", model=model)
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadArtefact, match="no such file|no regular file"):
            load(path, model=model)
    with pytest.raises(BadArtefact, match=r"filled by llama \(fingerprint \w{16}\), not by this model"):
        load(good[0], model=tiny_model("llama", seed=1))
    with pytest.raises(BadArtefact, match="another model"):
        load(good[0], config=tiny_model("llama", num_hidden_layers=2).config)
    assert load(good[0], config=tiny_model("llama", seed=1).config).rows == 2, "a config tells layers alone"


def rewritten(path, change_record=lambda header: None, change_tensors=lambda tensors: None):
    """The file with other contents and right checksums: what somebody could make who wants harm."""
    header, tensors = mapped_file.read(path, "cache")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change_record(header)
    change_tensors(tensors)
    return mapped_file.write(path.parent / "other.safetensors", header, {name: [x] for name, x in tensors.items()})


def put(*keys, value):
    def change_record(header):
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change_record


STORE = ("contents", "layers", 1, "stores", "K")
WRONG = {
    "format": (put("format", value="kv-plugin-cache/2"), "another version"),
    "unknown field": (put("extra", value=1), "unknown"),
    "layers": (lambda header: header["contents"]["layers"].pop(), "2 layers, not 3"),
    "tokens": (put("tokens", value=149), "holds tokens"),
    "forgotten": (put(*STORE, "forgotten", value=64), "64 forgotten"),
    "negative": (put(*STORE, "dropped_blocks", value=-1), "dropped_blocks"),
    "fields": (put(*STORE, "fields", value=["x"]), "its codec stores"),
    "sketch": (put(*STORE, "sketch", value=[1.0, 1.0, 1.0, 1.0]), "don't read as they did"),
    "codec": (put("recipe", "preset", "codec", value="no-such"), "codec"),
    "path": (put("recipe", "preset", "bits", value="4"), "bits"),
    "fingerprint": (put("recipe", "fingerprint", value="0" * 16), "filled by llama"),
}


def test_wrong_values_with_right_checksums(good, model):
    for wrong, message in WRONG.values():
        with pytest.raises(BadArtefact, match=message):
            load(rewritten(good[0], wrong), model=model)


def test_wrong_tensors_with_right_checksums(good, model):
    """Any tensor that is missing, of another shape or kind, or too much."""
    _, names = mapped_file.read(good[0], "cache", about_only=True)
    for name in sampled(sorted(names), 12):
        for other in (None, lambda x: x[:1], lambda x: x[None], lambda x: x.to(torch.int16), lambda x: x[..., :-1]):

            def wrong(tensors, name=name, other=other):
                if (x := tensors.pop(name)) is not None and other:
                    tensors[name] = other(x).clone()

            try:
                load(rewritten(good[0], change_tensors=wrong), model=model)
            except BadArtefact as error:
                assert "other.safetensors" in str(error)
            else:
                pytest.fail(f"{name} may be changed")
    with pytest.raises(BadArtefact, match="no layer has: more"):
        load(rewritten(good[0], change_tensors=lambda tensors: tensors.update(more=torch.ones(2))), model=model)


def test_a_calibrated_preset_needs_its_own_calibration(llama, calibration, tmp_path, monkeypatch):
    """Looked for beside the file, as beside a preset; one that was changed since reads the codes otherwise."""
    kept = save_calibration(calibration, tmp_path / "there" / "c.pt")
    preset = PRESET | {"calibration_file": str(kept), "target": "kv"}
    cache = create_cache_from_preset(preset, model=llama)
    feed(llama.model, cache, ids_of(150))
    path = cache.save(tmp_path / "there" / "doc.safetensors", token_ids=ids_of(150))
    monkeypatch.chdir(tmp_path)
    moved = (tmp_path / "there").rename(tmp_path / "elsewhere")
    again = load(moved / path.name, model=llama)
    assert torch.equal(feed(llama.model, again, ids_of(5)), feed(llama.model, cache, ids_of(5)))

    change(moved / "c.pt", "bases", "v", "D", value=lambda D: -D)
    with pytest.raises(BadArtefact, match="calibration"):
        load(moved / path.name, model=llama)
    (moved / "c.pt").unlink()
    with pytest.raises(PluginError, match="Calibration file not found"):
        load(moved / path.name, model=llama)


def test_what_can_not_be_saved(model, tmp_path):
    path = tmp_path / "c.safetensors"
    cache = cache_of(None)
    with pytest.raises(PluginError, match="holds no tokens"):
        cache.save(path)
    feed(model, cache, ids_of(30))
    with pytest.raises(PluginError, match="which model filled"):
        cache.save(path, token_ids=ids_of(30))
    with pytest.raises(PluginError, match=r"expected token_ids, the ids \[1, 30\].*got none"):
        cache.save(path, model=model)
    with pytest.raises(PluginError, match=r"got \[1, 29\]"):
        cache.save(path, token_ids=ids_of(30)[:, :29], model=model)
    assert load(cache.save(path, token_ids=ids_of(30), model=model), model=model).rows == 1, "with the model it can"
    path.unlink()
    cache.held_tokens.ids = None
    cache.layers[1].inconsistent = True
    with pytest.raises(PluginError, match="interrupted"):
        cache.save(path, token_ids=ids_of(30), model=model)
    assert not list(tmp_path.iterdir())


def test_a_crash_while_saving_leaves_what_was_there(good, model, monkeypatch):
    path, cache = good
    before, real, calls = path.read_bytes(), mapped_file._crc, []

    def failing(content):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(content)

    monkeypatch.setattr(mapped_file, "_crc", failing)
    with pytest.raises(KeyboardInterrupt):
        cache.save(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_cache_of_compressors_is_loaded_into_one_like_it(model, tmp_path):
    cache = identity_cache(3)
    feed(model, cache, ids_of(30))
    path = cache.save(tmp_path / "c.safetensors", token_ids=ids_of(30))
    assert saved.about(path)[0]["recipe"] is None
    with pytest.raises(PluginError, match="into="):
        load(path, model=model)
    with pytest.raises(PluginError, match="give model= or config="):
        load(path)
    with pytest.raises(PluginError, match="holds tokens"):
        load(path, into=cache)
    with pytest.raises(BadArtefact, match="its codec stores"):
        load(path, into=CompressedDynamicCache(*compressors_for("kv", 4, Geometry.uniform(3, 2, 12))))
    assert load(path, into=identity_cache(3)).get_seq_length() == 30


# --- which tokens a cache holds


def test_a_prompt_continues_what_is_held_or_is_refused(good, model):
    path, _ = good
    ids, new = ids_of(150, batch=2), ids_of(9, batch=2, seed=1)
    whole = torch.cat((ids, new), dim=1)
    plain = cache_of(model)
    expected = model.generate(whole, past_key_values=plain, max_new_tokens=8, do_sample=False)
    for given in ({"new": new}, {"whole": whole}):
        cache = load(path, model=model)
        found = model.generate(**cache.inputs(**given), past_key_values=cache, max_new_tokens=8, do_sample=False)
        assert torch.equal(found[:, :159], whole) and found.shape == expected.shape
        with pytest.raises(PluginError, match="only 150 of the 166"):
            cache.inputs(new=new)
        cache.inputs(whole=torch.cat((found, new), dim=1))
        assert cache.token_ids.shape[1] == 166, "what was said to be held is known from then on"
    other = whole.clone()
    other[1, 77] += 1
    cache = load(path, model=model)
    with pytest.raises(PluginError, match=r"token 77 of row 1 is (\d+) in the cache and (\d+) in the prompt"):
        cache.inputs(whole=other)
    with pytest.raises(PluginError, match="at least one token more"):
        cache.inputs(whole=ids)
    with pytest.raises(PluginError, match="either new="):
        cache.inputs()
    with pytest.raises(PluginError, match=r"token ids \[2, n\]"):
        cache.inputs(new=ids_of(4, batch=3))


# --- a pickled cache is read by the version that made it, and by no other


def held() -> CompressedDynamicCache:
    cache = CompressedDynamicCache(*compressors_for("kv", 4, Geometry.uniform(2, 2, 16), codec="hadamard"))
    for layer in range(2):
        cache.update(*torch.randn(2, 1, 2, 150, 16), layer)
    return cache


def test_only_the_same_version_goes_on(monkeypatch):
    cache = held()
    again = pickle.loads(pickle.dumps(cache))
    assert again.get_seq_length() == 150 and again.nbytes() == cache.nbytes() and "stored_by" not in vars(again)
    for ours, theirs in zip(cache.layers, again.layers, strict=True):
        assert all(map(torch.equal, ours.read(), theirs.read()))
    content, before_versions = pickle.dumps(cache), object.__new__(CompressedDynamicCache)
    with pytest.raises(PluginError, match="pickled by another version"):
        before_versions.__setstate__(vars(cache).copy())
    monkeypatch.setattr(dynamic_cache, "_version", lambda: "another")
    with pytest.raises(PluginError, match="pickled by another version"):
        pickle.loads(content)


def test_the_version_is_of_how_tokens_are_stored(monkeypatch, tmp_path):
    """Of every codec's source as well."""
    version, sources = dynamic_cache._version.__wrapped__, Path(dynamic_cache.__file__).parents[1]
    before = version()
    shutil.copytree(sources, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(dynamic_cache, "__file__", str(tmp_path / "copy" / "cache" / "dynamic_cache.py"))
    assert version() == before
    with (tmp_path / "copy" / "codecs" / "mixed.py").open("a") as codec:
        codec.write("\n")
    assert version() != before
