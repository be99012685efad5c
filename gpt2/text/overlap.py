"""Text that is in two places at once: what was calibrated or tuned on must not be measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gpt2.common.errors import PluginError
from gpt2.text.texts import Mixture, Text, WrittenText

PIECES, PIECE = 32, 200  # so many pieces of a text are looked for in another, of so many characters each
BY_CHANCE = 1  # pieces that both may have, such as a licence


def require_apart(used: Text, measured: Text, parts: Sequence[str], flags: str) -> None:
    """Raise PluginError if one of these parts of `used` shares text with the evaluation part of `measured`.

    The parts of one text are apart already and are not compared. flags: what named the texts, for the message.
    """
    for one in _written(used):
        for other in _written(measured):
            for part in parts if one != other else ():
                if shared(getattr(one, part), other.evaluation):
                    raise PluginError(
                        f"{flags}: the {part} part of {one.spec!r} has text of the evaluation part of {other.spec!r}, "
                        "so figures would be of text that was used before: name texts that have nothing in common"
                    )


def shared(one: str, other: str) -> bool:
    """Whether one of two strings has about a sixteenth of the other, or more, word by word."""
    return _found(one, other) or _found(other, one)


def _found(pieces_of: str, whole: str) -> bool:
    last = max(len(pieces_of) - PIECE, 0)
    pieces = {pieces_of[last * index // (PIECES - 1) :][:PIECE] for index in range(PIECES)}
    return sum(piece in whole for piece in pieces) > min(BY_CHANCE, len(pieces) - 1)


def _written(text: Text) -> list[WrittenText]:
    texts = text.texts if isinstance(text, Mixture) else (text,)
    return [text for text in texts if isinstance(text, WrittenText)]


def without_repeats(text: WrittenText) -> WrittenText:
    """The text without those paragraphs of its tuning and evaluation parts of which an earlier part has a piece."""
    calibration, tuning = _words(text.calibration), _words(text.tuning)
    return replace(
        text, tuning=_without(text.tuning, calibration), evaluation=_without(text.evaluation, calibration + tuning)
    )


def _without(text: str, earlier: str) -> str:
    return "\n\n".join(paragraph for paragraph in text.split("\n\n") if not _repeats(_words(paragraph), earlier))


def _repeats(paragraph: str, earlier: str) -> bool:
    starts = range(0, max(len(paragraph) - PIECE, 0) + 1, PIECE)
    return any(paragraph[start : start + PIECE] in earlier for start in starts)


def _words(text: str) -> str:
    return " ".join(text.split())  # the same paragraph may be indented differently
