"""Tables come from results: README can't show a figure that no committed file holds."""

import json
import subprocess

import pytest

from gpt2.common import files
from gpt2.common.errors import PluginError
from gpt2.report import regions, tables


def test_pages_are_made_of_results_that_have_provenance():
    """Regions are found at all: else tests/runs/test_check.py, which makes them again, compares nothing."""
    found = {page.name: regions.REGION.findall(page.read_text(encoding="utf-8")) for page in regions.pages(files.ROOT)}
    assert len(found["README.md"]) == 2 and len(found["quality.md"]) >= 10 and len(found["speed.md"]) >= 5
    for path in (files.RESULTS / "runs").glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert {"args", "git_commit", "versions", "device"} <= record.keys(), path.name


def test_machines_stand_side_by_side_or_one_below_the_other_and_never_in_one_table(tmp_path):
    name = "profile_direct_smollm2-135m"
    text = (files.RESULTS / "runs" / f"{name}.json").read_text()
    (tmp_path / f"{name}.json").write_text(text)

    def region(words: str) -> str:
        return regions.fill(f"<!-- results: {name} {words} -->\n<!-- end -->", tmp_path)

    alone = region("context=256")
    assert region("each,context=256").splitlines()[1:] == region("machines,context=256").splitlines()[1:]
    other = json.loads(text) | {"machine": {"processor": "Other", "instruction_sets": ["avx2"], "cores": 4}}
    other["rows"] = [row | {"token_ms_median": 987.0} for row in other["rows"] if row["cache"] != "kv4"]
    (tmp_path / f"{name}_avx2.json").write_text(json.dumps(other))
    assert region("context=256") == alone and "987" not in alone
    each = region("each,context=256")
    assert each.count("Machine: ") == 2 and each.count("| batch |") == 2 and "Machine: Other, AVX2, 4 cores" in each
    beside = region("machines,context=256")
    assert beside.count("| batch |") == 1
    assert "| per token, AVX-512 | against baseline, AVX-512 | per token, AVX2 |" in beside
    assert "AVX2: Machine: Other" in beside and "987.0 ms" in beside and "kv4, direct" in beside
    assert "| kv4 |" not in beside, "only rows that both have measured"
    (tmp_path / "benchmark_append.json").write_text(json.dumps({"rows": [], "args": {}}))
    (tmp_path / "benchmark_append_avx2.json").write_text(json.dumps({"rows": [], "args": {}}))
    with pytest.raises(PluginError, match="no table shows benchmark_append of several machines"):
        regions.fill("<!-- results: benchmark_append machines -->\n<!-- end -->", tmp_path)


def test_models_stand_side_by_side(tmp_path):
    record = json.loads((files.RESULTS / "runs" / "ratio_presets_smollm2-135m.json").read_text())
    other = record | {"model": "../Other-1B", "rows": [row | {"kl_nats": 0.5} for row in record["rows"][1:]]}
    for name, each in {"one": record, "other": other}.items():
        (tmp_path / f"ratio_presets_{name}.json").write_text(json.dumps(each))
    both = "<!-- results: ratio_presets_one+ratio_presets_other{} -->\n<!-- end -->"
    text = regions.fill(both.format(""), tmp_path)
    assert "Other-1B: Δ perplexity" in text and text.count("| 0.50000 |") == len(other["rows"])
    assert "kv-2x" not in text, "presets that every model has"
    assert "| kv-8x |" not in regions.fill(both.format(" kv-4x"), tmp_path)
    with pytest.raises(PluginError, match="'kv-2x'"):
        regions.fill(both.format(" kv-2x"), tmp_path)
    with pytest.raises(PluginError, match="no table shows needle_a"):
        (tmp_path / "needle_a.json").write_text("{}")
        regions.fill("<!-- results: needle_a+needle_a -->\n<!-- end -->", tmp_path)


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
