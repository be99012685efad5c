"""What all tasks share: a prompt that is checked before it is asked, and how its answer is scored.

A task writes a draft: a body, a question, the answers, wrong answers that stand in the body too, and the probability of
guessing right. `Task.build` makes token ids of it and checks it, so that no cache is asked a question that has no
answer in the prompt.
"""

from __future__ import annotations

import math
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gpt2.common.errors import PluginError
from gpt2.evaluation.asking import answers
from gpt2.evaluation.prompt_tokens import encode, insert, question_and_answer
from gpt2.text.texts import start_tokens

FULL = 0.8  # share of the room that a prompt has to fill, since whole records seldom fill it exactly
NUMBERS = 90_000  # of five digits
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


@dataclass(frozen=True)
class Source:
    """What prompts are made from: a tokenizer, and token ids [n] of ordinary text, called `name` in errors."""

    tokenizer: PreTrainedTokenizerBase
    haystack: Tensor
    name: str = "the text"

    def window(self, rng: np.random.Generator, tokens: int) -> Tensor:
        """A random part of the text, [tokens]. Raises PluginError if the text is shorter."""
        if tokens > len(self.haystack):
            raise PluginError(
                f"{self.name} has {len(self.haystack):,} tokens, fewer than a context of {tokens:,}: give a longer "
                "--text or shorter --context-lengths"
            )
        begin = int(rng.integers(len(self.haystack) - tokens + 1))
        return self.haystack[begin : begin + tokens]

    def encode(self, text: str) -> Tensor:
        return encode(self.tokenizer, text)


@dataclass(frozen=True)
class Draft:
    """A prompt before it is checked.

    body: token ids of all before the question. question: text that ends where the answer begins, after a space.
    evidence: parts of the body from which the answers follow, each holding one. others: wrong answers of the same form
    in the body. chance: probability that a guess among these candidates is right. joined: between several answers.
    """

    body: Tensor
    question: str
    answers: Sequence[str]
    evidence: Sequence[str]
    others: Sequence[str]
    chance: float
    joined: str = ", "


@dataclass(frozen=True)
class TaskPrompt:
    """A checked prompt. ids: [T]; answer_ids: [n], the answers one after the other; depth: share of the prompt before
    the first evidence.
    """

    ids: Tensor
    answers: tuple[str, ...]
    answer_ids: Tensor
    others: tuple[str, ...]
    chance: float
    depth: float = field(compare=False)

    def found(self, text: str) -> list[bool]:
        """For each answer, whether a generated text has it. A single answer must stand at the text's beginning."""
        if len(self.answers) == 1:
            return [answers(text, self.answers[0])]
        line = text.strip().split("\n")[0]  # small models go on with another question and answer
        return [_has(line, answer) for answer in self.answers]

    def exact(self, text: str) -> bool:
        """Whether a generated text has all answers and, if there are several, no wrong one beside them."""
        line = text.strip().split("\n")[0]
        wrong = len(self.answers) > 1 and any(_has(line, other) for other in self.others)
        return all(self.found(text)) and not wrong


def _has(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


class Task(ABC):
    """One kind of prompt. name: in flags and results. max_new_tokens: room for the answer."""

    name: str
    max_new_tokens: int = 16

    @abstractmethod
    def draft(self, source: Source, room: int, rng: np.random.Generator) -> Draft:
        """A draft whose body and question have at most `room` tokens. Raises PluginError if that is too few."""

    def build(self, source: Source, length: int, trial: int, seed: int = 0) -> TaskPrompt:
        """The prompt of a trial, which depends on these numbers, the text and the tokenizer only.

        length: tokens of prompt and answer together; the prompt has at most `length − max_new_tokens` and at least 80 %
        of that. Raises PluginError if no such prompt can be made.
        """
        rng = np.random.default_rng([seed % 2**32, trial, length, zlib.crc32(self.name.encode())])
        start = start_tokens(source.tokenizer)
        room = length - self.max_new_tokens
        draft = self.draft(source, room - len(start), rng)
        question, answer_ids = question_and_answer(
            source.tokenizer, draft.question, draft.joined.join(draft.answers), self.max_new_tokens, f"task {self.name}"
        )
        ids = torch.cat((start, draft.body, question))
        text = source.tokenizer.decode(ids)
        _check(self.name, draft, text, len(ids), room)
        depth = text.find(draft.evidence[0]) / len(text)
        return TaskPrompt(ids, tuple(draft.answers), answer_ids, tuple(draft.others), draft.chance, depth)


def _check(name: str, draft: Draft, text: str, tokens: int, room: int) -> None:
    """Raise PluginError for a prompt that no cache could answer, or that could be answered without reading it."""
    body = text.removesuffix(draft.question)
    problems = {
        "its question is not at the end": not text.endswith(draft.question),
        "a passage with an answer is missing": not all(part in body for part in draft.evidence),
        "an answer is in no passage": not all(any(a in part for part in draft.evidence) for a in draft.answers),
        "an answer is in the question": any(_has(draft.question, answer) for answer in draft.answers),
        "it has no wrong answers, or lacks some": not draft.others or not all(other in body for other in draft.others),
        "a wrong answer is right": bool(set(draft.others) & set(draft.answers)),
        f"it has {tokens} tokens in a room of {room}": not FULL * room <= tokens <= room,
    }
    if wrong := [problem for problem, there in problems.items() if there]:
        raise PluginError(f"task {name}, a prompt of {tokens} tokens: {'; '.join(wrong)}")


def no_room(name: str, room: int, wanted: int) -> PluginError:
    """The error for a context that is too short for a task's shortest prompt."""
    return PluginError(
        f"task {name}: {room} tokens for the prompt are too few, it needs about {wanted}: use longer --context-lengths"
    )


def in_text(
    task: Task, source: Source, room: int, rng: np.random.Generator, sentences: Sequence[str], question: str,
    first: float | None = None, in_order: bool = False,
) -> tuple[Tensor, list[int]]:  # fmt: skip
    """Token ids of ordinary text with sentences at random places, and the order in which the sentences stand.

    Together with the question it has exactly `room` tokens. first: share of the text before the first sentence; random
    if None. in_order: whether the sentences keep their order.
    """
    held = [source.encode(f"\n{sentence}\n") for sentence in sentences]
    space = room - len(source.encode(question)) - sum(map(len, held))
    if space < len(sentences):
        raise no_room(task.name, room, room - space + len(sentences))
    places = rng.choice(space, size=len(held), replace=False).tolist()
    if in_order:
        places.sort()
    if first is not None:
        places[0] = round(first * space)
    return insert(source.window(rng, space), held, places)[0], sorted(range(len(places)), key=places.__getitem__)


def most_records(task: Task, room: int, most: int, least: int, size: Callable[[int], int]) -> int:
    """The largest number of records, from `least` to `most`, whose prompt fits.

    size: tokens of a prompt by its number of records, which grows with it.
    """
    if size(least) > room:
        raise no_room(task.name, room, size(least))
    low, high = least, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= room else (low, middle)
    return low


def numbers(rng: np.random.Generator, count: int) -> list[str]:
    """Different numbers of five digits."""
    return [str(n) for n in 10_000 + rng.choice(NUMBERS, size=count, replace=False)]


def invented_words(rng: np.random.Generator, count: int, syllables: int = 3) -> list[str]:
    """Different words that mean nothing, such as `bakotu`; none is the beginning of another."""
    drawn = rng.choice(len(SYLLABLES) ** syllables, size=count, replace=False)
    return ["".join(SYLLABLES[n // len(SYLLABLES) ** i % len(SYLLABLES)] for i in range(syllables)) for n in drawn]


def subsets(candidates: int, wanted: int) -> float:
    """Probability that `wanted` candidates chosen at random are the right ones."""
    return 1 / math.comb(candidates, wanted)
