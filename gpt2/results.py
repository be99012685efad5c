"""Write results so that they can be trusted: atomically, and with what they were made from."""

from __future__ import annotations

import errno
import functools
import glob
import hashlib
import importlib.metadata
import json
import os
import re
import secrets
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpt2 import code_version
from gpt2.errors import PluginError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

try:
    import fcntl
except ImportError:  # Windows: what a killed process leaves stays there
    fcntl = None

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
PART, RANDOM_BYTES = ".tmp", 4  # names of temporary files
NOT_INPUTS = ("output", "study")  # arguments that name what is written
# Folders of results whose pictures go into `plots` beside them, and under what name
PICTURES = {"runs": "{stem}.png", "presets": "frontier_{stem}.png"}


@contextmanager
def atomic(path: str | Path):
    """Yield a temporary path beside `path`, moved onto it when the block succeeds and removed when it doesn't.

    What a killed process left there of the same path is removed too. Raises PluginError where it can't be written.
    """
    path = _real(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PluginError(f"can't make the folder of {path}: {error.strerror}") from error
    # Named before it is made: whenever Ctrl-C comes, it is removed
    part, handle = path.parent / f".{path.name}.{secrets.token_hex(RANDOM_BYTES)}{PART}", None
    try:
        _remove_abandoned(path)
        handle = _claim(part)
        yield part
        if path.exists():
            os.chmod(part, stat.S_IMODE(path.stat().st_mode))
        os.fsync(handle)  # some disks and networks say only now that they are full
        os.replace(part, path)
    except OSError as error:
        read_only = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        reason = "its folder is read-only" if read_only else error.strerror or error
        raise PluginError(f"can't write {path}: {reason}") from error
    finally:
        with suppress(OSError):  # what counts has been said
            part.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


def _real(path: str | Path) -> Path:
    """Where a link leads, so that it stays one. Raises PluginError for what can't be replaced by a file."""
    if os.path.isdir(path):
        raise PluginError(f"can't write {path}: it is a folder")
    if os.path.exists(path) and not os.path.isfile(path):
        raise PluginError(f"can't write {path}: it is no regular file")
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def _claim(part: Path) -> int:
    """Create a temporary file and lock it: a lock ends with its process, however that ends. Returns its handle."""
    while True:
        handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if fcntl:
            with suppress(OSError):  # there are file systems without locks; on those nobody removes anything
                fcntl.flock(handle, fcntl.LOCK_EX)
        if not fcntl or os.fstat(handle).st_nlink:
            return handle
        os.close(handle)  # taken for abandoned before we had the lock


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files of `path` whose writers are dead."""
    digits = "[0-9a-f]" * 2 * RANDOM_BYTES
    for part in path.parent.glob(f".{glob.escape(path.name)}.{digits}{PART}") if fcntl else ():
        with suppress(OSError):  # somebody's, gone by now, or not ours to remove
            handle = os.open(part, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()
            finally:
                os.close(handle)


def check_writable(path: str | Path) -> Path:
    """Create the folder of `path` and refuse now, by trying it, what could not be written after an hour of work."""
    with suppress(_Tried), atomic(path):
        raise _Tried
    return Path(path)


class _Tried(Exception):
    """Ends a trial."""


def picture_beside(path: Path) -> Path:
    """The PNG that goes with an output file, in `plots` for a folder of results, else beside it.

    Raises PluginError where it would overwrite the output itself.
    """
    if path.parent.name in PICTURES:
        return path.parent.parent / "plots" / PICTURES[path.parent.name].format(stem=path.stem)
    picture = path.with_suffix(".png")
    if picture == path:
        raise PluginError(f"can't write {path}: the picture goes there, give --output another ending, such as .json")
    return picture


def write_json(path: str | Path, record: dict) -> Path:
    """Write a dict as JSON; not-a-number is refused, since no reader agrees on it."""
    with atomic(path) as part:
        part.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    return Path(path)


def write_torch(path: str | Path, record: dict) -> Path:
    """Write tensors and plain types for `torch.load(weights_only=True)`."""
    with atomic(path) as part, part.open("wb") as file:
        try:
            torch.save(record, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # PyTorch hides it: a disk that is full is no error of ours
                raise error.__context__ from error
            raise
    return Path(path)


def write_figure(path: str | Path, figure: Figure) -> Path:
    """Write a matplotlib figure as PNG."""
    with atomic(path) as part:
        figure.savefig(part, format="png", dpi=150, bbox_inches="tight")
    return Path(path)


def write_run(path: Path, record: dict, picture: Path, draw: Callable[[], Figure]) -> None:
    """Write a run's record and its picture, the record last: a killed run is made again, and not taken for whole.

    Where the picture can't be drawn or written, the record, which took the work, is written all the same.
    """
    try:
        write_figure(picture, draw())
    except Exception:
        write_json(path, record)
        raise
    write_json(path, record)


def provenance(args: Any = None, **more) -> dict:
    """What a result was made from: arguments, the files that they name, code, versions, device, time; more as given."""
    packages = ("torch", "transformers", "numpy", "optuna", "triton")
    given = vars(args) if args else {}
    return {
        "args": {key: _recorded(value) for key, value in given.items()},
        "inputs": inputs(given),
        "git_commit": git_commit(),
        "code_sha256": code_sha256(main_script()),
        "versions": {name: version for name in packages if (version := _version(name))},
        "device": device_name(getattr(args, "device", "auto")),
        "threads": torch.get_num_threads(),
        "created_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **more,
    }


def inputs(args: dict) -> dict[str, str]:
    """Every file that arguments name, as `args` has it in a record, to its sha256."""
    values = [value for key, value in args.items() if key not in NOT_INPUTS]
    named = [item for value in values for item in (value if isinstance(value, list) else [value])]
    files = {_recorded(item): Path(item) for item in named if isinstance(item, (str, Path))}
    return {name: file_sha256(path) for name, path in files.items() if os.path.isfile(path)}


def read_and_written(args: dict) -> list[str] | None:
    """The flags of an argument that is written and of another that is the same file, if there are any."""
    files = [
        (key.replace("_", "-"), item) for key, value in args.items()
        for item in (value if isinstance(value, list) else [value])
        if isinstance(item, (str, Path)) and os.path.isfile(item)
    ]  # fmt: skip
    pairs = ([w, r] for w, written in files if w in NOT_INPUTS for r, read in files
             if w != r and os.path.samefile(written, read))  # fmt: skip
    return next(pairs, None)


def _recorded(value):
    return shown(value) if isinstance(value, Path) else value


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main_script() -> Path | None:
    """The script of a folder `scripts` that this process runs; None where it runs something else."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    return Path(script).resolve() if script and Path(script).resolve().parent.name == "scripts" else None


@functools.cache
def code_sha256(script: Path | None) -> str | None:
    """What `code_version` says of a script when first asked."""
    if script is None:
        return None
    checkout = script.parents[1]
    return code_version.digest(code_version.working_tree(checkout), script.relative_to(checkout).as_posix())


def device_name(device: str) -> str:
    """The processor behind a --device value: the GPU's name where it means one."""
    if device == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return torch.cuda.get_device_name(None if device in ("auto", "all") else device)


def device_slug(device: torch.device | str) -> str:
    """A device as file names have it: `cpu`, or `cuda-` and the GPU's short name, such as `cuda-h100`."""
    name = device_name(str(device))
    if name == "cpu":
        return name
    # Of "NVIDIA H100 80GB HBM3" and "NVIDIA GeForce RTX 4090" the first word with a digit
    short = next((word for word in name.split() if any(c.isdigit() for c in word)), name)
    return f"cuda-{re.sub('[^a-z0-9]+', '-', short.lower())}"


def _version(package: str) -> str | None:
    """None where it isn't installed: a machine that only measures has no need of the tuner's."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def shown(path: Path) -> str:
    """A path as results and messages have it: from the checkout inside it, so no machine shows."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


@functools.cache
def git_commit() -> str | None:
    """Commit of the checkout when first asked, `-dirty` where tracked code differs from it; None outside one."""

    def run(*words: str) -> str:
        command = ("git", "-C", str(ROOT), *words)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        dirty = run("status", "--porcelain", "--untracked-files=no", "--", "gpt2", "scripts", "configs").strip()
        return run("rev-parse", "--short=12", "HEAD").strip() + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None
