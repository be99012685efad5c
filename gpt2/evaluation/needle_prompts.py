"""Prompts of the needle test: one sentence in a long text, sentences like it about others, a question at the end.

    text … "The locker number of Anna is 48213." … text … "The locker number of Tom is 90157." … text
    "Question: What is the locker number of Anna?  Answer: The locker number of Anna is"

Prompts are built from token ids rather than text, so that each has exactly the wanted number of tokens and no later
step can cut off the needle. Every prompt is checked for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gpt2.common.errors import PluginError
from gpt2.evaluation.prompt_tokens import encode, insert, question_and_answer
from gpt2.text.texts import start_tokens

NAMES = "Anna Peter Maria Thomas Laura Henry Julia Oscar Simon Emily Victor Diana Martin Sophie George Helen"
TOWNS = "Lisbon Vienna Dublin Prague Athens Cairo Madrid Berlin London Boston Denver Tokyo Sydney Milan Geneva Oslo"
COUNTRIES = "Norway Spain Poland Greece Turkey Brazil Canada Mexico Egypt Kenya India Japan Chile Peru Sweden Austria"


@dataclass(frozen=True)
class Flags:
    """A script's flags for the settings of prompts, which errors name; None for one that the script doesn't have."""

    lengths: str = "--context-lengths"
    distractors: str | None = "--distractors"
    max_new_tokens: str | None = "--max-new-tokens"


@dataclass(frozen=True)
class Template:
    """One form of needle.

    sentence: has {subject} and {answer}. question: has {subject}; the answer follows after a space. answers, subjects:
    words to choose from, separated by spaces; without answers the answer is a number of five digits.
    """

    name: str
    sentence: str
    question: str
    answers: str = ""
    subjects: str = NAMES

    def draw(self, rng: np.random.Generator, count: int, taken: str, flags: Flags = Flags()) -> list[tuple[str, str]]:
        """`count` different subjects with different answers, none of which occurs in the text `taken`.

        Raises PluginError, naming the script's flags, if there are too few.
        """
        numbers = rng.integers(10_000, 100_000, size=10 * count).astype(str).tolist()
        picked = []
        for words in (self.subjects.split(), self.answers.split() or numbers):
            free = [word for word in dict.fromkeys(words) if word not in taken]
            if len(free) < count:
                fewer = f"fewer {flags.distractors}, " if flags.distractors and count > 1 else ""
                raise PluginError(
                    f"needle template {self.name!r} has fewer than {count} subjects or answers that don't occur in "
                    f"the text: use {fewer}a smaller {flags.lengths} or another --text"
                )
            picked.append(rng.choice(free, size=count, replace=False).tolist())
        return list(zip(*picked, strict=True))


# The question before the beginning of the answer helps: SmolLM2-135M then finds more needles at 2,048 tokens
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
    """One question. ids: [T], the prompt; answer_ids: [n], the wanted answer; needle: [start, end) in ids."""

    ids: Tensor
    answer: str
    answer_ids: Tensor
    needle: tuple[int, int]
    template: str
    other_answers: tuple[str, ...]  # the distractors'


@dataclass(frozen=True)
class Needles:
    """Builds prompts.

    haystack: token ids [n] of ordinary text. haystack_name, flags: for error messages. distractors: needles about other
    subjects in each prompt. A context length includes room for the answer: prompts have exactly
    `length − max_new_tokens` tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    haystack: Tensor
    templates: Sequence[Template] = TEMPLATES
    distractors: int = 1
    max_new_tokens: int = 12
    haystack_name: str = "the text"
    flags: Flags = Flags()

    def build(self, length: int, depth: float, trial: int, seed: int = 0) -> Prompt:
        """The prompt of a trial; it depends on these four numbers only.

        depth: share of the haystack's tokens before the needle, 0 … 1. Raises PluginError if the context or the text is
        too short, or the tokenizer can't give the needle back.
        """
        self._check_cell(length, depth)
        rng = np.random.default_rng([seed % 2**32, trial, length, round(depth * 10_000)])
        template = self.templates[trial % len(self.templates)]
        begin = int(rng.integers(len(self.haystack) - length + 1))
        window = self.haystack[begin : begin + length]
        drawn = template.draw(rng, 1 + self.distractors, self.tokenizer.decode(window), self.flags)
        sentences = [self._tokens(f"\n{template.sentence}\n".format(subject=s, answer=a)) for s, a in drawn]
        question, answer_ids = self._question(template, *drawn[0])

        start = start_tokens(self.tokenizer)
        fixed = len(start) + len(question) + sum(map(len, sentences)) + self.max_new_tokens
        space = length - fixed  # tokens of haystack
        if space < 1:
            raise PluginError(
                f"a context of {length} tokens has no room for needle, distractors ({self.distractors}), question "
                f"and answer: use {self.flags.lengths} {fixed + 1} or more"
            )
        places = [round(depth * space), *rng.integers(space + 1, size=self.distractors).tolist()]
        ids, first = insert(window[:space], sentences, places)
        needle = (len(start) + first, len(start) + first + len(sentences[0]))
        others = tuple(answer for _, answer in drawn[1:])
        prompt = Prompt(torch.cat((start, ids, question)), drawn[0][1], answer_ids, needle, template.name, others)
        self._check(prompt, sentences[0], question, length)
        return prompt

    def _check_cell(self, length: int, depth: float) -> None:
        if not 0 <= depth <= 1:
            raise PluginError(f"needle position {depth} is out of range: 0 is the text's beginning, 1 its end")
        if length > len(self.haystack):
            raise PluginError(
                f"{self.haystack_name} has {len(self.haystack):,} tokens, fewer than a context of {length:,}: give a "
                f"longer --text or a smaller {self.flags.lengths}"
            )

    def _tokens(self, text: str) -> Tensor:
        return encode(self.tokenizer, text)

    def _question(self, template: Template, subject: str, answer: str) -> tuple[Tensor, Tensor]:
        text, what = f"\n{template.question}".format(subject=subject), f"needle template {template.name!r}"
        flag = self.flags.max_new_tokens
        return question_and_answer(self.tokenizer, text, answer, self.max_new_tokens, what, flag)

    def _check(self, prompt: Prompt, sentence: Tensor, question: Tensor, length: int) -> None:
        """Raise PluginError for a prompt without its whole needle, with which any cache would fail."""
        held = prompt.ids[slice(*prompt.needle)]
        problems = {
            "the needle is not whole": not torch.equal(held, sentence),
            "the answer can't be read from the needle": prompt.answer not in self.tokenizer.decode(held),
            "the question is not at the end": not torch.equal(prompt.ids[-len(question) :], question),
            "its length is wrong": len(prompt.ids) != length - self.max_new_tokens,
        }
        if any(problems.values()):
            what = ", ".join(text for text, there in problems.items() if there)
            raise PluginError(f"needle prompt of {len(prompt.ids)} tokens for a context of {length}: {what}")
