"""Needle in a haystack: can the model still read one sentence out of a long context when its cache is compressed?

Prompts come from `needle_prompts`. All tokens of a prompt but the last are read into the cache first, so that both
figures depend on what is stored:

    exact match      greedy `generate`, the same call for every cache, starts with the answer
    log-probability  of the answer's tokens, fed one after another; it changes before an answer is lost

Our caches return their reconstruction already while the prompt is read, so that even a prefill in one forward pass has
the error of compression. Caches of transformers return exact tensors in that pass, so their error shows only from the
next one on; `prefill_chunk` feeds the prompt in chunks, as a server does.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gpt2.common.errors import PluginError
from gpt2.compression.cache.size import cache_bytes
from gpt2.evaluation.needle_prompts import Needles, Prompt
from gpt2.evaluation.perplexity import BASELINE, CacheFactory
from gpt2.evaluation.statistics import mean_interval, sign_test
from gpt2.models.loading import LoadedModel

FAILS, MATCHES, LOSES = "baseline fails", "matches", "loses"


def measure(
    loaded: LoadedModel,
    haystack: Tensor,
    caches: Mapping[str, CacheFactory],
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    seed: int = 0,
    prefill_chunk: int | None = None,
    progress=iter,
    **task,
) -> list[dict]:
    """Ask every cache the same questions; returns a record per prompt and cache, as results files have them.

    haystack: token ids [n]. lengths: context lengths in tokens. depths: shares of the haystack before the needle.
    task: settings of `Needles`. progress: wraps the iterable of prompts, such as tqdm. All prompts are built before the
    first one is asked, so a PluginError about them comes before any work.
    """
    loaded.require_context(max(lengths), "--context-lengths")
    needles = Needles(loaded.tokenizer, haystack, **task)
    asked = [
        ((length, depth, trial), needles.build(length, depth, trial, seed))
        for length, depth, trial in itertools.product(lengths, depths, range(trials))
    ]
    rows = []
    for (length, depth, trial), prompt in progress(asked):
        for name, make in caches.items():
            record = ask(loaded, make, prompt, needles.max_new_tokens, prefill_chunk)
            if not np.isfinite(record["answer_logprob_nats"]):
                raise PluginError(f"cache {name!r} gives NaN or infinite logits: try --dtype float32, or more bits")
            rows.append({"cache": name, "context_tokens": length, "depth": depth, "trial": trial, **record})
    return rows


@torch.no_grad()
def ask(
    loaded: LoadedModel, make: CacheFactory, prompt: Prompt, max_new_tokens: int = 12, prefill_chunk: int | None = None
) -> dict:
    """Ask one question with a fresh cache; the record's bytes are those of the prompt without its last token."""
    cache, ids = make(), prompt.ids[None].to(loaded.device)
    for chunk in ids[:, :-1].split(prefill_chunk or ids.shape[1], dim=1):
        # base_model computes no logits, which would take much memory for a long prompt
        loaded.model.base_model(input_ids=chunk, past_key_values=cache, use_cache=True)
    held = cache_bytes(cache)
    # Both figures need the cache of the prompt alone, and not every cache can be cropped back to it
    log_p = _answer_log_p(loaded, copy.deepcopy(cache), prompt)
    text = _generated(loaded, cache, ids, max_new_tokens)
    return {
        "template": prompt.template,
        "answer": prompt.answer,
        "generated": text,
        "exact_match": answers(text, prompt.answer),
        "distractors": len(prompt.other_answers),
        "distractor_match": any(answers(text, other) for other in prompt.other_answers),
        "answer_logprob_nats": log_p,
        "answer_tokens": len(prompt.answer_ids),
        "prompt_tokens": len(prompt.ids),
        "needle_start_token": prompt.needle[0],
        "needle_end_token": prompt.needle[1],
        "cache_bytes": held,
    }


def _answer_log_p(loaded: LoadedModel, cache: Cache, prompt: Prompt) -> float:
    """Log-probability of the answer, in nats, from a cache that holds the prompt without its last token."""
    fed = torch.cat((prompt.ids[-1:], prompt.answer_ids[:-1]))[None].to(loaded.device)
    logits = loaded.model(fed, past_key_values=cache, use_cache=True).logits[0].float()
    wanted = prompt.answer_ids[:, None].to(logits.device)
    return float(torch.log_softmax(logits, dim=-1).gather(-1, wanted).sum())


def _generated(loaded: LoadedModel, cache: Cache, ids: Tensor, max_new_tokens: int) -> str:
    """Text that the model generates greedily after ids [1, T]; the model's own generation settings are overridden."""
    tokenizer = loaded.tokenizer
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    tokens = loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True, do_sample=False, num_beams=1,
        repetition_penalty=1.0, max_new_tokens=max_new_tokens, pad_token_id=padding or 0,
    )  # fmt: skip
    return tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


def answers(text: str, answer: str) -> bool:
    """Whether a text starts with an answer that isn't the beginning of a longer word or number."""
    text = text.strip()
    return text.startswith(answer) and not text[len(answer) : len(answer) + 1].isalnum()


def accuracy(loaded: LoadedModel, haystack: Tensor, caches: Mapping[str, CacheFactory], **grid) -> dict[str, float]:
    """Share of all prompts of a grid that each cache answers. grid: as `measure` takes it."""
    rows = measure(loaded, haystack, caches, **grid)
    return {name: _mean(row["exact_match"] for row in rows if row["cache"] == name) for name in caches}


def cells(rows: Sequence[dict]) -> list[dict]:
    """Records of `measure` averaged over trials: one per cache, context length and depth, in the order of the rows.

    If one of the caches is called "baseline", the others also get their change from it and a verdict.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["cache"], row["context_tokens"], row["depth"]), []).append(row)
    made = {key: _cell(*key, group) for key, group in groups.items()}
    for (_, length, depth), cell in made.items():
        if reference := made.get((BASELINE, length, depth)):
            cell.update(_against(cell, reference))
    return list(made.values())


def _cell(cache: str, length: int, depth: float, group: list[dict]) -> dict:
    return {
        "cache": cache,
        "context_tokens": length,
        "depth": depth,
        "trials": len(group),
        "distractors": group[0]["distractors"],
        "exact_match": _mean(row["exact_match"] for row in group),
        "distractor_match": _mean(row["distractor_match"] for row in group),
        "answer_logprob_nats": _mean(row["answer_logprob_nats"] for row in group),
        "answer_logprob_nats_per_token": _mean(row["answer_logprob_nats"] / row["answer_tokens"] for row in group),
        "cache_bytes": _mean(row["cache_bytes"] for row in group),
    }


def works_from(distractors: int) -> float:
    """The exact match from which on a baseline counts as working.

    It is halfway between guessing among the answers in the prompt and always being right. Below it a cell can't show
    what compression costs.
    """
    guessing = 1 / (1 + distractors) if distractors else 0
    return (1 + guessing) / 2


def _against(cell: dict, reference: dict) -> dict:
    works = reference["exact_match"] >= works_from(reference["distractors"])
    if cell is reference:
        return {"baseline_works": works}
    matched = MATCHES if cell["exact_match"] >= reference["exact_match"] else LOSES
    return {
        "baseline_works": works,
        "logprob_change_nats": cell["answer_logprob_nats"] - reference["answer_logprob_nats"],
        "verdict": matched if works else FAILS,
    }


def summarize(rows: Sequence[dict], seed: int = 0) -> list[dict]:
    """One record per compressed cache over all prompts, paired with the baseline's, which must be among the rows.

    A cell's verdict rests on a few trials. Pairs of prompts allow an exact sign test of the prompts that only one of
    the two caches answers, and a bootstrap interval of the change of the answer's log-probability.
    """
    by_cache: dict[str, list[dict]] = {}
    for row in rows:
        by_cache.setdefault(row["cache"], []).append(row)
    reference = by_cache.pop(BASELINE)
    verdicts = [(cell["cache"], cell["verdict"]) for cell in cells(rows) if "verdict" in cell]
    return [
        {
            "cache": name,
            **_paired(reference, own, seed),
            "cells": sum(cache == name for cache, _ in verdicts),
            "cells_where_baseline_works": sum(cache == name and verdict != FAILS for cache, verdict in verdicts),
            "cells_matched": verdicts.count((name, MATCHES)),
        }
        for name, own in by_cache.items()
    ]


def _paired(reference: Sequence[dict], own: Sequence[dict], seed: int) -> dict:
    """Figures of two caches on the same prompts, in the same order."""
    right = [(a["exact_match"], b["exact_match"]) for a, b in zip(reference, own, strict=True)]
    lost, won = right.count((True, False)), right.count((False, True))
    change = np.array(
        [b["answer_logprob_nats"] - a["answer_logprob_nats"] for a, b in zip(reference, own, strict=True)]
    )
    interval = list(mean_interval(change, seed)) if len(change) > 1 else None  # one prompt gives no interval
    return {
        "prompts": len(right),
        "baseline_exact_match": _mean(first for first, _ in right),
        "exact_match": _mean(second for _, second in right),
        "only_baseline_right": lost,
        "only_compressed_right": won,
        "sign_test_p": sign_test(lost, won),
        "logprob_change_nats": float(change.mean()),
        "logprob_change_nats_interval": interval,
    }


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
