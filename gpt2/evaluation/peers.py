"""Our caches beside those of other packages: the same text, the same streamed perplexity, the same count of bytes.

Which caches these are is chosen in `evaluation.lineup`. A cache that can't be made or fails gets a row with the reason,
and the others are measured without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from gpt2.common.errors import CalibrationNotFound, PluginError, is_out_of_memory
from gpt2.common.files import ROOT
from gpt2.compression.cache.size import held_bytes, plain_bytes
from gpt2.evaluation import needle
from gpt2.evaluation.lineup import Entry
from gpt2.evaluation.perplexity import BASELINE, baseline_factory, compare, score, segment_sums
from gpt2.models.loading import LoadedModel

WEIGHED_TOKENS = 2048


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
    """Bytes and loss of every cache: one results record per entry, after the baseline's.

    Bytes are those of one sequence of 2048 tokens of noise in 16 bits, fed `chunk` at a time. weighing: wraps the
    iterable of entries, such as tqdm. scoring: as `score`. The record of a cache that fails has `not_run`, the reason,
    and no figures.
    """
    failed = {entry.label: entry.error for entry in compared if entry.error is not None}
    held = {BASELINE: plain_bytes(loaded.geometry, WEIGHED_TOKENS)}
    for entry in weighing([entry for entry in compared if entry.make]):
        try:
            held[entry.label] = held_bytes(entry.make, loaded.geometry, WEIGHED_TOKENS, chunk=chunk)
        except Exception as error:  # third-party code may raise anything
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
        pair = scores[BASELINE], scores[entry.label]
        rows.append(row | size | unmoved | compare(*pair, seed) | {"segment_sums": segment_sums(*pair)})
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
    """Ask needle prompts of the baseline and of every cache that has figures.

    Adds `needle_exact_match`, or `needle_not_run` with the reason, to each row. grid: as `needle.measure` takes it.
    progress: gets a cache's label and returns a wrapper of the iterable of prompts. Returns summaries and cells as
    results files have them.
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
        except Exception as error:  # third-party code may raise anything
            if label == BASELINE:
                raise
            row["needle_not_run"] = reason(error)
            continue
        row["needle_exact_match"] = sum(answer["exact_match"] for answer in own) / len(own)
        answers += own
    return {"summary": needle.summarize(answers, seed), "cells": needle.cells(answers)}


def reason(error: Exception) -> str:
    """An error in one line of at most 160 characters, without folders of this machine."""
    if is_out_of_memory(error):
        return "out of memory"
    words = " ".join(str(error).split()).replace(f"{ROOT}/", "")
    if isinstance(error, CalibrationNotFound):
        words = words.partition(" Looked at")[0]  # folders of this machine don't belong in results
    if not isinstance(error, PluginError):
        words = f"{type(error).__name__}: {words}".removesuffix(": ")
    return words if len(words) <= 160 else words[:159] + "…"
