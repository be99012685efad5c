"""Scripts in forked children, where nothing has to be imported again: cheap enough to be killed by the dozen."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from gpt2.common import files, interrupts

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


def at_every_write(folder: Path, act: Callable[[int], None]) -> Callable[[], None]:
    """To be called in a child: `act` gets 0, 1, 2 … before each file of `folder` is made, moved or removed."""
    inside, numbers = [], itertools.count()

    def hook(event: str, args: tuple) -> None:
        writes = event in {"open", "os.rename", "os.remove", "os.mkdir"} and isinstance(args[0], (str, Path))
        if inside or not writes:
            return
        reads = event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        path = os.path.abspath(args[0])
        if reads or not path.startswith(f"{folder}/") or path.endswith(".lock"):
            return
        inside.append(True)
        act(next(numbers))
        inside.clear()

    return lambda: sys.addaudithook(hook)


def unprivileged() -> None:
    """To be called in a child: modes of files and folders bind from now on, also where we are root."""
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3, this process; none of all
    if not os.getuid() and ctypes.CDLL(None, use_errno=True).capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


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
        sys.stdout, sys.stderr = (open(said.with_suffix(end), "w", 1) for end in (".out", ".err"))  # noqa: SIM115
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stderr.fileno(), 2)
        main = functools.partial(runpy.run_path, str(files.ROOT / "scripts" / f"{script}.py"), run_name="__main__")
        sys.argv = [script, *map(str, flags)]
        # All processes of one parent share it: whoever is killed at a progress bar would stop the others for good
        tqdm.set_lock(threading.RLock())
        for act in before:
            act()
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except KeyboardInterrupt as stop:
        frames = traceback.extract_tb(stop.__traceback__)
        if any(frame.name == "_with_exit_codes" for frame in frames):
            traceback.print_exc()
        else:  # while it imports: what the interpreter calls then, in a process of its own
            print(interrupts.MESSAGE, file=sys.stderr)
            code = interrupts.EXIT_CODE
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
