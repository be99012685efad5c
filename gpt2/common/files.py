"""Atomic writes: a file is written under a temporary name beside its path and then renamed, so it is never partial."""

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
except ImportError:  # Windows has no fcntl: temporary files of killed processes are not removed there
    fcntl = None

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
PART, RANDOM_BYTES = ".tmp", 4  # names of temporary files
# Folders of results whose pictures go into the folder `plots` beside them, and the pictures' names
PICTURES = {"runs": "{stem}.png", "presets": "frontier_{stem}.png"}


@contextmanager
def atomic(path: str | Path):
    """Yield a temporary path beside `path`. It is renamed to `path` if the block succeeds and removed if it fails.

    Temporary files that killed processes have left for the same path are removed too. Raises PluginError if the file
    can't be written.
    """
    path = _real(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PluginError(f"can't make the folder of {path}: {error.strerror}") from error
    # The name is chosen before the file is created, so that `finally` removes it even if Ctrl-C comes in between
    part, handle = path.parent / f".{path.name}.{secrets.token_hex(RANDOM_BYTES)}{PART}", None
    try:
        _remove_abandoned(path)
        handle = _claim(part)
        yield part
        if path.exists():
            os.chmod(part, stat.S_IMODE(path.stat().st_mode))
        os.fsync(handle)  # some disks and network file systems report only here that they are full
        os.replace(part, path)
    except OSError as error:
        read_only = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        reason = "its folder is read-only" if read_only else error.strerror or error
        raise PluginError(f"can't write {path}: {reason}") from error
    finally:
        with suppress(OSError):  # a failure here must not replace the error of the block
            part.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


def _real(path: str | Path) -> Path:
    """The target of a link, so that the link itself is kept. Raises PluginError if it can't be replaced by a file."""
    if os.path.isdir(path):
        raise PluginError(f"can't write {path}: it is a folder")
    if os.path.exists(path) and not os.path.isfile(path):
        raise PluginError(f"can't write {path}: it is no regular file")
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def _claim(part: Path) -> int:
    """Create a temporary file and lock it; returns its handle. The system drops the lock when the process ends."""
    while True:
        handle = _created(part)
        if fcntl:
            with suppress(OSError):  # on file systems without locks abandoned files are not removed either
                fcntl.flock(handle, fcntl.LOCK_EX)
        if not fcntl or os.fstat(handle).st_nlink:
            return handle
        os.close(handle)  # another process removed the file as abandoned before the lock was taken


def _created(part: Path) -> int:
    """A new file's handle. Its folder is made again if the `check_writable` of another process has removed it."""
    how = os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666
    try:
        return os.open(part, *how)
    except FileNotFoundError:
        part.parent.mkdir(parents=True, exist_ok=True)
        return os.open(part, *how)


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files of `path` whose writers are dead, that is, which are not locked."""
    digits = "[0-9a-f]" * 2 * RANDOM_BYTES
    for part in path.parent.glob(f".{glob.escape(path.name)}.{digits}{PART}") if fcntl else ():
        with suppress(OSError):  # locked by its writer, already removed, or owned by another user
            handle = os.open(part, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()
            finally:
                os.close(handle)


def check_writable(path: str | Path) -> Path:
    """Try to write at `path`, so that an error shows before an hour of work, not after.

    Raises PluginError if it can't be written. Nothing is left: the file is neither created nor changed, and folders
    that `atomic` makes for it are removed again, as the work may fail.
    """
    path = Path(path)
    new = [folder for folder in path.parents if not os.path.exists(folder)]
    try:
        with suppress(_Tried), atomic(path):
            raise _Tried
    finally:
        for folder in new:  # the innermost first; another process may have put something there
            with suppress(OSError):
                folder.rmdir()
    return path


class _Tried(Exception):
    """Leaves `atomic` without writing anything."""


def picture_beside(path: Path) -> Path:
    """The PNG that belongs to an output file: in `plots` for a folder of results, else beside the file.

    Raises PluginError if it would overwrite the output itself.
    """
    if path.parent.name in PICTURES:
        return path.parent.parent / "plots" / PICTURES[path.parent.name].format(stem=path.stem)
    picture = path.with_suffix(".png")
    if picture == path:
        raise PluginError(f"can't write {path}: the picture goes there, give --output another ending, such as .json")
    return picture


def write_json(path: str | Path, record: dict) -> Path:
    """Write a dict as JSON. Raises ValueError for NaN and infinities, which JSON doesn't have."""
    with atomic(path) as part:
        part.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    return Path(path)


def write_torch(path: str | Path, record: dict) -> Path:
    """Write tensors and plain types, to be read by `torch.load(weights_only=True)`."""
    with atomic(path) as part, part.open("wb") as file:
        try:
            torch.save(record, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # PyTorch wraps errors such as a full disk; `atomic` needs them
                raise error.__context__ from error
            raise
    return Path(path)


def write_figure(path: str | Path, figure: Figure) -> Path:
    """Write a matplotlib figure as PNG."""
    with atomic(path) as part:
        figure.savefig(part, format="png", dpi=150, bbox_inches="tight")
    return Path(path)


def write_run(path: Path, record: dict, picture: Path, draw: Callable[[], Figure]) -> None:
    """Write a run's record and its picture. The record comes last: only complete runs have one.

    If the picture can't be drawn or written, the record is still written, since it holds the results, and then the
    error is raised.
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


def recorded(path: Path) -> str:
    """A path for results: relative to the checkout if it is inside, so that it is the same on every machine."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def shown(path: Path) -> str:
    """A path for messages, as it can be pasted: relative to the working folder if it is inside, else as given."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
