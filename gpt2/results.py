"""Write results so that they can be trusted: atomically, and with what they were made from."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gpt2 import code_version
from gpt2.errors import PluginError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
NOT_INPUTS = ("output", "study")  # arguments that name what is written
# Folders of results whose pictures go into `plots` beside them, and under what name
PICTURES = {"runs": "{stem}.png", "presets": "frontier_{stem}.png"}


@contextmanager
def atomic(path: str | Path):
    """Yield a temporary path beside `path`, moved onto it when the block succeeds and removed when it doesn't."""
    path = Path(path)
    check_writable(path)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    part = Path(part)
    try:
        yield part
        part.chmod(0o644)
        os.replace(part, path)
    except OSError as error:
        raise PluginError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def check_writable(path: str | Path) -> Path:
    """Create the folder of `path` and refuse now what could not be written after an hour of work."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PluginError(f"can't make the folder of {path}: {error.strerror}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise PluginError(f"can't write {path}: {'it is a folder' if path.is_dir() else 'its folder is read-only'}")
    return path


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
    with atomic(path) as part:
        torch.save(record, part)
    return Path(path)


def write_figure(path: str | Path, figure) -> Path:
    """Write a matplotlib figure as PNG."""
    with atomic(path) as part:
        figure.savefig(part, format="png", dpi=150, bbox_inches="tight")
    return Path(path)


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
    return {name: file_sha256(path) for name, path in files.items() if path.is_file()}


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
