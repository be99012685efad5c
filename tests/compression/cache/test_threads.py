"""Caches that live at the same time: in threads, in turns, as copies. Each gives what it gives alone."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from presets import PRESET
from sampling import ALL
from tiny import windows
from torch import Tensor
from transformers import DynamicCache

from gpt2.compression.attention import disable_compressed_attention, enable_compressed_attention, is_enabled
from gpt2.compression.cache.attention import NAME
from gpt2.compression.calibration.file import save_calibration
from gpt2.compression.presets import build, calibration_lookup, create_cache_from_preset

STEPS = 25 if ALL else 6


@pytest.fixture(autouse=True)
def often():
    """Threads take turns a hundred times as often, so that whatever can come between does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def model(llama):
    yield llama.model
    disable_compressed_attention(llama.model)


@pytest.fixture
def preset(calibration, tmp_path):
    file = save_calibration(calibration, tmp_path / "c.pt")
    return PRESET | {"target": "kv", "bits": 4, "calibration_file": str(file)}


@pytest.fixture
def makers(preset) -> list[Callable]:
    """Ways to make the caches that live together: read directly, by reconstruction, and transformers' own."""

    def reconstructed():
        cache = create_cache_from_preset(preset)
        cache.direct = False
        return cache

    by_channel = preset | {"codec": "identity", "quantizer": "int4_channel"}
    calibrated = partial(create_cache_from_preset, preset)
    return [calibrated, calibrated, partial(create_cache_from_preset, by_channel), reconstructed, DynamicCache]


def at_once(tasks: list[Callable]) -> list:
    """What tasks return that begin together, in a thread each."""
    together = threading.Barrier(len(tasks))

    def begin(task):
        together.wait(60)
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result(120) for future in [pool.submit(begin, task) for task in tasks]]


@torch.no_grad()
def steps(model, cache, ids: Tensor) -> Iterator[list[float]]:
    """Logits of a prompt and of greedy steps after it, one by one."""
    for _ in range(STEPS):
        logits = model(ids, past_key_values=cache).logits[:, -1:]
        ids = logits.argmax(-1)
        yield logits.flatten().tolist()


def prompt(i: int) -> Tensor:
    """Of the `i`th thread: the steps after it fill a block."""
    return windows(1, 123 + i, seed=i)


@pytest.mark.parametrize("direct", [False, True], ids=["reconstruction", "direct"])
def test_caches_in_threads_in_turns_and_as_copies(direct, model, makers):
    if direct:
        enable_compressed_attention(model)
    tasks = [lambda make=make, i=i: list(steps(model, make(), prompt(i))) for i, make in enumerate(makers)]
    alone = [task() for task in tasks]
    assert len(set(map(str, alone))) == len(tasks), "they can be told apart"
    assert at_once(tasks) == alone
    turns = zip(*(steps(model, make(), prompt(i)) for i, make in enumerate(makers)), strict=True)
    assert [list(found) for found in zip(*turns, strict=True)] == alone, "in turns"

    cache = makers[2]()
    model(prompt(0), past_key_values=cache)
    ways = [lambda cache, i=i: list(steps(model, cache, windows(1, 3, seed=i))) for i in range(3)]
    alone = [way(copy.deepcopy(cache)) for way in ways]
    branches = [cache, *(copy.deepcopy(cache) for _ in ways[1:])]
    assert at_once([partial(way, branch) for way, branch in zip(ways, branches, strict=True)]) == alone, "as copies"


@pytest.mark.parametrize(("ranks", "threads"), [((9, 8, 7), 3), (range(1, 13), 1)], ids=["few", "more than are kept"])
def test_caches_of_one_preset_share_their_compressors_whichever_was_made_first(preset, ranks, threads):
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
    for _ in range(2):
        at_once([partial(enable_compressed_attention, model)] * 4)
        assert is_enabled(model) and model.config._attn_implementation == NAME
        at_once([partial(disable_compressed_attention, model)] * 4)
        assert not is_enabled(model) and model.config._attn_implementation == before
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in (model, model.model))
