"""Needle in a haystack: can the model still read one sentence out of a long context when its cache is compressed?

Prompts come from `needle_prompts`; how they are asked, and which two figures are read from the cache, is in `asking`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from torch import Tensor

from gpt2.evaluation import asking
from gpt2.evaluation.asking import answers, mean
from gpt2.evaluation.needle_prompts import Needles, Prompt
from gpt2.evaluation.perplexity import CacheFactory
from gpt2.models.loading import LoadedModel

CELL = ("cache", "context_tokens", "depth")


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
    needles = Needles(loaded.tokenizer, haystack, **task)
    loaded.require_context(max(lengths), needles.flags.lengths)
    asked = [
        ({"context_tokens": length, "depth": depth, "trial": trial}, needles.build(length, depth, trial, seed))
        for length, depth, trial in itertools.product(lengths, depths, range(trials))
    ]
    return asking.ask_all(
        caches, asked, lambda make, prompt: ask(loaded, make, prompt, needles.max_new_tokens, prefill_chunk), progress
    )


def ask(
    loaded: LoadedModel, make: CacheFactory, prompt: Prompt, max_new_tokens: int = 12, prefill_chunk: int | None = None
) -> dict:
    """Ask one question with a fresh cache; the record's bytes are those of the prompt without its last token."""
    reply = asking.reply(loaded, make, prompt.ids, prompt.answer_ids, max_new_tokens, prefill_chunk)
    return {
        "template": prompt.template,
        "answer": prompt.answer,
        "exact_match": answers(reply.text, prompt.answer),
        "distractors": len(prompt.other_answers),
        "distractor_match": any(answers(reply.text, other) for other in prompt.other_answers),
        "needle_start_token": prompt.needle[0],
        "needle_end_token": prompt.needle[1],
        **reply.record(),
    }


def accuracy(loaded: LoadedModel, haystack: Tensor, caches: Mapping[str, CacheFactory], **grid) -> dict[str, float]:
    """Share of all prompts of a grid that each cache answers. grid: as `measure` takes it."""
    rows = measure(loaded, haystack, caches, **grid)
    return {name: mean(row["exact_match"] for row in rows if row["cache"] == name) for name in caches}


def cells(rows: Sequence[dict]) -> list[dict]:
    """Records of `measure` averaged over trials: one per cache, context length and depth, in the order of the rows.

    If one of the caches is called "baseline", the others also get their change from it and a verdict.
    """
    made = {key: _cell(*key, group) for key, group in asking.grouped(rows, *CELL).items()}
    asking.judge(made, lambda cell: works_from(cell["distractors"]))
    return list(made.values())


def _cell(cache: str, length: int, depth: float, group: list[dict]) -> dict:
    return {
        "cache": cache,
        "context_tokens": length,
        "depth": depth,
        "distractors": group[0]["distractors"],
        "distractor_match": mean(row["distractor_match"] for row in group),
        **asking.averages(group),
    }


def works_from(distractors: int) -> float:
    """The exact match from which on a baseline counts as working, if it guesses among the answers in the prompt."""
    return asking.works_from(1 / (1 + distractors) if distractors else 0)


def summarize(rows: Sequence[dict], seed: int = 0) -> list[dict]:
    """As `asking.summarize`, of the cells of `cells`."""
    return asking.summarize(rows, cells(rows), seed)
