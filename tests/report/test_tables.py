"""Tables come from results; what a terminal, Markdown and sorting make of the same cells."""

import json
import subprocess

import pytest

from gpt2.common import files
from gpt2.common.errors import PluginError
from gpt2.report import regions, tables
from gpt2.report.table import Table, number


def region(folder, words: str) -> str:
    """What a page shows of a folder's results."""
    return regions.fill(f"<!-- results: {words} -->\n<!-- end -->", folder)


def test_pages_are_made_of_results_that_have_provenance():
    """Regions are found at all: else tests/runs/test_pages.py, which makes them again, compares nothing."""
    found = {page.name: regions.REGION.findall(page.read_text(encoding="utf-8")) for page in regions.pages(files.ROOT)}
    assert len(found["README.md"]) == 3 and len(found["quality.md"]) >= 10 and len(found["speed.md"]) >= 5
    for path in (files.RESULTS / "runs").glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert {"args", "git_commit", "versions", "device"} <= record.keys(), path.name


def test_side_by_side_are_the_rows_that_all_machines_have(tmp_path):
    """All else of such a table is in docs, which tests/runs/test_pages.py makes again."""
    name = "profile_direct_smollm2-135m"
    text = (files.RESULTS / "runs" / f"{name}.json").read_text()
    (tmp_path / f"{name}.json").write_text(text)
    each, beside = (region(tmp_path, f"{name} {words},context=256") for words in ("each", "machines"))
    assert each.splitlines()[1:] == beside.splitlines()[1:]
    other = json.loads(text) | {"machine": {"processor": "Other", "instruction_sets": ["avx2"], "cores": 4}}
    other["rows"] = [row for row in other["rows"] if row["cache"] != "identity, direct"]
    (tmp_path / f"{name}_avx2.json").write_text(json.dumps(other))
    first, beside = (region(tmp_path, f"{name} {words}") for words in ("context=256", "machines,context=256"))
    assert "| identity, direct |" in first and "Other" not in first
    assert "Machine: Other" in beside and "| kv4, direct |" in beside and "| identity, direct |" not in beside
    for path in (tmp_path / "benchmark_append.json", tmp_path / "benchmark_append_avx2.json"):
        path.write_text(json.dumps({"rows": [], "args": {}}))
    with pytest.raises(PluginError, match="no table shows benchmark_append of several machines"):
        region(tmp_path, "benchmark_append machines")


def test_side_by_side_are_the_presets_that_every_model_has(tmp_path):
    record = json.loads((files.RESULTS / "runs" / "ratio_presets_smollm2-135m.json").read_text())
    other = record | {"model": "../Other-1B", "rows": record["rows"][1:]}
    for name, each in {"ratio_presets_one": record, "ratio_presets_other": other, "needle_a": {}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(each))
    both = "ratio_presets_one+ratio_presets_other"
    shown = region(tmp_path, both)
    assert "Other-1B: Δ perplexity" in shown and "kv-2x" not in shown
    assert "| kv-8x |" in shown and "| kv-8x |" not in region(tmp_path, f"{both} kv-4x")
    for words, message in ((f"{both} kv-2x", "'kv-2x'"), ("needle_a+needle_a", "no table shows needle_a")):
        with pytest.raises(PluginError, match=message):
            region(tmp_path, words)


def test_side_by_side_are_the_tasks_of_all_models(tmp_path):
    """A row for each task that any model was asked, and caches by name."""

    def row(cache: str, **more) -> dict:
        return {"cache": cache, "baseline_exact_match": 1.0, "exact_match": 0.5, "logprob_change_nats": -0.25,
                "prompts": 4} | more  # fmt: skip

    def record(model: str, *tasks: str) -> dict:
        own, summary = [row(cache, task=task) for task in tasks for cache in ("kv4", "kv8")], [row("kv4"), row("kv8")]
        return {"model": model, "args": {"context_lengths": [512, 1024]}, "by_task": own, "summary": summary}

    for name, each in {"one": record("one", "copying"), "two": record("../two", "copying", "key_value")}.items():
        (tmp_path / f"tasks_{name}.json").write_text(json.dumps(each))
    lines = region(tmp_path, "tasks_one+tasks_two kv4").splitlines()
    assert lines[1:6:2] == [
        "| task | one: uncompressed | kv4 | two: uncompressed | kv4 |",
        "| copying | 100% | 50% (-0.25) | 100% | 50% (-0.25) |",
        "| all | 100% | 50% (-0.25) | 100% | 50% (-0.25) |",
    ]
    assert lines[4] == "| key value | – | – | 100% | 50% (-0.25) |"
    assert "two: 4 prompts of 512 and 1,024 tokens." in lines[-2]


def test_missing_results_are_named(tmp_path):
    with pytest.raises(PluginError, match="validate_ppl_x.json"):
        region(tmp_path, "validate_ppl_x sinks")
    (tmp_path / "validate_ppl_x.json").write_text(json.dumps({"rows": [{"group": "rank"}]}))
    with pytest.raises(PluginError, match="no rows of group sinks"):
        region(tmp_path, "validate_ppl_x sinks")
    with pytest.raises(PluginError, match="x.json doesn't hold what is shown of it .KeyError"):
        tables.table("peers_x", {})


def test_nothing_tracked_names_a_folder_of_somebodys_machine():
    tracked = subprocess.run(["git", "-C", str(files.ROOT), "grep", "-lIE", r'["= ]/(home|root|work|tmp|Users)/'],
                             capture_output=True, text=True).stdout.split()  # fmt: skip
    assert [name for name in tracked if name != "tests/report/test_tables.py"] == []


TABLE = Table(
    ["cache", "ms", "against baseline"],
    [["int4, of a long name", "1.0", "0.95x (0.93 … 1.21)"], ["a|b", "12.5", "–"], ["hqq", "not run: no package"]],
    "A note " * 30,
)


def test_a_terminal_gets_aligned_columns_and_wrapped_notes():
    head, rule, *rows = TABLE.console().splitlines()
    assert rows[0] == "int4, of a long name   1.0  0.95x (0.93 … 1.21)" and rows[1] == "a|b                   12.5  –"
    assert head == "cache                   ms  against baseline" and set(rule) == {"-"} and len(rule) == len(rows[0])
    assert rows[2] == "hqq                   not run: no package", "a short row's last cell takes the rest of the line"
    assert len(rows) == 5 and all(len(line) <= 120 for line in rows), "the note has two lines"


def test_long_words_are_wrapped_in_their_column_and_figures_stay_right():
    wide = Table(["families", "which"], [["97", ", ".join(["family"] * 30)], ["2", "x, y"]]).console().splitlines()
    assert all(line.startswith(" " * 10 + "family") or line.startswith("      97  family") for line in wide[2:-1])
    assert sum(line.count("family") for line in wide[2:]) == 30 and wide[-1] == "       2  x, y"


@pytest.mark.parametrize(("cell", "value"), [
    ("+0.14%", 0.14), ("-1,125.6% … +2%", -1125.6), ("0.95x (0.93 … 1.21)", 0.95), ("4.1e-05", 4.1e-5),
    ("12.0 MiB", 12), ("at least 3", 3), ("5 of 5 depths", 5), ("–", None), ("kv4", None), ("**8 bits**", None),
    ("3 (0.1), 4 (0.2)", None),
])  # fmt: skip
def test_the_figure_that_a_cell_is_sorted_by(cell, value):
    assert number(cell) == value
    column = Table(["x"], [[cell], [cell], ["–"]])
    assert column.numeric() == [value is not None], "of most cells"
