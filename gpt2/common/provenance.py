"""What a result was made from: arguments, input files, commit, versions, machine and time."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from gpt2.common import files, machine

STARTED = time.monotonic()  # of this module's import, at a script's start
NOT_INPUTS = ("output", "study")  # arguments that name files to write


def provenance(args: Any = None, **more) -> dict:
    """A results record's keys on its origin: arguments, hashes of files they name, commit, versions, machine and time.

    args: the parsed arguments of the script, if any. more: further keys, which may replace these: scripts that
    measure time give `machine` as `machine.before_timing` found it, resumed ones give `wall_s` as from `taken`.
    """
    packages = ("torch", "transformers", "numpy", "optuna", "triton")
    given, device = vars(args) if args else {}, more.get("device") or getattr(args, "device", "auto")
    return {
        "args": {key: _recorded(value) for key, value in given.items()},
        "inputs": inputs(given),
        "git_commit": git_commit(),
        "versions": {name: version for name in packages if (version := _version(name))},
        "device": device_name(device),
        **({} if "machine" in more else {"machine": machine.describe(device)}),
        "threads": torch.get_num_threads(),
        "created_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "wall_s": taken(),
        **more,
    }


def taken(resumed: bool = False) -> int | None:
    """The seconds since the script began, for `wall_s`; None if it resumed, as then they aren't those of the whole."""
    return None if resumed else round(time.monotonic() - STARTED)


def inputs(args: dict) -> dict[str, str]:
    """The sha256 of every file that arguments name. Keys are paths as they stand in a record's `args`."""
    values = [value for key, value in args.items() if key not in NOT_INPUTS]
    named = [item for value in values for item in (value if isinstance(value, list) else [value])]
    paths = {_recorded(item): Path(item) for item in named if isinstance(item, (str, Path))}
    return {name: files.file_sha256(path) for name, path in paths.items() if os.path.isfile(path)}


def read_and_written(args: dict) -> list[str] | None:
    """Two flags that name the same file, the first one to be written; None if there are none."""
    existing = [
        (key.replace("_", "-"), item) for key, value in args.items()
        for item in (value if isinstance(value, list) else [value])
        if isinstance(item, (str, Path)) and os.path.isfile(item)
    ]  # fmt: skip
    pairs = ([w, r] for w, written in existing if w in NOT_INPUTS for r, read in existing
             if w != r and os.path.samefile(written, read))  # fmt: skip
    return next(pairs, None)


def _recorded(value):
    if isinstance(value, str) and "://" in value:
        return re.sub("//[^/]*@", "//", value)  # a database's URL has a user and a password before its host
    return files.recorded(value) if isinstance(value, Path) else value


def device_name(device: str) -> str:
    """The device that a --device value means: `cpu`, or the GPU's name."""
    if device == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return torch.cuda.get_device_name(None if device in ("auto", "all") else device)


def device_slug(device: torch.device | str) -> str:
    """A device for file names: `cpu`, or `cuda-` and the GPU's short name, such as `cuda-h100`."""
    name = device_name(str(device))
    if name == "cpu":
        return name
    # The first word with a digit: H100 of "NVIDIA H100 80GB HBM3", 4090 of "NVIDIA GeForce RTX 4090"
    short = next((word for word in name.split() if any(c.isdigit() for c in word)), name)
    return f"cuda-{re.sub('[^a-z0-9]+', '-', short.lower())}"


def machine_tag(device: torch.device | str = "auto") -> str:
    """The tag of results that are measured here on a device: the kind of processor, or the GPU's slug."""
    slug = device_slug(device)
    return machine.tag(gpu=None if slug == "cpu" else slug)


def _version(package: str) -> str | None:
    """A package's version; None if it isn't installed, as some packages are optional."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def git_commit() -> str | None:
    """The checkout's commit at the first call, with `-dirty` if tracked code differs from it; None outside git."""

    def run(*words: str) -> str:
        command = ("git", "-C", str(files.ROOT), *words)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        dirty = run("status", "--porcelain", "--untracked-files=no", "--", "gpt2", "scripts", "configs").strip()
        return run("rev-parse", "--short=12", "HEAD").strip() + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def has_commit(checkout: Path, commit: str) -> bool:
    """Whether the repository of a checkout has a commit of this hash.

    The hash comes from a results file, which is untrusted: anything else, such as a branch or a flag, isn't passed to
    git.
    """
    if not re.fullmatch("[0-9a-f]{4,64}", commit):
        return False
    return (
        subprocess.run(
            ("git", "-C", str(checkout), "cat-file", "-e", f"{commit}^{{commit}}"), capture_output=True
        ).returncode
        == 0
    )
