"""Caches that live at the same time: in threads, in turns, as copies. Each gives what it gives alone."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import script_runs
import torch
from calibrations import TEXT
from sampling import ALL
from tiny import tiny_loaded, tiny_model, windows
from torch import Tensor
from transformers import DynamicCache

from gpt2.compression.attention import disable_compressed_attention, enable_compressed_attention, is_enabled
from gpt2.compression.cache.attention import NAME
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.file import save_calibration
from gpt2.compression.presets import build, calibration_lookup, create_cache_from_preset

PRESET = script_runs.PRESET | {"model": "tiny-llama", "target": "kv", "bits": 4}
STEPS = 25 if ALL else 12


@pytest.fixture(autouse=True)
def often():
    """Threads take turns a hundred times as often, so that whatever can come between does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture
def model(llama):
    yield llama
    disable_compressed_attention(llama)


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    made = calibrate(tiny_loaded("llama"), TEXT, rank=6, samples=2, seq_len=48)
    return PRESET | {"calibration_file": str(save_calibration(made, tmp_path_factory.mktemp("made") / "c.pt"))}


def at_once(tasks: list[Callable]) -> list:
    """What tasks return that begin together, in a thread each."""
    together = threading.Barrier(len(tasks))

    def begin(task):
        together.wait(60)
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result(120) for future in [pool.submit(begin, task) for task in tasks]]


@torch.no_grad()
def steps(model, cache, ids: Tensor, count: int = STEPS) -> Iterator[Tensor]:
    """Logits of a prompt and of greedy steps after it, one by one."""
    for _ in range(count):
        logits = model(ids, past_key_values=cache).logits[:, -1:]
        ids = logits.argmax(-1)
        yield logits


def continued(model, cache, ids: Tensor, count: int = STEPS) -> Tensor:
    """All of `steps`, [1, count, vocabulary]."""
    return torch.cat(list(steps(model, cache, ids, count)), dim=1)


def same(found: Iterable[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def caches(preset) -> dict[str, Callable]:
    """Ways to make the caches that live together: read directly, by reconstruction, and transformers' own."""

    def reconstructed():
        cache = create_cache_from_preset(preset)
        cache.direct = False
        return cache

    channels = preset | {"codec": "identity", "quantizer": "int4_channel"}
    return {
        "direct": lambda: create_cache_from_preset(preset),
        "direct, in blocks": lambda: create_cache_from_preset(channels),
        "reconstructed": reconstructed,
        "transformers'": DynamicCache,
    }


@pytest.fixture(params=[False, True], ids=["reconstruction", "direct"])
def enabled(request, model):
    if request.param:
        enable_compressed_attention(model)


def prompt(i: int) -> Tensor:
    """Of the `i`th thread: the steps after it fill a block."""
    return windows(1, 186 + i, seed=i)


def test_caches_in_threads(model, preset, enabled):
    """And copies of one cache, which go on in several ways at once."""
    makers = [*caches(preset).values(), caches(preset)["direct"]]
    tasks = [partial(lambda make, i: continued(model, make(), prompt(i)), make, i) for i, make in enumerate(makers)]
    alone = [task() for task in tasks]
    assert len({tuple(logits.argmax(-1)[0].tolist()) for logits in alone}) == len(tasks), "they can be told apart"
    assert same(at_once(tasks), alone)
    turns = zip(*(steps(model, make(), prompt(i)) for i, make in enumerate(makers)), strict=True)
    assert same((torch.cat(found, dim=1) for found in zip(*turns, strict=True)), alone), "in turns"
    cache = caches(preset)["direct, in blocks"]()
    continued(model, cache, prompt(0), count=2)
    ways = [partial(continued, model, ids=windows(1, 3, seed=i)) for i in range(3)]
    alone = [way(copy.deepcopy(cache)) for way in ways]
    branches = [cache, *(copy.deepcopy(cache) for _ in ways[1:])]
    assert same(at_once([partial(way, branch) for way, branch in zip(ways, branches, strict=True)]), alone)


@pytest.mark.parametrize(("ranks", "threads"), [((9, 8, 7), 3), (range(1, 13), 1)], ids=["few", "more than are kept"])
def test_caches_are_made_in_threads(preset, ranks, threads):
    """Caches of one preset share their compressors, whichever was made first."""
    kinds = [preset | {"rank": rank} for rank in ranks for _ in range(threads)]
    for _ in range(3):
        build.shared_compressors.cache_clear()
        calibration_lookup.read_calibration.cache_clear()
        made = at_once([partial(create_cache_from_preset, kind) for kind in kinds])
        codecs = [cache.layers[0].stores["K"].compressor for cache in made]
        assert [codec.transform.rank for codec in codecs] == [kind["rank"] for kind in kinds]
        assert len(set(map(id, codecs))) == len(ranks)


def test_attention_is_switched_in_threads(model):
    before = model.config._attn_implementation
    for _ in range(3):
        at_once([partial(enable_compressed_attention, model)] * 4)
        assert is_enabled(model) and model.config._attn_implementation == NAME
        at_once([partial(disable_compressed_attention, model)] * 4)
        assert not is_enabled(model) and model.config._attn_implementation == before
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in (model, model.model))
