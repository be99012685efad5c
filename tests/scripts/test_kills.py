"""Scripts that write, killed, interrupted, on a full disk and in a read-only folder: no half file, and a rerun ends as
an uninterrupted run does.

KILLS is how often each is stopped at a random moment: `make kills` does it ten times.
"""

import contextlib
import fnmatch
import functools
import gc
import hashlib
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from forked import Child, at_every_write, start, unprivileged
from jobs import JOBS, Job, make_home, results_here
from pictures import draw_nothing
from PIL import Image
from sampling import ALL, covering

from gpt2.common import files, interrupts, mapped_file, provenance, trial_queue
from gpt2.report import plots

WAYS = ("kill", "interrupt", "full disk")
KILLS = int(os.environ.get("KILLS", "1"))
# Shown where a test fails. The long version draws another one each time
SEED = int(os.environ.get("KILLS_SEED", time.time_ns() % 2**32 if KILLS > 1 else 0))
# `make test` stops one of those that write alike, each in one way; `make test-all` all but the longest in every way;
# `make kills` all of them ten times
LONG = KILLS > 1 or ALL
NAMES = [name for name, job in JOBS.items() if KILLS > 1 or not job.long]
ONE_OF_EACH = ["calibrate", "append", "tune codecs", "report", "readme", "tables"]  # PyTorch, a record, SQLite, pages
STOPPED = list(itertools.product(NAMES, WAYS) if LONG else covering(ONE_OF_EACH, WAYS))
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
PASSING = (".lock", "-journal", "log")  # a journal is what SQLite takes back when it is opened next
EARLIER = b"earlier\n"
UNFINISHED = "what a later run goes on from"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny model and what scripts read; whatever they import or work out once is there before they are forked."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        patch.setenv("COMMIT", provenance.git_commit() or "")
        make_home(home)
        files.write_figure(home / "warm.png", plots.append_times())
        trial_queue.TrialQueue(home / "warm.db", "warm")
        gc.collect()
        gc.freeze()  # children would look through all of it, and copy it
        yield home
        gc.unfreeze()


def stopped(way: str) -> list[str]:
    """Names of the scripts that are stopped in this way."""
    return [name for name, own in STOPPED if own == way]


class Run:
    """One job in a folder of its own: a copy of `source`, by default of what scripts read, unless it is there."""

    def __init__(self, name: str, home: Path, folder: Path, source: Path | None = None):
        self.job, self.home, self.folder = JOBS[name], home, folder
        if not folder.exists():
            shutil.copytree(source or home / "space", folder, symlinks=True)
        self.flags = self.job.flags.replace("{home}", str(home)).split()

    def start(self, *before) -> Child:
        said = self.folder.parent / f"{self.folder.name} said"
        return start(self.job.script, self.flags, self.folder, said, results_here, *self.job.before, *before)

    def complete(self, *before) -> tuple[Child, int]:
        child = self.start(*before)
        code = child.wait()
        return child, child.send(signal.SIGKILL) if code is None else code

    def made(self) -> dict[str, object]:
        """What lies in the folder apart from what was there, as `content` shows it."""
        given = listing(self.home / "space")
        found = {name: path for name, path in listing(self.folder).items() if not name.endswith(PASSING)}
        return {name: content(path, self.job, self.folder) for name, path in found.items()
                if name not in given or path.read_bytes() != given[name].read_bytes()}  # fmt: skip


def listing(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


# Of every record, and of the machine before a measurement of time
MEASURED = ("created_utc", "wall_s", "busy_cores_before", "load_average_before", "copy_bytes_per_s")


def content(path: Path, job: Job, folder: Path) -> object:
    """What a whole file says, apart from times; raises where it isn't whole."""
    blob = path.read_bytes()
    if TEMPORARY.fullmatch(path.name):
        return "temporary"
    if blob == EARLIER:
        return "earlier"
    if path.suffix == ".json":
        return untimed(json.loads(blob.decode().replace(str(folder), "")), job.timed + MEASURED)
    if path.suffix == ".png":
        Image.open(io.BytesIO(blob)).load()
        return "a picture of times" if job.timed else hashlib.sha256(blob).hexdigest()
    if path.suffix in (".safetensors", ".part"):
        mapped_file.read(path, "saved cache")  # every checksum
        return UNFINISHED if path.suffix == ".part" else hashlib.sha256(blob).hexdigest()
    if path.suffix == ".pt":
        torch.load(io.BytesIO(blob), weights_only=True)
    if path.suffix == ".db":
        return whole_database(path)
    assert path.suffix in (".pt", ".html", ".md"), f"{path}: what is a whole one?"
    return hashlib.sha256(blob).hexdigest()


def untimed(record: object, timed: tuple[str, ...]) -> object:
    """A record without its times: keys that match a pattern, and rows that say of which metric they are."""

    def is_time(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in timed)

    if isinstance(record, dict):
        return {key: untimed(value, timed) for key, value in record.items() if not is_time(key)}
    if isinstance(record, list):
        return [untimed(x, timed) for x in record if not (isinstance(x, dict) and is_time(str(x.get("metric"))))]
    return record


def whole_database(path: Path) -> str:
    """Whatever was being written is taken back when it is opened next; that is done to a copy."""
    with tempfile.TemporaryDirectory() as copy:
        for part in path.parent.glob(f"{path.name}*"):
            shutil.copy(part, copy)
        with contextlib.closing(sqlite3.connect(Path(copy) / path.name)) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    return "a whole database"


def another_choice(run: Run) -> bool:
    """Whether a slot of a search over codecs lost two workers in a row, so that it was given another choice."""
    if "codec" not in run.flags:
        return False
    count = "SELECT count(*) FROM trial_user_attributes WHERE key = 'deaths' AND value_json NOT IN ('0', '1')"
    with contextlib.closing(sqlite3.connect(run.folder / "s.db")) as database:
        try:
            return database.execute(count).fetchone() != (0,)
        except sqlite3.OperationalError:  # killed before there were tables
            return False


@dataclass
class Whole:
    """What a script does that nothing stops; states: its folder before each of its writes, where it is to be killed."""

    code: int
    seconds: float
    made: dict[str, object]
    folder: Path
    states: list[Path]


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """A function of a job's name, which runs it once."""

    @functools.cache
    def run(name: str) -> Whole:
        states = tmp_path_factory.mktemp("states")
        own = Run(name, home, tmp_path_factory.mktemp("whole") / "run")
        keep = at_every_write(own.folder, lambda n: shutil.copytree(own.folder, states / f"{n:04}", symlinks=True))
        began = time.monotonic()
        child, code = own.complete(*[keep] * (name in stopped("kill")))
        assert code in (0, 3) and own.made(), child.err
        return Whole(code, time.monotonic() - began, own.made(), own.folder, sorted(states.iterdir()))

    return run


def assert_all_whole(run: Run, whole: Whole, *, temporary=False, earlier: dict | None = None, drawn=True) -> None:
    """Every file is as an uninterrupted run leaves it, or as it was before; where its record is, all is.

    temporary: whether files of a killed process may lie there. drawn: whether a record implies its picture.
    """
    made = run.made()
    for name, found in made.items():
        if found == "temporary":
            assert temporary, f"{name} was left behind"
        elif found == UNFINISHED:
            continue
        elif name.startswith("layer_ablation") and name.endswith(".json"):
            rows = whole.made[name]["rows"]
            assert found["rows"] == rows[: len(found["rows"])]
        elif not name.endswith(".db") and not another_choice(run):
            assert found in (whole.made.get(name), (earlier or {}).get(name)), f"{name} is neither whole nor as it was"
    if run.job.record and made.get(run.job.record) == whole.made[run.job.record]:
        named = {name: found for name, found in whole.made.items() if drawn or not name.endswith(".png")}
        assert named.items() <= made.items(), "the record was written, but not all that it names"


def assert_a_rerun_ends_as(whole: Whole, run: Run) -> None:
    child, ended = run.complete()
    assert ended == whole.code, child.err
    assert another_choice(run) or run.made() == whole.made


@pytest.fixture
def draw(request):
    return random.Random(f"{SEED} {request.node.name}")


def stop(run: Run, whole: Whole, number: int, draw: random.Random) -> tuple[Child, int]:
    """Start it and send it a signal at a random moment, at which it may have ended."""
    child = run.start()
    ended = child.wait(draw.uniform(0, whole.seconds))
    return child, child.send(number) if ended is None else ended


@pytest.mark.parametrize("name", stopped("kill"))
def test_killed(name, home, whole, tmp_path, draw):
    """At each of its writes; in the middle of one; and at random moments, again and again."""
    expected = whole(name)
    assert expected.states
    for state in expected.states:
        assert_all_whole(Run(name, home, state), expected, temporary=True)
    run = Run(name, home, tmp_path / "run", draw.choice(expected.states))
    limit = draw.randrange(1, draw.choice([(expected.folder / path).stat().st_size for path in expected.made]) + 1)
    child, ended = run.complete(lambda: dies_at(limit))
    # Where a script that it has started is killed for it, it says so
    assert ended in (-signal.SIGXFSZ, expected.code) or "failed" in child.err, child.err
    assert_all_whole(run, expected, temporary=True)
    for _ in range(KILLS):
        child, ended = stop(run, expected, signal.SIGKILL, draw)
        assert ended in (-signal.SIGKILL, expected.code), child.err
        assert_all_whole(run, expected, temporary=True)
    assert_a_rerun_ends_as(expected, run)


@pytest.mark.parametrize("name", stopped("interrupt"))
def test_interrupted(name, home, whole, tmp_path, draw):
    """At one of its writes, and at random moments: it says so in one line and cleans up."""
    expected, run, write = whole(name), Run(name, home, tmp_path / "run"), draw.randrange(1, 4)
    at_a_write = at_every_write(run.folder, lambda number: number == write and os.kill(os.getpid(), signal.SIGINT))
    for random_moment in [False] + [True] * KILLS:
        child, ended = stop(run, expected, signal.SIGINT, draw) if random_moment else run.complete(at_a_write)
        assert ended in (130, expected.code), child.err
        if ended == 130:
            assert "Traceback" not in child.err, child.err
            assert child.err.count("interrupted: nothing half-written was left behind") == 1
        assert_all_whole(run, expected)
    assert_a_rerun_ends_as(expected, run)


def dies_at(size: int) -> None:
    """To be called in a child: the system kills it when it writes beyond so many bytes of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


@contextlib.contextmanager
def disk(folder: Path, kib: int):
    """A real file system of so many KiB at `folder`."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk takes the right to mount one: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def assert_one_line(child: Child, code: int) -> None:
    """It failed, and says why in one line."""
    assert code not in (0, None), child.out
    lines = [line for line in child.err.splitlines() if "error: " in line]
    assert len(lines) == 1 and "Traceback" not in child.err, child.err


@pytest.mark.parametrize("name", stopped("full disk"))
def test_full_disk(name, home, whole, tmp_path, draw):
    """The whole working folder is on a disk that is full after some more KiB; what was there stays as it was."""
    expected = whole(name)
    size = sum(expected.folder.joinpath(path).stat().st_size for path in expected.made)
    for number in range(min(KILLS, 2) if JOBS[name].long else KILLS):
        room, folder = draw.randrange(4, max(8, size // 1024)), tmp_path / f"full {number}"
        folder.mkdir()
        with disk(folder, 4096):
            shutil.copytree(home / "space", folder, symlinks=True, dirs_exist_ok=True)
            earlier = {path: "earlier" for path in expected.made if path.startswith("out/")}
            for path in earlier:
                folder.joinpath(path).parent.mkdir(parents=True, exist_ok=True)
                folder.joinpath(path).write_bytes(EARLIER)
            folder.joinpath("filler").write_bytes(bytes(max(0, shutil.disk_usage(folder).free - room * 1024)))
            run = Run(name, home, folder)
            child, ended = run.complete()
            folder.joinpath("filler").unlink()
            if ended != expected.code:
                assert_one_line(child, ended)
                assert re.search("No space left on device|is full", child.err), child.err
            # Without room for its picture a record is written all the same: it took the work
            assert_all_whole(run, expected, earlier=earlier, drawn=False)
            if KILLS > 1:
                assert_a_rerun_ends_as(expected, run)


def test_printing_onto_a_full_disk(home, tmp_path):
    def print_onto_it() -> None:
        sys.stdout = open("/dev/full", "w")  # noqa: SIM115

    child, code = Run("report", home, tmp_path / "run").complete(print_onto_it)
    assert (code, child.err) == (2, "error: can't write what is printed: No space left on device\n")


@pytest.mark.parametrize("name", NAMES if LONG else ["calibrate", "validate", "readme", "tables"])
def test_read_only(name, home, tmp_path):
    """The folder of what is written can't be written: an error before the work, with the path."""
    run = Run(name, home, tmp_path / "run")
    folders = {"readme": ["docs", "."], "tables": ["results/tables"], "presets": ["out/presets"]}.get(name, ["out"])
    for folder in folders:
        run.folder.joinpath(folder).mkdir(parents=True, exist_ok=True)
        run.folder.joinpath(folder).chmod(0o555)
    before = listing(run.folder)
    child, code = run.complete(unprivileged, no_work)
    assert_one_line(child, code)
    said = "can't (?:write|make the folder of) (.+?): (?:its folder is read-only|Permission denied)"
    named = re.search(said, child.err)
    places = set((run.folder / named[1]).parents[:2]) if named else set()
    assert places & {run.folder / folder for folder in folders}, child.err
    assert listing(run.folder) == before


def no_work() -> None:
    """A model may be loaded and asked for its shape with two tokens, but not run."""

    def call(module, *args, **kwargs):
        if args and isinstance(args[0], torch.Tensor) and args[0].dim() == 2 and args[0].shape[1] > 2:
            raise AssertionError("the work began")
        return real(module, *args, **kwargs)

    real, torch.nn.Module.__call__ = torch.nn.Module.__call__, call


def test_interrupted_while_it_imports():
    """In a process of its own, which imports for seconds."""
    command = [sys.executable, str(files.ROOT / "scripts" / "validate_ppl_postbugfix.py"), "--help"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not any("libtorch" in line for line in Path(f"/proc/{child.pid}/maps").read_text().splitlines()):
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, f"{interrupts.MESSAGE}\n")
