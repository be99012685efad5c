"""Passkey retrieval at depth (Mohtashami & Jaggi, 2023, arXiv 2305.16300): a number in text that says nothing.

RULER counts it among its single needles, with repeated sentences as the haystack. The distractor, a number with another
name, is ours.
"""

from __future__ import annotations

import numpy as np

from gpt2.evaluation.tasks.base import Draft, Source, Task, in_text, numbers, subsets

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
KEY = "The pass key is {value}. Remember it. {value} is the pass key."
DISTRACTOR = "The order number is {value}. Forget it. {value} is the order number."


class Passkey(Task):
    """The pass key stands at a random depth of repeated sentences, an order number at another."""

    name = "passkey"

    def draft(self, source: Source, room: int, rng: np.random.Generator) -> Draft:
        key, other = numbers(rng, 2)
        question = "\nQuestion: What is the pass key?\nAnswer: The pass key is"
        repeats = room // 16 + 2  # the five sentences have more than sixteen tokens
        noise = Source(source.tokenizer, source.encode(NOISE * repeats), "the passkey's noise")
        sentences = [KEY.format(value=key), DISTRACTOR.format(value=other)]
        body, _ = in_text(self, noise, room, rng, sentences, question, first=rng.random())
        return Draft(body, question, [key], [KEY.format(value=key)], [other], subsets(2, 1))
