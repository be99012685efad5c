"""Bad calibration and preset files, made from good ones, and a watch over what reading one does."""

from __future__ import annotations

import builtins
import functools
import gc
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch
from sampling import sampled
from torch import Tensor

from gpt2.common.errors import PluginError, printable
from gpt2.compression.calibration.file import load_calibration

Bad = Iterator[tuple[str, object]]  # what was done, and the file: its bytes, or what torch.save makes a file of
DEEP: list = []
for _ in range(200):
    DEEP = [DEEP]


# --- what reading a file may not do

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
    """Collect in DONE which programs the block starts, which files it writes or deletes, and which hosts it asks."""
    global _watching
    DONE.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False


@contextmanager
def watched(most_bytes: int = 64 * 2**20):
    """Fails if the block starts a program, writes or deletes a file, opens a connection, or takes too much memory."""
    with suppress(OSError):  # without this file, the peak of the whole run counts, which is more
        Path("/proc/self/clear_refs").write_text("5")
    collects = gc.isenabled()
    gc.disable()  # garbage of earlier tests, if it were freed in the block, would hide what the block takes
    before = counted("status", "VmRSS")
    try:
        with watching():
            yield
    finally:
        if collects:
            gc.enable()
    grown = 1024 * (counted("status", "VmHWM") - before)
    assert not DONE, DONE
    assert grown < most_bytes, f"{grown / 2**20:.0f} MiB"


def counted(file: str, field: str) -> int:
    """A number that Linux keeps of this process in /proc/self; 0 where there is no such file."""
    try:
        lines = (Path("/proc/self") / file).read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def check(
    folder: Path, cases: Iterable[tuple[str, object]], read: Callable = load_calibration, most: int = 10**6, message="",
    name: str = "bad.pt",
) -> int:  # fmt: skip
    """Reading each file, of that name, raises one line that names it, without an attempt to allocate what it asks for.

    message: what the error says, or a function of what was done that gives it. `make test` tries `most` of the files.
    Returns how many there are.
    """
    cases, path = list(cases), folder / name
    for what, content in sampled(cases, most):
        path.write_bytes(content if isinstance(content, bytes) else saved(content))
        try:
            with watched(), pytest.raises(PluginError) as error:
                read(path)
            line, cause = str(error.value), error.value.__cause__
            assert "\n" not in printable(line).strip() and len(line) < 1000 and path.name in line
            assert (message(what) if callable(message) else message) in line
            assert not isinstance(cause, MemoryError) and "alloc" not in str(cause), repr(cause)
        except BaseException:
            print(what)  # pytest shows it with the failure
            raise
    return len(cases)


# --- changed bytes


def flipped(good: bytes, rng: random.Random) -> bytes:
    data = bytearray(good)
    for _ in range(rng.choice((1, 1, 8))):
        place = rng.randrange(8 * len(good))
        data[place // 8] ^= 1 << place % 8
    return bytes(data)


def overwritten(good: bytes, rng: random.Random) -> bytes:
    start, length = rng.randrange(len(good)), rng.choice((16, 4096))
    other = rng.choice((b"\0", b"\xff", rng.randbytes(1))) * length
    return (good[:start] + other + good[start + length :])[: len(good)]


def parts(good: bytes) -> Bad:
    for length in (0, 1, 8, 9, len(good) // 3, len(good) - 1):
        yield f"cut to {length} bytes", good[:length]
    half = len(good) // 2
    yield "halves swapped", good[half:] + good[:half]
    yield "backwards", good[::-1]


# --- changed contents


def saved(record, **how) -> bytes:
    """What torch.save writes of any object."""
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
        fractional = tensor if tensor.is_floating_point() else tensor.float()
        wrong = {
            "cut": tensor[..., :-1],
            "longer": torch.cat((tensor, tensor), dim=-1),
            "one more dimension": tensor[None],
            "NaN": fractional.clone().index_fill_(0, torch.tensor([0]), float("nan")),
            "infinite": fractional.clone().index_fill_(0, torch.tensor([len(tensor) - 1]), float("inf")),
            "one number for all": torch.ones((1,) * tensor.ndim, dtype=tensor.dtype).expand_as(tensor),
            "missing": None,
            "words": "tensor",
        }
        if tensor.dtype == torch.int8:  # codes of a basis, from -127 to 127
            wrong["least integer"] = tensor.clone().index_fill_(0, torch.tensor([0]), -128)
            wrong["wider integers"] = tensor.int() + 256  # the same in eight bits
        for what, value in wrong.items():
            if what != "one number for all" or tensor.numel() > 1:
                yield f"{name} {what}", put(record, at, value)


# --- code


class Runs:
    """When it is unpickled without care, it makes a call."""

    def __init__(self, call: Callable, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


PAYLOADS = {
    "os.system": Runs(os.system, "touch pwned"),
    "subprocess.Popen": Runs(subprocess.Popen, ["touch", "pwned"]),
    "eval": Runs(builtins.eval, "__import__('os').mkdir('pwned')"),
    "exec": Runs(builtins.exec, "open('pwned', 'w')"),
    "open": Runs(builtins.open, "pwned", "w"),
    "os.remove": Runs(os.remove, "victim"),
    "import": Runs(builtins.__import__, "antigravity"),
    "torch.load": Runs(torch.load, "victim"),
    "bytearray": Runs(bytearray, 10**11),  # weights_only lets it through
    "set": {1, 2},
    "class": Runs,
}


def in_archive(good: bytes, data_pkl: bytes | None, **how) -> bytes:
    """A good archive written again, with another pickle in it where one is given."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(buffer, "w", **how) as new:
        for part in old.infolist():
            own = data_pkl and part.filename.endswith("/data.pkl")
            new.writestr(part.filename, data_pkl if own else old.read(part))
    return buffer.getvalue()


def hostile(good: bytes, record: dict) -> Bad:
    """Pickles that would run code: without an archive, inside the record, in place of it."""
    for name, payload in PAYLOADS.items():
        for protocol in (0, 2, 4):
            yield f"{name} in a bare pickle, protocol {protocol}", pickle.dumps(payload, protocol)
            yield f"{name} in an archive, protocol {protocol}", in_archive(good, pickle.dumps(payload, protocol))
        yield f"{name} in meta", put(record, ("meta", "model"), payload)
        yield f"{name} in place of the format", put(record, ("format",), payload)
        old = saved(put(record, ("meta", "text"), payload), _use_new_zipfile_serialization=False)
        yield f"{name} in PyTorch's old format", old


# --- sizes


def too_large(good: bytes, record: dict) -> Bad:
    """Small files that would take much memory."""

    def in_meta(value) -> dict:
        return put(record, ("meta", "versions"), {"torch": value})

    count = 10**6
    one, meta = torch.ones(1, 1, 1).expand(count, count, count), record["meta"]
    meta = meta | {"num_layers": count, "num_kv_heads": count, "head_dim": count, "rank": 1}
    sides = {key: one[0] for key in ("mean", "E", "D", "spectrum")}
    yield (
        "strides of 0",
        record | {"meta": meta, "bases": {"k": sides, "v": sides}, "statistics": {"k_count": one[0, 0]}},
    )
    yield "strides of 0 in meta", in_meta(one)
    yield "a tensor without storage", in_meta(torch.empty(count, count, device="meta"))
    yield "a sparse tensor", in_meta(torch.zeros(3).to_sparse())
    yield "one list in thirty", in_meta(_doubled(30))
    yield "a list of itself", in_meta(_endless())
    yield "a tensor a thousand times", in_meta([torch.ones(10**5)] * 1000)
    yield "empty lists", in_archive(good, b"\x80\x02](" + b"]" * count + b"e.")
    yield "a value with a large number", in_archive(good, b"\x80\x02}r\xff\xff\xff\xff.")
    yield "a value with a large number in digits", in_archive(good, b"\x80\x02}p100000000\n.")
    yield "a part that is larger than the file", _declared(good, 2**31)
    yield "zeros, compressed", _compressed_zeros()
    true, claimed = b"M" + struct.pack("<H", 12345), b"J" + struct.pack("<i", 2**31 - 1)
    data = saved({"meta": torch.ones(12345)})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    assert true in pickled
    yield "billions of elements", in_archive(data, pickled.replace(true, claimed))


@functools.cache
def _compressed_zeros() -> bytes:
    return in_archive(saved({"meta": torch.zeros(2**24)}), None, compression=zipfile.ZIP_DEFLATED)


def _doubled(depth: int) -> list:
    """A list that holds one list twice, and so on: 2 to the power of `depth` values in all."""
    value: list = ["value"]
    for _ in range(depth):
        value = [value, value]
    return value


def _endless() -> list:
    value: list = []
    value.append(value)
    return value


def _declared(good: bytes, size: int) -> bytes:
    """An archive whose directory says that its last part is so large."""
    place = good.rindex(b"PK\x01\x02")
    return good[: place + 20] + struct.pack("<II", size, size) + good[place + 28 :]


def wrong_safetensors(good: bytes) -> Bad:
    """Headers that claim something else than the file holds."""
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
