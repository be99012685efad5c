"""Bad calibration and preset files by the hundred, made from good ones, and a watch over what reading one does."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from gpt2.common.errors import PluginError, printable
from gpt2.compression.calibration.file import load_calibration
from gpt2.compression.presets import create_cache_from_preset

Bad = Iterator[tuple[str, bytes]]  # what was done, and the file
PRESET = {
    "model": "tiny-llama", "rank": 9, "target": "v", "bits": 8, "compression_ratio": 1.5, "baseline_ppl": 20.0,
    "compressed_ppl": 21.0, "ppl_delta": 0.05, "calibration_file": "c.pt", "head_dim": 12, "num_layers": 3,
}  # fmt: skip
DEEP: list = []
for _ in range(200):
    DEEP = [DEEP]


# --- what reading may not do

DONE: list[str] = []
_watching = False
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "os.startfile", "pty.spawn")
REACHES = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")


def _note(event: str, args: tuple) -> None:
    if not _watching:
        return
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if writes or event in (*CHANGES, *STARTS, *REACHES):
        DONE.append(f"{event} {args}")


sys.addaudithook(_note)


@contextmanager
def watching():
    """Notes in DONE what the block starts, writes, deletes or reaches for."""
    global _watching
    DONE.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False


@contextmanager
def watched(most_calls: int | None = None, most_bytes: int = 64 * 2**20):
    """Fails if the block starts a program, writes or deletes a file, opens a connection, or allocates too much.

    most_calls: also fails if the block makes more function calls than this, C functions included.
    """
    calls = 0

    def count(frame, event: str, argument) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    _reset_peak()
    before = _status("VmRSS")
    sys.setprofile(count if most_calls else None)  # counting makes the block several times slower
    try:
        with watching():
            yield
    finally:
        sys.setprofile(None)
    grown = _status("VmHWM") - before
    assert not DONE, DONE
    assert most_calls is None or calls < most_calls, f"{calls:,} function calls"
    assert grown < most_bytes, f"{grown / 2**20:.0f} MiB"


def _reset_peak() -> None:
    with suppress(OSError):  # then the peak of the whole run counts, which is more
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    """A line of /proc/self/status in bytes; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@contextmanager
def untouched(folder: Path):
    """Puts a file into a folder that nothing in the block may touch, nor leave others there but those of tests."""
    (folder / "victim").write_text("as it was")
    yield
    assert {path.name for path in folder.iterdir()} <= {"victim", "bad.pt", "p.json", "folder", "pipe"}
    assert (folder / "victim").read_text() == "as it was"


def refused(path, what: str, message: str = "", read=load_calibration) -> None:
    """One line that names the file; not for want of memory, which would mean that it was asked for."""
    with watched(), pytest.raises(PluginError) as error:
        read(path)
    said = str(error.value)
    assert "\n" not in printable(said).strip() and len(said) < 1000 and "bad.pt" in said and message in said, what
    cause = error.value.__cause__
    assert not isinstance(cause, MemoryError) and "alloc" not in str(cause), f"{what}: {cause!r}"


def make(path):
    """The cache of a preset file."""
    return create_cache_from_preset(path)


def check(space, files, read=load_calibration) -> int:
    count = 0
    for what, content in files:
        (space / "bad.pt").write_bytes(content)
        try:
            refused(space / "bad.pt", what, read=read)
        except BaseException:
            print(what)  # pytest shows it with the failure
            raise
        count += 1
    return count


# --- bytes


def flipped(good: bytes, count: int, rng: random.Random) -> Bad:
    for _ in range(count):
        data, places = bytearray(good), [rng.randrange(8 * len(good)) for _ in range(rng.choice((1, 1, 8)))]
        for place in places:
            data[place // 8] ^= 1 << place % 8
        yield f"bits {places} flipped", bytes(data)


def cut(good: bytes, count: int, rng: random.Random) -> Bad:
    for length in [0, 1, 8, 9, len(good) - 1, *(rng.randrange(len(good)) for _ in range(count - 5))]:
        yield f"cut to {length} bytes", good[:length]


def overwritten(good: bytes, count: int, rng: random.Random) -> Bad:
    for _ in range(count):
        start, length = rng.randrange(len(good)), rng.choice((16, 4096))
        other = rng.choice((b"\0", b"\xff", rng.randbytes(1))) * length
        yield f"{length} bytes from {start} overwritten", (good[:start] + other + good[start + length :])[: len(good)]


def out_of_place(good: bytes) -> Bad:
    half = len(good) // 2
    yield "halves swapped", good[half:] + good[:half]
    yield "twice", good + good
    yield "half of it again", good + good[half:]
    yield "something before it", b"\0" * 100 + good
    yield "something behind it", good + b"\0" * 100_000
    yield "backwards", good[::-1]


# --- contents


def saved(record, **how) -> bytes:
    """As torch.save writes it, whatever it is."""
    buffer = io.BytesIO()
    torch.save(record, buffer, **how)
    return buffer.getvalue()


def places(record, at: tuple = ()) -> Iterator[tuple[tuple, Tensor]]:
    """Every tensor of a record and where it is."""
    for key, value in record.items() if isinstance(record, dict) else enumerate(record):
        if isinstance(value, Tensor):
            yield (*at, key), value
        elif isinstance(value, (dict, list)):
            yield from places(value, (*at, key))


def put(record, at: tuple, value):
    """The record with another value at one place."""
    if not at:
        return value
    copy = dict(record) if isinstance(record, dict) else list(record)
    copy[at[0]] = put(copy[at[0]] if not isinstance(copy, dict) or at[0] in copy else {}, at[1:], value)
    return copy


def wrong_tensors(record: dict) -> Iterator[tuple[str, dict]]:
    for at, tensor in places(record):
        name = ".".join(map(str, at))
        wrong = {
            "cut": tensor[..., :-1],
            "longer": torch.cat((tensor, tensor), dim=-1),
            "one more dimension": tensor[None],
            "NaN": tensor.clone().index_fill_(0, torch.tensor([0]), float("nan")),
            "infinite": tensor.clone().index_fill_(0, torch.tensor([len(tensor) - 1]), float("inf")),
            "one number for all": torch.ones((1,) * tensor.ndim, dtype=tensor.dtype).expand_as(tensor),
            "missing": None,
            "words": "tensor",
        }
        for what, value in wrong.items():
            if what != "one number for all" or tensor.numel() > 1:
                yield f"{name} {what}", put(record, at, value)


# --- code


class Runs:
    """Unpickled by a careless reader, it calls what it is given."""

    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def payloads() -> Iterator[tuple[str, object]]:
    import builtins
    import os
    import subprocess

    yield "os.system", Runs(os.system, "touch pwned")
    yield "subprocess.Popen", Runs(subprocess.Popen, ["touch", "pwned"])
    yield "eval", Runs(builtins.eval, "__import__('os').mkdir('pwned')")
    yield "exec", Runs(builtins.exec, "open('pwned', 'w')")
    yield "open", Runs(builtins.open, "pwned", "w")
    yield "os.remove", Runs(os.remove, "victim")
    yield "import", Runs(builtins.__import__, "antigravity")
    yield "torch.load", Runs(torch.load, "victim")
    yield "bytearray", Runs(bytearray, 10**11)
    yield "set", {1, 2}
    yield "class", Runs


def in_archive(good: bytes, data_pkl: bytes | None, **how) -> bytes:
    """A good archive written again, with another pickle inside if one is given."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(buffer, "w", **how) as new:
        for part in old.infolist():
            own = data_pkl and part.filename.endswith("/data.pkl")
            new.writestr(part.filename, data_pkl if own else old.read(part))
    return buffer.getvalue()


def hostile(good: bytes, record: dict) -> Bad:
    """Pickles that would run code: bare, inside the record, inside the archive."""
    for name, payload in payloads():
        for protocol in (0, 2, 4):
            yield f"{name} in a bare pickle, protocol {protocol}", pickle.dumps(payload, protocol)
            yield f"{name} in an archive, protocol {protocol}", in_archive(good, pickle.dumps(payload, protocol))
        yield f"{name} in meta", saved(put(record, ("meta", "model"), payload))
        yield f"{name} in place of the format", saved(put(record, ("format",), payload))
        yield (
            f"{name} in PyTorch's old format",
            saved(put(record, ("meta", "text"), payload), _use_new_zipfile_serialization=False),
        )


# --- sizes


def too_large(good: bytes, record: dict) -> Bad:
    """Files of a few bytes that say they hold billions."""
    for claimed in (10**5, 2**31 - 1):
        yield f"{claimed} elements of 12,345", _claiming(good, claimed)
    for count in (100, 10**6):
        one = torch.ones(1, 1, 1).expand(count, count, count)
        meta = record["meta"] | {"num_layers": count, "num_kv_heads": count, "head_dim": count, "rank": 1}
        sides = {key: one[0] for key in ("mean", "E", "D", "spectrum")}
        yield (
            f"{count} of everything, one number each",
            saved(record | {"meta": meta, "bases": {"k": sides, "v": sides}, "statistics": {"k_count": one[0, 0]}}),
        )
        yield f"a tensor of {count} cubed in meta", saved(put(record, ("meta", "samples"), one))
    yield "a tensor without storage", saved(put(record, ("meta", "samples"), torch.empty(10**6, 10**6, device="meta")))
    yield "a sparse tensor", saved(put(record, ("meta", "samples"), torch.zeros(3).to_sparse()))
    yield "lists in lists", saved(put(record, ("meta", "versions"), {"torch": _laughs(30)}))
    yield "a list of itself", saved(put(record, ("meta", "versions"), {"torch": _endless()}))
    yield (
        "a tensor ten thousand times",
        saved(put(record, ("meta", "versions"), {"torch": [torch.ones(10**5)] * 10**4})),
    )
    for place in (10**6, 2**32 - 1):
        yield f"a value with the number {place}", _numbered(good, place)
    yield "zeros, packed", _bomb(good)
    yield "a part that is larger than the file", _declared(good, 2**31)
    yield "many values", saved(put(record, ("meta", "versions"), {"torch": [None] * 5 * 10**6}))


def _claiming(good: bytes, elements: int) -> bytes:
    """An archive whose pickle says that one tensor has so many elements."""
    data = saved({"meta": torch.ones(12345)})
    pickled = _pickled(data)
    true = b"M" + struct.pack("<H", 12345)
    assert true in pickled
    return in_archive(data, pickled.replace(true, b"J" + struct.pack("<i", elements)))


def too_many(good: bytes) -> Bad:
    """Small files with more values or parts than a calibration has."""
    keys = b"".join(b"\x8a\x0a" + number.to_bytes(10, "little") + b"N" for number in range(10_000))
    yield "many keys", in_archive(good, b"\x80\x02}X\x04\0\0\0meta}(" + keys + b"us.")
    buffer = io.BytesIO(good)
    with zipfile.ZipFile(buffer, "a") as archive:
        for number in range(20_000):
            archive.writestr(f"archive/data/more{number}", b"")
    yield "many empty parts", buffer.getvalue()


def _pickled(good: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        (part,) = (part for part in archive.infolist() if part.filename.endswith("/data.pkl"))
        return archive.read(part)


def _numbered(good: bytes, place: int) -> bytes:
    """An archive whose pickle keeps its first value, to come back to, at such a place among all that it keeps."""
    pickled = _pickled(good)
    assert b"q\0" in pickled
    return in_archive(good, pickled.replace(b"q\0", b"r" + struct.pack("<I", place), 1))


def _laughs(depth: int) -> list:
    """2 to the power of `depth` ends in so many lists."""
    value: list = ["ha"]
    for _ in range(depth):
        value = [value, value]
    return value


def _endless() -> list:
    value: list = []
    value.append(value)
    return value


def _bomb(good: bytes) -> bytes:
    """An archive with 64 MB of zeros that take 64 kB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        with zipfile.ZipFile(io.BytesIO(good)) as old:
            for part in old.infolist():
                new.writestr(part.filename, old.read(part))
            top = old.infolist()[0].filename.split("/")[0]
        with new.open(f"{top}/data/999", "w") as part:
            for _ in range(64):
                part.write(bytes(2**20))
    return buffer.getvalue()


def _declared(good: bytes, size: int) -> bytes:
    """An archive whose directory says that its last part is so large."""
    place = good.rindex(b"PK\x01\x02")
    return good[: place + 20] + struct.pack("<II", size, size) + good[place + 28 :]


def wrong_safetensors(good: bytes) -> Bad:
    """Headers that lie."""
    length = int.from_bytes(good[:8], "little")
    header, tensors = json.loads(good[8 : 8 + length]), good[8 + length :]
    names = [name for name in header if name != "__metadata__"]

    def made(header, tensors: bytes = tensors) -> bytes:
        words = json.dumps(header).encode()
        return len(words).to_bytes(8, "little") + words + tensors

    for size in (0, 1, length - 1, length + 1, 2**20, 2**40, 2**63, 2**64 - 1):
        yield f"header of {size} bytes", size.to_bytes(8, "little") + good[8:]
    for name in names:
        own = header[name]
        for key, value in {
            "shape": [10**9, 10**9], "dtype": "F8_X", "data_offsets": [0, 2**60],
            "shape ": [*own["shape"], 1], "data_offsets ": [5, 1], "dtype ": None,
        }.items():  # fmt: skip
            yield f"{name}: {key} {value}", made(header | {name: own | {key.strip(): value}})
        yield f"{name} missing", made({key: value for key, value in header.items() if key != name})
    about = header["__metadata__"]
    for key in about:
        if key != "format":
            yield f"no {key}", made(header | {"__metadata__": {k: v for k, v in about.items() if k != key}})
            yield f"another {key}", made(header | {"__metadata__": about | {key: "{}"}})
    yield "lists in lists", made(header | {"__metadata__": about | {"record": "[" * 10**5}})
    yield "much metadata", made(header | {"__metadata__": about | {"more": "x" * 2**17}})
    yield "no metadata", made({name: header[name] for name in names})
    yield "of another program", safetensors.torch.save({"weight": torch.ones(3)}, metadata={"format": "pt"})
