"""Conversations parked as files: how many fit into a memory, and how long waking one takes against reading it again.

Bytes are counted as everywhere. Waking is measured: a file is loaded, and one token more is fed. Contexts longer than
what was read repeat its codes, and a shape without weights is run with its first layers up to one that attends, which
stand for all: values change neither bytes nor times.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from gpt2.compression.cache.attention import disable_compressed_attention, enable_compressed_attention
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.cache.recoding import recode
from gpt2.compression.named_caches import CacheChoice, from_preset
from gpt2.evaluation.perplexity import baseline_factory
from gpt2.evaluation.statistics import spread
from gpt2.evaluation.timing import WARM_TOKENS, random_tokens, run_once
from gpt2.experiments import cost_model
from gpt2.experiments.cost_model import Dimensions
from gpt2.experiments.predictions import cache_rows
from gpt2.models import random_weights
from gpt2.models.loading import LoadedModel

CUT_VOCABULARY = 512  # of shapes: one token's logits aren't what is compared
READINGS = 2  # of each prompt; the faster counts
MEASURED, COUNTED = "measured", "counted"
clock = time.perf_counter


@dataclass(frozen=True)
class Subject:
    """A model that is measured: itself, or the first layers of a shape.

    reads: lengths of the prompts that it reads. whole: the sizes of the model that it stands for.
    """

    name: str
    loaded: LoadedModel
    reads: tuple[int, ...]
    whole: Dimensions

    @property
    def scale(self) -> float:
        """Layers that one layer of it stands for."""
        return len(self.whole.layers) / self.loaded.geometry.num_layers


def fitting_rows(
    configs: Mapping[str, PretrainedConfig], tokens: int, presets: Sequence[str], memory_bytes: float, progress=iter
) -> list[dict]:
    """Conversations of `tokens` that fit into a memory beside one basis, a record per model and cache.

    A preset that the layers can't have is one record with the `reason`.
    """
    rows = cache_rows(configs, [tokens], presets, progress)
    return [
        row if "reason" in row else row | {"fit": int((memory_bytes - row["basis_bytes"]) // row["bytes"])}
        for row in rows
    ]


def subject(loaded: LoadedModel, contexts: Sequence[int]) -> Subject:
    """A model with weights, which reads the contexts that it was trained for. Raises PluginError if there are none."""
    loaded.require_context(min(contexts), "--context-lengths")
    most = loaded.max_context or max(contexts)
    reads = tuple(tokens for tokens in contexts if tokens <= most)
    return Subject(loaded.slug, loaded, reads, cost_model.dimensions(loaded.model.config, loaded.spec))


def subject_of_shape(name: str, config: PretrainedConfig, tokens: int, device: torch.device) -> Subject:
    """The layers of a shape up to the first that attends, with random weights, which read `tokens`."""
    whole = cost_model.dimensions(config, name)
    layers = whole.geometry.attention[0] + 1
    cut = random_weights.changed(config, layers, vocab_size=CUT_VOCABULARY, pad_token_id=None)
    return Subject(name, random_weights.from_config(cut, name, device), (tokens,), whole)


def waking_rows(
    own: Subject, presets: Sequence[str], contexts: Sequence[int], repeats: int, progress: Callable = iter
) -> list[dict]:
    """Milliseconds of waking a parked conversation, a record per preset and context length; see the module."""
    model, rows = own.loaded.model, []
    plain, seconds = _read(own)
    longest = max(seconds)
    run = cost_model.dimensions(model.config, own.name)
    flops_per_s = cost_model.forward_flops(run, longest) / seconds[longest]
    for preset in progress(presets):
        choice = from_preset(preset, own.loaded)
        cache = choice.make()
        recode(plain, cache)
        for tokens in contexts:
            read_s = seconds.get(tokens) if own.scale == 1 else None
            counted_s = cost_model.forward_flops(own.whole, tokens) / flops_per_s
            rows.append({
                "shape": own.name, "cache": choice.label, "context_tokens": tokens,
                "layers": own.loaded.geometry.num_layers, "whole_layers": len(own.whole.layers),
                "read_s": read_s or counted_s, "read": MEASURED if read_s else COUNTED,
                **_woken(own, choice, grown(cache, tokens), repeats),
            })  # fmt: skip
            rows[-1]["times_faster"] = 1000 * rows[-1]["read_s"] / rows[-1]["wake_ms_median"]
    return rows


def _read(own: Subject) -> tuple:
    """transformers' cache of the shortest prompt, and the seconds that reading each took, by its tokens."""
    make, model, seconds, shortest = baseline_factory(own.loaded), own.loaded.model, {}, None
    run_once(model, make(), random_tokens(own.loaded, 1, WARM_TOKENS, 0), 0)
    for tokens in sorted(own.reads):
        prompt, times = random_tokens(own.loaded, 1, tokens, 0), []
        for _ in range(READINGS):
            cache = make()
            times.append(run_once(model, cache, prompt, 0).prefill_s)
        seconds[tokens], shortest = min(times), shortest or cache
    return shortest, seconds


def grown(cache: CompressedDynamicCache, tokens: int) -> CompressedDynamicCache:
    """A fork of a cache without windows that holds `tokens` or a few less: its codes are repeated."""
    fork = cache.fork()
    stores = [store for layer in fork.compressed for store in layer.stores.values()]
    step = math.lcm(*(store.compressor.block_tokens for store in stores))
    missing = (tokens - fork.get_seq_length()) // step * step
    for store in stores if missing > 0 else []:
        for stored in store.blocks.values():
            known = torch.cat(stored.views(), dim=2)
            stored.append(known[:, :, torch.arange(missing // store.compressor.block_tokens) % known.shape[2]])
    return fork


def _woken(own: Subject, choice: CacheChoice, cache: CompressedDynamicCache, repeats: int) -> dict:
    """Times of loading a cache from a file and of the first token, scaled to all layers of the model."""
    token, times = torch.zeros(1, 1, dtype=torch.long, device=own.loaded.device), []
    with tempfile.TemporaryDirectory() as folder, _reading_codes(own.loaded):
        ids = torch.zeros(cache.get_seq_length(), dtype=torch.long)
        path = cache.save(Path(folder) / "parked.kv.safetensors", token_ids=ids, model=own.loaded)
        held, size = cache.nbytes(), path.stat().st_size
        del cache
        for _ in range(repeats + 1):
            start = clock()
            woken = _load(path, own.loaded, choice)
            loaded_s = clock() - start
            times.append((loaded_s, run_once(own.loaded.model, woken, token, 0).prefill_s))
    load, first = ([1000 * own.scale * value for value in values] for values in zip(*times[1:], strict=True))
    return {
        "file_bytes": size, "held_bytes": held, "load_ms": load, "first_token_ms": first,
        **spread("load_ms", load), **spread("first_token_ms", first),
        **spread("wake_ms", [sum(pair) for pair in zip(load, first, strict=True)]),
    }  # fmt: skip


def _load(path: Path, loaded: LoadedModel, choice: CacheChoice) -> CompressedDynamicCache:
    """The cache of a file. What stands for the calibration of a shape is made once, not with each cache."""
    how = {"into": choice.make()} if loaded.random_weights else {"model": loaded}
    return CompressedDynamicCache.load(path, device=loaded.device, **how)


@contextmanager
def _reading_codes(loaded: LoadedModel) -> Iterator[None]:
    """Attention over the stored codes where they can be read, as it would be set up for speed."""
    enable_compressed_attention(loaded.model)
    try:
        yield
    finally:
        disable_compressed_attention(loaded.model)
