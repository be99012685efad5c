"""Layers on several devices, as device_map spreads them: each layer's cache and codec live where the layer is.

No second device is needed: fake tensors say that they are on cpu:0 or cpu:1 and can't be mixed, as on two GPUs. They
have shapes and no values, so tokens are compared with layers on disk instead, which accelerate moves as it runs.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from sampling import covering
from tiny import tiny_model, windows
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, DynamicCache

from gpt2.common.errors import PluginError
from gpt2.compression.calibration import fisher, statistics
from gpt2.compression.calibration.fisher import collect_fisher
from gpt2.compression.codecs import BASES, QUANTIZERS, Compressor, Transform, moments
from gpt2.compression.codecs.rope import Rotary
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.models import loading
from gpt2.models.geometry import Geometry
from gpt2.models.loading import LoadedModel, wrap

CPU, FIRST, SECOND = (torch.device(name) for name in ("cpu", "cpu:0", "cpu:1"))
DEVICES = [FIRST, SECOND, FIRST]  # of the layers
H, D = 2, 12  # KV heads and channels of the tiny models


def compressors() -> list[Compressor]:
    """Codecs with a transform, on the CPU as a preset gives them."""
    E = torch.linalg.qr(torch.randn(H, D, D, generator=torch.Generator().manual_seed(0))).Q
    return [Compressor(QUANTIZERS["int4"], Transform(E, E.mT.contiguous(), torch.ones(H, D)).truncate(9))
            for _ in DEVICES]  # fmt: skip


def cache_of(k: list[Compressor], v: list[Compressor]) -> CompressedDynamicCache:
    return CompressedDynamicCache(k, v, sink_tokens=2, recent_tokens=1)


def loaded_of(model) -> LoadedModel:
    return LoadedModel(model.requires_grad_(False), None, "spread", Geometry.uniform(3, H, D), "")


def fill(cache: CompressedDynamicCache, batch: int = 3) -> CompressedDynamicCache:
    """Seven tokens in every layer, where the layer is: sinks, blocks and a tail."""
    for n in (6, 1):
        for layer, device in enumerate(DEVICES):
            x = torch.zeros(batch, H, n, D, device=device)
            assert {t.device for t in cache.update(x, x, layer)} == {device}
    return cache


def held(layer) -> list[Tensor]:
    stores = layer.stores.values()
    blocks = [part for store in stores for stored in store.blocks.values() for part in stored.chunks]
    return blocks + [part for store in stores for part in (store.sinks, store.tail)]


def assert_in_place(cache: CompressedDynamicCache, batch: int) -> None:
    for layer, device in zip(cache.layers, DEVICES, strict=True):
        assert layer.device == device
        assert {(t.device, len(t)) for t in held(layer)} == {(device, batch)}
        for store in layer.stores.values():
            transform = store.compressor.transform
            assert set(store.blocks) == {"codes", "scale", "offset"} and store.compressed_tokens == 4
            assert {transform.E.device, transform.D.device, transform.mean.device} == {device}


@pytest.fixture
def apart():
    """Devices of their own for as long as the test runs; tensors made before are on the CPU, which is neither."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield


def test_every_part_of_a_layer_is_where_the_layer_is(apart):
    """Also after cropping, a reset, and moving a layer to the CPU and back."""
    x, y = torch.zeros(2, device=FIRST), torch.zeros(2, device=SECOND)
    for a, b in ((x, y), (y, x), (y, torch.zeros(2))):
        with pytest.raises(RuntimeError, match="device"):  # or nothing here would show anything
            a + b
    cache = fill(cache_of(compressors(), compressors()))
    assert_in_place(cache, 3)
    cache.crop(-1)
    assert_in_place(cache, 3)
    for layer in cache.layers:
        layer.offload()
        assert {t.device for t in held(layer)} == {CPU}
        layer.prefetch()
    assert_in_place(cache, 3)
    cache.reset()
    assert_in_place(fill(cache, batch=1), 1)
    cache.reset()
    x = torch.zeros(1, H, 7, D, device=SECOND)  # a layer follows its model to another device
    assert {t.device for t in cache.update(x, x, 0)} == {SECOND}
    assert cache.layers[0].stores["V"].compressor.transform.E.device == SECOND


def test_transforms_are_copied_to_a_device_once(apart):
    """Not once per conversation or layer; the caller's stays where it is, and one that is there is not copied."""
    k, v = compressors(), compressors()
    caches = [fill(cache_of(k, v)) for _ in range(2)]
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        for side in "KV":
            assert layers[0].stores[side].compressor is layers[1].stores[side].compressor
    assert {c.transform.E.device for c in (*k, *v)} == {CPU}
    cache = fill(cache_of([k[0]] * 3, [k[0]] * 3))
    assert_in_place(cache, 3)
    first, second, third = (layer.stores["K"].compressor for layer in cache.layers)
    assert first is third and first is not second and k[0].to(CPU) is k[0]
    plain = Compressor(QUANTIZERS["int4"])
    assert plain.to(SECOND) is plain, "and one without a transform is nowhere"


class Indices:
    """Stands for indices on another device: fake tensors accept those that a GPU would reject."""

    def __init__(self, count: int):
        self.count, self.moved_to = count, set()

    def to(self, device: torch.device) -> Tensor:
        self.moved_to.add(device)
        return torch.zeros(self.count, dtype=torch.long, device=device)


def test_beams_are_chosen_by_indices_from_any_device(apart):
    cache, reordered, selected = fill(cache_of(compressors(), compressors())), Indices(3), Indices(2)
    cache.reorder_cache(reordered)
    assert_in_place(cache, 3)
    cache.batch_repeat_interleave(2)
    assert_in_place(cache, 6)
    cache.batch_select_indices(selected)
    assert_in_place(cache, 2)
    assert reordered.moved_to == selected.moved_to == {FIRST, SECOND}


@contextmanager
def spread_llama():
    """A llama with its second layer on another device, and what accelerate puts around a layer that is."""
    config = tiny_model("llama").config
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        models = []
        for device in (FIRST, SECOND):
            with device:
                models.append(AutoModelForCausalLM.from_config(config).eval())
        model, layer = models[0], models[1].model.layers[1]
        model.model.layers[1] = layer
        skipped = model._skip_keys_device_placement  # the cache among them: it stays as it is
        add_hook_to_module(layer, AlignDevicesHook(execution_device=SECOND, io_same_device=True, skip_keys=skipped))
        yield model


def test_a_spread_model_runs_with_one_cache():
    cache = cache_of(compressors(), compressors())  # on the CPU, before there are devices
    with spread_llama() as model:
        ids = torch.zeros(2, 7, dtype=torch.long, device=FIRST)
        for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:]):
            logits = model(part, past_key_values=cache, use_cache=True).logits
        assert logits.device == FIRST and cache.get_seq_length() == 7
        assert_in_place(cache, 2)
        # Without its hooks the model fails, so the run above did cross devices
        del model.model.layers[1]._hf_hook
        model.model.layers[1].forward = model.model.layers[1]._old_forward
        with pytest.raises(RuntimeError, match="device"):
            model(ids, past_key_values=DynamicCache(), use_cache=True)


@pytest.fixture
def seen(monkeypatch):
    """Entries and devices of all that moments are updated with."""
    monkeypatch.setattr(moments, "check_finite", lambda *args: None)  # fake tensors have no values to look at
    seen, update = [], moments.Moments.update
    monkeypatch.setattr(
        moments.Moments, "update", lambda self, entry, x: (seen.append((entry, x.device)), update(self, entry, x))
    )
    return seen


def test_a_spread_model_is_calibrated(seen, monkeypatch):
    """The statistics of each layer and of its gradients come from where it is, and are gathered on the CPU."""
    rotaries = [Rotary(torch.ones(D // 2))] * len(DEVICES)
    monkeypatch.setattr(fisher, "detect_rotary", lambda *args: rotaries)
    monkeypatch.setattr(fisher, "drawn_labels", lambda logits, *args: logits.argmax(-1))

    def one_window():
        yield torch.zeros(20, dtype=torch.long)
        raise StopAsyncIteration

    with spread_llama() as model:
        loaded = loaded_of(model)
        with pytest.raises(StopAsyncIteration):
            statistics.collect(loaded, one_window(), 4)
        assert seen == [(layer, device) for layer, device in enumerate(DEVICES) for _ in "KV"]
        tokens, bases = torch.zeros(1, 80, dtype=torch.long), {"grouped": BASES["grouped"]}
        for checkpointing in (False, True):
            seen.clear()
            found = collect_fisher(loaded, tokens, None, 4, bases, checkpointing=checkpointing)["grouped"]
            assert sorted(seen) == [(2 * layer + i, device) for layer, device in enumerate(DEVICES) for i in (0, 1)]
            gathered = (*found.moments.scatter, *found.moments.metrics["fisher"], *found.blocks)
            assert {t.device for t in gathered} == {CPU}


@pytest.fixture(scope="module")
def dispatched(tmp_path_factory):
    """A llama, and the same with its second layer on disk."""
    folder = tmp_path_factory.mktemp("dispatched")
    model = tiny_model("llama")
    model.save_pretrained(folder / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu",
              "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    spread = AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=places, offload_folder=folder / "off", dtype=torch.float32
    )
    assert spread.hf_device_map == places and next(spread.model.layers[1].parameters()).device.type == "meta"
    return model, spread.eval()


@pytest.mark.parametrize(("beams", "exact"), covering([1, 3], [False, True]))
def test_a_dispatched_model_gives_the_same_tokens(dispatched, beams, exact):
    k, v, ids = compressors(), compressors(), windows(2, 10)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    one, spread = (
        model.generate(ids, past_key_values=identity_cache(3) if exact else cache_of(k, v), **how)
        for model in dispatched
    )
    assert torch.equal(one, spread)


@pytest.mark.parametrize(("device", "expected"), [("all", {"model": "cpu", "lm_head": "cpu"}), ("cpu", None)])
def test_all_devices_are_left_to_the_device_map(device, expected, model_folder, monkeypatch):
    """On the CPU, with a map that has only it; a model that a map has spread must not be moved afterwards."""
    assert loading.SPREAD == {"all": "auto"}
    monkeypatch.setattr(loading, "resolve_device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(loading, "SPREAD", {"all": {"model": "cpu", "lm_head": "cpu"}})
    maps, moved, load = [], [], AutoModelForCausalLM.from_pretrained

    def spied(*args, device_map, **kwargs):
        maps.append(device_map)
        model, report = load(*args, device_map=device_map, **kwargs)
        to = model.to
        model.to = lambda *args: moved.append(args) or to(*args)
        return model, report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spied)
    loaded = loading.load(str(model_folder), device=device)
    assert maps == [expected] and bool(moved) == (device == "cpu")
    found, wanted = (model(windows(1, 20)).logits for model in (loaded.model, tiny_model()))
    assert torch.equal(found, wanted)


def test_layers_that_found_no_room_are_rejected(dispatched):
    with pytest.raises(PluginError, match="spread: some layers don't fit on the devices of its device_map and"):
        wrap(dispatched[1], None, "spread")
    model = tiny_model()
    loading.reject_offloaded(model, "x", torch.device("cpu"))
    model.model.layers[1].to("meta")
    with pytest.raises(PluginError, match="model 'x' doesn't fit on all GPUs together"):
        loading.reject_offloaded(model, "x", torch.device("cpu"))
