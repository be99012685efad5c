"""Types of command-line arguments: each takes the word that was typed and returns its value, or rejects it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence


def positive_int(word: str) -> int:
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{word} is not a positive number")
    return value


def natural(word: str) -> int:
    """A whole number from 0 on."""
    value = int(word)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{word} is negative")
    return value


def int_list(word: str) -> list[int]:
    """`60,56,48` to [60, 56, 48], in the order given, without repetitions."""
    return list(dict.fromkeys(positive_int(part) for part in word.split(",")))


def ratio_list(word: str) -> list[float]:
    """`2,3.5,4` to [2.0, 3.5, 4.0], each above 1 and without repetitions."""
    try:
        ratios = list(dict.fromkeys(float(part) for part in word.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{word}: give compression ratios, such as 2,3.5,4") from error
    if not all(1 < ratio < 64 for ratio in ratios):
        raise argparse.ArgumentTypeError(f"{word}: a compression ratio lies between 1 and 64")
    return ratios


def word_list(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """An argument type for `a,b` out of the allowed words."""

    def parse(words: str) -> list[str]:
        chosen = words.split(",")
        if unknown := set(chosen) - set(allowed):
            raise argparse.ArgumentTypeError(f"unknown {', '.join(sorted(unknown))}: choose from {','.join(allowed)}")
        return chosen

    return parse


def fraction(word: str) -> float:
    """A share such as 0.05, between 0 and 1; a 5 typed for 5 % is rejected."""
    value = float(word)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{word} is out of range: 0.05 means 5 %, give a number between 0 and 1")
    return value
