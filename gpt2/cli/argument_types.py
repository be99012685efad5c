"""Types of command-line arguments: each converts the typed text to a value, or raises an error that argparse prints."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence


def positive_int(word: str) -> int:
    """A whole number from 1 on."""
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


def seed(word: str) -> int:
    """A seed of random numbers, which all generators take: a whole number from 0 to 2⁶³ − 1."""
    value = int(word)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{word} is out of range: a seed is a whole number from 0 to 2^63 - 1")
    return value


def positive_float(word: str) -> float:
    """A number above 0, neither infinite nor NaN."""
    value = float(word)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{word} is not a positive number")
    return value


def natural_float(word: str) -> float:
    """As `positive_float`, or 0."""
    return positive_float(word) if float(word) else 0.0


def int_list(word: str) -> list[int]:
    """`60,56,48` as [60, 56, 48]: positive numbers in the given order, without repetitions."""
    return list(dict.fromkeys(positive_int(part) for part in word.split(",")))


def ratio_list(word: str) -> list[float]:
    """`2,3.5,4` as [2.0, 3.5, 4.0]: numbers between 1 and 64 in the given order, without repetitions."""
    try:
        ratios = list(dict.fromkeys(float(part) for part in word.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{word}: expected compression ratios, such as 2,3.5,4") from error
    if not all(1 < ratio < 64 for ratio in ratios):
        raise argparse.ArgumentTypeError(f"{word}: a compression ratio lies between 1 and 64")
    return ratios


def word_list(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """An argument type that converts `a,b` to ["a", "b"], each word once, and rejects all but the allowed ones."""

    def parse(words: str) -> list[str]:
        chosen = list(dict.fromkeys(words.split(",")))
        if unknown := set(chosen) - set(allowed):
            raise argparse.ArgumentTypeError(f"unknown {', '.join(sorted(unknown))}: choose from {','.join(allowed)}")
        return chosen

    return parse


def utf8(word: str) -> str:
    """Text for a model: what a shell gives in another encoding than UTF-8 no tokenizer takes."""
    try:
        word.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError("expected text in UTF-8, got another encoding") from error
    return word


def fraction(word: str) -> float:
    """A fraction between 0 and 1, such as 0.05 for 5 %; 5 is rejected."""
    value = float(word)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{word} is out of range: 0.05 means 5 %, give a number between 0 and 1")
    return value
