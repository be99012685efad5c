"""A small checkout of its own: a script that takes no time and tells when it was started, and tables made by it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

SCRIPT = r'''"""A script for tests: python scripts/fake.py"""

import argparse
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # in silence

CHECKOUT = Path(__file__).resolve().parents[1]


def arguments():
    p = argparse.ArgumentParser()
    p.add_argument("--size", type=int, default=1)
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--reads")
    p.add_argument("--fails", action="store_true")
    p.add_argument("--hangs", action="store_true", help="as long as there is a file `hang`")
    p.add_argument("--output")
    return p


def main():
    args = arguments().parse_args()
    output = Path(args.output)
    with (CHECKOUT / "log").open("a") as log:
        log.write(f"{output.stem} {os.getpid()}\n")
    while args.hangs and (CHECKOUT / "hang").exists():
        time.sleep(0.05)
    if args.fails:
        sys.exit(2)
    reads = {args.reads: hashlib.sha256(Path(args.reads).read_bytes()).hexdigest()} if args.reads else {}
    record = {"args": vars(args), "inputs": reads, "git_commit": os.environ.get("COMMIT") or None, "device": "cpu"}
    record |= {"created_utc": "2026-01-01T00:00:00Z", "rows": []}
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_suffix(".tmp")
    part.write_text(json.dumps(record))
    part.replace(output)


if __name__ == "__main__":
    main()
'''


def make_checkout(folder: Path, **tables: dict) -> Path:
    """A checkout in `folder` with the script `fake` and tables by name, each given by its runs."""
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts" / "fake.py").write_text(SCRIPT)
    (folder / "configs" / "tables").mkdir(parents=True)
    for name, runs in tables.items():
        write_table(folder, name, runs=runs, show=[{"results": run} for run in runs])
    return folder


def write_table(folder: Path, name: str, **record) -> None:
    """A table that shows nothing, apart from what is given."""
    record = {"title": f"Table {name}", "about": "For tests.", "runs": {}, "show": [], "plots": []} | record
    (folder / "configs" / "tables" / f"{name}.json").write_text(json.dumps(record))


def fake(args: dict | None = None, **more) -> dict:
    """A run of the script."""
    return {"script": "fake", "args": args or {}} | more


def matcher_of(checkout: Path, any_code: bool = False, **options):
    """The `Matcher` of a checkout. any_code: as it takes it; options: as `RunOptions` takes them."""
    from gpt2.runs.config import RunOptions, load
    from gpt2.runs.up_to_date import Matcher

    options = RunOptions(checkout=checkout, **options)
    return Matcher(options, load(options)[1], any_code)


def started(folder: Path) -> list[str]:
    """Names of the runs that were started, in order."""
    log = folder / "log"
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def git(folder: Path, *words: str) -> str:
    """A git command in a folder, by somebody; what it prints."""
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    return subprocess.run(
        ("git", "-C", folder, *who, *words), capture_output=True, text=True, check=True
    ).stdout.strip()
