"""Tables come from results: README can't show a figure that no committed file holds."""

import json
import subprocess

import pytest

from gpt2.common import files
from gpt2.common.errors import PluginError
from gpt2.report import regions, tables


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

    def region(words: str) -> str:
        return regions.fill(f"<!-- results: {name} {words} -->\n<!-- end -->", tmp_path)

    assert region("each,context=256").splitlines()[1:] == region("machines,context=256").splitlines()[1:]
    other = json.loads(text) | {"machine": {"processor": "Other", "instruction_sets": ["avx2"], "cores": 4}}
    other["rows"] = [row for row in other["rows"] if row["cache"] != "identity, direct"]
    (tmp_path / f"{name}_avx2.json").write_text(json.dumps(other))
    assert "| identity, direct |" in region("context=256") and "Other" not in region("context=256")
    beside = region("machines,context=256")
    assert "Machine: Other" in beside and "| kv4, direct |" in beside and "| identity, direct |" not in beside
    for path in (tmp_path / "benchmark_append.json", tmp_path / "benchmark_append_avx2.json"):
        path.write_text(json.dumps({"rows": [], "args": {}}))
    with pytest.raises(PluginError, match="no table shows benchmark_append of several machines"):
        regions.fill("<!-- results: benchmark_append machines -->\n<!-- end -->", tmp_path)


def test_side_by_side_are_the_presets_that_every_model_has(tmp_path):
    record = json.loads((files.RESULTS / "runs" / "ratio_presets_smollm2-135m.json").read_text())
    other = record | {"model": "../Other-1B", "rows": record["rows"][1:]}
    for name, each in {"ratio_presets_one": record, "ratio_presets_other": other, "needle_a": {}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(each))

    def region(names: str, words: str = "") -> str:
        return regions.fill(f"<!-- results: {names}{words} -->\n<!-- end -->", tmp_path)

    both = "ratio_presets_one+ratio_presets_other"
    assert "Other-1B: Δ perplexity" in region(both) and "kv-2x" not in region(both)
    assert "| kv-8x |" in region(both) and "| kv-8x |" not in region(both, " kv-4x")
    for names, words, message in ((both, " kv-2x", "'kv-2x'"), ("needle_a+needle_a", "", "no table shows needle_a")):
        with pytest.raises(PluginError, match=message):
            region(names, words)


def test_side_by_side_are_the_tasks_of_all_models(tmp_path):
    """A row for each task that any model was asked, and caches by name."""

    def row(cache: str, **more) -> dict:
        return {"cache": cache, "baseline_exact_match": 1.0, "exact_match": 0.5, "logprob_change_nats": -0.25,
                "prompts": 4} | more  # fmt: skip

    def record(model: str, *tasks: str) -> dict:
        own = [row(cache, task=task) for task in tasks for cache in ("kv4", "kv8")]
        return {
            "model": model,
            "args": {"context_lengths": [512, 1024]},
            "by_task": own,
            "summary": [row("kv4"), row("kv8")],
        }

    for name, each in {"one": record("one", "copying"), "two": record("../two", "copying", "key_value")}.items():
        (tmp_path / f"tasks_{name}.json").write_text(json.dumps(each))
    lines = regions.fill("<!-- results: tasks_one+tasks_two kv4 -->\n<!-- end -->", tmp_path).splitlines()
    assert lines[1:6:2] == [
        "| task | one: uncompressed | kv4 | two: uncompressed | kv4 |",
        "| copying | 100% | 50% (-0.25) | 100% | 50% (-0.25) |",
        "| all | 100% | 50% (-0.25) | 100% | 50% (-0.25) |",
    ]
    assert lines[4] == "| key value | – | – | 100% | 50% (-0.25) |"
    assert "two: 4 prompts of 512 and 1,024 tokens." in lines[-2]


def test_missing_results_are_named(tmp_path):
    region = "<!-- results: validate_ppl_x sinks -->\n<!-- end -->"
    with pytest.raises(PluginError, match="validate_ppl_x.json"):
        regions.fill(region, tmp_path)
    (tmp_path / "validate_ppl_x.json").write_text(json.dumps({"rows": [{"group": "rank"}]}))
    with pytest.raises(PluginError, match="no rows of group sinks"):
        regions.fill(region, tmp_path)
    with pytest.raises(PluginError, match="x.json doesn't hold what is shown of it .KeyError"):
        tables.table("peers_x", {})


def test_nothing_tracked_names_a_folder_of_somebodys_machine():
    tracked = subprocess.run(["git", "-C", str(files.ROOT), "grep", "-lIE", r'["= ]/(home|root|work|tmp|Users)/'],
                             capture_output=True, text=True).stdout.split()  # fmt: skip
    assert [name for name in tracked if name != "tests/report/test_tables.py"] == []
