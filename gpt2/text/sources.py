"""Text by spec, cut into three parts that never overlap: calibration, tuning, evaluation.

spec         what it is                                        parts
embedded     Python's own documentation (pydoc topics)         by position: 60 %, 20 %, 20 %, without repetitions
wikitext2    WikiText-2 from the hub, through `datasets`       validation 80 % / 20 %, test
a file       any UTF-8 text                                    by position: 60 %, 20 %, 20 %
a folder     one *valid*.txt and one *test*.txt                validation 80 % / 20 %, test
self         sampled from the model itself, see self_text.py   separate samples, any number of them
a+b+…        segments of several of these in turn               the parts of each text
"""

from __future__ import annotations

import os
from pathlib import Path

from gpt2.common.errors import PluginError
from gpt2.models.embedded import EMBEDDED
from gpt2.text.overlap import require_apart, shared, without_repeats
from gpt2.text.texts import Mixture, SelfText, Text, WrittenText

PARTS = ("calibration", "tuning", "evaluation")


def default_text(model_spec: str) -> str:
    """The text spec used when --text is not given."""
    return "embedded" if model_spec == EMBEDDED else "wikitext2"


def load_text(spec: str | None, model_spec: str = EMBEDDED) -> Text:
    """Open a text by its spec, or several joined by +. None means the default text of the model.

    A file or folder whose name contains + can be given alone, but not as one of several. Raises PluginError for a text
    that doesn't exist, can't be read, is too short, or is named twice, and for texts of which one would be measured on
    what another is calibrated or tuned on.
    """
    if spec is not None and not spec.strip():
        raise PluginError("--text: its name is empty: name a text, or leave the flag out for the default")
    spec = spec or default_text(model_spec)
    if text := _single(spec):
        return text
    texts = {piece: _single(piece) for piece in spec.split("+")}
    for piece, text in texts.items():
        if text is None:
            raise PluginError(
                f"no text {piece!r}{'' if piece == spec else f' in {spec!r}'}: give embedded, wikitext2, a text file, "
                "a folder with *valid*.txt and *test*.txt, self, or several of these joined by +"
            )
    mixture = Mixture(tuple(texts.values()), spec)
    if len({text.sha256("calibration") for text in mixture.texts}) <= spec.count("+"):
        raise PluginError(f"--text {spec} has the same text twice: name each once")
    require_apart(mixture, mixture, ("calibration", "tuning"), f"--text {spec}")
    return mixture


def _single(spec: str) -> Text | None:
    """The text of a spec without +; None if there is none."""
    if spec == "embedded":
        return without_repeats(by_position(spec, spec, _pydoc_topics()))  # topics contain each other
    if spec == "wikitext2":
        return by_official_split(spec, spec, *_wikitext2())
    if spec == "self":
        return SelfText()
    path = Path(os.path.expanduser(spec))  # pathlib raises for unknown users after ~ and for very long names
    if spec and os.path.isdir(path):
        return _of_folder(path, spec)
    if os.path.isfile(path):
        return by_position(path.name, spec, _read(path))
    return None


def _of_folder(folder: Path, spec: str) -> WrittenText:
    valid, test = _named(folder, "valid"), _named(folder, "test")
    text = by_official_split(f"{valid.stem} + {test.stem}", spec, _read(valid), _read(test))
    if any(shared(part, text.evaluation) for part in (text.calibration, text.tuning)):
        raise PluginError(
            f"text folder {spec!r}: {valid.name} and {test.name} have text in common, so figures would be of text that "
            "was used before: give one *valid*.txt and another *test*.txt"
        )
    return text


def by_position(name: str, spec: str, text: str) -> WrittenText:
    """60 % calibration, 20 % tuning, 20 % evaluation, in reading order."""
    a, b = _line_end(text, 0.6), _line_end(text, 0.8)
    return _checked(WrittenText(name, spec, text[:a], text[a:b], text[b:]))


def by_official_split(name: str, spec: str, valid: str, test: str) -> WrittenText:
    """Validation split for calibration (80 %) and tuning (20 %), test split for evaluation."""
    a = _line_end(valid, 0.8)
    return _checked(WrittenText(name, spec, valid[:a], valid[a:], test))


def _line_end(text: str, fraction: float) -> int:
    """A position at or shortly after a fraction of the text: after a line break if one is near, else after a word."""
    start = int(len(text) * fraction)
    for separator in ("\n", " "):
        if found := text.find(separator, start, start + len(text) // 20) + 1:
            return found
    return start


def _checked(text: WrittenText) -> WrittenText:
    for part in PARTS:
        if not getattr(text, part).strip():
            raise PluginError(f"text {text.name!r} is empty or too short: nothing left for its {part} part")
    return text


def _pydoc_topics() -> str:
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def _wikitext2() -> tuple[str, str]:
    from datasets import load_dataset

    try:
        splits = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
    except Exception as error:  # the hub fails with errors of many kinds, and the advice is the same for all
        raise PluginError(
            f"can't load wikitext2 ({type(error).__name__}): the hub can't be reached and the data set is not cached. "
            "Give --text embedded, a text file, or a folder with *valid*.txt and *test*.txt"
        ) from error
    return tuple("".join(splits[name]["text"]) for name in ("validation", "test"))


def _named(folder: Path, word: str) -> Path:
    found = sorted(path for path in folder.glob(f"*{word}*.txt") if path.is_file())  # reading a pipe would block
    if len(found) != 1:
        raise PluginError(
            f"text folder {str(folder)!r}: expected one *{word}*.txt, found {len(found)}: give a file, or a folder "
            "with one *valid*.txt and one *test*.txt"
        )
    return found[0]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # without the byte order mark of Windows, which would be a token
    except (OSError, UnicodeDecodeError) as error:
        raise PluginError(f"can't read text file {path}: {error}") from error
