"""Copying a passage: one of several numbered passages of ordinary text has to be repeated word for word.

Verbatim copying is what retrieval heads do (Wu et al., 2024, arXiv 2404.15574), and an early sign of a damaged cache.
"""

from __future__ import annotations

import numpy as np

from gpt2.common.errors import PluginError
from gpt2.evaluation.tasks.base import Draft, Source, Task, most_records, no_room, subsets

WORDS = 12  # of a passage


class Copying(Task):
    """Numbered passages of twelve words; the answer is the whole of one of them."""

    name = "copying"
    max_new_tokens = 64

    def draft(self, source: Source, room: int, rng: np.random.Generator) -> Draft:
        passages = self._passages(source, room, rng)
        share = rng.random()  # of the passages before the one that is asked for

        def body(count: int) -> str:
            return "\n".join(f"Passage {number}: {words}" for number, words in enumerate(passages[:count], start=1))

        def question(number: int) -> str:
            return f"\nQuestion: What does passage {number} say, word for word?\nAnswer: Passage {number}:"

        count = most_records(
            self, room, len(passages), 3, lambda n: len(source.encode(body(n))) + len(source.encode(question(n)))
        )
        asked = int(share * count)
        others = [words for words in passages[:count] if words != passages[asked]]
        evidence = [f"Passage {asked + 1}: {passages[asked]}"]
        return Draft(
            source.encode(body(count)), question(asked + 1), [passages[asked]], evidence, others, subsets(count, 1)
        )

    def _passages(self, source: Source, room: int, rng: np.random.Generator) -> list[str]:
        """Consecutive passages of ordinary text that begin with different words and are short enough to be answers."""
        words = source.tokenizer.decode(source.window(rng, min(2 * room, len(source.haystack)))).split()
        cut = [" ".join(words[i : i + WORDS]) for i in range(1, len(words) - WORDS, WORDS)]
        short = [words for words in cut if len(source.encode(f" {words}")) < self.max_new_tokens]
        if len(passages := list(dict.fromkeys(short))) >= 3:
            return passages
        if len(short) >= 3:
            why = "its passages are all alike"
        elif len(cut) >= 3:
            why = f"passages of {WORDS} words have more than {self.max_new_tokens - 1} tokens"
        elif len(words) < 2 * room // WORDS:  # words of a dozen tokens: written without spaces
            why = "the text has too few spaces between words"
        else:
            raise no_room(self.name, room, 3 * self.max_new_tokens)
        raise PluginError(f"task {self.name}: {why}: give another --text, or leave it out of --tasks")
