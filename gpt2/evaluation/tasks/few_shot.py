"""A pattern shown by examples: in-context learning with labels that mean nothing, so that only the prompt gives them.

Labels unrelated to the classes make the model read its context (Min et al., 2022, arXiv 2202.12837; Wei et al., 2023,
arXiv 2303.03846). Each prompt draws new labels.
"""

from __future__ import annotations

import numpy as np

from gpt2.evaluation.tasks.base import Draft, Source, Task, invented_words, most_records

CLASSES = (
    "cat dog horse cow sheep lion tiger bear wolf rabbit mouse pig goat monkey elephant snake",
    "red blue green yellow black white brown pink purple orange gray gold silver crimson violet beige",
    "bread cheese rice soup butter apple banana meat sugar salad pizza cake pasta honey potato egg",
    "hammer knife spoon saw drill shovel axe scissors needle brush rope ladder screwdriver wrench pliers rake",
)
LEAST = 12  # examples, three of each class


class FewShot(Task):
    """Examples `word -> label` of four classes, and a word that no example has."""

    name = "few_shot"
    max_new_tokens = 12

    def draft(self, source: Source, room: int, rng: np.random.Generator) -> Draft:
        words = [rng.permutation(names.split()).tolist() for names in CLASSES]
        labels = invented_words(rng, len(CLASSES), syllables=2)
        wanted = int(rng.integers(len(CLASSES)))
        asked = words[wanted].pop()
        lines = _examples(rng, words, labels, max(room // 4, LEAST))  # an example has at least four tokens
        question = f"\n{asked} ->"

        def body(count: int) -> str:
            return "\n".join(lines[:count])

        count = most_records(
            self, room, len(lines), LEAST, lambda n: len(source.encode(body(n))) + len(source.encode(question))
        )
        others = [label for label in labels if label != labels[wanted]]
        evidence = [line for line in lines[:count] if line.endswith(f"-> {labels[wanted]}")]
        return Draft(source.encode(body(count)), question, [labels[wanted]], evidence, others, chance=1 / len(CLASSES))


def _examples(rng: np.random.Generator, words: list[list[str]], labels: list[str], count: int) -> list[str]:
    """Lines of examples: in every four, one of each class in random order."""
    lines: list[str] = []
    while len(lines) < count:
        turn = len(lines) // len(words)
        lines += [f"{words[i][turn % len(words[i])]} -> {labels[i]}" for i in rng.permutation(len(words))]
    return lines
