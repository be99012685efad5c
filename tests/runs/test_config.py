"""Tables as files: those of this repository, and what is rejected in others."""

import pytest
from checkouts import fake, make_checkout, write_table

from gpt2.common import files, machine
from gpt2.common.errors import PluginError
from gpt2.report import tables
from gpt2.runs.config import THIS, RunOptions, load, select
from gpt2.runs.pages import page_path
from gpt2.runs.up_to_date import Matcher


@pytest.mark.parametrize("quick", [False, True])
def test_every_table_can_be_made_from_its_runs(quick):
    """Every run's arguments are those of its script, and every way to show results exists."""
    options = RunOptions(text="embedded", quick=quick, run_generated_code=True)
    known, runs = load(options)
    matcher = Matcher(options, runs)
    assert len(known) >= 12
    for run in runs.values():
        matcher.parsed(run)
        command = matcher.command(run)
        assert ("/results/quick" in command[command.index("--output") + 1]) == quick
        assert not quick or not any("results/" in word and "results/quick" not in word for word in run.words())
    for table in known.values():
        assert table.title and table.about.endswith(".") and "{" not in table.about
        assert {item.get("as") or tables.kind_of(item["results"]) for item in table.show} <= tables.TABLES.keys()

    # Presets of another model are the calibration-free ones, or files that other runs of the same tables make
    _, runs = load(RunOptions(model="org/other-1b", text="embedded", quick=quick))
    assert runs["needle_other-1b"].args["preset"] == ["kv8", "kv4"]
    for run in runs.values():
        presets = run.args.get("preset", [])
        for preset in [presets] if isinstance(presets, str) else presets:
            made = preset.startswith(("results/presets/other-1b-", "results/quick/presets/other-1b-"))
            assert preset in ("kv8", "kv4") or made and run.needs, f"{run.name}: {preset}"
        assert "smollm2" not in " ".join(run.words()), run.name
    own = load(RunOptions(text="embedded", quick=quick))[1]["needle_smollm2-135m"]
    assert own.args["preset"] == ["int4-vonly", "r60-vonly"], "the committed results are of these"


def test_every_committed_result_is_of_a_run_and_on_a_page():
    """Pages of a model other than the embedded one have its name behind the table's."""
    pages = {path.stem for path in (files.RESULTS / "tables").glob("*.md")}
    names = load(RunOptions())[0].keys()
    assert pages >= names
    others = {page.removeprefix(f"{name}_") for page in pages for name in names if page.startswith(f"{name}_")}
    shown = set()
    for model in [RunOptions().model, *others]:
        known, own = load(RunOptions(model=model))
        on_pages = {name for table in known.values() if page_path(RunOptions(model=model), table.name).is_file()
                    for name in table.results}  # fmt: skip
        shown |= on_pages | {need for name in on_pages for need in own[name].needs}
    committed = {machine.untagged(path.stem) for path in (files.RESULTS / "runs").glob("*.json")}
    assert committed <= shown


def test_invalid_tables_are_named(tmp_path):
    checkout = make_checkout(tmp_path)

    def rejected(message: str, **tables: dict) -> None:
        for name, runs in tables.items():
            write_table(checkout, name, runs=runs)
        with pytest.raises(PluginError, match=message):
            load(RunOptions(checkout=checkout))

    (checkout / "configs" / "tables" / "t.json").write_text('{"title": "x"}')
    rejected("t.json: missing: about, runs, show, plots")
    unknown = "t.json: key 'runs.peers_a.argz': unknown: the keys are args, models, needs"
    rejected(unknown, t={"peers_a": fake() | {"argz": {}}})
    rejected("t.json: run r: no script no.py", t={"r": {"script": "no", "args": {}}})
    rejected("run peers_x: no table defines a run peers_y", t={"peers_x": fake(needs=["peers_y"])})
    one, other = ({"peers_x": fake({"size": size})} for size in (1, 2))
    rejected("u.json: run peers_x is defined differently in another table", t=one, u=other)


def test_what_measures_time_has_a_name_for_each_kind_of_machine(tmp_path):
    checkout = make_checkout(tmp_path, t={"peers_{model}": fake(per_machine=True), "peers_y": fake()})
    for options, wanted in {"avx512": "peers_m", "avx2": "peers_m_avx2", "avx2-two": "peers_m_avx2-two"}.items():
        known, runs = load(RunOptions("m", machine=options, checkout=checkout))
        assert runs.keys() == {wanted, "peers_y"} and known["t"].results == [wanted, "peers_y"]
        assert [item["results"] for item in known["t"].show] == ["peers_m", "peers_y"], "what is shown doesn't depend"
        assert runs[wanted].output == f"runs/{wanted}.json"
        assert select(["peers_m"], known, runs)[1] == select([wanted], known, runs)[1] == [wanted]
    _, runs = load(RunOptions("m", machine=THIS, checkout=checkout))
    assert machine.named("peers_m", machine.tag()) in runs
    for bad in ("laptop", "avx2_x", "../avx2", "avx2-X"):
        with pytest.raises(PluginError, match="a tag is one of avx512, avx2"):
            RunOptions(machine=bad)


def test_names_are_filled_in_and_selected(tmp_path):
    run = fake({"reads": ["{results}/x", "{text}+self"], "fails": True})
    checkout = make_checkout(tmp_path, t={"peers_{model}": run}, u={"peers_u": fake()})
    known, runs = load(RunOptions("folder/My-Model/", "t.txt", True, checkout=checkout))
    assert known["t"].results == ["peers_my-model"]
    words = runs["peers_my-model"].words()
    assert words[0] == "--reads" and words[1].endswith("results/quick/x") and words[2:] == ["t.txt+self", "--fails"]
    assert select([], known, runs) == ([known["t"], known["u"]], ["peers_my-model", "peers_u"])
    assert select(["t", "peers_u"], known, runs) == ([known["t"]], ["peers_u", "peers_my-model"])
    with pytest.raises(PluginError, match="no table v in configs/tables: there are t, u"):
        select(["v"], known, runs)


def test_a_model_may_have_arguments_of_its_own(tmp_path):
    run = fake({"tokens": 8, "seed": 1}, models={"slow-1b": {"tokens": 4}}, quick={"tokens": 2})
    checkout = make_checkout(tmp_path, one={"r_{model}": run})

    def args(model: str, quick: bool = False) -> dict:
        return load(RunOptions(model=model, text="embedded", quick=quick, checkout=checkout))[1][f"r_{model}"].args

    assert args("slow-1b") == {"tokens": 4, "seed": 1}
    assert args("other-1b")["tokens"] == 8
    assert args("slow-1b", quick=True)["tokens"] == 2, "small runs are small for every model"
