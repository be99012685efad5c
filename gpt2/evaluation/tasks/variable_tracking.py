"""Variable tracking: RULER (Hsieh et al., 2024, arXiv 2404.06654), a chain of assignments to be followed through."""

from __future__ import annotations

import numpy as np

from gpt2.evaluation.tasks.base import Draft, Source, Task, in_text, numbers, subsets

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class VariableTracking(Task):
    """Two chains `VAR A = 12345`, `VAR B = VAR A`, … in ordinary text; asked are all variables of one value."""

    name = "variable_tracking"
    max_new_tokens = 32
    chains = 2
    hops = 3  # assignments of a variable to a variable, in each chain

    def draft(self, source: Source, room: int, rng: np.random.Generator) -> Draft:
        size = self.hops + 1
        names = _variables(rng, self.chains * size)
        chains = [names[i : i + size] for i in range(0, len(names), size)]
        values = numbers(rng, self.chains)
        told = [_assignments(*pair) for pair in zip(chains, values, strict=True)]
        mixed = _interleaved(rng, told)
        question = f"\nQuestion: Which variables have the value {values[0]}?\nAnswer: The variables with the value "
        question += f"{values[0]} are"
        body, _ = in_text(self, source, room, rng, mixed, question, in_order=True)
        others = [name for chain in chains[1:] for name in chain]
        return Draft(body, question, chains[0], told[0], others, subsets(len(names), size))


def _variables(rng: np.random.Generator, count: int) -> list[str]:
    """Different names of three capital letters."""
    drawn = rng.choice(26**3, size=count, replace=False)
    return ["".join(LETTERS[n // 26**i % 26] for i in range(3)) for n in drawn]


def _assignments(names: list[str], value: str) -> list[str]:
    chain = [f"VAR {names[0]} = {value}."]
    return chain + [f"VAR {new} = VAR {old}." for old, new in zip(names, names[1:], strict=False)]


def _interleaved(rng: np.random.Generator, chains: list[list[str]]) -> list[str]:
    """All sentences in random order, those of a chain in its own order."""
    turns = rng.permutation([index for index, chain in enumerate(chains) for _ in chain])
    left = [iter(chain) for chain in chains]
    return [next(left[index]) for index in turns]
