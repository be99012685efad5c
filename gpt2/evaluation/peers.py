"""Other people's KV caches beside ours: the same text, the same streamed perplexity, the same count of bytes.

quanto, hqq    transformers' QuantizedCache: groups of 64 numbers that lie side by side, one token's where head_dim is
               64. The chunk that is being read stays exact until the next, beside the residual of exact latest tokens,
               and each time the residual is full, everything that is held is quantized anew.
fp8            transformers' QuantizedCache: one scale per layer and side, frozen after the first chunk.
kivi           KIVI (Liu et al. 2024, arXiv:2402.02750), written anew here: K per channel over 32 tokens, V per token
               over 32 channels, asymmetric with scale and zero in float16. There is no residual but K's unfinished
               group, and also the chunk that is being read comes back as it is stored, as with ours.
lowrank        the guide's: V in the built-in presets `rN-vonly`.
ours           presets.

A cache that can't be made or that fails has a row with the reason; the others are measured without it.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor
from transformers.cache_utils import QuantizedCache

from gpt2.common.errors import CalibrationNotFound, PluginError, is_out_of_memory
from gpt2.common.files import ROOT
from gpt2.compression.cache.size import held_bytes, plain_bytes
from gpt2.compression.named_caches import CacheChoice, from_preset
from gpt2.compression.presets.preset_files import built_in_presets
from gpt2.evaluation import needle
from gpt2.evaluation.kivi import kivi_cache
from gpt2.evaluation.perplexity import BASELINE, CacheFactory, baseline_factory, compare, score
from gpt2.models.loading import LoadedModel

PEERS = ("quanto", "hqq", "fp8", "kivi", "lowrank")
OURS = "ours"
PACKAGES = {"quanto": ("optimum.quanto", "optimum-quanto"), "hqq": ("hqq.core.quantize", "hqq")}
AXES = {"quanto": 0, "hqq": 1}  # what each backend calls groups along the last dimension
RESIDUALS = (128, 0)  # exact latest tokens: transformers' default, and as few as it allows
KIVI_BITS, KIVI_SINKS = (4, 3, 2), (4, 0)
WEIGHED_TOKENS = 2048


@dataclass(frozen=True)
class Entry:
    """One cache of the comparison. make: None where it can't be made, and then `error` says why."""

    family: str
    label: str
    make: CacheFactory | None = None
    error: Exception | None = None
    preset: dict = field(default_factory=dict)  # what results files say of one of ours


def entries(loaded: LoadedModel, families: Sequence[str] = PEERS, presets: Sequence[str] | None = None) -> list[Entry]:
    """The caches to compare. presets: files or built-in names, of which one that can't be used raises; None takes all
    built-in presets of the model, and what can't be used of those becomes an entry with its error."""
    built_in = list(built_in_presets().get(loaded.spec, {}))
    low_rank = [name for name in built_in if re.fullmatch(r"r\d+-vonly", name)] if "lowrank" in families else []
    made = [entry for family in families if family != "lowrank" for entry in _peers(family, loaded)]
    made += [_built_in(name, loaded, "lowrank") for name in low_rank]
    if "lowrank" in families and not low_rank:
        made.append(Entry("lowrank", "low rank", error=PluginError(f"no preset rN-vonly for {loaded.spec}")))
    if presets is None:
        made += [_built_in(name, loaded, OURS) for name in built_in if name not in low_rank]
    else:
        made += [_of_choice(from_preset(name, loaded)) for name in presets if name not in low_rank]
    labels = [BASELINE, *(entry.label for entry in made)]
    if twice := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
        raise PluginError(f"two caches are called {twice[0]!r}: give one of them another name")
    return made


def _peers(family: str, loaded: LoadedModel) -> Iterator[Entry]:
    config, L = loaded.model.config, loaded.geometry.num_layers
    if family == "fp8":
        yield _entry(family, "fp8, a scale per layer", partial(SharedCache, "fp8", config))
    elif family == "kivi":
        for bits in KIVI_BITS:
            for sinks in KIVI_SINKS:
                exact = "" if sinks else ", no exact sinks"
                yield _entry(family, f"KIVI {bits} bits{exact}", partial(kivi_cache, L, bits, sinks))
    else:
        for bits in (4, 2):
            for residual in RESIDUALS:
                make = partial(
                    SharedCache, family, config, nbits=bits, axis_key=AXES[family], axis_value=AXES[family],
                    q_group_size=64, residual_length=residual,
                )  # fmt: skip
                yield _entry(family, f"{family} {bits} bits, residual {residual}", make)


def _entry(family: str, label: str, make: CacheFactory) -> Entry:
    """An entry that has been tried: a package that is missing, or a model that the backend refuses, shows here."""
    try:
        if family in PACKAGES:
            _require(*PACKAGES[family])
        make()
    except Exception as error:  # of other people's code: it may be any
        return Entry(family, label, error=error)
    return Entry(family, label, make)


def _require(module: str, package: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise PluginError(f"{package} is not installed: pip install -r requirements-peers.txt") from error


def _built_in(name: str, loaded: LoadedModel, family: str) -> Entry:
    try:
        return _of_choice(from_preset(name, loaded))
    except PluginError as error:
        return Entry(family, name, error=error)


def _of_choice(choice: CacheChoice) -> Entry:
    preset = choice.preset.record
    cut = preset["bits"] == 16 and preset["rank"] < preset["head_dim"] and not preset.get("layers")
    return Entry("lowrank" if cut else OURS, choice.label, choice.make, preset=choice.record())


class SharedCache(QuantizedCache):
    """transformers' cache, whose copy shares what it holds until then.

    The needle needs copies, and quanto's tensors refuse to be copied. Its layers replace what they hold and never write
    to it, so the copy stays as it was.
    """

    def __deepcopy__(self, memo: dict) -> SharedCache:
        twin = copy.copy(self)
        twin.layers = [copy.copy(layer) for layer in self.layers]
        return twin


def measure(
    loaded: LoadedModel,
    segments: Tensor,
    compared: Sequence[Entry],
    *,
    seed: int = 0,
    chunk: int = 64,
    weighing: Callable = iter,
    **scoring,
) -> list[dict]:
    """Weigh and score every cache; a results record each, the baseline's first, in the order that they come.

    Bytes are those of one sequence of 2048 tokens of noise in 16 bits, fed `chunk` at a time. weighing: wraps the
    iterable of entries, such as tqdm. scoring: as `score`. A cache that fails has `not_run` in place of figures.
    """
    failed = {entry.label: entry.error for entry in compared if entry.error is not None}
    held = {BASELINE: plain_bytes(loaded.geometry, WEIGHED_TOKENS, config=loaded.model.config)}
    for entry in weighing([entry for entry in compared if entry.make]):
        try:
            held[entry.label] = held_bytes(entry.make, loaded.geometry, WEIGHED_TOKENS, chunk=chunk)
        except Exception as error:  # of other people's code: it may be any
            failed[entry.label] = error.with_traceback(None)
    caches = {entry.label: entry.make for entry in compared if entry.label not in failed}
    scores = score(
        loaded, segments, {BASELINE: baseline_factory(loaded)} | caches, chunk=chunk, failed=failed, **scoring
    )
    unmoved = {"kl_nats": 0.0, "top1_agreement": 1.0}
    rows = []
    for entry in (Entry(BASELINE, BASELINE), *compared):
        row = {"family": entry.family, "label": entry.label} | ({"preset": entry.preset} if entry.preset else {})
        if entry.label in failed:
            rows.append(row | {"not_run": reason(failed[entry.label])})
            continue
        size = {
            "cache_bytes_2048": held[entry.label],
            "bytes_per_token": held[entry.label] / WEIGHED_TOKENS,
            "compression_ratio_2048": held[BASELINE] / held[entry.label],
        }
        rows.append(row | size | unmoved | compare(scores[BASELINE], scores[entry.label], seed))
    return rows


def ask_needles(
    loaded: LoadedModel,
    haystack: Tensor,
    compared: Sequence[Entry],
    rows: list[dict],
    *,
    seed: int = 0,
    progress: Callable[[str], Callable] = lambda label: iter,
    **grid,
) -> dict:
    """Ask the baseline and every cache that has figures; adds `needle_exact_match`, or `needle_not_run`, to its row.

    grid: as `needle.measure` takes it. progress: from a cache's label, what wraps the iterable of prompts. Returns what
    results files have: cells and summaries.
    """
    factories = {BASELINE: baseline_factory(loaded)} | {entry.label: entry.make for entry in compared}
    answers = []
    for row in rows:
        label = row["label"]
        if "not_run" in row:
            continue
        asked = {label: factories[label]}
        try:
            own = needle.measure(loaded, haystack, asked, seed=seed, progress=progress(label), **grid)
        except Exception as error:  # of other people's code: it may be any
            if label == BASELINE:
                raise
            row["needle_not_run"] = reason(error)
            continue
        row["needle_exact_match"] = sum(answer["exact_match"] for answer in own) / len(own)
        answers += own
    return {"summary": needle.summarize(answers, seed), "cells": needle.cells(answers)}


def reason(error: Exception) -> str:
    """An error in one line, as tables show it."""
    if is_out_of_memory(error):
        return "out of memory"
    words = " ".join(str(error).split()).replace(f"{ROOT}/", "")
    if isinstance(error, CalibrationNotFound):
        words = words.partition(" Looked at")[0]  # the places are a machine's
    if not isinstance(error, PluginError):
        words = f"{type(error).__name__}: {words}".removesuffix(": ")
    return words if len(words) <= 160 else words[:159] + "…"
