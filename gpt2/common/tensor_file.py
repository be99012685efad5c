"""Files of tensors and plain values: written atomically, read without trusting them.

A record is a dict of dicts, lists, tensors, strings, numbers and None. It is written as PyTorch's archive or, where the
name ends in `.safetensors`, as safetensors, whose header has everything but the tensors as JSON. Reading goes by a
file's first bytes, not by its name.

Any file may be read, whoever wrote it: nothing in it is run, it takes no more memory than a few times its own size, and
changed bits are noticed. Each check beside `torch.load(weights_only=True)` names the attack that this lets through.
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
MOST_STRUCTURE = 2**16  # bytes beside the tensors: a pickle of empty lists takes 80 times its size in memory
MOST_INFLATED = 2  # times a file's size that its parts may take: zeros compress a thousandfold
MOST_VALUES = 100_000  # lists that hold one list twice, thirty levels deep, are a billion values in a kilobyte
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int32, torch.int64}
TENSOR = "$tensor"  # in JSON, {TENSOR: name} stands for a tensor
# What a pickle may call. weights_only allows more, such as bytearray(10**10), which allocates ten gigabytes
STORAGES = ("Bool", "Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double")
CALLABLE = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"}
CALLABLE |= {f"torch {kind}Storage" for kind in STORAGES}


class _Rejected(ValueError):
    """Why a file is not read, in words for its user."""


def write(path: str | Path, record: dict, *, compress: bool = False) -> Path:
    """Write a record atomically, in the format of the name's ending. Raises PluginError where it can't be written.

    compress: deflate PyTorch's archive, for a file that is kept or sent; `torch.load` reads it as any other.
    """
    if Path(path).suffix != ".safetensors":
        return _write_compressed(path, record) if compress else files.write_torch(path, record)
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_taken_apart(record, "", tensors), allow_nan=False)
    about = {"format": "pt", "record": structure, "sha256": _sha256(structure, tensors)}
    content = safetensors.torch.save(tensors, metadata=about)
    with files.atomic(path) as part:
        part.write_bytes(content)
    return Path(path)


def read(path: str | Path, kind: str = "file of tensors", *, only: str | None = None) -> dict:
    """The record of a file, its tensors on the CPU. Raises BadArtefact, which names the file, where it has none.

    kind: what the file should be, for messages. only: return this entry alone, plain values with None for tensors;
    little of the file is then read, and the checksum of its tensors isn't checked.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise _Rejected("it is no regular file")
        with path.open("rb") as file:
            head = file.read(9)
        if head[:4] == b"PK\x03\x04":
            return _read_archive(path, only)
        if head[8:] == b"{":
            return _read_safetensors(path, int.from_bytes(head[:8], "little"), only)
        raise _Rejected("it is neither PyTorch's archive nor safetensors")
    except (_Rejected, zipfile.BadZipFile) as error:
        raise BadArtefact(f"{path}: not a readable {kind}: {error}: make it again") from error
    except OSError as error:
        raise BadArtefact(f"{path}: not a readable {kind}: {error.strerror or error}") from error
    except Exception as error:  # damaged files raise a dozen types of errors, and the block does nothing but read
        raise BadArtefact(f"{path}: not a readable {kind} ({type(error).__name__}): make it again") from error


def _write_compressed(path: str | Path, record: dict) -> Path:
    """Write PyTorch's archive with its parts deflated, or as it is where `read` would take the result for an attack."""
    plain = io.BytesIO()
    torch.save(record, plain)
    with zipfile.ZipFile(plain) as archive:
        parts = archive.infolist()
        deflated = _written_again(archive, parts, zipfile.ZIP_DEFLATED)
    readable = _inflated(parts) <= MOST_INFLATED * len(deflated.getvalue())
    with files.atomic(path) as part:
        part.write_bytes((deflated if readable else plain).getvalue())
    return Path(path)


def _inflated(parts: list[zipfile.ZipInfo]) -> int:
    return sum(part.file_size for part in parts)


def _read_archive(path: Path, only: str | None):
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        size = _inflated(parts)
        if size > MOST_INFLATED * path.stat().st_size:  # 200 kB of zeros inflate to 200 MB
            raise _Rejected(f"its parts would be more than {MOST_INFLATED} times as large as the file")
        # Of data.pkl and DATA.PKL PyTorch reads one, and zipfile, which checks it, the other
        if len({part.filename.casefold() for part in parts}) < len(parts):
            raise _Rejected("two of its parts have one name")
        (pickled,) = (part for part in parts if part.filename.endswith("/data.pkl"))
        if pickled.file_size > MOST_STRUCTURE:
            raise _Rejected(f"{pickled.file_size:,} bytes beside its tensors")
        structure = archive.read(pickled)
        _check_pickle(structure)
        if only is not None:  # without the tensors: most of the file isn't read
            return _Copy(0).of(_WithoutTensors(io.BytesIO(structure)).load()[only])
        checked = _written_again(archive, parts)
    return _Copy(2 * size).of(torch.load(checked, map_location="cpu", weights_only=True))


def _written_again(archive: zipfile.ZipFile, parts: list[zipfile.ZipInfo], method=zipfile.ZIP_STORED) -> io.BytesIO:
    """The same parts in a new archive: reading them checks their checksums, which PyTorch's own reader ignores."""
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w", method) as written:
        for part in parts:
            # Without the time of writing: the same record gives the same file
            written.writestr(zipfile.ZipInfo(part.filename), archive.read(part), method, compresslevel=9)
    copy.seek(0)
    return copy


class _WithoutTensors(pickle.Unpickler):
    """Plain values of a pickle, and None for every tensor and every other object: nothing is called."""

    def find_class(self, module: str, name: str):
        return lambda *args: None

    def persistent_load(self, pid):
        return None


def _check_pickle(pickled: bytes) -> None:
    """Reject a pickle that calls more than what rebuilds a tensor, or that makes Python's reader allocate too much."""
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name == "PROTO" and argument != 2:  # PyTorch writes 2, and prints a warning for others
            raise _Rejected(f"its pickle is of protocol {argument}, and PyTorch's are of 2")
        if operation.name == "GLOBAL" and argument not in CALLABLE:
            raise _Rejected(f"it calls {argument!r:.80}: only tensors and plain values are read")
        # Python's reader allocates a table up to the highest number: 1.5 GB for 10**8
        if operation.name in ("PUT", "LONG_BINPUT") and argument > len(pickled):
            raise _Rejected(f"it numbers {argument:,} values in {len(pickled):,} bytes")


def _read_safetensors(path: Path, header: int, only: str | None):
    if header > MOST_STRUCTURE:
        raise _Rejected(f"{header:,} bytes beside its tensors")
    with safetensors.safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
        if "record" not in about:
            raise _Rejected("no record of ours in its header")
        structure = json.loads(about["record"])
        if only is not None:
            return _Copy(0).of(structure[only])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    if about.get("sha256") != _sha256(about["record"], tensors):
        raise _Rejected("damaged, its checksum is wrong")
    return _Copy(2 * path.stat().st_size, tensors).of(structure)


class _Copy:
    """Copies a record of plain values and of tensors that hold their own elements, `most_bytes` of them at most.

    tensors: by name, for a record in which {TENSOR: name} stands for them.
    """

    def __init__(self, most_bytes: int, tensors: dict[str, Tensor] | None = None):
        self.bytes, self.values, self.tensors = most_bytes, MOST_VALUES, tensors or {}

    def of(self, value):
        self.values -= 1
        if self.values < 0:
            raise _Rejected(f"it holds more than {MOST_VALUES:,} values")
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
        raise _Rejected(f"it holds a {type(value).__name__}")

    def _tensor(self, tensor: Tensor) -> Tensor:
        if tensor.dtype not in DTYPES:
            raise _Rejected(f"it holds a tensor of {tensor.dtype}")
        plain = type(tensor) is Tensor and tensor.layout == torch.strided and tensor.device.type == "cpu"
        self.bytes -= tensor.numel() * tensor.element_size()
        # With strides of 0 one number stands for a billion; tensors on `meta` and sparse ones have no elements
        if not plain or self.bytes < 0 or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise _Rejected("a tensor in it has more elements than the file holds")
        return tensor.detach().clone(memory_format=torch.contiguous_format)


def _taken_apart(value, name: str, tensors: dict[str, Tensor]):
    """A record with {TENSOR: name} in place of each tensor, which goes into `tensors` under that name."""
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
