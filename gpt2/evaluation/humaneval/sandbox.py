"""Run generated programs: each in a process of its own, with limits of time and memory, and without a network.

A program runs in an interpreter with `-I`, in a session of its own and in an empty folder that is removed afterwards,
with next to no environment. When the time is over the whole session is killed. Memory, processor time, size of files
(none can be written) and processes have resource limits. Where the system lets a user have a network namespace
(`unshare --net`), the process has one, in which there is no network; everywhere an audit hook of Python rejects
sockets, processes and files opened for writing (`humaneval.runner`).

This stops what a language model writes by accident. It is no prison: a program that is made to break out, such as by
machine code, has the rights of the user. Run models that you don't trust in a container or a virtual machine.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

RUNNER = Path(__file__).with_name("runner.py")
UNSHARE = ["unshare", "--map-root-user", "--net"]
PASSED, TIMED_OUT = "passed", "timed out"
MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """seconds: of wall time, the interpreter's start included. memory_mib: address space, in MiB."""

    seconds: float = 10
    memory_mib: int = 1024


@functools.cache
def network() -> str:
    """How programs are kept from a network on this system."""
    try:
        done = subprocess.run([*UNSHARE, "true"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "sockets rejected"
    return "sockets rejected" if done.returncode else "own namespace, sockets rejected"


def run(source: str, test: str, entry_point: str, limits: Limits | None = None) -> str:
    """Run a program and `check(entry_point)` of its test; `passed`, or what went wrong."""
    limits, token = limits or Limits(), secrets.token_hex(16)
    given = {"source": source, "test": test, "entry_point": entry_point, "token": token}
    given |= {"memory": limits.memory_mib * MIB, "seconds": int(limits.seconds) + 1}
    prefix = UNSHARE if network().startswith("own") else []
    reader, writer = os.pipe()
    try:
        with tempfile.TemporaryDirectory() as folder:
            child = subprocess.Popen(
                [*prefix, sys.executable, "-I", str(RUNNER)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, cwd=folder, env=_environment(folder), pass_fds=(writer,),
                start_new_session=True,
            )  # fmt: skip
            ended = _finish(child, json.dumps(given | {"file": writer}).encode(), limits.seconds)
        os.set_blocking(reader, False)
        with suppress(BlockingIOError):
            said, _, outcome = os.read(reader, 4096).decode(errors="replace").strip().partition(" ")
            if said == token:
                return outcome
        return f"no result (exit code {child.returncode})" if ended else TIMED_OUT
    finally:
        os.close(reader)
        os.close(writer)


def _finish(child: subprocess.Popen, given: bytes, seconds: float) -> bool:
    """Wait for a process, then kill its session. Whether it ended in time."""
    try:
        child.communicate(given, timeout=seconds)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _environment(folder: str) -> dict[str, str]:
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {"PATH": os.environ.get("PATH", ""), "HOME": folder, "LANG": "C.UTF-8"} | one_thread
