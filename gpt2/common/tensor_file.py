"""Files of tensors and plain values: written atomically, read without trusting them.

A record is a dict of dicts, lists, tensors, strings, numbers and None. It is written as PyTorch's archive, or, where
the name ends in `.safetensors`, as safetensors with everything but the tensors as JSON in its header. Reading goes by
what a file is, not by its name.

A file from anywhere may be read: none can run code, take more memory than a few times its own size, or be read as
something else than what was written after bits of it have changed.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import pickletools
import zipfile
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from gpt2.common import files
from gpt2.common.errors import BadArtefact

SUFFIXES = (".pt", ".safetensors")
# Bytes of everything but the tensors: tens of times ours, and few enough that nothing they say takes a second. Of
# numbers with one and the same hash, a dict of four times as many takes two
MOST_STRUCTURE = 2**16
MOST_VALUES = 100_000
MOST_PARTS = 10_000  # of an archive: one for each tensor and a few more
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64}
TENSOR = "$tensor"  # in JSON, {TENSOR: name} stands for a tensor
# What a pickle of plain values and tensors consists of, a smaller choice than that of weights_only: bytearray, for one,
# allocates what it is told to
OPERATIONS = {"PROTO", "STOP", "MARK", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS"}
OPERATIONS |= {"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1"}
OPERATIONS |= {"BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"}
OPERATIONS |= {"GLOBAL", "REDUCE", "BINPERSID"}
STORAGES = ("Bool", "Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double")
NAMED = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict", *(f"torch {kind}Storage" for kind in STORAGES)}


class _Refused(ValueError):
    """Why a file isn't read on, in words for its user."""


def write(path: str | Path, record: dict) -> Path:
    """Write a record atomically, in the format that the name's ending says."""
    if Path(path).suffix != ".safetensors":
        return files.write_torch(path, record)
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_taken_apart(record, "", tensors), allow_nan=False)
    about = {"format": "pt", "record": structure, "sha256": _sha256(structure, tensors)}
    content = safetensors.torch.save(tensors, metadata=about)
    with files.atomic(path) as part:
        part.write_bytes(content)
    return Path(path)


def read(path: str | Path, kind: str = "file of tensors", *, only: str | None = None) -> dict:
    """A record, its tensors on the CPU and its own. Raises BadArtefact, naming the file, for anything else.

    kind: what the file should be, for messages. only: this entry alone, of which little is read: content isn't checked.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise _Refused("it is no regular file")
        with path.open("rb") as file:
            head = file.read(9)
        if head[:4] == b"PK\x03\x04":
            return _read_archive(path, only)
        if head[8:] == b"{":
            return _read_safetensors(path, int.from_bytes(head[:8], "little"), only)
        raise _Refused("it is neither PyTorch's archive nor safetensors")
    except (_Refused, zipfile.BadZipFile) as error:
        raise BadArtefact(f"{path}: not a readable {kind}: {error}: make it again") from error
    except OSError as error:
        raise BadArtefact(f"{path}: not a readable {kind}: {error.strerror or error}") from error
    except Exception as error:  # damage shows as any of a dozen types, and nothing but reading happens in the block
        raise BadArtefact(f"{path}: not a readable {kind} ({type(error).__name__}): make it again") from error


def _read_archive(path: Path, only: str | None):
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if len(parts) > MOST_PARTS:
            raise _Refused(f"it has {len(parts):,} parts")
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(p.file_size for p in parts) > size:
            raise _Refused("its parts would be larger than the file")
        if len({part.filename.casefold() for part in parts}) < len(parts):  # PyTorch's reader doesn't tell them apart
            raise _Refused("two of its parts have one name")
        (pickled,) = (part for part in parts if part.filename.endswith("/data.pkl"))
        if pickled.file_size > MOST_STRUCTURE:
            raise _Refused(f"{pickled.file_size:,} bytes beside its tensors")
        structure = archive.read(pickled)
        _refuse_objects(structure)
        if only is not None:  # of a large file of something else little is read
            return _Copy(0).of(_WithoutTensors(io.BytesIO(structure)).load()[only])
        looked_at = _written_again(archive, parts)
    return _Copy(2 * size).of(torch.load(looked_at, map_location="cpu", weights_only=True))


def _written_again(archive: zipfile.ZipFile, parts: list[zipfile.ZipInfo]) -> io.BytesIO:
    """The parts that were looked at, with right checksums, and nothing else.

    PyTorch's own reader goes past a wrong checksum, and may find other parts in a crafted file.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as written:
        for part in parts:
            written.writestr(part.filename, archive.read(part))
    copy.seek(0)
    return copy


class _WithoutTensors(pickle.Unpickler):
    """Plain values of a pickle; None in the place of every tensor, and of whatever else has a name."""

    def find_class(self, module: str, name: str):
        return lambda *args: None

    def persistent_load(self, pid):
        return None


def _refuse_objects(pickled: bytes) -> None:
    """Refuse a pickle with anything but plain values and what rebuilds a tensor, before anything is built of it."""
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name not in OPERATIONS or (operation.name == "GLOBAL" and argument not in NAMED):
            raise _Refused(f"it holds {argument or 'objects'!r:.80}, and only tensors and plain values are read")
        if operation.name == "LONG_BINPUT" and argument > len(pickled):  # a reader makes a table of so many places
            raise _Refused(f"it numbers {argument:,} values in {len(pickled):,} bytes")


def _read_safetensors(path: Path, header: int, only: str | None):
    if header > MOST_STRUCTURE:
        raise _Refused(f"{header:,} bytes beside its tensors")
    with safetensors.safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
        if "record" not in about:
            raise _Refused("no record of ours in its header")
        structure = json.loads(about["record"])
        if only is not None:
            return _Copy(0).of(structure[only])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    if about.get("sha256") != _sha256(about["record"], tensors):
        raise _Refused("damaged, its checksum is wrong")
    return _Copy(2 * path.stat().st_size, tensors).of(structure)


class _Copy:
    """Copies a record of at most so many bytes, of plain values and of tensors that hold their own elements.

    tensors: by name, for a structure that has names in their place.
    """

    def __init__(self, most_bytes: int, tensors: dict[str, Tensor] | None = None):
        self.bytes, self.values, self.tensors = most_bytes, MOST_VALUES, tensors or {}

    def of(self, value):
        self.values -= 1
        if self.values < 0:
            raise _Refused(f"it holds more than {MOST_VALUES:,} values")
        if isinstance(value, Tensor):
            return self._tensor(value)
        if type(value) is dict and value.keys() == {TENSOR}:
            return self._tensor(self.tensors[value[TENSOR]])
        if type(value) is dict and all(type(key) is str for key in value):
            return {key: self.of(item) for key, item in value.items()}
        if type(value) is list:
            return [self.of(item) for item in value]
        if value is None or type(value) in (str, bool, float) or (type(value) is int and abs(value) < 2**63):
            return value
        raise _Refused(f"it holds a {type(value).__name__}")

    def _tensor(self, tensor: Tensor) -> Tensor:
        if tensor.dtype not in DTYPES:
            raise _Refused(f"it holds a tensor of {tensor.dtype}")
        plain = type(tensor) is Tensor and tensor.layout == torch.strided and tensor.device.type == "cpu"
        self.bytes -= tensor.numel() * tensor.element_size()
        # With strides of 0 one number passes for any number of them
        if not plain or self.bytes < 0 or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise _Refused("a tensor in it has more elements than the file holds")
        return tensor.detach().clone(memory_format=torch.contiguous_format)


def _taken_apart(value, name: str, tensors: dict[str, Tensor]):
    """A record with names in place of its tensors, which go into `tensors` under these names."""
    if isinstance(value, Tensor):
        name = name if name not in tensors else f"{name} {len(tensors)}"  # keys may have dots
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {TENSOR: name}
    if isinstance(value, dict):
        return {key: _taken_apart(item, f"{name}.{key}".lstrip("."), tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_taken_apart(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    return value


def _sha256(structure: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(structure.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
