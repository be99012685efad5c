"""Databases of studies, and processes that work on them."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def in_a_process(target: Callable, *args) -> multiprocessing.Process:
    """A function at work in a process of its own, which ends with this one; forked, so nothing is imported again."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args, daemon=True)
    process.start()
    return process


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def as_postgres(*command: str) -> list[str]:
    """A command of PostgreSQL, which rejects root: as Debian's own user where we are root."""
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    return [*([] if os.getuid() else user), *command]


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """The URL of a database of our own, on a socket in a folder of its own."""
    # Debian keeps the versions beside each other, none on PATH
    folders = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), os.environ["PATH"]]
    where = os.pathsep.join(map(str, folders))
    if missing := [name for name in ("initdb", "pg_ctl") if not shutil.which(name, path=where)]:
        pytest.skip(f"no PostgreSQL here: {', '.join(missing)} not found")
    if not importlib.util.find_spec("psycopg2"):
        pytest.skip("no driver for PostgreSQL: pip install -r requirements.txt")
    if not os.getuid() and "postgres" not in {user.pw_name for user in pwd.getpwall()}:
        pytest.skip("PostgreSQL rejects root, and there is no user postgres")
    folder = tempfile.mkdtemp(prefix="pg")  # its path is short and open to its user, which pytest's folders aren't
    if not os.getuid():
        shutil.chown(folder, "postgres", "postgres")
    how = {"check": True, "cwd": folder, "env": os.environ | {"PATH": where}}
    server = as_postgres("pg_ctl", "-D", f"{folder}/data", "-w", "-s", "-l", f"{folder}/log")
    make = as_postgres("initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "tables", "--no-sync", "-E", "UTF8")
    subprocess.run(make, capture_output=True, **how)
    subprocess.run([*server, "-o", f"-F -c listen_addresses= -k {folder}", "start"], **how)
    try:
        yield f"postgresql+psycopg2://tables@/postgres?host={folder}"
    finally:
        subprocess.run([*server, "-m", "immediate", "stop"], **how)
        shutil.rmtree(folder)
