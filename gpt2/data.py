"""Text by spec, cut into three parts that never overlap: calibration, tuning, evaluation.

spec         what it is                                        parts
embedded     prose that Python itself carries (pydoc topics)   by position: 60 %, 20 %, 20 %
wikitext2    WikiText-2 from the hub, through `datasets`       validation 80 % / 20 %, test
a file       any UTF-8 text                                    by position: 60 %, 20 %, 20 %
a folder     one *valid*.txt and one *test*.txt                validation 80 % / 20 %, test
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt2.errors import PluginError
from gpt2.models import EMBEDDED

PARTS = ("calibration", "tuning", "evaluation")


@dataclass(frozen=True)
class Text:
    """Three disjoint stretches of text. name: for people; spec: what `load_text` was given."""

    name: str
    spec: str
    calibration: str
    tuning: str
    evaluation: str

    def sha256(self, part: str) -> str:
        return hashlib.sha256(getattr(self, part).encode()).hexdigest()

    def tokens(self, part: str, tokenizer) -> torch.Tensor:
        """Token ids of one part, [n]."""
        # verbose=False: the tokenizer would warn that the text is longer than the model's context
        encoded = tokenizer(getattr(self, part), return_tensors="pt", add_special_tokens=False, verbose=False)
        return encoded.input_ids[0]

    def segments(
        self, part: str, tokenizer, length: int, count: int | None = None, seed: int | None = None, *,
        flag: str = "--seq-len",
    ):  # fmt: skip
        """Up to `count` windows of `length` tokens that don't overlap, [count, length]; all when count is None.

        In reading order, or drawn at random with a seed. Raises PluginError when the text is shorter than one window;
        `flag` is what the user would change.
        """
        ids = self.tokens(part, tokenizer)
        start = start_tokens(tokenizer)
        width = length - len(start)
        available = len(ids) // width
        if available == 0:
            raise PluginError(
                f"the {part} part of text {self.name!r} has {len(ids)} tokens, fewer than one segment of {length}: "
                f"give a longer --text or a shorter {flag}"
            )
        windows = ids[: available * width].view(available, width)
        windows = torch.cat((start.expand(available, -1), windows), dim=1)
        if seed is not None:
            windows = windows[torch.randperm(available, generator=torch.Generator().manual_seed(seed))]
        return windows[:count]


def start_tokens(tokenizer) -> torch.Tensor:
    """What the tokenizer puts before every text, [n]: models trained with a start token read badly without it."""
    with_start, without = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    bos = tokenizer.bos_token_id
    return torch.tensor([bos] if bos is not None and with_start[0] == bos != without[0] else [], dtype=torch.long)


def default_text(model_spec: str) -> str:
    """The text spec used when --text is not given."""
    return "embedded" if model_spec == EMBEDDED else "wikitext2"


def load_text(spec: str | None, model_spec: str = EMBEDDED) -> Text:
    """Read a text by its spec; None is the model's default."""
    spec = spec or default_text(model_spec)
    if spec == "embedded":
        return by_position(spec, spec, _pydoc_topics())
    if spec == "wikitext2":
        return by_official_split(spec, spec, *_wikitext2())
    path = Path(spec).expanduser()
    if path.is_dir():
        valid, test = _named(path, "valid"), _named(path, "test")
        return by_official_split(f"{valid.stem} + {test.stem}", spec, _read(valid), _read(test))
    if path.is_file():
        return by_position(path.name, spec, _read(path))
    raise PluginError(
        f"no text {spec!r}: give embedded, wikitext2, a text file, or a folder with *valid*.txt and *test*.txt"
    )


def by_position(name: str, spec: str, text: str) -> Text:
    """60 % calibration, 20 % tuning, 20 % evaluation, in reading order."""
    a, b = _line_end(text, 0.6), _line_end(text, 0.8)
    return _checked(Text(name, spec, text[:a], text[a:b], text[b:]))


def by_official_split(name: str, spec: str, valid: str, test: str) -> Text:
    """Validation split for calibration (80 %) and tuning (20 %), test split for evaluation."""
    a = _line_end(valid, 0.8)
    return _checked(Text(name, spec, valid[:a], valid[a:], test))


def _line_end(text: str, fraction: float) -> int:
    """Position just past a fraction of the text, after a line break or at least a word where one is near."""
    start = int(len(text) * fraction)
    for separator in ("\n", " "):
        if found := text.find(separator, start, start + len(text) // 20) + 1:
            return found
    return start


def _checked(text: Text) -> Text:
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
    except Exception as error:  # every way in which the hub can fail, and there are many: the advice is the same
        raise PluginError(
            f"can't load wikitext2 ({type(error).__name__}): the hub is out of reach or the data set is not cached. "
            "Give --text embedded, a text file, or a folder with *valid*.txt and *test*.txt"
        ) from error
    return tuple("".join(splits[name]["text"]) for name in ("validation", "test"))


def _named(folder: Path, word: str) -> Path:
    found = sorted(folder.glob(f"*{word}*.txt"))
    if len(found) != 1:
        raise PluginError(f"text folder {folder.name!r}: expected one *{word}*.txt, found {len(found)}")
    return found[0]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PluginError(f"can't read text file {path}: {error}") from error
