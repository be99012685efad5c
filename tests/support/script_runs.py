"""Scripts called as from a shell, but in this process, with flags that keep them small."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import presets
import pytest

from gpt2.common import files, machine

CALIBRATE, TUNE, VALIDATE = "calibrate_kv_lowrank", "auto_tune_kv_compression", "validate_ppl_postbugfix"
NEEDLE, STABILITY, PROFILE = "eval_long_context_needle", "eval_stability", "profile_kv_performance"
GENERATE = "generate_with_preset"

SMALL = ["--samples", "3", "--seq-len", "64"]  # of a calibration
SMALL_EVAL = ["--eval-tokens", "128", "--eval-seq-len", "64", "--chunk", "16"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # for scripts in a process of their own, as conftest sets it here

# A preset of the tiny Llama with every key of the guide's format, and one that needs no calibration file
PRESET = presets.PRESET | {"model": "tiny"}
FREE_PRESET = PRESET | {"codec": "identity", "calibration_file": ""}
INT4_PRESET = FREE_PRESET | {"rank": 12, "bits": 4, "name": "int4"}


def run(script: str, *args) -> int:
    """Run scripts/NAME.py in this process; returns its exit code."""
    sys_argv, sys.argv = sys.argv, [script, *map(str, args)]
    try:
        runpy.run_path(str(files.ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = sys_argv
    return 0


@pytest.fixture(scope="module", autouse=True)
def quick_look() -> Iterator[None]:
    """For a folder's conftest.py: other work is watched, and memory copied, for an instant before times are measured.

    In full it takes a second, and half a GiB.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "LOOK_S", 0.01)
        patch.setattr(machine, "COPY_BYTES", 1 << 16)
        yield


def listing(folder: Path) -> set[str]:
    """Relative paths of all files in a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
