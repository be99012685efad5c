"""Run a script's main: user errors are printed as one line on stderr, and every outcome has its exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from typing import NoReturn

from gpt2.cli.flags import Parser, fail_after_the_first
from gpt2.common import interrupts, processes, provenance
from gpt2.common.errors import PluginError, is_out_of_memory, printable

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota exceeded, file too large
# Flag to its advice against a lack of memory, in the order to try; a script prints those of the flags that it has
AGAINST_OUT_OF_MEMORY = {
    "--samples": "reduce --samples (50 is often enough)",
    "--seq-len": "use --seq-len 512 instead of the default 1024",
    "--gradient-checkpointing": "use --gradient-checkpointing (only for metrics that need gradients)",
    "--batch-size": "while evaluating, a smaller --batch-size",
    "--batch-sizes": "smaller --batch-sizes",
    "--prefill-chunk": "read the prompt in chunks: --prefill-chunk 512",
    "--context-lengths": "shorter --context-lengths",
    "--dtype": "a smaller --dtype (bfloat16)",
    "--device": "--device cpu",
}


def run(main: Callable[..., None], *, shared: bool = False) -> None:
    """Run a script's main. A PluginError ends it with one line on stderr and a non-zero exit code, without traceback.

    shared: several processes may run the script, and main takes the `Processes`. Only the first prints; an error is
    printed by the process that fails first.
    """
    _print_anything()
    provenance.git_commit()  # read now: when results are written, hours later, the checkout may have another commit

    def together() -> None:
        with processes.together() as own, _muted(not own.first):
            # Inside `together`, so that the failing process prints its error before it leaves the group; once it has
            # left, the others fail as well
            _with_exit_codes(lambda: main(own), own)

    def alone() -> None:
        own = processes.launched()
        if not own.first:
            fail_after_the_first()
        if own.size > 1:
            raise PluginError("this script runs in one process: start it with python (and without WORLD_SIZE set)")
        main()

    _with_exit_codes(together if shared else alone, processes.ALONE)


def _print_anything() -> None:
    """Let stdout escape what its encoding lacks, as stderr does: a Δ must not end an hour's work in Latin-1."""
    if hasattr(sys.stdout, "reconfigure"):  # None after `>&-` in a shell, and others where a test captures it
        sys.stdout.reconfigure(errors="backslashreplace")


def _with_exit_codes(work: Callable[[], None], own: processes.Processes) -> None:
    def stop(message: str, exit_code: int) -> NoReturn:
        if own.first_to_fail():  # later processes fail only because this one stopped
            print(printable(message), file=sys.stderr, flush=True)
        sys.exit(exit_code)

    try:
        work()
        if sys.stdout:  # None after `>&-` in a shell
            sys.stdout.flush()
    except PluginError as error:
        stop(f"error: {error}", error.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        stop(_out_of_memory(), 4)
    except KeyboardInterrupt as error:  # its text, if any, says what was kept of the work
        stop(f"\ninterrupted: {error}" if str(error) else interrupts.MESSAGE, interrupts.EXIT_CODE)
    except BrokenPipeError:  # `script | head`
        _discard_stdout()
        sys.exit(141)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        _discard_stdout()
        stop(f"error: can't write {error.filename or 'what is printed'}: {error.strerror}", 2)


def _out_of_memory() -> str:
    """The message for a lack of memory, with advice on those flags that the running script has."""
    helps = [
        words for flag, words in AGAINST_OUT_OF_MEMORY.items()
        if Parser.parsed is None or hasattr(Parser.parsed, flag[2:].replace("-", "_"))
    ]  # fmt: skip
    lines = [f"  {number}. {words}" for number, words in enumerate(helps, start=1)]
    return "\n".join(["error: out of memory. What helps, in this order:", *lines])


def _discard_stdout() -> None:
    """Redirect stdout to the null device: at exit the interpreter would flush buffered output again, and fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _muted(really: bool):
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if really else sys.stdout):
        yield
