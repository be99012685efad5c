"""Files that are whole or not there: written beside their place, then moved onto it."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gpt2.common.errors import PluginError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


try:
    import fcntl
except ImportError:  # Windows: what a killed process leaves stays there
    fcntl = None

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
PART, RANDOM_BYTES = ".tmp", 4  # names of temporary files
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


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shown(path: Path) -> str:
    """A path as results and messages have it: from the checkout inside it, so no machine shows."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
