"""Frequent-word extraction: FWE of RULER (Hsieh et al., 2024, arXiv 2404.06654), three words that occur most often."""

from __future__ import annotations

import numpy as np

from gpt2.evaluation.tasks.base import Draft, Source, Task, invented_words, most_records, subsets

WORDS = 12  # different words of a prompt
WANTED = 3
ALPHA = 2.0  # of the Zeta distribution: the word of rank k occurs in proportion to k to the power −ALPHA


class FrequentWords(Task):
    """A list of invented words in random order, whose frequencies follow a Zeta distribution."""

    name = "frequent_words"
    max_new_tokens = 24

    def draft(self, source: Source, room: int, rng: np.random.Generator) -> Draft:
        words = invented_words(rng, WORDS, syllables=2)
        seed, question = int(rng.integers(2**32)), "\nQuestion: Which three words occur most often in the list?\n"
        question += "Answer: The three words that occur most often are"

        def body(total: int) -> str:
            return _listed(words, counts(total), np.random.default_rng(seed))

        total = most_records(
            self, room, room, least_total(), lambda n: len(source.encode(body(n))) + len(source.encode(question))
        )
        others = words[WANTED:]
        return Draft(
            source.encode(body(total)), question, words[:WANTED], words[:WANTED], others, subsets(WORDS, WANTED)
        )


def counts(total: int) -> list[int]:
    """How often the word of each rank occurs in a list of about `total` words, at least once."""
    weights = np.arange(1, WORDS + 1) ** -ALPHA
    return [max(1, round(total * share)) for share in weights / weights.sum()]


def least_total() -> int:
    """The shortest list in which the wanted words occur in their order, and more often than all others."""
    return next(n for n in range(WORDS, 1000) if counts(n)[WANTED - 2] > counts(n)[WANTED - 1] > counts(n)[WANTED])


def _listed(words: list[str], often: list[int], rng: np.random.Generator) -> str:
    all_words = [word for word, n in zip(words, often, strict=True) for _ in range(n)]
    return "A list of words: " + " ".join(rng.permutation(all_words))
