"""Ctrl-C while a script still imports, which takes seconds: one line, as `cli.run` says it later, and no traceback."""

from __future__ import annotations

import sys
from pathlib import Path

MESSAGE = "\ninterrupted: nothing half-written was left behind"
EXIT_CODE = 130


def in_one_line(kind: type[BaseException], error: BaseException, trace) -> None:
    """A `sys.excepthook`."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print(MESSAGE, file=sys.stderr, flush=True)
    sys.exit(EXIT_CODE)


def expect() -> None:
    """Install it where a script of this checkout runs; what else imports the package has a hook of its own."""
    scripts = Path(__file__).resolve().parents[2] / "scripts"
    if sys.argv and scripts in Path(sys.argv[0]).resolve().parents:
        sys.excepthook = in_one_line
