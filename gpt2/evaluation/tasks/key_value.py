"""Key-value lookup in a long JSON object, as in "Lost in the Middle" (Liu et al., 2023, arXiv 2307.03172)."""

from __future__ import annotations

import json

import numpy as np

from gpt2.evaluation.tasks.base import NUMBERS, Draft, Source, Task, invented_words, most_records, numbers, subsets


class KeyValue(Task):
    """An object of invented keys with numbers as values, one of which is asked for."""

    name = "key_value"

    def draft(self, source: Source, room: int, rng: np.random.Generator) -> Draft:
        most = min(max(room // 4, 4), NUMBERS)  # a pair has more than four tokens
        keys, values = invented_words(rng, most), numbers(rng, most)
        share = rng.random()  # of the pairs before the one that is asked for

        def body(count: int) -> str:
            return json.dumps(dict(zip(keys[:count], values[:count], strict=True)))

        def question(key: str) -> str:
            return f'\nQuestion: What is the value of "{key}"?\nAnswer: The value of "{key}" is'

        longest = max(keys, key=lambda key: len(source.encode(key)))
        count = most_records(
            self, room, most, 4, lambda n: len(source.encode(body(n))) + len(source.encode(question(longest)))
        )
        asked = int(share * count)
        key, value = keys[asked], values[asked]
        others = [other for other in values[:count] if other != value]
        return Draft(
            source.encode(body(count)), question(key), [value], [f'"{key}": "{value}"'], others, subsets(count, 1)
        )
