"""What a result was made from: arguments, input files, commit, versions, device and time."""

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

from gpt2.common import files

NOT_INPUTS = ("output", "study")  # arguments that name what is written


def provenance(args: Any = None, **more) -> dict:
    """What a result was made from: arguments, the files that they name, commit, versions, device and time.

    more: further keys, taken as they are.
    """
    packages = ("torch", "transformers", "numpy", "optuna", "triton")
    given = vars(args) if args else {}
    return {
        "args": {key: _recorded(value) for key, value in given.items()},
        "inputs": inputs(given),
        "git_commit": git_commit(),
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
    paths = {_recorded(item): Path(item) for item in named if isinstance(item, (str, Path))}
    return {name: files.file_sha256(path) for name, path in paths.items() if os.path.isfile(path)}


def read_and_written(args: dict) -> list[str] | None:
    """The flags of an argument that is written and of another that is the same file, if there are any."""
    existing = [
        (key.replace("_", "-"), item) for key, value in args.items()
        for item in (value if isinstance(value, list) else [value])
        if isinstance(item, (str, Path)) and os.path.isfile(item)
    ]  # fmt: skip
    pairs = ([w, r] for w, written in existing if w in NOT_INPUTS for r, read in existing
             if w != r and os.path.samefile(written, read))  # fmt: skip
    return next(pairs, None)


def _recorded(value):
    return files.shown(value) if isinstance(value, Path) else value


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


@functools.cache
def git_commit() -> str | None:
    """Commit of the checkout when first asked, `-dirty` where tracked code differs from it; None outside one."""

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

    A results file from outside names it: anything but a hash, such as a branch or a flag of git, is not looked up.
    """
    if not re.fullmatch("[0-9a-f]{4,64}", commit):
        return False
    return (
        subprocess.run(
            ("git", "-C", str(checkout), "cat-file", "-e", f"{commit}^{{commit}}"), capture_output=True
        ).returncode
        == 0
    )
