"""Every script that writes, killed, interrupted, on a full disk and in a read-only folder: no half file, and a rerun
ends as an uninterrupted run does.

KILLS is how often each is killed at a random moment: `make kills` does it ten times.
"""

import contextlib
import gc
import hashlib
import io
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
import time
from pathlib import Path

import pictures
import pytest
import torch
from forked import Child, at_every_write, start, unprivileged
from jobs import JOBS, Job, make_home
from matplotlib.figure import Figure
from PIL import Image
from sampling import ALL, sampled

from gpt2.common import files, interrupts, mapped_file, provenance, trial_queue
from gpt2.report import plots

KILLS = int(os.environ.get("KILLS", "1"))
# `make test` kills some of the scripts, `make test-all` all but the longest, `make kills` all of them ten times
WANTED = list(JOBS) if KILLS > 1 else sampled([name for name, job in JOBS.items() if not job.long], 5)
# Shown where a test fails. The long version draws another one each time
SEED = int(os.environ.get("KILLS_SEED", time.time_ns() % 2**32 if KILLS > 1 else 0))
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
# Of those that write alike, for `make test`: SQLite; PyTorch; a record and its picture; presets; a page; several pages
ONE_OF_EACH = ["tune codecs", "calibrate", "append", "presets", "report", "readme", "tables"]
PASSING = (".lock", "-journal", "log")  # a journal is what SQLite takes back when it is opened next
SIGNALS = [signal.SIGKILL, signal.SIGINT]
EARLIER = b"earlier\n"
UNFINISHED = "what a later run goes on from"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny model and what scripts read; whatever they import or work out once is there before they are forked."""
    home = tmp_path_factory.mktemp("home")
    os.environ["COMMIT"] = provenance.git_commit() or ""
    make_home(home)
    files.write_figure(home / "warm.png", plots.append_times([1, 2], {"a": [1, 2]}, "t"))
    trial_queue.TrialQueue(home / "warm.db", "warm")
    provenance.git_commit()
    gc.collect()
    gc.freeze()  # children would look through all of it, and copy it
    yield home
    gc.unfreeze()


class Run:
    """One job in a folder of its own."""

    def __init__(self, name: str, home: Path, folder: Path, source: Path | None = None):
        self.job, self.home, self.folder = JOBS[name], home, folder
        shutil.copytree(source or home / "space", folder, symlinks=True)
        self.flags = self.job.flags.replace("{home}", str(home)).split()

    def start(self, *before) -> Child:
        said = self.folder.parent / f"{self.folder.name} said"
        return start(self.job.script, self.flags, self.folder, said, draw_small, *self.job.before, *before)

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


def draw_small() -> None:
    Figure.savefig = pictures.small


def listing(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


# Of every record, and of the machine before a measurement of time
MEASURED = {"created_utc", "busy_cores_before", "load_average_before", "copy_bytes_per_s"}


def content(path: Path, job: Job, folder: Path) -> object:
    """What a whole file says, apart from times; raises where it isn't whole."""
    blob = path.read_bytes()
    if TEMPORARY.fullmatch(path.name):
        return "temporary"
    if blob == EARLIER:
        return "earlier"
    if path.suffix == ".json":
        return untimed(json.loads(blob.decode().replace(str(folder), "")), job.timed | MEASURED)
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


def untimed(record: object, timed: frozenset[str]) -> object:
    """A record without its times: keys that are named, and rows that say of which metric they are."""
    if isinstance(record, dict):
        return {key: untimed(value, timed) for key, value in record.items() if key not in timed}
    if isinstance(record, list):
        return [untimed(x, timed) for x in record if not (isinstance(x, dict) and x.get("metric") in timed)]
    return record


def whole_database(path: Path) -> str:
    """Whatever was being written is taken back when it is opened next; that is done to a copy."""
    copy = path.parent / "copy-of-study"
    copy.mkdir()
    try:
        for part in path.parent.glob(f"{path.name}*"):
            shutil.copy(part, copy)
        database = sqlite3.connect(copy / path.name)
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        database.close()
    finally:
        shutil.rmtree(copy)
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


def assert_all_whole(run: Run, whole: dict, *, temporary=False, earlier: dict | None = None, drawn=True) -> None:
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
            rows = whole[name]["rows"]
            assert found["rows"] == rows[: len(found["rows"])]
        elif not name.endswith(".db") and not another_choice(run):
            assert found in (whole.get(name), (earlier or {}).get(name)), f"{name} is neither whole nor as it was"
    if run.job.record and made.get(run.job.record) == whole[run.job.record]:
        named = {name: found for name, found in whole.items() if drawn or not name.endswith(".png")}
        assert named.items() <= made.items(), "the record was written, but not all that it names"


@pytest.fixture
def draw(request):
    return random.Random(f"{SEED} {request.node.name}")


@pytest.mark.parametrize("name", WANTED)
def test_killed_and_interrupted(name, home, tmp_path, draw):
    whole, left = Run(name, home, tmp_path / "whole"), tmp_path / "states"
    left.mkdir()
    began = time.monotonic()
    child, code = whole.complete(
        at_every_write(whole.folder, lambda n: shutil.copytree(whole.folder, left / str(n), symlinks=True))
    )
    took = time.monotonic() - began
    assert code in (0, 3), child.err
    expected, states = whole.made(), sorted(left.iterdir(), key=lambda path: int(path.name))
    assert expected and states
    for number, state in enumerate(states):  # what a kill at each of its writes would leave
        run = Run(name, home, tmp_path / f"state {number}", state)
        assert_all_whole(run, expected, temporary=True)
    # The folder as a kill at some write has left it, or one in the middle of a write; then killed again and again
    amid, state = draw.choice([(True, None), (False, draw.choice(states))])
    run = Run(name, home, tmp_path / "run", state)
    if KILLS > 1 or amid:
        sizes = [path.stat().st_size for at, path in listing(Path(states[-1])).items() if at in expected]
        limit = draw.randrange(1, draw.choice(sizes or [100]) + 1)
        child, ended = run.complete(lambda: dies_at(limit))
        # Where a script that it has started is killed for it, it says so
        assert ended in (-signal.SIGXFSZ, code) or "failed" in child.err, child.err
        assert_all_whole(run, expected, temporary=True)
    signals = [signal.SIGKILL] * KILLS + [signal.SIGINT] if KILLS > 1 else [] if amid else [draw.choice(SIGNALS)]
    for number in signals:
        before = set(run.made())  # temporary files of those that were killed
        child = run.start()
        ended = child.wait(draw.uniform(0, took))
        if ended is None:
            ended = child.send(number)
            assert ended in (130 if number == signal.SIGINT else -number, code), child.err
        if ended == 130:
            assert "Traceback" not in child.err, child.err
            assert child.err.count("interrupted: nothing half-written was left behind") == 1
        assert_all_whole(run, expected, temporary=True)
        left = {name for name, found in run.made().items() if found == "temporary"}
        assert ended == -signal.SIGKILL or left <= before, "it could clean up"
    child, ended = run.complete()
    assert ended == code, child.err
    if not another_choice(run):
        assert run.made() == expected


def dies_at(size: int) -> None:
    """To be called in a child: the system kills it when it writes beyond so many bytes of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


@contextlib.contextmanager
def disk(folder: Path, kib: int):
    """A real file system of so many KiB at `folder`."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], capture_output=True, text=True
    )
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


@pytest.mark.parametrize("name", WANTED if KILLS > 1 or ALL else ONE_OF_EACH[::2])
def test_full_disk(name, home, tmp_path, draw):
    """The whole working folder is on a disk that is full after some more KiB; what was there stays as it was."""
    whole = Run(name, home, tmp_path / "whole")
    child, code = whole.complete()
    expected = whole.made()
    sizes = {path: whole.folder.joinpath(path).stat().st_size for path in expected}
    for number in range(min(KILLS, 2) if whole.job.long else KILLS):
        room = draw.randrange(4, max(8, sum(sizes.values()) // 1024))
        run = Run(name, home, tmp_path / f"full {number}")
        subprocess.run(["rm", "-rf", run.folder], check=True)
        run.folder.mkdir()
        with disk(run.folder, 4096):
            shutil.copytree(home / "space", run.folder, symlinks=True, dirs_exist_ok=True)
            earlier = with_earlier(run, expected)
            left = shutil.disk_usage(run.folder).free
            run.folder.joinpath("filler").write_bytes(bytes(max(0, left - room * 1024)))
            child, ended = run.complete()
            run.folder.joinpath("filler").unlink()
            if ended != code:
                assert_one_line(child, ended)
                assert re.search("No space left on device|is full", child.err), child.err
            # Without room for its picture a record is written all the same: it took the work
            assert_all_whole(run, expected, earlier=earlier, drawn=False)
            if KILLS > 1:
                child, ended = run.complete()
                assert ended == code, child.err
                assert run.made() == expected


def with_earlier(run: Run, whole: dict) -> dict:
    """Put something in the place of all that is written into `out`."""
    earlier = {name: "earlier" for name in whole if name.startswith("out/")}
    for name in earlier:
        run.folder.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        run.folder.joinpath(name).write_bytes(EARLIER)
    return earlier


@pytest.mark.parametrize("name", ["calibrate", "report"])
def test_files_that_may_not_grow_and_printing_onto_a_full_disk(name, home, tmp_path):
    """A limit that anybody can set, met by PyTorch and by plain files; it takes no right to mount."""
    run = Run(name, home, tmp_path / "run")
    child, code = run.complete(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))
    assert_one_line(child, code)
    assert "File too large" in child.err and not run.made()
    child, code = run.complete(lambda: setattr(sys, "stdout", open("/dev/full", "w")))  # noqa: SIM115
    assert (code, child.err) == (2, "error: can't write what is printed: No space left on device\n")


def test_a_study_that_may_not_grow_any_more(home, tmp_path):
    """SQLite meets the limit in the middle of a search, and so do its heartbeats."""
    run = Run("tune codecs", home, tmp_path / "run")
    assert run.complete()[1] == 0
    size, run.flags = (run.folder / "s.db").stat().st_size, [*run.flags, "--num-trials", "60"]
    child, code = run.complete(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    assert_one_line(child, code)
    assert "can't use s.db as a study ((sqlite3.OperationalError) disk I/O error)" in child.err


@pytest.mark.parametrize("name", dict.fromkeys([*WANTED, "tables"]))
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
