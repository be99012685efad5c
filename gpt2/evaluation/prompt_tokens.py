"""Prompts as token ids: a question whose answer has tokens of its own, and sentences inserted into a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gpt2.common.errors import PluginError


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids [n] of a text, without the tokens that the tokenizer adds to whole documents."""
    return tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]


def question_and_answer(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str, max_new_tokens: int, what: str,
    flag: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Tokens of a question, and of ` answer` as they are when both are tokenized as one text.

    what: names the kind of prompt in errors. flag: sets max_new_tokens, if the script has such a flag. Raises
    PluginError if the answer doesn't begin with a new token, or has no room in max_new_tokens.
    """
    asked, both = encode(tokenizer, question), encode(tokenizer, f"{question} {answer}")
    answer_ids = both[len(asked) :]
    if not torch.equal(both[: len(asked)], asked) or tokenizer.decode(answer_ids).strip() != answer:
        raise PluginError(
            f"{what}: this tokenizer doesn't encode the answer {answer!r} in separate tokens after the question"
        )
    if (n := len(answer_ids)) >= max_new_tokens:
        advice = f"use {flag} {n + 1} or more" if flag else f"this test has room for {max_new_tokens - 1}: leave it out"
        raise PluginError(f"{what}: the answer {answer!r} has {n} tokens: {advice}")
    return asked, answer_ids


def insert(text: Tensor, sentences: Sequence[Tensor], places: Sequence[int]) -> tuple[Tensor, int]:
    """Token ids with sentences inserted before those at `places`, and the position of the first sentence."""
    parts, done, size, first = [], 0, 0, 0
    for index in sorted(range(len(places)), key=places.__getitem__):
        parts += [text[done : places[index]], sentences[index]]
        size += places[index] - done
        if index == 0:
            first = size
        size += len(sentences[index])
        done = places[index]
    return torch.cat((*parts, text[done:])), first
