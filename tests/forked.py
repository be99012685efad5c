"""Scripts in forked children, where nothing has to be imported again: cheap enough to be killed by the dozen."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from test_scripts import run

PATIENCE = 120  # seconds until a child counts as hanging


@dataclass
class Child:
    """A script that runs in a process of its own, whose stdout and stderr are files beside `said`."""

    pid: int
    said: Path
    started: float

    def wait(self, until: float = PATIENCE) -> int | None:
        """Its exit code, negative where a signal ended it; None where it still runs `until` seconds after its start."""
        while True:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() >= self.started + until:
                return None
            time.sleep(0.002)

    def send(self, number: int) -> int:
        """Send a signal to it and to all that it has started, as a terminal does at Ctrl-C; its exit code."""
        os.killpg(self.pid, number)
        code = self.wait(time.monotonic() - self.started + PATIENCE)
        if code is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError(f"it still runs {PATIENCE} seconds after signal {number}")
        return code

    @property
    def out(self) -> str:
        return self.said.with_suffix(".out").read_text()

    @property
    def err(self) -> str:
        return self.said.with_suffix(".err").read_text()


def start(script: str, flags: list, folder: Path, said: Path, *before: Callable[[], None]) -> Child:
    """Start a script with `folder` as its working folder. before: called in the child first."""
    started = time.monotonic()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # whichever of the two is first
            os.setpgid(pid, pid)
        return Child(pid, said, started)
    code = 99
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        sys.stdout, sys.stderr = (open(said.with_suffix(end), "w", buffering=1) for end in (".out", ".err"))
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stderr.fileno(), 2)
        for act in before:
            act()
        code = run(script, *flags)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
