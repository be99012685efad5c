"""A program of `sandbox`, not to be imported: runs one generated program with its test, within limits.

Reads a JSON object from stdin: source, test, entry_point, memory (bytes), seconds, file (number of the open file for
the result) and token. Writes one line to that file: the token, and `passed` or what went wrong. Whatever the generated
program prints, or exits with, is no result, as it doesn't know the token.
"""

import json
import os
import resource
import sys

# Events of Python's audit hooks that a function which only computes never raises: network, processes, files written
REJECTED = ("socket.", "subprocess.", "shutil.", "ftplib.", "smtplib.", "urllib.", "http.", "webbrowser.")
REJECTED += ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.kill", "os.remove", "os.rename")
REJECTED += ("os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate")
REJECTED += ("signal.pthread_kill", "pty.spawn")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def reject(event: str, args: tuple) -> None:
    """An audit hook, which can't be removed again."""
    if event.startswith(REJECTED) or (event == "open" and args[2] & WRITES):
        raise PermissionError(f"a generated program must not do this: {event}")


def limit(memory: int, seconds: int) -> None:
    """Limits of this process. Its superuser isn't held by the number of processes, but by the audit hook."""
    for kind, most in {
        resource.RLIMIT_AS: memory, resource.RLIMIT_CPU: seconds, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0, resource.RLIMIT_NOFILE: 64,
    }.items():  # fmt: skip
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def outcome(source: str, test: str, entry_point: str) -> str:
    """`passed`, or what went wrong."""
    names = {"__name__": "generated"}
    try:
        program = compile(source, "<generated>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "syntax error"
    try:
        exec(program, names)
        exec(compile(test, "<test>", "exec"), names)
        names["check"](names[entry_point])
    except MemoryError:
        return "out of memory"
    except BaseException as error:  # SystemExit too: a program that exits hasn't passed
        return f"failed: {type(error).__name__}"[:100]
    return "passed"


def main() -> None:
    given = json.load(sys.stdin)
    sys.dont_write_bytecode = True
    limit(given["memory"], given["seconds"])
    sys.addaudithook(reject)
    found = outcome(given["source"], given["test"], given["entry_point"])
    os.write(given["file"], f"{given['token']} {found}\n".encode())
    os._exit(0)  # what the program has left for the end of the process doesn't run


if __name__ == "__main__":
    main()
