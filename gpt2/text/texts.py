"""Texts as token segments: written texts, text sampled from the model itself, and mixtures of several texts.

A text is opened before the model is loaded, so that a missing file shows early; it is tokenized with the model.
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

ENDLESS = sys.maxsize  # number of segments of a text that is sampled on demand


class Text(ABC):
    """Token segments of three disjoint parts: calibration, tuning, evaluation.

    name: for messages and results. spec: the argument of `load_text`.
    """

    name: str
    spec: str

    @abstractmethod
    def sha256(self, part: str) -> str:
        """A hash that identifies a part: texts with equal hashes give the same segments."""

    @abstractmethod
    def tokens(self, part: str, loaded: LoadedModel) -> Tensor:
        """Token ids of one part as running text, [n]. Raises PluginError if the text has only separate segments."""

    @abstractmethod
    def available(self, part: str, loaded: LoadedModel, length: int, *, flag: str = "--seq-len") -> int:
        """How many segments of `length` tokens a part has; ENDLESS if it is sampled. Raises as `segments` does."""

    @abstractmethod
    def segments(
        self, part: str, loaded: LoadedModel, length: int, count: int | None = None, seed: int | None = None, *,
        flag: str = "--seq-len",
    ) -> Tensor:  # fmt: skip
        """Up to `count` segments of `length` tokens that don't overlap, [count, length]; all if count is None.

        In reading order, or shuffled by a seed. Raises PluginError if the text is shorter than one segment; the message
        names `flag` as the one to change.
        """


@dataclass(frozen=True)
class WrittenText(Text):
    """An existing text, split into three disjoint strings."""

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
        if not encoded.input_ids.numel():
            raise no_tokens(f"the {part} part of text {self.name!r}")
        return encoded.input_ids[0]

    def available(self, part, loaded, length, *, flag="--seq-len") -> int:
        return len(self.segments(part, loaded, length, flag=flag))

    def segments(self, part, loaded, length, count=None, seed=None, *, flag="--seq-len") -> Tensor:
        ids = self.tokens(part, loaded)
        start = start_tokens(loaded.tokenizer)
        width = length - len(start)
        if width < 1:
            raise PluginError(
                f"a segment of {length} token has room for the start token alone: give {flag} {length + 1} or more"
            )
        available = len(ids) // width
        if available == 0:
            raise PluginError(
                f"the {part} part of text {self.name!r} has {len(ids)} tokens, fewer than one segment of {length}: "
                f"give a longer --text or a shorter {flag}"
            )
        segments = ids[: available * width].view(available, width)
        segments = torch.cat((start.expand(available, -1), segments), dim=1)
        if seed is not None:
            segments = segments[torch.randperm(available, generator=torch.Generator().manual_seed(seed))]
        return segments[:count]


@dataclass(frozen=True)
class SelfText(Text):
    """Text sampled from the model itself on demand, for models without a suitable text.

    Every part and seed gives other segments, of which there is no limit. Each is sampled separately, so there is no
    running text.
    """

    name: str = "self"
    spec: str = "self"

    def sha256(self, part: str) -> str:
        """The hash of how the part is sampled, as the part itself has no end."""
        return self_text.recipe_sha256(part)

    def tokens(self, part: str, loaded: LoadedModel) -> Tensor:
        raise PluginError(
            f"text {self.name!r} is sampled in separate segments, so it is no running text, as documents and needle "
            "tests need: give embedded, wikitext2, a text file or a folder"
        )

    def available(self, part, loaded, length, *, flag="--seq-len") -> int:
        return ENDLESS

    def segments(self, part, loaded, length, count=None, seed=None, *, flag="--seq-len") -> Tensor:
        if count is None:
            raise _no_end(self)
        return self_text.segments(loaded, part, length, count, seed)


@dataclass(frozen=True)
class Mixture(Text):
    """Several texts in equal shares: one segment of each in turn.

    When one text runs out, the others fill in and a note is printed.
    """

    texts: tuple[Text, ...]
    spec: str

    @property
    def name(self) -> str:
        return ", ".join(text.name for text in self.texts)

    def sha256(self, part: str) -> str:
        """The hashes of all texts, joined by + as in the spec."""
        return "+".join(text.sha256(part) for text in self.texts)

    def tokens(self, part: str, loaded: LoadedModel) -> Tensor:
        """The texts one after the other, without sampled ones, which are no running text."""
        running = [text for text in self.texts if not isinstance(text, SelfText)]
        return torch.cat([text.tokens(part, loaded) for text in running])

    def available(self, part, loaded, length, *, flag="--seq-len") -> int:
        return min(ENDLESS, sum(text.available(part, loaded, length, flag=flag) for text in self.texts))

    def segments(self, part, loaded, length, count=None, seed=None, *, flag="--seq-len") -> Tensor:
        # Count the segments of all texts before drawing any: sampling takes minutes, and another text may be too short
        available = [text.available(part, loaded, length, flag=flag) for text in self.texts]
        if count is None and ENDLESS in available:
            raise _no_end(self)
        turns = in_turn(available, sum(available) if count is None else count)
        if len(turns) < len(self.texts):
            raise PluginError(
                f"{len(turns)} segments of {length} tokens are too few for {len(self.texts)} texts ({self.name}): ask "
                "for more, or name fewer texts in --text"
            )
        shares = Counter(index for _, index in turns)
        for index, text in enumerate(self.texts):
            if count is not None and shares[index] < len(turns) // len(self.texts):
                print(f"note: the {part} part of {text.name} has only {shares[index]} of the {len(turns)} segments; "
                      "the other texts fill in", flush=True)  # fmt: skip
        drawn = {i: self.texts[i].segments(part, loaded, length, n, seed) for i, n in shares.items()}
        return torch.stack([drawn[index][turn] for turn, index in turns])


def in_turn(available: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Up to `count` segments of several texts, one of each in turn, as pairs (index of the segment, index of the text).

    available: number of segments of each text. When one text runs out, the others fill in.
    """
    segments = ((turn, index) for index, n in enumerate(available) for turn in range(min(n, count)))
    return sorted(segments)[:count]


def _no_end(text: Text) -> PluginError:
    return PluginError(f"text {text.name!r} has no end: give the number of segments to sample")


def no_tokens(what: str) -> PluginError:
    """The error for a text of which a tokenizer makes no token: transformers makes an empty one without its files."""
    return PluginError(
        f"the model's tokenizer makes no token of {what}: it is of other characters, or the model's folder has none: "
        "copy tokenizer.json, or what the model has in its place, into it"
    )


def start_tokens(tokenizer) -> Tensor:
    """The start token that the tokenizer puts before every text, [1] or [0] if it has none.

    Models that were trained with a start token predict badly without it.
    """
    with_start, without = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    bos = tokenizer.bos_token_id
    # Of a letter that it doesn't know a tokenizer may make no token at all
    added = bos is not None and with_start[:1] == [bos] != without[:1]
    return torch.tensor([bos] if added else [], dtype=torch.long)
