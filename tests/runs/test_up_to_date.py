"""Tables as files: their format, which results match, what pages and README show."""

import hashlib
import json
import re
import shutil
import subprocess

import pytest
from checkouts import fake, make_checkout, write_table

from gpt2.common import files, provenance
from gpt2.common.errors import PluginError
from gpt2.report import tables
from gpt2.runs import check_figures, pages
from gpt2.runs.check import check
from gpt2.runs.config import Setting, load
from gpt2.runs.record import write_record
from gpt2.runs.up_to_date import Matcher
from gpt2.text import sources as data

RUNS = files.RESULTS / "runs"


@pytest.fixture(autouse=True)
def repository(monkeypatch):
    monkeypatch.setenv("COMMIT", provenance.git_commit() or "")


# The tables of this repository


def test_every_table_can_be_made_from_its_runs():
    """Every run's arguments are those of its script, in full and in quick; and every way to show results exists."""
    for quick in (False, True):
        setting = Setting(text="embedded", quick=quick)
        known, runs = load(setting)
        assert len(known) >= 12
        for run in runs.values():
            Matcher(setting, runs).parsed(run)
        for table in known.values():
            assert table.title and table.about.endswith(".") and "{" not in table.about
            kinds = [
                item.get("as") or next(p for p in tables.TABLES if item["results"].startswith(p)) for item in table.show
            ]
            assert set(kinds) <= tables.TABLES.keys()


def test_every_committed_result_is_of_a_run_and_on_a_page():
    known, runs = load(Setting())
    committed = {path.stem for path in RUNS.glob("*.json")}
    assert committed <= runs.keys()
    shown = {name for table in known.values() for name in table.results}
    assert committed <= shown | {name for run in runs.values() for name in run.needs}
    assert {path.stem for path in (files.RESULTS / "tables").glob("*.md")} >= known.keys()


def test_pages_and_readme_show_what_results_say():
    check(files.ROOT)


def test_quick_runs_lie_apart():
    setting = Setting(quick=True)
    _, runs = load(setting)
    matcher = Matcher(setting, runs)
    for run in runs.values():
        command = matcher.command(run)
        assert "/results/quick" in command[command.index("--output") + 1]
        assert not any("results/" in word and "results/quick" not in word for word in run.words())


# The format


def test_unknown_keys_are_named(tmp_path):
    checkout = make_checkout(tmp_path, t={"peers_a": fake() | {"argz": {}}})
    with pytest.raises(PluginError, match="t.json: run peers_a: unknown argz: the keys are args, needs"):
        load(Setting(checkout=checkout))
    write_table(checkout, "t", {"title": "x"})
    with pytest.raises(PluginError, match="t.json: about, plots, runs, show is missing"):
        load(Setting(checkout=checkout))


def test_a_name_means_one_run(tmp_path):
    checkout = make_checkout(tmp_path, a={"peers_x": fake({"size": 1})}, b={"peers_x": fake({"size": 2})})
    with pytest.raises(PluginError, match="b.json: run peers_x is defined otherwise in another table"):
        load(Setting(checkout=checkout))


def test_a_missing_run_or_script_is_named(tmp_path):
    checkout = make_checkout(tmp_path, a={"peers_x": fake(needs=["peers_y"])})
    with pytest.raises(PluginError, match="run peers_x: no table defines a run peers_y"):
        load(Setting(checkout=checkout))
    write_table(
        checkout, "a", {"title": "", "about": "", "plots": [], "show": [], "runs": {"r": fake() | {"script": "no"}}}
    )
    with pytest.raises(PluginError, match="a.json: run r: no script no.py"):
        load(Setting(checkout=checkout))


def test_names_are_filled_in(tmp_path):
    checkout = make_checkout(
        tmp_path, t={"peers_{model}": fake({"reads": ["{results}/x", "{text}+self"], "fails": True})}
    )
    known, runs = load(Setting("folder/My-Model/", "t.txt", True, checkout=checkout))
    assert known["t"].results == ["peers_my-model"]
    words = runs["peers_my-model"].words()
    assert words[0] == "--reads" and words[1].endswith("results/quick/x") and words[2:] == ["t.txt+self", "--fails"]


# Matching


@pytest.fixture
def made(tmp_path):
    """A checkout with one run and what makes its results."""
    checkout = make_checkout(tmp_path, t={"peers_x": fake({"size": 3})})

    def make(name: str = "peers_x") -> Matcher:
        matcher = Matcher(Setting(checkout=checkout), load(Setting(checkout=checkout))[1])
        subprocess.run(matcher.command(matcher.runs[name]), check=True)
        return matcher

    return checkout, make


def redefine(checkout, **runs) -> Matcher:
    show = [{"results": name} for name in runs]
    write_table(checkout, "t", {"title": "t", "about": "", "runs": runs, "show": show, "plots": []})
    return Matcher(Setting(checkout=checkout), load(Setting(checkout=checkout))[1])


def test_results_match_until_an_argument_changes(made):
    checkout, make = made
    assert redefine(checkout, peers_x=fake({"size": 3})).why_not("peers_x") == "missing"
    assert make().why_not("peers_x") is None
    assert redefine(checkout, peers_x=fake({"size": 4})).why_not("peers_x") == "made with --size 3, now 4"
    matcher = redefine(checkout, peers_x=fake())
    assert matcher.why_not("peers_x") == "made with --size 3, now 1" and matcher.to_make(["peers_x"]) == ["peers_x"]


def test_what_is_no_record_is_missing(made):
    """Cut short by hand, or of something else: made again, and no traceback."""
    _, make = made
    matcher = make()
    for content in ("", "{", "[]", "3", "{}", '{"args": []}', "[" * 10**5):
        matcher.record_path("peers_x").write_text(content)
        assert matcher.why_not("peers_x") == "missing", content[:20]


def test_an_argument_that_older_results_lack_was_the_default(made):
    checkout, make = made
    matcher = make()
    path = matcher.record_path("peers_x")
    record = json.loads(path.read_text())
    del record["args"]["hangs"]
    path.write_text(json.dumps(record))
    assert matcher.why_not("peers_x") is None
    hangs = redefine(checkout, peers_x=fake({"size": 3, "hangs": True}))
    assert hangs.why_not("peers_x") == "made with --hangs False, now True"


def test_a_file_is_compared_by_what_it_holds(made):
    checkout, make = made
    read = checkout / "some.txt"
    read.write_text("a")
    redefine(checkout, peers_x=fake({"reads": str(read)}))
    assert make().why_not("peers_x") is None
    shutil.copy(read, checkout / "copy.txt")
    elsewhere = redefine(checkout, peers_x=fake({"reads": str(checkout / "copy.txt")}))
    assert elsewhere.why_not("peers_x") is None
    (checkout / "copy.txt").write_text("b")
    assert elsewhere.why_not("peers_x").startswith("made with --reads sha256 ")


def test_what_a_run_needs_is_part_of_it(made):
    checkout, make = made
    runs = {"peers_x": fake({"size": 3}), "peers_y": fake(needs=["peers_x"])}
    matcher = redefine(checkout, **runs)
    assert matcher.to_make(["peers_y"]) == ["peers_x", "peers_y"]
    make("peers_x")
    assert make("peers_y").why_not("peers_y") is None
    stale = redefine(checkout, **runs | {"peers_x": fake({"size": 5})})
    assert stale.why_not("peers_y") == "needs peers_x: made with --size 3, now 5"
    assert stale.to_make(["peers_y"]) == ["peers_x", "peers_y"]


def test_the_text_is_compared_by_its_hash(tmp_path):
    """As validation records it: evaluation text beside arguments, calibration text in what was calibrated."""
    checkout = make_checkout(tmp_path)
    script = (
        (checkout / "scripts" / "fake.py").read_text().replace('"--reads")', '"--reads")\n    p.add_argument("--text")')
    )
    (checkout / "scripts" / "reader.py").write_text(script)
    write_table(checkout, "t", {"title": "", "about": "", "plots": [], "show": [],
                                "runs": {"peers_x": {"script": "reader", "args": {"text": "{text}"}}}})  # fmt: skip
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("\n".join(f"{name} line {i}" for i in range(50)))
    text = data.load_text(str(tmp_path / "one.txt"))
    setting = Setting(text=str(tmp_path / "one.txt"), checkout=checkout)
    matcher = Matcher(setting, load(setting)[1], any_code=True)
    record = {"args": vars(matcher.parsed(matcher.runs["peers_x"])) | {"text": "../elsewhere/one.txt"}}

    def why_not(**more):
        files.write_json(matcher.record_path("peers_x"), record | more)
        return matcher.why_not("peers_x")

    assert why_not() == "it doesn't say which text it was made from"
    assert why_not(text_sha256=text.sha256("evaluation")) is None
    assert why_not(text_sha256={"tuning": text.sha256("tuning")}) is None
    assert "another text" in why_not(text_sha256=text.sha256("tuning"))
    own = {"text_sha256": text.sha256("evaluation")}
    assert why_not(**own, calibration={"text_sha256": text.sha256("calibration")}) is None
    assert "(calibration part)" in why_not(**own, calibration={"text_sha256": "other"})


def test_the_commit_that_made_results_must_be_known(made):
    """Whether today's code gives the same is for a replay; here it is enough that anyone can go back to it."""
    checkout, make = made
    matcher = make()

    def git(*words: str) -> str:
        config = ("-c", "user.name=x", "-c", "user.email=x@example.com")
        command = ["git", "-C", str(checkout), *config, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "--short=12", "HEAD").strip()
    path = matcher.record_path("peers_x")
    record = json.loads(path.read_text())

    def why_not(git_commit) -> str | None:
        path.write_text(json.dumps(record | {"git_commit": git_commit}))
        return matcher.why_not("peers_x")

    assert why_not(commit) is None
    assert why_not("0123456789ab") == "made at commit 0123456789ab, which is not in this repository"
    for other in (f"{commit}-dirty", "", None, ["x"]):
        assert why_not(other) == "made from code that was never committed"
    victim = checkout / "victim"
    victim.write_text("as it was")
    for word in (f"--output={victim}", f"--remote={checkout}", "HEAD"):  # git would write a file as it is asked to
        assert "is not in this repository" in why_not(word), word
    assert victim.read_text() == "as it was"
    matcher.any_code = True
    assert matcher.why_not("peers_x") is None


def test_a_preset_that_is_made_has_a_record_of_its_own(tmp_path):
    """And may be moved away: then it has to be made again only for what reads it."""
    preset = tmp_path / "results" / "presets" / "x.json"
    runs = {"peers_p": fake(output="presets/x.json"), "peers_r": fake({"reads": str(preset)}, needs=["peers_p"])}
    checkout = make_checkout(tmp_path, t=runs)
    matcher = Matcher(Setting(checkout=checkout), load(Setting(checkout=checkout))[1])
    subprocess.run(matcher.command(matcher.runs["peers_p"]), check=True)
    record = json.loads(preset.read_text())
    preset.write_text(json.dumps({"rank": 60, "provenance": record}))
    write_record(matcher, matcher.runs["peers_p"])
    assert matcher.current("peers_p")
    written = matcher.record("peers_p")
    assert written["rank"] == 60 and written["args"] == record["args"] and "provenance" not in written
    assert written["sha256"] == hashlib.sha256(preset.read_bytes()).hexdigest()
    subprocess.run(matcher.command(matcher.runs["peers_r"]), check=True)
    preset.rename(tmp_path / "kept.json")
    assert matcher.why_not("peers_r") is None and matcher.to_make(["peers_p", "peers_r"]) == []
    matcher.record_path("peers_r").unlink()
    assert matcher.to_make(["peers_r"]) == ["peers_p", "peers_r"]


# Pages and figures


@pytest.fixture
def paged(tmp_path):
    """A checkout with the committed ladder and a page of it."""
    checkout = make_checkout(tmp_path)
    runs = {"ratio_presets_{model}": fake()}
    show = [{"results": "ratio_presets_{model}", "heading": "Presets"}]
    write_table(checkout, "t", {"title": "A table", "about": "What it shows.", "runs": runs, "show": show, "plots": []})
    setting = Setting(checkout=checkout)
    return checkout, setting, lambda: pages.write(setting, load(setting)[0]["t"])


def test_a_page_without_results_says_how_to_make_them(paged):
    _, _, write = paged
    assert "Not measured yet: `python scripts/reproduce_tables.py t`" in write().read_text()


def test_a_page_that_was_touched_is_noticed(paged):
    checkout, setting, write = paged
    shutil.copytree(RUNS, setting.results / "runs")
    page = write()
    text = page.read_text()
    assert (
        "# A table\n\nWhat it shows.\n\n## Presets\n\n| preset |" in text
        and "Source: `ratio_presets_smollm2-135m.json`" in text
    )
    assert pages.differing(checkout) == []
    page.write_text(re.sub(r"\+0\.\d\d%", "+0.99%", text, count=1))
    assert pages.differing(checkout) == [
        "results/tables/t.md differs from its results: run scripts/reproduce_tables.py --pages"
    ]
    page.rename(page.with_name("gone.md"))
    assert pages.differing(checkout) == ["results/tables/gone.md has no table in configs/tables: remove it"]


def test_another_models_page_is_its_own(paged):
    checkout, _, _ = paged
    other = Setting("models/Other-1B", checkout=checkout)
    shutil.copytree(RUNS, other.results / "runs")
    runs = other.results / "runs"
    (runs / "ratio_presets_smollm2-135m.json").rename(runs / "ratio_presets_other-1b.json")
    assert pages.write(other, load(other)[0]["t"]).name == "t_other-1b.md"
    assert pages.differing(checkout) == []


PROSE = """About {figure} of it.
<!-- results: ratio_presets_x -->
| kv-4x | 3.97x | +0.14% | 0.00158 |
<!-- end -->
"""


@pytest.mark.parametrize(
    "figure", ["3.97x", "4.0x", "+0.14 %", "+0.1 %", "0.1 %", "12 tokens", "4x", "5 %", "`9.99x`", "kv-5.3x"]
)
def test_a_figure_that_a_table_shows_is_found(figure):
    assert check_figures.unfound(PROSE.format(figure=figure), []) == []


@pytest.mark.parametrize("figure", ["3.98x", "4.1x", "+0.15 %", "-0.14 %", "−0.14 %", "3.97 %", "+1 %", "9.5 nats"])
def test_a_figure_that_no_table_shows_is_named_with_its_line(figure):
    assert check_figures.unfound(f"\n\n{PROSE.format(figure=figure)}", []) == [
        f"line 3: {figure} is in no table that is made of committed results"
    ]


def test_a_figure_of_a_page_is_found():
    assert check_figures.unfound("It is 1.47x.", ["| a | 1.47x (1.44 … 1.51) |"]) == []


def test_the_guides_figures_stand_beside_ours():
    """The same share of head_dim, the same bits; marked as the guide's."""
    record = json.loads((RUNS / "validate_ppl_smollm2-135m.json").read_text())
    lines = (
        tables.table("validate_ppl_smollm2-135m", record, "rank,bits,target", "beside_guide").markdown().splitlines()
    )
    cell = {line.split(" | ")[0].strip("| "): line.split(" | ")[-1] for line in lines if line.startswith("| ")}
    assert "rank 120: +6% at 1.03x (Qwen2.5-7B)" in cell["V rank 60"] and "rank 112: +14%" in cell["V rank 56"]
    assert "+6%" in cell["V rank 60, 8 bits"] and "ruins quality" in cell["K rank 60"]
    assert cell["V rank 48"] == cell["V rank 64, 8 bits"] == cell["V rank 60, 4 bits"] == "– |"
