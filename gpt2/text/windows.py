"""Texts as token windows: written by somebody, by the model itself, or several of them mixed.

A text is opened before the model is loaded, so that a missing one costs no time, and read with the model.
"""

from __future__ import annotations

import hashlib
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.models.loading import LoadedModel
from gpt2.text import self_text

ENDLESS = sys.maxsize  # so many windows has a text that is written as it is read


class Text(ABC):
    """Three disjoint parts of token windows. name: for people; spec: what `load_text` was given."""

    name: str
    spec: str

    @abstractmethod
    def sha256(self, part: str) -> str:
        """What tells this part from others: two texts with the same give the same windows."""

    @abstractmethod
    def tokens(self, part: str, loaded: LoadedModel) -> Tensor:
        """Token ids of one part as running text, [n]. Raises PluginError where it is none."""

    @abstractmethod
    def available(self, part: str, loaded: LoadedModel, length: int, *, flag: str = "--seq-len") -> int:
        """How many windows `segments` has to draw from, ENDLESS where there is no end. Raises as it does."""

    @abstractmethod
    def segments(
        self, part: str, loaded: LoadedModel, length: int, count: int | None = None, seed: int | None = None, *,
        flag: str = "--seq-len",
    ) -> Tensor:  # fmt: skip
        """Up to `count` windows of `length` tokens that don't overlap, [count, length]; all when count is None.

        In reading order, or drawn at random with a seed. Raises PluginError when the text is shorter than one window;
        `flag` is what the user would change.
        """


@dataclass(frozen=True)
class WrittenText(Text):
    """Three disjoint stretches of text that somebody wrote."""

    name: str
    spec: str
    calibration: str
    tuning: str
    evaluation: str

    def sha256(self, part: str) -> str:
        return hashlib.sha256(getattr(self, part).encode()).hexdigest()

    def tokens(self, part: str, loaded: LoadedModel) -> Tensor:
        # verbose=False: the tokenizer would warn that the text is longer than the model's context
        encoded = loaded.tokenizer(getattr(self, part), return_tensors="pt", add_special_tokens=False, verbose=False)
        return encoded.input_ids[0]

    def available(self, part, loaded, length, *, flag="--seq-len") -> int:
        return len(self.segments(part, loaded, length, flag=flag))

    def segments(self, part, loaded, length, count=None, seed=None, *, flag="--seq-len") -> Tensor:
        ids = self.tokens(part, loaded)
        start = start_tokens(loaded.tokenizer)
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


@dataclass(frozen=True)
class SelfText(Text):
    """What the model itself writes, sampled when it is asked for: a text for where there is none.

    It has no end, so every seed and part gives windows of its own; and nothing in it runs on from window to window.
    """

    name: str = "self"
    spec: str = "self"

    def sha256(self, part: str) -> str:
        """Of the recipe: the part itself has no end."""
        return self_text.recipe_sha256(part)

    def tokens(self, part: str, loaded: LoadedModel) -> Tensor:
        raise PluginError(
            f"text {self.name!r} is sampled in windows of their own and no running text to hide a needle in: give "
            "--text embedded, wikitext2, a text file or a folder"
        )

    def available(self, part, loaded, length, *, flag="--seq-len") -> int:
        return ENDLESS

    def segments(self, part, loaded, length, count=None, seed=None, *, flag="--seq-len") -> Tensor:
        if count is None:
            raise _no_end(self)
        return self_text.windows(loaded, part, length, count, seed)


@dataclass(frozen=True)
class Mixture(Text):
    """Several texts in equal shares: a window of each in turn. One that runs out is passed over, which is said."""

    texts: tuple[Text, ...]
    spec: str

    @property
    def name(self) -> str:
        return ", ".join(text.name for text in self.texts)

    def sha256(self, part: str) -> str:
        """Every text's own, joined by + as in the spec."""
        return "+".join(text.sha256(part) for text in self.texts)

    def tokens(self, part: str, loaded: LoadedModel) -> Tensor:
        """One text after the other, without those that are no running text."""
        running = [text for text in self.texts if not isinstance(text, SelfText)]
        return torch.cat([text.tokens(part, loaded) for text in running])

    def available(self, part, loaded, length, *, flag="--seq-len") -> int:
        return min(ENDLESS, sum(text.available(part, loaded, length, flag=flag) for text in self.texts))

    def segments(self, part, loaded, length, count=None, seed=None, *, flag="--seq-len") -> Tensor:
        # All are counted before any is drawn: sampling takes minutes, and a text may turn out to be too short
        available = [text.available(part, loaded, length, flag=flag) for text in self.texts]
        if count is None and ENDLESS in available:
            raise _no_end(self)
        turns = in_turn(available, sum(available) if count is None else count)
        if len(turns) < len(self.texts):
            raise PluginError(
                f"{len(turns)} windows of {length} tokens are too few for {len(self.texts)} texts ({self.name}): ask "
                "for more, or name fewer texts in --text"
            )
        shares = Counter(index for _, index in turns)
        for index, text in enumerate(self.texts):
            if count is not None and shares[index] < len(turns) // len(self.texts):
                print(f"note: the {part} part of {text.name} has only {shares[index]} of the {len(turns)} windows; the "
                      "other texts fill up", flush=True)  # fmt: skip
        drawn = {i: self.texts[i].segments(part, loaded, length, n, seed) for i, n in shares.items()}
        return torch.stack([drawn[index][turn] for turn, index in turns])


def in_turn(available: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Up to `count` windows of several texts, one of each in turn: (which of its windows, which text) for each.

    A text with no more windows is passed over.
    """
    windows = ((turn, index) for index, n in enumerate(available) for turn in range(min(n, count)))
    return sorted(windows)[:count]


def _no_end(text: Text) -> PluginError:
    return PluginError(f"text {text.name!r} has no end: say how many windows of it are wanted")


def start_tokens(tokenizer) -> Tensor:
    """What the tokenizer puts before every text, [n]: models trained with a start token read badly without it."""
    with_start, without = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    bos = tokenizer.bos_token_id
    return torch.tensor([bos] if bos is not None and with_start[0] == bos != without[0] else [], dtype=torch.long)
