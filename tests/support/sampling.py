"""Some cases of many: `make test` runs a sample of long parameter lists, `make test-all` runs every case."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")
ALL = os.environ.get("TEST_ALL") == "1"


def sampled(cases: Iterable[T], count: int) -> list[T]:
    """All cases with TEST_ALL=1, else `count` of them: the first, the last, and evenly between.

    The same cases every time, so that a failure can be repeated. For lists whose cases differ in data only; what
    differs in kind belongs into a list of its own.
    """
    cases = list(cases)
    if ALL or count >= len(cases):
        return cases
    if count == 1:
        return cases[:1]
    return [cases[round(i * (len(cases) - 1) / (count - 1))] for i in range(count)]


def covering(*lists: Iterable, times: int = 1) -> list[tuple]:
    """Combinations of one value of each list: all of them with TEST_ALL=1, else few in which every value stands.

    There are `times` as many as the longest list has values; each further round pairs the values otherwise.
    """
    lists = [list(values) for values in lists]
    if ALL:
        return list(itertools.product(*lists))
    longest = max(map(len, lists))
    places = dict.fromkeys(
        tuple((i + turn * j) % len(values) for j, values in enumerate(lists))
        for turn in range(times)
        for i in range(longest)
    )
    return [tuple(values[at] for values, at in zip(lists, place, strict=True)) for place in places]
