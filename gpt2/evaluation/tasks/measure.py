"""Ask tasks of several caches, by name and factory, and judge each cache beside the uncompressed one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from torch import Tensor

from gpt2.evaluation import asking
from gpt2.evaluation.asking import mean
from gpt2.evaluation.perplexity import CacheFactory
from gpt2.evaluation.tasks import TASKS, Source, TaskPrompt
from gpt2.models.loading import LoadedModel

CELL = ("cache", "task", "context_tokens")


def measure(
    loaded: LoadedModel,
    haystack: Tensor,
    caches: Mapping[str, CacheFactory],
    tasks: Sequence[str] = tuple(TASKS),
    *,
    lengths: Sequence[int],
    trials: int,
    seed: int = 0,
    prefill_chunk: int | None = None,
    haystack_name: str = "the text",
    progress=iter,
) -> list[dict]:
    """Ask every cache the same prompts; returns a record per prompt and cache, as results files have them.

    haystack: token ids [n] of ordinary text. tasks: names in TASKS. lengths: context lengths in tokens, with room for
    the answer. progress: wraps the iterable of prompts, such as tqdm. All prompts are built and checked before the
    first one is asked, so a PluginError about them comes before any work.
    """
    loaded.require_context(max(lengths), "--context-lengths")
    source = Source(loaded.tokenizer, haystack, haystack_name)
    asked = [
        ({"task": name, "context_tokens": length, "trial": trial}, TASKS[name].build(source, length, trial, seed))
        for name, length, trial in itertools.product(tasks, lengths, range(trials))
    ]
    return asking.ask_all(caches, _with_room(asked), lambda make, prompt: ask(loaded, make, *prompt, prefill_chunk),
                          progress)  # fmt: skip


def _with_room(asked: list[tuple[dict, TaskPrompt]]) -> list[tuple[dict, tuple[TaskPrompt, int]]]:
    """Each prompt with the number of tokens to generate."""
    return [(keys, (prompt, TASKS[keys["task"]].max_new_tokens)) for keys, prompt in asked]


def ask(
    loaded: LoadedModel, make: CacheFactory, prompt: TaskPrompt, max_new_tokens: int, prefill_chunk: int | None = None
) -> dict:
    """Ask one prompt with a fresh cache. `recall`: share of the answers that the generated text has."""
    reply = asking.reply(loaded, make, prompt.ids, prompt.answer_ids, max_new_tokens, prefill_chunk)
    return {
        "answers": list(prompt.answers),
        "exact_match": prompt.exact(reply.text),
        "recall": mean(prompt.found(reply.text)),
        "chance": prompt.chance,
        "distractors": len(prompt.others),
        "depth": prompt.depth,
        **reply.record(),
    }


def cells(rows: Sequence[dict]) -> list[dict]:
    """Records of `measure` averaged over trials: one per cache, task and context length, in the order of the rows.

    If one of the caches is called "baseline", the others also get their change from it and a verdict.
    """
    made = {
        key: dict(zip(CELL, key, strict=True))
        | {"chance": mean(row["chance"] for row in group), "recall": mean(row["recall"] for row in group)}
        | asking.averages(group)
        for key, group in asking.grouped(rows, *CELL).items()
    }
    asking.judge(made, lambda cell: asking.works_from(cell["chance"]))
    return list(made.values())


def by_task(rows: Sequence[dict], seed: int = 0) -> list[dict]:
    """Records as `asking.summarize` makes them, one per compressed cache and task, over all lengths."""
    judged = asking.grouped(cells(rows), "task")
    return [
        {"task": task, **record}
        for (task,), own in asking.grouped(rows, "task").items()
        for record in asking.summarize(own, judged[task,], seed)
    ]
