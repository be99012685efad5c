"""Which caches are compared, those of other packages among them: made, copied and counted; rows instead of crashes."""

import copy
import dataclasses
import importlib
import itertools
import json
import re
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from script_runs import FREE_PRESET, listing, run
from tiny import char_tokenizer, save_tiny, tiny_loaded, windows
from transformers import AutoConfig, DynamicCache, cache_utils

from gpt2.common import files
from gpt2.common.errors import CalibrationNotFound, PluginError
from gpt2.compression.cache.size import cache_bytes, held_bytes
from gpt2.compression.named_caches import from_preset
from gpt2.compression.presets import preset_files
from gpt2.evaluation import kivi, lineup, needle, other_caches, peers
from gpt2.evaluation.lineup import Entry
from gpt2.evaluation.perplexity import BASELINE, baseline_factory, compare, score
from gpt2.models.geometry import LINEAR, Geometry, LayerGeometry
from gpt2.report import plots, regions, tables

H, D, T = 2, 64, 300
SHAPE = {"hidden_size": 64}  # head_dim 16: groups of 64 and packing by 8 fit
PRESET = FREE_PRESET | {"rank": 16, "bits": 4, "head_dim": 16, "calibration_file": "nowhere.pt"}
needs_fp8 = pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="no fp8 in this transformers")


@pytest.fixture(scope="module")
def llama():
    return tiny_loaded("llama", char_tokenizer(), **SHAPE)


@pytest.fixture(scope="module")
def haystack():
    return torch.randint(60, 90, (2000,), generator=torch.Generator().manual_seed(0))


def peer(family: str, **overrides):
    """A cache of transformers for two layers of [B, 2, n, 64]; the test is skipped where its package isn't there."""
    config = AutoConfig.for_model("llama", num_hidden_layers=2, num_attention_heads=H, hidden_size=H * D)
    if family == "fp8":
        return other_caches.SharedCache("fp8", config)
    module, package = other_caches.PACKAGES[family]
    try:
        importlib.import_module(module)
    except ImportError:
        pytest.skip(f"{package} is not installed (requirements-peers.txt)")
    axis = other_caches.AXES[family]
    settings = {"nbits": 4, "axis_key": axis, "axis_value": axis, "q_group_size": 64, "residual_length": 0} | overrides
    return other_caches.SharedCache(family, config, **settings)


def fed(cache, x, chunk: int):
    """What the last update of layer 0 returns for K, after x has gone into every layer."""
    for part in x.split(chunk, dim=2):
        returned = [cache.update(part, part, index)[0] for index in range(len(cache.layers))]
    return returned[0]


@pytest.mark.parametrize("family", ["quanto", "hqq"])
def test_inner_tensors_of_quantized_caches_are_counted(family, x):
    for bits, residual in itertools.product((4, 2), (0, 128)):
        cache = peer(family, nbits=bits, residual_length=residual)
        fed(cache, x[:, :, :256].bfloat16(), 64)
        exact = 64 if residual else 0  # 64 at first, 128 more at once, then 64 in the residual
        numbers = H * D * (256 - exact)
        side = numbers * bits // 8 + numbers // 64 * (2 + 2) + H * D * exact * 2
        assert cache_bytes(cache) == 2 * 2 * side, (bits, residual)


@needs_fp8
def test_fp8_is_counted_and_a_model_that_it_rejects_gives_a_row(x):
    cache = peer("fp8")
    fed(cache, x.bfloat16(), 64)
    assert cache_bytes(cache) == 2 * 2 * (H * D * T + 4)
    found = lineup.for_quality(tiny_loaded("mistral"), ["fp8", "kivi"], [])
    assert "only full attention" in peers.reason(found[0].error) and all(entry.make for entry in found[1:])


def test_methods_of_papers_reject_layers_that_keep_states(llama):
    layers = (*llama.geometry.layers[:2], LayerGeometry(LINEAR))
    hybrid = dataclasses.replace(llama, geometry=Geometry(layers))
    for entry in lineup.for_quality(hybrid, ["kivi", "turboquant"], []):
        assert "is of K and V alone; this model has layers of other kinds: linear_attention" in peers.reason(
            entry.error
        )


@pytest.mark.parametrize("family", ["quanto", "hqq", pytest.param("fp8", marks=needs_fp8)])
def test_a_copy_keeps_what_it_held(family, x):
    cache = peer(family)
    fed(cache, x[:, :, :64], 32)
    twin = copy.deepcopy(cache)
    fed(cache, x[:, :, 64:128], 64)
    returned = fed(twin, x[:, :, 64:96], 32)
    assert returned.shape[2] == 96 and (returned[:, :, :64] - x[:, :, :64]).abs().max() < 1
    assert (cache.get_seq_length(), twin.get_seq_length()) == (128, 96)


def test_an_older_transformers_without_fp8_gives_an_entry_with_the_reason(llama, monkeypatch):
    monkeypatch.delattr(cache_utils, "Fp8QuantizedLayer", raising=False)
    (found,) = lineup.for_quality(llama, ["fp8"], [])
    assert re.fullmatch(r"transformers 5\.\S+ has no fp8 cache: install .*requirements\.txt", peers.reason(found.error))


def test_a_package_that_is_missing_gives_entries_with_errors(llama, monkeypatch):
    for module, _ in other_caches.PACKAGES.values():
        monkeypatch.setitem(sys.modules, module, None)
    found = lineup.for_quality(llama, ["quanto", "hqq", "kivi"], [])
    assert [entry.make is None for entry in found] == [True] * 8 + [False] * 6
    assert peers.reason(found[0].error) == "optimum-quanto is not installed: pip install -r requirements-peers.txt"
    with pytest.raises(PluginError, match="--peers hqq: hqq is not installed"):
        lineup.for_speed(llama, [], packages=["hqq"])


def test_built_in_presets_are_compared_unless_others_are_given(llama, tmp_path, monkeypatch):
    assert "no preset rN-vonly" in peers.reason(lineup.for_quality(llama, ["lowrank"])[0].error)
    for name, own in {"r12-vonly": {"rank": 12, "bits": 16, "codec": "pca"}, "int4-vonly": {}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(PRESET | own | {"model": llama.spec, "name": name}))
    monkeypatch.setattr(preset_files, "BUILT_IN", (tmp_path,))
    found = lineup.for_quality(llama, ["lowrank"])
    assert [(entry.family, entry.label) for entry in found] == [("lowrank", "r12-vonly"), ("ours", "int4-vonly")]
    assert isinstance(found[0].error, CalibrationNotFound) and found[1].preset["bits"] == 4
    assert [entry.label for entry in lineup.for_quality(llama, [], [])] == []
    for names, message in ((["int5-vonly"], "did you mean 'int4-vonly'"),
                           (["int4-vonly"] * 2, "two caches are called 'int4-vonly'")):  # fmt: skip
        with pytest.raises(PluginError, match=message):
            lineup.for_quality(llama, [], names)
    with pytest.raises(PluginError, match="no cache is called 'KIVI 9 bits': there are r12-vonly; int4-vonly"):
        lineup.only(found, ["KIVI 9 bits"])
    assert lineup.only(found, None) == found and lineup.only(found, ["int4-vonly"]) == found[1:]


def test_a_preset_of_low_rank_is_compared_once_and_also_where_only_other_caches_of_peers_are(llama, monkeypatch):
    monkeypatch.setattr(lineup, "built_in_presets", lambda: {llama.spec: {"r12-vonly": {}}})
    monkeypatch.setattr(lineup, "from_preset", lambda name, loaded: replace(from_preset("kv4", loaded), label=name))
    for only, expected in ((None, ["KIVI 4 bits", "r12-vonly"]), (["KIVI 4 bits"], ["KIVI 4 bits", "r12-vonly"])):
        found = lineup.for_quality(llama, ["kivi", "lowrank"], ["r12-vonly"], only)
        labels = [entry.label for entry in found]
        assert labels.count("r12-vonly") == 1 and [label for label in labels if label in expected] == expected


def test_caches_are_told_apart_by_what_decides_what_they_read(llama, tmp_path):
    """So that answers of an earlier run aren't taken for those of another preset or version."""
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    for path, bits in ((one, 4), (other, 8)):
        files.write_json(path, FREE_PRESET | {"name": "same", "rank": 16, "bits": bits, "head_dim": 16})
    told = [lineup.for_quality(llama, [], [str(path)])[0] for path in (one, other)]
    assert told[0].label == told[1].label and told[0].identity != told[1].identity
    assert told[0].identity == from_preset(str(one), llama).identity()
    (kivi_entry, *_) = lineup.for_quality(llama, ["kivi"], [])
    assert kivi_entry.identity == {"label": kivi_entry.label}
    assert set(other_caches.identity("fp8", "fp8")) == {"label", "transformers"}


def test_caches_for_speed_come_by_name_with_the_baseline_first(llama):
    choices = [from_preset("kv4", llama)]
    assert list(lineup.for_speed(llama, choices)) == [BASELINE, "kv4"]
    caches = lineup.for_speed(llama, choices, identity=True, direct=True)
    assert list(caches) == [BASELINE, "identity", "identity, direct", "kv4", "kv4, direct"]
    assert [caches[name]().direct for name in ("kv4", "kv4, direct")] == [False, True]
    alone = lineup.for_speed(llama, choices, direct=True, reconstruct=False)
    assert list(alone) == [BASELINE, "kv4, direct"], "what can be read is not reconstructed as well"


def test_rows_that_read_codes_slower_than_the_baseline_are_named():
    def row(cache: str, low: float, median: float, high: float, context: int = 8000) -> dict:
        ratio = {"tokens_per_s_median": median, "tokens_per_s_quartiles": [low, high]}
        return {"cache": cache, "context_tokens": context, "batch_size": 4, "ratio_to_baseline": ratio}

    failed = row("kv2, direct", 0, 0, 0) | {"ratio_to_baseline": None, "out_of_memory": True}
    rows = [failed, row("kv4", 0.4, 0.5, 0.6), row("int8, direct", 0.9, 0.97, 1.02), row("kv8, direct", 1.1, 1.2, 1.3)]
    assert lineup.slower_directly(rows) is None
    said = lineup.slower_directly([*rows, row("kv4, direct", 0.9, 0.931, 0.95), row("a, direct", 0.4, 0.5, 0.6, 256)])
    assert "kv4, direct 0.93x at 8,000 tokens, batch of 4; a, direct 0.50x at 256 tokens" in said
    assert "\n" not in said and "when='auto'" in said and "int8" not in said


class Breaks(DynamicCache):
    """Fails after 100 tokens."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self.get_seq_length() > 100:
            raise RuntimeError("kernel\n  exploded")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class Poisons(DynamicCache):
    def update(self, *args, **kwargs):
        keys, values = super().update(*args, **kwargs)
        return keys, values * torch.nan


def test_one_cache_that_fails_does_not_stop_the_others(llama):
    segments = windows(3, 160)
    caches = {BASELINE: baseline_factory(llama), "kivi": lambda: kivi.kivi_cache(3, 2)}
    broken = {"nan": Poisons, "breaks": Breaks}
    failed = {}
    scores = score(llama, segments, broken | caches, chunk=32, batch_size=2, failed=failed)
    assert list(scores) == [BASELINE, "kivi"] and set(failed) == set(broken)
    alone = score(llama, segments, caches, chunk=32, batch_size=2)
    assert all(np.array_equal(scores[name].nll, alone[name].nll) for name in caches)
    assert peers.reason(failed["nan"]).startswith("the loss with cache 'nan' is NaN or infinite: try --dtype float32")
    assert peers.reason(failed["breaks"]) == "RuntimeError: kernel exploded"
    for name, how in ((BASELINE, {"failed": {}}), (BASELINE, {}), ("peer", {})):
        with pytest.raises(RuntimeError, match="exploded"):
            score(llama, segments[:1], {name: Breaks}, chunk=32, **how)


def test_rows_have_what_score_and_weights_say(llama):
    segments = windows(2, 160)
    own = Entry("kivi", "KIVI", lambda: kivi.kivi_cache(3, 2))
    broken = Entry("quanto", "breaks", lambda: kivi.kivi_cache(3, 2).nothing)
    rows = peers.measure(llama, segments, [broken, own], chunk=32, batch_size=1)
    assert [row["label"] for row in rows] == [BASELINE, "breaks", "KIVI"]
    assert rows[1]["not_run"].startswith("AttributeError")
    assert rows[0]["ppl_delta"] == 0 and rows[0]["bytes_per_token"] == llama.geometry.bytes_per_token()
    scores = score(llama, segments, {BASELINE: baseline_factory(llama), "KIVI": own.make}, chunk=32, batch_size=1)
    assert rows[2].items() >= compare(scores[BASELINE], scores["KIVI"]).items() and rows[2]["kl_nats"] > 0
    assert rows[2]["cache_bytes_2048"] == held_bytes(own.make, llama.geometry, 2048, chunk=32)
    assert rows[2]["compression_ratio_2048"] == rows[0]["cache_bytes_2048"] / rows[2]["cache_bytes_2048"]


def test_needles_go_on_without_the_cache_that_fails(llama, haystack):
    compared = [Entry("quanto", "breaks", Breaks), Entry("kivi", "KIVI", lambda: kivi.kivi_cache(3, 4))]
    rows = [{"label": BASELINE}, {"label": "breaks"}, {"label": "KIVI"}, {"label": "gone", "not_run": "why"}]
    grid = {"lengths": [320], "depths": [0.2, 0.8], "trials": 1, "prefill_chunk": 64}
    asked = peers.ask_needles(llama, haystack, compared, rows, **grid)
    assert "exploded" in rows[1]["needle_not_run"] and "needle_exact_match" not in rows[1] and len(rows[3]) == 2
    alone = needle.measure(llama, haystack, {BASELINE: baseline_factory(llama), "KIVI": compared[1].make}, **grid)
    assert asked["summary"] == needle.summarize(alone)
    assert sorted(map(str, asked["cells"])) == sorted(map(str, needle.cells(alone)))
    assert rows[2]["needle_exact_match"] == asked["summary"][0]["exact_match"]


def test_a_comparison_in_which_no_other_cache_runs_shows_the_baseline(llama, haystack):
    rows = peers.measure(llama, windows(2, 64), [])
    rows.append({"family": "quanto", "label": "quanto", "not_run": "not installed"})
    asked = peers.ask_needles(llama, haystack, [], rows, lengths=[320], depths=[0.2, 0.8], trials=1)
    record = {"model": "m", "text": "t", "rows": rows, "needle": asked, "args": {"needle_context_lengths": [320]}}
    note = tables.table("peers_m", record).note
    assert "Needle: exact match over 2 prompts of 320 tokens." in note


def test_reasons_name_no_folder_of_the_machine():
    lost = CalibrationNotFound("Calibration file not found: c.pt. Looked at: /srv/me/c.pt. Make it")
    assert peers.reason(lost) == "Calibration file not found: c.pt."
    assert peers.reason(OSError(f"bad {files.ROOT}/gpt2/x.py")) == "OSError: bad gpt2/x.py"
    assert peers.reason(RuntimeError("can't allocate memory")) == "out of memory"
    assert len(peers.reason(ValueError("x" * 999))) == 160


@pytest.fixture
def flags(script, tmp_path, monkeypatch):
    """Flags of the script on a tiny model with heads of 16 channels, in the folder of `script`."""
    monkeypatch.setattr(plots, "peers", lambda rows, title: Figure())  # drawn by tests/report/test_plots.py
    save_tiny(tmp_path / "tiny", tokenizer=char_tokenizer(), **SHAPE)
    return ["--model", "tiny", "--text", "prose.txt", "--eval-tokens", 128, "--eval-seq-len", 64, "--chunk", 32]


def test_the_script_compares(flags, tmp_path, capsys, monkeypatch, asked_for):
    monkeypatch.setattr(other_caches, "PAPER_SINKS", (4,))
    monkeypatch.setattr(other_caches, "PAPER_BITS", (4, 2))
    monkeypatch.setattr(peers, "WEIGHED_TOKENS", 256)
    monkeypatch.setitem(sys.modules, "optimum.quanto", None)
    more = ["--peers", "quanto,kivi,lowrank", "--preset", "kv4", "--needle-context-lengths", 320, "--num-trials", 1]
    assert run("compare_peers", *flags, *more) == 0 and asked_for == {(12, 32)}
    said = capsys.readouterr().out
    assert "quanto 4 bits, residual 128  not run: optimum-quanto is not installed" in said and "KIVI 2 bits" in said
    assert listing(tmp_path / "results") == {"runs/peers_tiny.json", "plots/peers_tiny.png"}
    record = json.loads((tmp_path / "results/runs/peers_tiny.json").read_text())
    assert {"args", "git_commit", "versions", "fingerprint", "text_sha256", "peer_versions"} <= record.keys()
    rows = {row["label"]: row for row in record["rows"]}
    assert len(rows) == 1 + 4 + 2 + 1 + 1 and len(record["needle"]["cells"]) == 5 * (1 + 2 + 1)
    assert sum("not_run" in row for row in record["rows"]) == 5 and "not_run" in rows["low rank"]
    assert rows["kv4"]["preset"] and "needle_exact_match" in rows["KIVI 2 bits"]
    assert rows["KIVI 2 bits"]["kl_nats"] > rows["KIVI 4 bits"]["kl_nats"] > 0
    table = regions.fill("<!-- results: peers_tiny kivi -->\n<!-- end -->", tmp_path / "results/runs")
    assert table.count("| KIVI") == 2 and "quanto" not in table and "| 16-bit cache | 384 | 1.00x |" in table
    more = ["--peers", "fp8", "--preset", "--needle-context-lengths", "none", "--output", "p.json"]
    assert run("compare_peers", *flags, *more) == 0
    record = json.loads((tmp_path / "p.json").read_text())
    assert record["needle"] is None and [row["label"] for row in record["rows"]] == [BASELINE, "fp8, a scale per layer"]


def test_bad_input_is_one_clear_line_before_any_work(flags, rejects, monkeypatch):
    monkeypatch.setattr(peers, "measure", lambda *args, **kwargs: pytest.fail("it measures"))
    rejects(partial(run, "compare_peers", *flags), [
        (["--peers", "kivi,nope"], "unknown nope"), (["--preset", "none.json"], "no preset file none.json"),
        (["--needle-context-lengths", "64"], "a context of 64 tokens has no room"),
    ])  # fmt: skip
