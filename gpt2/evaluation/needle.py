"""Needle in a haystack: can the model still read one sentence out of a long context when its cache is compressed?

A sentence with an answer nobody could guess (the needle) lies at some depth of ordinary text (the haystack), among
sentences of the same form about somebody else (distractors). The prompt ends with a question and the beginning of its
answer, and the model goes on. All but the prompt's last token is read into the cache first, so that both figures come
from what is stored:

    exact match      greedy `generate`, the same call for every cache, starts with the answer
    log-probability  of the answer's tokens, fed one after another; graded, where exact match is all or nothing

The compressed caches here return their reconstruction already while the prompt is read, so even one forward pass over
all of it has the error of compression in it. Caches that hand back exact tensors in that pass, as those of
transformers do, are read back from then on; `prefill_chunk` feeds the prompt in pieces, as a server does.

A context length counts the prompt and room for the answer: prompts have exactly `length − max_new_tokens` tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gpt2.data import start_tokens
from gpt2.errors import PluginError
from gpt2.evaluation.memory import cache_bytes
from gpt2.evaluation.perplexity import BASELINE, CacheFactory
from gpt2.evaluation.statistics import mean_interval, sign_test
from gpt2.models import LoadedModel

FAILS, MATCHES, LOSES = "baseline fails", "matches", "loses"

NAMES = "Anna Peter Maria Thomas Laura Henry Julia Oscar Simon Emily Victor Diana Martin Sophie George Helen"
TOWNS = "Lisbon Vienna Dublin Prague Athens Cairo Madrid Berlin London Boston Denver Tokyo Sydney Milan Geneva Oslo"
COUNTRIES = "Norway Spain Poland Greece Turkey Brazil Canada Mexico Egypt Kenya India Japan Chile Peru Sweden Austria"


@dataclass(frozen=True)
class Template:
    """One form of needle. sentence: with {subject} and {answer}; question: with {subject}, and the answer would follow
    after a space. answers: words to choose from, as subjects; without them the answer is five digits."""

    name: str
    sentence: str
    question: str
    answers: str = ""
    subjects: str = NAMES

    def draw(self, rng: np.random.Generator, count: int, taken: str) -> list[tuple[str, str]]:
        """`count` different subjects with different answers, none of which is in the text `taken`."""
        answers = self.answers.split() or rng.integers(10_000, 100_000, size=10 * count).astype(str).tolist()
        subjects, answers = (
            [w for w in dict.fromkeys(words) if w not in taken] for words in (self.subjects.split(), answers)
        )
        if count > min(len(subjects), len(answers)):
            raise PluginError(
                f"needle template {self.name!r} lacks {count} subjects and answers that don't occur in the text anyway: "
                "use fewer --distractors or another --text"
            )
        pick = [rng.choice(words, size=count, replace=False).tolist() for words in (subjects, answers)]
        return list(zip(*pick, strict=True))


# Asked for a whole sentence, a small model answers up to twice as far as without a question (tried on SmolLM2-135M)
TEMPLATES = (
    Template(
        "locker",
        "The locker number of {subject} is {answer}.",
        "Question: What is the locker number of {subject}?\nAnswer: The locker number of {subject} is",
    ),
    Template(
        "town",
        "The home town of {subject} is {answer}.",
        "Question: What is the home town of {subject}?\nAnswer: The home town of {subject} is",
        TOWNS,
    ),
    Template(
        "account",
        "The account number of {subject} is {answer}.",
        "Question: What is the account number of {subject}?\nAnswer: The account number of {subject} is",
    ),
    Template(
        "country",
        "{subject} comes from {answer}.",
        "Question: Where does {subject} come from?\nAnswer: {subject} comes from",
        COUNTRIES,
    ),
)


@dataclass(frozen=True)
class Prompt:
    """One question. ids: [T], what the model reads; answer_ids: [n], what should follow; needle: where it is, [start, end)."""

    ids: Tensor
    answer: str
    answer_ids: Tensor
    needle: tuple[int, int]
    template: str
    distractor_answers: tuple[str, ...]


@dataclass(frozen=True)
class Needles:
    """Builds prompts from token ids. haystack: token ids [n] of ordinary text; distractors: per prompt."""

    tokenizer: object
    haystack: Tensor
    templates: Sequence[Template] = TEMPLATES
    distractors: int = 1
    max_new_tokens: int = 12

    def build(self, length: int, depth: float, trial: int, seed: int = 0) -> Prompt:
        """The prompt of a cell's trial: it depends on these four numbers, not on what else is measured.

        depth: share of the haystack's tokens before the needle, 0 … 1. Raises PluginError where the context is too
        short, the text too, or the needle doesn't arrive whole.
        """
        if not 0 <= depth <= 1:
            raise PluginError(f"needle position {depth} is out of range: 0 is the prompt's beginning, 1 its end")
        if length > len(self.haystack):
            raise PluginError(
                f"the text has {len(self.haystack):,} tokens, fewer than a context of {length:,}: give a longer "
                "--text or shorter --context-lengths"
            )
        rng = np.random.default_rng([seed % 2**32, trial, length, round(depth * 10_000)])
        template = self.templates[trial % len(self.templates)]
        begin = int(rng.integers(len(self.haystack) - length + 1))
        window = self.haystack[begin : begin + length]
        drawn = template.draw(rng, 1 + self.distractors, self.tokenizer.decode(window))
        sentences = [self._tokens(f"\n{template.sentence}\n".format(subject=s, answer=a)) for s, a in drawn]
        question, answer_ids = self._question(template, *drawn[0])

        start = start_tokens(self.tokenizer)
        fixed = len(start) + len(question) + sum(map(len, sentences))
        space = length - self.max_new_tokens - fixed  # tokens of haystack
        if space < 1:
            raise PluginError(
                f"a context of {length} tokens has no room for needle, distractors, question and answer: "
                f"--context-lengths {fixed + self.max_new_tokens + 1} is the least with {self.distractors} distractors"
            )
        places = [round(depth * space), *rng.integers(space + 1, size=self.distractors).tolist()]
        ids, (first, last) = _insert(window[:space], sentences, places)
        needle = (first + len(start), last + len(start))
        prompt = Prompt(
            torch.cat((start, ids, question)), drawn[0][1], answer_ids, needle, template.name,
            tuple(answer for _, answer in drawn[1:]),
        )  # fmt: skip
        self._check(prompt, sentences[0], question, length)
        return prompt

    def _tokens(self, text: str) -> Tensor:
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]

    def _question(self, template: Template, subject: str, answer: str) -> tuple[Tensor, Tensor]:
        """Tokens of the question, and of the answer as it follows in one text with the question."""
        text = f"\n{template.question}".format(subject=subject)
        question, both = self._tokens(text), self._tokens(f"{text} {answer}")
        answer_ids = both[len(question) :]
        if not torch.equal(both[: len(question)], question) or self.tokenizer.decode(answer_ids).strip() != answer:
            raise PluginError(
                f"needle template {template.name!r}: this tokenizer doesn't give the answer {answer!r} back as tokens "
                "of its own"
            )
        if len(answer_ids) >= self.max_new_tokens:
            raise PluginError(
                f"the answer {answer!r} has {len(answer_ids)} tokens: use --max-new-tokens {len(answer_ids) + 1} or "
                "more"
            )
        return question, answer_ids

    def _check(self, prompt: Prompt, sentence: Tensor, question: Tensor, length: int) -> None:
        """A needle that isn't there, or not whole, would make every cache look bad, or every loss look like none."""
        held = prompt.ids[slice(*prompt.needle)]
        problems = {
            "the needle is not whole": not torch.equal(held, sentence),
            "the answer can't be read from the needle": prompt.answer not in self.tokenizer.decode(held),
            "the question is not at the end": not torch.equal(prompt.ids[-len(question) :], question),
            "the length is wrong": len(prompt.ids) != length - self.max_new_tokens,
        }
        if any(problems.values()):
            what = ", ".join(text for text, there in problems.items() if there)
            raise PluginError(f"needle prompt of {len(prompt.ids)} tokens for a context of {length}: {what}")


def _insert(haystack: Tensor, sentences: Sequence[Tensor], places: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
    """The haystack with sentences put before the tokens at `places`; where the first sentence begins and ends."""
    parts, done, size, first = [], 0, 0, 0
    for index in sorted(range(len(places)), key=places.__getitem__):
        parts += [haystack[done : places[index]], sentences[index]]
        size += places[index] - done + len(sentences[index])
        done = places[index]
        if index == 0:
            first = size - len(sentences[0])
    return torch.cat((*parts, haystack[done:])), (first, first + len(sentences[0]))


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
    """Ask every cache the same questions; a record per prompt and cache, as results files have them.

    haystack: token ids [n]. lengths: contexts in tokens. task: settings of `Needles`. All prompts are built, and so
    checked, before the first is asked. progress: wraps the iterable of prompts, such as tqdm.
    """
    loaded.require_context(max(lengths), "--context-lengths")
    needles = Needles(loaded.tokenizer, haystack, **task)
    cells = [(length, depth, trial) for length in lengths for depth in depths for trial in range(trials)]
    asked = [(cell, needles.build(*cell, seed)) for cell in cells]
    return [
        {"cache": name, "context_tokens": length, "depth": depth, "trial": trial}
        | ask(loaded, make, prompt, needles.max_new_tokens, prefill_chunk)
        for (length, depth, trial), prompt in progress(asked)
        for name, make in caches.items()
    ]


@torch.no_grad()
def ask(
    loaded: LoadedModel, make: CacheFactory, prompt: Prompt, max_new_tokens: int = 12, prefill_chunk: int | None = None
) -> dict:
    """One question through a fresh cache. The cache's bytes are those of the prompt without its last token."""
    cache, ids = make(), prompt.ids[None].to(loaded.device)
    for piece in ids[:, :-1].split(prefill_chunk or ids.shape[1], dim=1):
        loaded.model.base_model(input_ids=piece, past_key_values=cache, use_cache=True)  # no logits of a long prompt
    held = cache_bytes(cache)
    # Both figures need the prompt's cache as it is, and not every cache can be cropped back to it
    log_p = _answer_log_p(loaded, copy.deepcopy(cache), prompt)
    text = _generated(loaded, cache, ids, max_new_tokens)
    return {
        "template": prompt.template,
        "answer": prompt.answer,
        "generated": text,
        "exact_match": answers(text, prompt.answer),
        "distractors": len(prompt.distractor_answers),
        "distractor_match": any(answers(text, other) for other in prompt.distractor_answers),
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
    wanted = prompt.answer_ids[:, None].to(loaded.device)
    log_p = float(torch.log_softmax(logits, dim=-1).gather(-1, wanted).sum())
    if not np.isfinite(log_p):
        raise PluginError("the answer's log-probability is NaN or infinite: try --dtype float32, or more bits")
    return log_p


def _generated(loaded: LoadedModel, cache: Cache, ids: Tensor, max_new_tokens: int) -> str:
    """What the model writes after ids [1, T], greedily; a model's own settings for chats stay out of it."""
    tokenizer = loaded.tokenizer
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    tokens = loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True, do_sample=False, num_beams=1,
        repetition_penalty=1.0, max_new_tokens=max_new_tokens, pad_token_id=padding or 0,
    )  # fmt: skip
    return tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


def answers(text: str, answer: str) -> bool:
    """Whether a text starts with an answer, and with no longer word or number than it."""
    text = text.strip()
    return text.startswith(answer) and not text[len(answer) : len(answer) + 1].isalnum()


def accuracy(loaded: LoadedModel, haystack: Tensor, caches: Mapping[str, CacheFactory], **grid) -> dict[str, float]:
    """Share of all prompts of a grid that each cache answers. grid: as `measure` takes it."""
    rows = measure(loaded, haystack, caches, **grid)
    return {name: _mean(row["exact_match"] for row in rows if row["cache"] == name) for name in caches}


def cells(rows: Sequence[dict]) -> list[dict]:
    """Records of `measure` averaged over trials: one per cache, length and depth, in the order they come.

    With a cache called "baseline" among them, the others get their change against it and a verdict.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["cache"], row["context_tokens"], row["depth"]), []).append(row)
    made = {key: _cell(*key, group) for key, group in groups.items()}
    for (_, length, depth), cell in made.items():
        if reference := made.get((BASELINE, length, depth)):
            cell |= _against(cell, reference)
    return list(made.values())


def _cell(cache: str, length: int, depth: float, group: list[dict]) -> dict:
    return {
        "cache": cache,
        "context_tokens": length,
        "depth": depth,
        "trials": len(group),
        "exact_match": _mean(row["exact_match"] for row in group),
        "distractor_match": _mean(row["distractor_match"] for row in group),
        "answer_logprob_nats": _mean(row["answer_logprob_nats"] for row in group),
        "answer_logprob_nats_per_token": _mean(row["answer_logprob_nats"] / row["answer_tokens"] for row in group),
        "cache_bytes": _mean(row["cache_bytes"] for row in group),
        "baseline_works_from": works_from(group[0]["distractors"]),
    }


def works_from(distractors: int) -> float:
    """Exact match from which a baseline works: halfway between guessing among the answers it has read and always
    right. Below it a cell can't tell what compression costs."""
    return (1 + (1 / (1 + distractors) if distractors else 0)) / 2


def _against(cell: dict, reference: dict) -> dict:
    works = reference["exact_match"] >= reference["baseline_works_from"]
    verdict = {"baseline_works": works}
    if cell is not reference:
        verdict["logprob_change_nats"] = cell["answer_logprob_nats"] - reference["answer_logprob_nats"]
        matched = MATCHES if cell["exact_match"] >= reference["exact_match"] else LOSES
        verdict["verdict"] = matched if works else FAILS
    return verdict


def summarize(rows: Sequence[dict], seed: int = 0) -> list[dict]:
    """One record per compressed cache over all prompts of a grid, those of failing cells included.

    The cells' own verdicts rest on a few trials each; here the prompts are pairs: an exact sign test of those that one
    cache alone answers, and a bootstrap interval of the change of the answer's log-probability.
    """
    by_cell, summaries = cells(rows), []
    reference = [row for row in rows if row["cache"] == BASELINE]
    for name in dict.fromkeys(row["cache"] for row in rows if row["cache"] != BASELINE):
        own = [row for row in rows if row["cache"] == name]
        pairs = list(zip(reference, own, strict=True))
        lost = sum(b["exact_match"] and not c["exact_match"] for b, c in pairs)
        won = sum(c["exact_match"] and not b["exact_match"] for b, c in pairs)
        change = np.array([c["answer_logprob_nats"] - b["answer_logprob_nats"] for b, c in pairs])
        verdicts = [cell["verdict"] for cell in by_cell if cell["cache"] == name]
        summaries.append({
            "cache": name,
            "prompts": len(pairs),
            "exact_match": _mean(row["exact_match"] for row in own),
            "baseline_exact_match": _mean(row["exact_match"] for row in reference),
            "only_baseline_right": lost,
            "only_compressed_right": won,
            "sign_test_p": sign_test(lost, won),
            "logprob_change_nats": float(change.mean()),
            "logprob_change_nats_interval": list(mean_interval(change, seed)),
            "cells": len(verdicts),
            "cells_where_baseline_works": len(verdicts) - verdicts.count(FAILS),
            "cells_matched": verdicts.count(MATCHES),
        })  # fmt: skip
    return summaries


def _mean(values) -> float:
    return float(np.mean(list(values)))
