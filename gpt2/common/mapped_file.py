"""Large files of tensors that are mapped into memory instead of being read: safetensors, with checksums.

Any program that reads safetensors reads these files. Ours goes by their bytes: the header's checksum, then the table of
tensors, then the checksum of each, so that no byte can change unnoticed. Nothing in a file is run, and a mapped tensor
takes memory only where somebody writes to it, which the file never sees.
"""

from __future__ import annotations

import json
import math
import mmap
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gpt2.common import files
from gpt2.common.errors import BadArtefact
from gpt2.common.schema import EachOf, ListOf, OneOf, Record, String, Whole, parse

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_HEADER = 2**22  # bytes: JSON takes twenty times its size in memory
MOST_DIMENSIONS, LONGEST = 6, 2**31  # of a tensor, which may be empty and so be of any shape
BEGIN = b'{"__metadata__":{"header_crc32":"'  # of every header; the checksum of all its other bytes follows
DIGITS = 8  # of a checksum
EMPTY = "0" * DIGITS
METADATA = Record(
    {"header_crc32": String(DIGITS), "format": OneOf(("pt",)), "record": String(MOST_HEADER, printable=False),
     "crc32": String(MOST_HEADER)}
)  # fmt: skip
TENSOR = Record(
    {"dtype": OneOf(tuple(DTYPES)), "shape": ListOf(Whole(0)), "data_offsets": EachOf((Whole(0), Whole(0)))}
)
Parts = Sequence[Tensor]  # one tensor in pieces along its third dimension


class _Rejected(ValueError):
    """Why a file is not read, in words for its user."""


def write(path: str | Path, record: dict, tensors: Mapping[str, Parts]) -> Path:
    """Write plain values and tensors atomically, one tensor at a time. Raises PluginError where that can't be done."""
    shapes = {name: _shape(parts) for name, parts in tensors.items()}
    # The widest first, so that every tensor is aligned
    order = sorted(tensors, key=lambda name: (-tensors[name][0].dtype.itemsize, name))
    table, end = {}, 0
    for name in order:
        dtype = tensors[name][0].dtype
        begin, end = end, end + math.prod(shapes[name]) * dtype.itemsize
        table[name] = {"dtype": NAMES[dtype], "shape": shapes[name], "data_offsets": [begin, end]}
    about = {"format": "pt", "record": json.dumps(record, allow_nan=False)}
    with files.atomic(path) as part, part.open("wb") as file:
        file.write(_header(about, [EMPTY] * len(order), table))
        sums = []
        for name in order:
            whole = tensors[name][0] if len(tensors[name]) == 1 else torch.cat(list(tensors[name]), dim=2)
            content = whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            sums.append(_crc(content))
            file.write(content)
        file.seek(0)
        file.write(_header(about, sums, table))  # of the same length, for a checksum has the same number of digits
    return Path(path)


def read(path: str | Path, kind: str, *, about_only: bool = False) -> tuple[dict, dict[str, Tensor]]:
    """Plain values of a file, and its tensors on the CPU, mapped; what is written to one doesn't reach the file.

    kind: what the file should be, for messages. about_only: give tensors on the meta device, which have shapes alone;
    little of the file is then read, and of its checksums only the header's is compared. Raises BadArtefact.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise _Rejected("there is no such file" if not path.exists() else "it is no regular file")
        with path.open("rb") as file:
            size = path.stat().st_size
            about, table, start = _read_header(file, size, path)
            if about_only:
                return about["record"], {
                    name: torch.empty(own["shape"], dtype=DTYPES[own["dtype"]], device="meta")
                    for name, own in table.items()
                }
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        each = zip(table.items(), about["crc32"], strict=True)
        return about["record"], {name: _mapped(mapped, name, own, start, crc) for (name, own), crc in each}
    except _Rejected as error:
        raise BadArtefact(f"{path}: not a readable {kind}: {error}: make it again") from error
    except OSError as error:
        raise BadArtefact(f"{path}: not a readable {kind}: {error.strerror or error}") from error


def _mapped(whole: mmap.mmap, name: str, own: dict, start: int, crc: str) -> Tensor:
    """One tensor of a mapped file; its checksum is compared."""
    first, last = (start + offset for offset in own["data_offsets"])
    with memoryview(whole) as content, content[first:last] as bytes_of_tensor:
        if _crc(bytes_of_tensor) != crc:
            raise _Rejected(f"damaged in {name!r:.80}, its checksum is wrong")
    dtype, count = DTYPES[own["dtype"]], math.prod(own["shape"])
    if not count:
        return torch.empty(own["shape"], dtype=dtype)
    return torch.frombuffer(whole, dtype=dtype, count=count, offset=first).view(own["shape"])


def _shape(parts: Parts) -> list[int]:
    shape = list(parts[0].shape)
    if len(parts) > 1:
        shape[2] = sum(part.shape[2] for part in parts)
    return shape


def _crc(content) -> str:
    return f"{zlib.crc32(content):0{DIGITS}x}"


def _header(about: dict, sums: list[str], table: dict) -> bytes:
    """The header with its length before it, padded so that tensors are aligned."""
    whole = {"__metadata__": {"header_crc32": EMPTY, **about, "crc32": " ".join(sums)}} | table
    content = json.dumps(whole, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 64)
    with_crc = content.replace(BEGIN + EMPTY.encode(), BEGIN + _crc(content).encode(), 1)
    return len(content).to_bytes(8, "little") + with_crc


def _read_header(file, size: int, path: Path) -> tuple[dict, dict, int]:
    """Record and checksums of the tensors, the table of these, and where the first begins."""
    length = int.from_bytes(file.read(8), "little")
    if length > MOST_HEADER or 8 + length > size:
        raise _Rejected("it has no header of ours, or lost its end")
    content = file.read(length)
    found = content[len(BEGIN) :][:DIGITS]
    if not content.startswith(BEGIN):
        raise _Rejected("it has no header of ours")
    if _crc(content.replace(BEGIN + found, BEGIN + EMPTY.encode(), 1)).encode() != found:
        raise _Rejected("its header is damaged, the checksum is wrong")
    try:
        whole = json.loads(content)
        table = parse(whole, Record({"__metadata__": METADATA}, others=TENSOR), path)
        about = table.pop("__metadata__")
        record = json.loads(about["record"])
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadArtefact):
            raise
        raise _Rejected("its header is no JSON") from error
    sums, end = about["crc32"].split(), 0
    for name, own in table.items():
        first, last = own["data_offsets"]
        if len(own["shape"]) > MOST_DIMENSIONS or max(own["shape"], default=0) > LONGEST:
            raise _Rejected(f"the shape of {name!r:.80} is out of range")
        if first != end or last - first != math.prod(own["shape"]) * DTYPES[own["dtype"]].itemsize:
            raise _Rejected(f"its table of tensors contradicts itself at {name!r:.80}")
        end = last
    if 8 + length + end != size:
        raise _Rejected(f"it has {size:,} bytes, expected {8 + length + end:,}")
    if len(sums) != len(table):
        raise _Rejected(f"{len(sums)} checksums for {len(table)} tensors")
    return {"record": record, "crc32": sums}, table, 8 + length
