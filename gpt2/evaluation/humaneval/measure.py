"""pass@1 of several caches on the same problems, and each cache paired with the uncompressed one.

With one greedy answer per problem pass@1 is the share of problems whose answer passes its test. Two caches are compared
by the problems that only one of them solves: McNemar's test in its exact form (McNemar 1947), which is a sign test of
these problems.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gpt2.compression.cache.size import held_bytes, plain_bytes
from gpt2.evaluation.asking import grouped, mean
from gpt2.evaluation.humaneval import sandbox
from gpt2.evaluation.humaneval.completions import Completion, Kept, complete
from gpt2.evaluation.humaneval.problems import Problem
from gpt2.evaluation.humaneval.prompts import STOPS, program, prompt_ids
from gpt2.evaluation.perplexity import BASELINE, CacheFactory
from gpt2.evaluation.statistics import sign_test
from gpt2.models.loading import LoadedModel

Answers = dict[tuple[str, str], Completion]  # by cache and task_id


@dataclass(frozen=True)
class Compared:
    """A cache by its factory. about: what it is, as JSON; answers are taken from an earlier run if it is the same.

    pads: whether the model's rows with left padding lose no more than alone; if not, prompts go one at a time. apart:
    whether each row gets a cache of its own, as others' caches don't know padding (`row_caches`).
    """

    make: CacheFactory
    about: dict = field(default_factory=dict)
    pads: bool = True
    apart: bool = False


@dataclass(frozen=True)
class Setting:
    """How problems are asked. style: of prompts, one of STOPS."""

    style: str
    max_new_tokens: int = 256
    batch_size: int = 8
    prefill_chunk: int | None = None

    def key(self, loaded: LoadedModel, about: dict) -> str:
        """A hash of all that decides an answer but the problem and the code; a batch only changes rounding."""
        made = {"fingerprint": loaded.fingerprint, "dtype": str(loaded.model.dtype), "cache": about}
        made |= {"style": self.style, "max_new_tokens": self.max_new_tokens, "prefill_chunk": self.prefill_chunk}
        return hashlib.sha256(json.dumps(made, sort_keys=True, default=str).encode()).hexdigest()


def answer_all(
    loaded: LoadedModel, problems: Sequence[Problem], caches: Mapping[str, Compared], setting: Setting, kept: Kept,
    progress=iter,
) -> Answers:  # fmt: skip
    """The answer of every cache to every problem; those that `kept` has are taken from there, new ones are added.

    progress: wraps the iterable of batches, such as tqdm. Raises PluginError for a prompt without room for an answer.
    """
    prompts = {problem.task_id: prompt_ids(loaded, problem, setting.style) for problem in problems}
    longest = max(map(len, prompts.values()))
    loaded.require_context(setting.max_new_tokens, "--max-new-tokens", after=longest)
    order = sorted(prompts, key=lambda task_id: len(prompts[task_id]))  # little padding in a batch
    keys = {
        (name, problem.task_id): setting.key(loaded, cache.about | {"problem": problem.prompt})
        for name, cache in caches.items() for problem in problems
    }  # fmt: skip
    for name, ids in progress(_batches(order, caches, setting)):
        left = [task_id for task_id in ids if kept.get(keys[name, task_id], task_id) is None]
        if not left:
            continue
        made = complete(
            loaded, caches[name].make, [prompts[task_id] for task_id in left], STOPS[setting.style],
            setting.max_new_tokens, setting.prefill_chunk, caches[name].apart,
        )  # fmt: skip
        own = {task_id: keys[name, task_id] for task_id in left}
        kept.add(name, own, made)
    return {(name, task_id): kept.get(key, task_id) for (name, task_id), key in keys.items()}


def _batches(order: list[str], caches: Mapping[str, Compared], setting: Setting) -> list[tuple[str, list[str]]]:
    """Names of caches with task_ids: all caches of a batch of problems before the next batch.

    Chunks are cut where the longest row has them, and others' caches read another answer from other chunks.
    """
    size = setting.batch_size
    return [
        (name, order[at : at + step])
        for start in range(0, len(order), size)
        for name, cache in caches.items()
        for step in [size if cache.pads and not (cache.apart and setting.prefill_chunk) else 1]
        for at in range(start, min(start + size, len(order)), step)
    ]


def run_all(
    problems: Sequence[Problem], answers: Answers, style: str, limits: sandbox.Limits, progress=iter
) -> list[dict]:
    """Run every answer with its problem's test; a record per cache and problem, as results files have them.

    Answers of one problem that make the same program are run once. progress: wraps the iterable of answers.
    """
    by_id, found, rows = {problem.task_id: problem for problem in problems}, {}, []
    for (name, task_id), answer in progress(list(answers.items())):
        problem = by_id[task_id]
        source = program(problem, answer.text, style)
        if (task_id, source) not in found:
            found[task_id, source] = sandbox.run(source, problem.test, problem.entry_point, limits)
        outcome = found[task_id, source]
        rows.append({
            "cache": name, "task_id": task_id, "passed": outcome == sandbox.PASSED, "outcome": outcome,
            "answer_tokens": answer.tokens, "finished": answer.finished,
            "first_tokens_logprob_nats": answer.first_logprob_nats,
            "same_as_baseline": answer.text == answers[BASELINE, task_id].text,
        })  # fmt: skip
    return rows


def summarize(rows: Sequence[dict]) -> list[dict]:
    """One record per cache, the baseline's first; the others are paired with it problem by problem."""
    by_cache = {name: own for (name,), own in grouped(rows, "cache").items()}
    reference = {row["task_id"]: row["passed"] for row in by_cache[BASELINE]}
    records = []
    for name, own in by_cache.items():
        lost = [row["task_id"] for row in own if reference[row["task_id"]] and not row["passed"]]
        won = [row["task_id"] for row in own if row["passed"] and not reference[row["task_id"]]]
        records.append({
            "cache": name, "problems": len(own), "passed": sum(row["passed"] for row in own),
            "pass_at_1": mean(row["passed"] for row in own), "only_baseline": lost, "only_compressed": won,
            "mcnemar_p": sign_test(len(lost), len(won)),
            "unfinished": sum(not row["finished"] for row in own),
            "same_answers": sum(row["same_as_baseline"] for row in own),
        })  # fmt: skip
    return records


def about(loaded: LoadedModel, caches: Mapping[str, Compared], answers: Answers) -> dict:
    """What results files say of answers: the commits that generated them, and how small each cache was.

    `sequence_tokens` is a mean length of answer and prompt, rounded up; `compression_ratios` are of one sequence of so
    many tokens of a 16-bit model, by cache. Problems are short, so exact tokens weigh more than in a long context.
    """
    tokens = math.ceil(mean(answer.prompt_tokens + answer.tokens for answer in answers.values()))
    plain = plain_bytes(loaded.geometry, tokens)
    held = {name: held_bytes(cache.make, loaded.geometry, tokens) for name, cache in caches.items() if name != BASELINE}
    return {
        "answer_commits": sorted({str(answer.commit) for answer in answers.values()}),
        "sequence_tokens": tokens,
        "compression_ratios": {BASELINE: 1.0} | {name: plain / size for name, size in held.items()},
    }
