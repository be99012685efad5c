"""Ctrl-C while a script still imports its modules, which takes seconds: print one line, as `cli.run` does."""

from __future__ import annotations

import sys
from pathlib import Path

MESSAGE = "\ninterrupted: nothing half-written was left behind"
EXIT_CODE = 130


def excepthook(kind: type[BaseException], error: BaseException, trace) -> None:
    """A `sys.excepthook` that prints MESSAGE instead of the traceback of a KeyboardInterrupt."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print(MESSAGE, file=sys.stderr, flush=True)
    sys.exit(EXIT_CODE)


def install() -> None:
    """Install the hook if a script of this checkout is running; other programs that import the package keep theirs."""
    scripts = Path(__file__).resolve().parents[2] / "scripts"
    if sys.argv and scripts in Path(sys.argv[0]).resolve().parents:
        sys.excepthook = excepthook
