"""What a record from a file must look like, written down as data, and the one check of a record against it.

A schema is built from the kinds below, for example

    Record({"rank": Whole(1, 64), "codec": Default(String(), "pca"), "widths": Default(Nullable(ListOf(Whole())))})

`parse(value, schema, file)` returns the record with defaults filled in and tensors in the precision to work with. It
raises BadArtefact where the record doesn't fit; the message names the file, the field, what was expected and what was
found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2.common.errors import BadArtefact, PluginError, brief

MOST_JSON_BYTES = 2**20  # lists of lists take twenty times the memory of their text
# Characters that a terminal acts on, or that change the order in which text is shown, and halves of surrogate pairs
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
LARGEST = 2**63 - 1  # whole number that a file may hold
ABSENT = object()  # the default of a key that stays absent
At = tuple[str, ...]  # where a value is in its record: keys, and list positions such as "[3]"


class Mismatch(Exception):
    """A value isn't of its kind. found: None where `expected` is a whole message."""

    def __init__(self, at: At, expected: str, found: str | None):
        self.at, self.expected, self.found = at, expected, found


def parse(value: Any, kind: Kind, file: str | Path, *, noun: str = "field", remedy: str = "") -> Any:
    """The value as `kind` returns it. Raises BadArtefact, in one line, where it isn't of this kind.

    file, noun, remedy: the file's name, what messages call a key, and what a user can do, such as "make it again".
    """
    try:
        return kind.parse(value, ())
    except Mismatch as error:
        place = f" {noun} {brief('.'.join(error.at).replace('.[', '['))}:" if error.at else ""
        said = error.expected if error.found is None else f"expected {error.expected}, found {error.found}"
        raise BadArtefact(f"{file}:{place} {said}{remedy and f': {remedy}'}") from error


def read_json(path: Path, what: str) -> Any:
    """The content of a JSON file, in UTF-8 or as Windows writes it: with a byte order mark, or in UTF-16.

    Raises BadArtefact, which says `what` was expected, where it isn't one of a size.
    """
    if path.is_dir():
        raise BadArtefact(f"{path}: not a readable {what}: it is a folder, expected a file")
    if not path.is_file() or path.stat().st_size > MOST_JSON_BYTES:
        raise BadArtefact(f"{path}: not a readable {what}: expected a file of at most {MOST_JSON_BYTES:,} bytes")
    try:
        return json.loads(path.read_bytes(), parse_constant=_reject_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise BadArtefact(f"{path}: not a readable {what}: {error}") from error


def _reject_constant(word: str):
    raise ValueError(f"JSON has no number {word}")


def _found(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {brief(list(value.shape))}"
    return type(value).__name__ if isinstance(value, (dict, list)) else brief(value)


class Kind:
    """What a value must be. A kind says what is `expected`, and has either `fits` or `parse`."""

    expected = "a value"

    def fits(self, value: Any) -> bool:
        raise NotImplementedError

    def parse(self, value: Any, at: At) -> Any:
        """The value as callers use it. Raises Mismatch where it isn't of this kind."""
        if not self.fits(value):
            raise Mismatch(at, self.expected, _found(value))
        return value


@dataclass(frozen=True)
class Anything(Kind):
    """Any value: what is neither used nor checked."""

    def fits(self, value):
        return True


@dataclass(frozen=True)
class Plain(Kind):
    """Any value without a tensor in it."""

    expected = "a plain value"

    def fits(self, value):
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return not isinstance(value, Tensor) and all(map(self.fits, items))


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number from `least` to `most`."""

    least: int = -LARGEST
    most: int = LARGEST

    def fits(self, value):
        return type(value) is int and self.least <= value <= self.most

    @property
    def expected(self):
        if self.most == LARGEST:
            return "a whole number" if self.least == -LARGEST else f"a whole number, {self.least} or more"
        return f"a whole number from {self.least} to {self.most}"


@dataclass(frozen=True)
class Number(Kind):
    """A whole number or a float, finite, larger than `above` and smaller than `below`."""

    above: float = -1e15
    below: float = 1e15

    def fits(self, value):
        return type(value) in (int, float) and self.above < value < self.below  # NaN is neither

    @property
    def expected(self):
        return f"a number between {self.above:g} and {self.below:g}"


@dataclass(frozen=True)
class String(Kind):
    """A string of at most so many characters. printable: none of them a control character."""

    longest: int = 4096
    printable: bool = True

    def fits(self, value):
        right = type(value) is str and len(value) <= self.longest
        return right and not (self.printable and CONTROL.search(value))

    @property
    def expected(self):
        return f"text of at most {self.longest} {'printable ' * self.printable}characters"


@dataclass(frozen=True)
class OneOf(Kind):
    """One of these values."""

    values: tuple

    def fits(self, value):
        return any(type(value) is type(one) and value == one for one in self.values)

    @property
    def expected(self):
        return " or ".join(map(repr, self.values))


@dataclass(frozen=True)
class Nullable(Kind):
    """None, or a value of this kind."""

    kind: Kind

    @property
    def expected(self):
        return f"{self.kind.expected}, or null"

    def parse(self, value, at):
        return None if value is None else self.kind.parse(value, at)


@dataclass(frozen=True)
class Checked(Kind):
    """A value of this kind that a function accepts too: for others it raises PluginError with the reason."""

    kind: Kind
    check: Callable[[Any], Any]

    @property
    def expected(self):
        return self.kind.expected

    def parse(self, value, at):
        value = self.kind.parse(value, at)
        try:
            self.check(value)
        except PluginError as error:
            raise Mismatch(at, str(error), None) from error
        return value


@dataclass(frozen=True)
class ListOf(Kind):
    """A list of values of one kind, `length` of them where that is given."""

    kind: Kind
    length: int | None = None

    @property
    def expected(self):
        return "a list" if self.length is None else f"a list of {self.length}"

    def parse(self, value, at):
        if type(value) is not list:
            raise Mismatch(at, self.expected, _found(value))
        if len(value) != (len(value) if self.length is None else self.length):
            raise Mismatch(at, self.expected, f"one of {len(value)}")
        return [self.kind.parse(item, (*at, f"[{place}]")) for place, item in enumerate(value)]


@dataclass(frozen=True)
class EachOf(Kind):
    """A list of one value of each of these kinds, in their order."""

    kinds: tuple[Kind, ...]

    @property
    def expected(self):
        return f"a list of {len(self.kinds)}"

    def parse(self, value, at):
        value = ListOf(Anything(), len(self.kinds)).parse(value, at)
        pairs = enumerate(zip(self.kinds, value, strict=True))
        return [kind.parse(item, (*at, f"[{place}]")) for place, (kind, item) in pairs]


@dataclass(frozen=True)
class Default(Kind):
    """In a Record: the kind of a key that may be absent, and the value that it then has (without one, it stays so)."""

    kind: Kind
    value: Any = ABSENT

    def parse(self, value, at):
        return self.kind.parse(value, at)


@dataclass(frozen=True)
class Record(Kind):
    """A dict with these keys. others: the kind of all further values; without it, further keys are rejected."""

    fields: dict[str, Kind] = field(default_factory=dict)
    others: Kind | None = None
    expected = "a dict"

    def parse(self, value, at):
        if type(value) is not dict:
            raise Mismatch(at, self.expected, _found(value))
        parsed = {}
        missing = [key for key, kind in self.fields.items() if key not in value and not isinstance(kind, Default)]
        if len(missing) > 1:
            raise Mismatch(at, f"missing: {', '.join(missing)}", None)
        for key, kind in self.fields.items():
            if key in value:
                parsed[key] = kind.parse(value[key], (*at, key))
            elif not isinstance(kind, Default):
                raise Mismatch((*at, key), kind.expected, "nothing")
            elif kind.value is not ABSENT:
                parsed[key] = kind.value
        for key in value.keys() - self.fields.keys():
            if self.others is None:
                raise Mismatch((*at, key), f"unknown: the keys are {', '.join(sorted(self.fields))}", None)
            parsed[key] = self.others.parse(value[key], (*at, key))
        return {key: parsed[key] for key in value} | parsed  # in the order of the file, defaults last


@dataclass(frozen=True)
class ListOrRecord(Kind):
    """A list where the value is one, else a record."""

    list_of: ListOf
    record: Record

    @property
    def expected(self):
        return f"{self.list_of.expected} or {self.record.expected}"

    def parse(self, value, at):
        if not isinstance(value, (list, dict)):
            raise Mismatch(at, self.expected, _found(value))
        return (self.list_of if isinstance(value, list) else self.record).parse(value, at)


@dataclass(frozen=True)
class TensorOf(Kind):
    """Numbers of this shape (None: any length), from `least` (default -below) to less than `below`.

    They are floating-point numbers, or integers where `dtype` is of these, and are checked and returned as `dtype`.
    """

    shape: tuple[int | None, ...]
    below: float
    least: float | None = None
    dtype: torch.dtype = torch.float32

    @property
    def expected(self):
        return f"a tensor [{', '.join('n' if size is None else str(size) for size in self.shape)}]"

    def fits(self, value):
        right = isinstance(value, Tensor) and value.ndim == len(self.shape)
        return right and all(size in (None, own) for size, own in zip(self.shape, value.shape, strict=True))

    def parse(self, value, at):
        value, least = super().parse(value, at), -self.below if self.least is None else self.least
        if value.is_floating_point() != self.dtype.is_floating_point or value.is_complex():
            wanted = "floating-point numbers" if self.dtype.is_floating_point else "integers"
            raise Mismatch(at, wanted, str(value.dtype))
        # Integers in their own dtype: those that are too large for self.dtype would wrap around
        numbers = value.to(self.dtype) if self.dtype.is_floating_point else value
        low, high = map(float, numbers.aminmax()) if value.numel() else (least, least)
        if not least <= low <= high < self.below:  # NaN is neither
            raise Mismatch(at, f"finite numbers from {least:g} to less than {self.below:g}", f"{low:g} to {high:g}")
        return value.to(self.dtype)
