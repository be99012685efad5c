"""What the needle tasks have in common: facts about invented things in ordinary text, some of which are asked for.

RULER (Hsieh et al., 2024, arXiv 2404.06654) defines four variants by the number of keys, of values per key, and of
keys that are asked for. The names of the variants are theirs, the wording of needles and questions is ours.
"""

from __future__ import annotations

import numpy as np

from gpt2.evaluation.tasks.base import Draft, Source, Task, in_text, invented_words, numbers, subsets

FACT = "The special number of {key} is {value}."
DECOY = "The old number of {key} is {value}."


class Needles(Task):
    """Numbers of invented things in ordinary text.

    keys: things that have numbers. values: numbers of each thing that is asked for. queries: things that are asked
    for. decoys: sentences about something else that has a number too, of which the question doesn't speak.
    """

    keys = 1
    values = 1
    queries = 1
    decoys = 0

    def draft(self, source: Source, room: int, rng: np.random.Generator) -> Draft:
        count = self.queries * self.values + (self.keys - self.queries) + self.decoys
        keys, drawn = invented_words(rng, self.keys + self.decoys), iter(numbers(rng, count))
        asked, rest, decoys = keys[: self.queries], keys[self.queries : self.keys], keys[self.keys :]
        facts = [(key, next(drawn)) for key in asked for _ in range(self.values)]
        others = [(key, next(drawn)) for key in rest]
        wrong = [(key, next(drawn)) for key in decoys]
        sentences = [FACT.format(key=key, value=value) for key, value in facts + others]
        sentences += [DECOY.format(key=key, value=value) for key, value in wrong]
        question = self.question(asked)
        body, order = in_text(self, source, room, rng, sentences, question)
        # Several values of one key are wanted in the text's order, values of several keys in the question's
        told = [facts[i] for i in order if i < len(facts)] if self.queries == 1 else facts
        return Draft(
            body, question, [value for _, value in told], [FACT.format(key=k, value=v) for k, v in told],
            [value for _, value in others + wrong], subsets(count, len(facts)),
        )  # fmt: skip

    def question(self, keys: list[str]) -> str:
        """A question for the numbers of some things, and the beginning of its answer."""
        named = ", ".join(keys)
        if self.queries * self.values == 1:
            return f"\nQuestion: What is the special number of {named}?\nAnswer: The special number of {named} is"
        ask = f"What are all special numbers of {named}?"
        return f"\nQuestion: {ask}\nAnswer: The special numbers of {named} are"
