"""Writing: all or nothing, and with what it was made from."""

import argparse
import json
import multiprocessing
import os
import signal
import stat
import time
from pathlib import Path

import pytest
import torch
from checkouts import git
from databases import in_a_process

from gpt2.common import files, provenance
from gpt2.common.errors import PluginError
from gpt2.common.files import atomic, check_writable, write_json, write_torch
from gpt2.report import plots


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("old")
    return path


def interrupted(path, error):
    with atomic(path) as part:
        part.write_text("half of the n")
        raise error


@pytest.mark.parametrize(("write", "what", "error"), [
    *((interrupted, error, error) for error in (ZeroDivisionError, KeyboardInterrupt, SystemExit)),
    *((write_json, {"deep": [{"ppl": float(x)}]}, ValueError) for x in ("nan", "inf", "-inf")),
    (write_torch, {}, PluginError),
])  # fmt: skip
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(write, what, error, path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(error, match="can't write .*r.json: No space left on device" if error is PluginError else None):
        write(path, what)
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_folders_are_made_rights_and_links_stay(tmp_path):
    path = write_json(tmp_path / "a" / "b" / "r.json", {"x": 1})
    assert json.loads(path.read_text()) == {"x": 1} and path.stat().st_mode & 0o777 == 0o644
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "r.json", tmp_path / "r.json"
    link.symlink_to(target)
    for number, rights in ((1, 0o644), (2, 0o600)):  # before there is anything at its end, and after
        write_json(link, {"a": number})
        assert link.is_symlink() and json.loads(target.read_text()) == {"a": number}
        assert target.stat().st_mode & 0o777 == rights
        target.chmod(0o600)
    assert list(target.parent.iterdir()) == [target]


def test_checking_leaves_no_folder_and_rejects_paths_where_no_file_can_be(path, tmp_path):
    """Root may write into read-only folders, but nobody below a file."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    bad = {path / "x" / "y.json": "can't make the folder of .*r.json/x/y.json: ", tmp_path: "it is a folder",
           tmp_path / "pipe": "it is no regular file", tmp_path / "link": "it is no regular file",
           tmp_path / ("x" * 300): "File name too long"}  # fmt: skip
    for place, message in bad.items():
        for write in (check_writable, lambda place: write_torch(place, {})):
            with pytest.raises(PluginError, match=message):
                write(place)
    assert path.read_text() == "old" and (tmp_path / "link").is_symlink()
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    (tmp_path / "empty").mkdir()
    before = set(tmp_path.rglob("*"))
    for place in ("new/a/b.json", "empty/c.json", "empty/new/d.json"):
        assert check_writable(tmp_path / place) == tmp_path / place
    assert set(tmp_path.rglob("*")) == before, "no folder is left, and those that were there are kept"


def writes_and_dies(path: Path, begun, go, die: bool) -> None:
    """A process that is in the middle of writing when `begun` is set; on `go` it ends by a signal or in good order."""
    with atomic(path) as part:
        part.write_text("half")
        begun.set()
        assert go.wait(60)
        if die:
            os.kill(os.getpid(), signal.SIGKILL)
        part.write_text("theirs")


@pytest.mark.parametrize("die", [True, False])
def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(path, die):
    begun, go = multiprocessing.Event(), multiprocessing.Event()
    other = in_a_process(writes_and_dies, path, begun, go, die)
    assert begun.wait(60) and path.read_text() == "old"
    write_json(path, {})
    assert len(list(path.parent.glob(".r.json.*.tmp"))) == 1, "the other one lives, and its file is left to it"
    go.set()
    other.join(30)
    assert other.exitcode == (-signal.SIGKILL if die else 0)
    assert len(list(path.parent.glob(".r.json.*.tmp"))) == die and path.read_text() == ("{}\n" if die else "theirs")
    foreign = {path.with_name(name) for name in (".r.jsonx.0123abcd.tmp", ".r.json.mine.tmp")}
    for kept in foreign:
        kept.touch()
    check_writable(path)
    assert set(path.parent.glob(".*")) == foreign, "of this path, and of this name alone"


def write_again_and_again(path: Path) -> None:
    for _ in range(60):
        write_json(path, {"long": list(range(300))})


def test_many_processes_that_write_the_same_path_dont_take_each_others_files_for_abandoned(path):
    path.unlink()
    writers = [in_a_process(write_again_and_again, path) for _ in range(4)]
    while any(writer.is_alive() for writer in writers):
        assert not path.exists() or len(json.loads(path.read_text())["long"]) == 300
        time.sleep(0.01)
    assert [writer.exitcode for writer in writers] == [0] * 4 and list(path.parent.iterdir()) == [path]


def test_a_record_is_written_after_its_picture_and_also_without_it(tmp_path):
    record, picture = tmp_path / "r.json", tmp_path / "r.png"

    def draw():
        assert not record.exists()
        return plots.append_times([1, 2], {"a": [1, 2]}, "t")

    files.write_run(record, {"x": 1}, picture, draw)
    assert json.loads(record.read_text()) == {"x": 1} and picture.exists()
    with pytest.raises(ZeroDivisionError):
        files.write_run(record, {"x": 2}, picture, lambda: 1 / 0)
    assert json.loads(record.read_text()) == {"x": 2}, "it took the work"


def test_a_path_is_shown_as_it_can_be_pasted_and_recorded_as_it_is_on_every_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROOT", tmp_path / "checkout")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    made, own = tmp_path / "checkout/results/p.json", tmp_path / "work/p.json"
    assert [files.shown(path) for path in (made, own, Path("p.json"))] == [str(made), "p.json", "p.json"]
    assert [files.recorded(path) for path in (made, own)] == ["results/p.json", str(own)]


def test_torch_files_load_without_running_code_and_are_the_same_to_the_byte(tmp_path):
    record = {"t": torch.arange(3), "meta": {"name": "x", "n": 1, "list": [1.5, None, True]}}
    one, two = (write_torch(tmp_path / name, record) for name in ("a.pt", "b.pt"))
    assert one.read_bytes() == two.read_bytes(), "the name of a temporary file would be in it"
    back = torch.load(one, weights_only=True)
    assert torch.equal(back.pop("t"), record.pop("t")) and back == record


def test_provenance_has_what_a_result_was_made_from():
    args = argparse.Namespace(model="m", output=Path("a/b.json"), ranks=[60, 56], seed=0)
    record = provenance.provenance(args, text_sha256="abc")
    assert record["args"] == {"model": "m", "output": "a/b.json", "ranks": [60, 56], "seed": 0}
    assert {"torch", "transformers", "numpy"} <= set(record["versions"]) and all(record["versions"].values())
    assert record["text_sha256"] == "abc" and record["device"] and record["threads"] >= 1
    assert record["created_utc"].endswith("Z") and record["wall_s"] >= 0
    assert json.dumps(record, allow_nan=False)


def test_the_commit_says_when_code_differs_from_it(tmp_path, monkeypatch, request):
    def asked() -> str | None:
        """The commit as a new process finds it: a run asks once, before the work, and remembers."""
        provenance.git_commit.cache_clear()
        return provenance.git_commit()

    request.addfinalizer(provenance.git_commit.cache_clear)
    monkeypatch.setattr(files, "ROOT", tmp_path)
    assert asked() is None, "no checkout"
    git(tmp_path, "init", "-q")
    assert asked() is None, "no commit"
    code, readme = tmp_path / "gpt2" / "a.py", tmp_path / "README"
    code.parent.mkdir()
    for path in (code, readme):
        path.write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert asked() == commit == provenance.provenance()["git_commit"]
    readme.write_text("2")
    assert asked() == commit, "only code counts"
    code.write_text("2")
    assert provenance.git_commit() == commit, "what a run began with"
    assert asked() == f"{commit}-dirty"
