"""Which results are up to date, and in what the others differ."""

import hashlib
import json
import shutil
import subprocess

import pytest
from checkouts import fake, git, make_checkout, matcher_of, write_table

from gpt2.common import files
from gpt2.runs.record import write_record
from gpt2.runs.up_to_date import REPLAYED, Matcher
from gpt2.text import sources


def make(checkout, name: str = "peers_x") -> Matcher:
    """Make the results of a run."""
    matcher = matcher_of(checkout)
    subprocess.run(matcher.command(matcher.runs[name]), check=True)
    return matcher


def redefine(checkout, **runs) -> Matcher:
    write_table(checkout, "t", runs=runs, show=[{"results": name} for name in runs])
    return matcher_of(checkout)


@pytest.fixture
def checkout(tmp_path):
    """A checkout with one run."""
    return make_checkout(tmp_path, t={"peers_x": fake({"size": 3})})


@pytest.fixture
def recorded(checkout):
    """A run's matcher, and a function from changes of its record to why it then is stale."""
    matcher = make(checkout)
    path = matcher.record_path("peers_x")
    record = json.loads(path.read_text())

    def stale(**changes) -> str | None:
        path.write_text(json.dumps(record | changes))
        return matcher.stale("peers_x")

    return matcher, record, stale


def test_results_are_up_to_date_until_an_argument_changes(checkout, recorded):
    matcher, record, stale = recorded
    assert stale() is None
    assert redefine(checkout, peers_x=fake({"size": 4})).stale("peers_x") == "made with --size 3, now 4"
    default = redefine(checkout, peers_x=fake())
    assert default.stale("peers_x") == "made with --size 3, now 1" and default.to_make(["peers_x"]) == ["peers_x"]
    older = {key: value for key, value in record["args"].items() if key != "hangs"}
    assert stale(args=older) is None, "an argument that older results lack had its default"
    hangs = redefine(checkout, peers_x=fake({"size": 3, "hangs": True}))
    assert hangs.stale("peers_x") == "made with --hangs False, now True"
    for content in ("", "{", "[]", "3", "{}", '{"args": []}', "[" * 10**5):
        matcher.record_path("peers_x").write_text(content)
        assert matcher.stale("peers_x") == "missing", content[:20]
    matcher.record_path("peers_x").unlink()
    assert matcher.stale("peers_x") == "missing"


def test_a_file_is_compared_by_its_contents(checkout):
    read = checkout / "some.txt"
    read.write_text("a")
    redefine(checkout, peers_x=fake({"reads": str(read)}))
    assert make(checkout).stale("peers_x") is None
    shutil.copy(read, checkout / "copy.txt")
    elsewhere = redefine(checkout, peers_x=fake({"reads": str(checkout / "copy.txt")}))
    assert elsewhere.stale("peers_x") is None
    (checkout / "copy.txt").write_text("b")
    assert elsewhere.stale("peers_x").startswith("made with --reads sha256 ")


def test_what_a_run_needs_is_part_of_it(checkout):
    runs = {"peers_x": fake({"size": 3}), "peers_y": fake(needs=["peers_x"])}
    assert redefine(checkout, **runs).to_make(["peers_y"]) == ["peers_x", "peers_y"]
    make(checkout, "peers_x")
    assert make(checkout, "peers_y").stale("peers_y") is None
    stale = redefine(checkout, **runs | {"peers_x": fake({"size": 5})})
    assert stale.stale("peers_y") == "needs peers_x: made with --size 3, now 5"
    assert stale.to_make(["peers_y"]) == ["peers_x", "peers_y"]


def test_a_text_is_compared_by_its_hash(tmp_path):
    """As validation records it: evaluation text beside arguments, calibration text in what was calibrated."""
    checkout = make_checkout(tmp_path)
    script = (checkout / "scripts" / "fake.py").read_text()
    (checkout / "scripts" / "reader.py").write_text(script.replace('"--reads")', '"--text")'))
    redefine(checkout, peers_x={"script": "reader", "args": {"text": "{text}"}})
    (tmp_path / "one.txt").write_text("\n".join(f"line {i}" for i in range(50)))
    text = sources.load_text(str(tmp_path / "one.txt"))
    matcher = matcher_of(checkout, any_code=True, text=str(tmp_path / "one.txt"))
    record = {"args": vars(matcher.parsed(matcher.runs["peers_x"])) | {"text": "../elsewhere/one.txt"}}

    def stale(**more):
        files.write_json(matcher.record_path("peers_x"), record | more)
        return matcher.stale("peers_x")

    assert stale() == "its record names no text"
    assert stale(text_sha256=text.sha256("evaluation")) is None
    assert stale(text_sha256={"tuning": text.sha256("tuning")}) is None
    assert "another text" in stale(text_sha256=text.sha256("tuning"))
    own = {"text_sha256": text.sha256("evaluation")}
    assert stale(**own, calibration={"text_sha256": text.sha256("calibration")}) is None
    assert "(calibration part)" in stale(**own, calibration={"text_sha256": "other"})


def test_the_commit_that_made_results_must_be_known_or_that_of_a_replay(checkout, recorded):
    """Whether today's code gives the same is for a replay; here it is enough that anyone can go back to it."""
    matcher, _, stale = recorded
    for words in ("init -q", "add .", "commit -qm first"):
        git(checkout, *words.split())
    commit = git(checkout, "rev-parse", "--short=12", "HEAD")
    assert stale(git_commit=commit) is None
    for other in (f"{commit}-dirty", "", None, ["x"]):
        assert stale(git_commit=other) == "made from code that was never committed"
    victim = checkout / "victim"
    victim.write_text("as it was")
    for word in (f"--output={victim}", f"--remote={checkout}", "HEAD"):  # git would take the first for a flag
        assert "is not in this repository" in stale(git_commit=word), word
    assert victim.read_text() == "as it was"
    assert stale(git_commit="0123456789ab") == "made at commit 0123456789ab, which is not in this repository"
    assert matcher_of(checkout, any_code=True).stale("peers_x") is None
    replayed = {"agrees": True, "commit": commit, "sha256": files.file_sha256(matcher.record_path("peers_x"))}
    for changes in ({}, {"agrees": False}, {"commit": "f" * 12}, {"sha256": "that of another file"}):
        files.write_json(matcher.options.results / REPLAYED, {"peers_x": replayed | changes})
        assert (matcher.stale("peers_x") is None) == (changes == {}), changes


def test_a_preset_that_is_made_has_a_record_of_its_own(tmp_path):
    """And may be moved away: then it is made again only for what reads it."""
    preset = tmp_path / "results" / "presets" / "x.json"
    runs = {"peers_p": fake(output="presets/x.json"), "peers_r": fake({"reads": str(preset)}, needs=["peers_p"])}
    checkout = make_checkout(tmp_path, t=runs)
    matcher = make(checkout, "peers_p")
    record = json.loads(preset.read_text())
    preset.write_text(json.dumps({"rank": 60, "provenance": record}))
    write_record(matcher, matcher.runs["peers_p"])
    assert matcher.complete("peers_p")
    written = matcher.record("peers_p")
    assert written["rank"] == 60 and written["args"] == record["args"] and "provenance" not in written
    assert written["sha256"] == hashlib.sha256(preset.read_bytes()).hexdigest()
    make(checkout, "peers_r")
    preset.rename(tmp_path / "kept.json")
    assert matcher.stale("peers_r") is None and matcher.to_make(["peers_p", "peers_r"]) == []
    matcher.record_path("peers_r").unlink()
    assert matcher.to_make(["peers_r"]) == ["peers_p", "peers_r"]


def test_a_run_of_a_shape_is_of_that_shape_whatever_the_model():
    """The tables' --model is for runs that name no model of their own."""
    matcher = matcher_of(files.ROOT, model="some/model")
    own, other = (matcher.parsed(matcher.runs[name]).model for name in ("cache_bytes_gemma-3-4b", "cache_bytes_model"))
    assert (own, other) == ("configs/models/gemma-3-4b.json", "some/model")
