"""Peers: rows instead of crashes, figures of score and needle, and the script."""

import json
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from script_runs import listing, run
from tiny import char_tokenizer, tiny_loaded, tiny_model, windows
from transformers import DynamicCache

from gpt2.common import files
from gpt2.common.errors import CalibrationNotFound
from gpt2.compression.cache.size import held_bytes
from gpt2.evaluation import kivi, needle, other_caches, peers
from gpt2.evaluation.lineup import Entry
from gpt2.evaluation.perplexity import BASELINE, baseline_factory, compare, score
from gpt2.report import plots, regions

SHAPE = {"hidden_size": 64}  # head_dim 16: groups of 64 and packing by 8 fit
SCRIPT = "compare_peers"


@pytest.fixture(scope="module")
def llama():
    return tiny_loaded("llama", char_tokenizer(), **SHAPE)


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
    for name in caches:
        assert np.array_equal(scores[name].nll, alone[name].nll)
    assert "NaN" in peers.reason(failed["nan"]) and peers.reason(failed["breaks"]) == "RuntimeError: kernel exploded"
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


def test_needles_go_on_without_the_cache_that_fails(llama):
    haystack = torch.randint(60, 90, (2000,), generator=torch.Generator().manual_seed(0))
    compared = [Entry("quanto", "breaks", Breaks), Entry("kivi", "KIVI", lambda: kivi.kivi_cache(3, 4))]
    rows = [{"label": BASELINE}, {"label": "breaks"}, {"label": "KIVI"}, {"label": "gone", "not_run": "why"}]
    grid = {"lengths": [320], "depths": [0.2, 0.8], "trials": 1, "prefill_chunk": 64}
    asked = peers.ask_needles(llama, haystack, compared, rows, **grid)
    assert "exploded" in rows[1]["needle_not_run"] and "needle_exact_match" not in rows[1] and len(rows[3]) == 2
    caches = {BASELINE: baseline_factory(llama), "KIVI": compared[1].make}
    alone = needle.measure(llama, haystack, caches, **grid)
    assert asked["summary"] == needle.summarize(alone)
    assert sorted(map(str, asked["cells"])) == sorted(map(str, needle.cells(alone)))
    assert rows[2]["needle_exact_match"] == asked["summary"][0]["exact_match"]


def test_reasons_name_no_folder_of_the_machine():
    lost = CalibrationNotFound("Calibration file not found: c.pt. Looked at: /srv/me/c.pt. Make it")
    assert peers.reason(lost) == "Calibration file not found: c.pt."
    assert peers.reason(OSError(f"bad {files.ROOT}/gpt2/x.py")) == "OSError: bad gpt2/x.py"
    assert peers.reason(RuntimeError("can't allocate memory")) == "out of memory"
    assert len(peers.reason(ValueError("x" * 999))) == 160


@pytest.fixture
def flags(tmp_path, monkeypatch, prose):
    """Flags of the script on a tiny saved model, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(plots, "peers", lambda rows, title: Figure())  # drawn by tests/report/test_plots.py
    (tmp_path / "prose.txt").write_text(prose)
    tiny_model("llama", **SHAPE).save_pretrained("tiny")
    char_tokenizer().save_pretrained("tiny")
    return ["--model", "tiny", "--text", "prose.txt", "--eval-tokens", 128, "--eval-seq-len", 64, "--chunk", 32]


def test_the_script_compares(flags, tmp_path, capsys, monkeypatch):
    ask, chunks = needle.ask, set()
    monkeypatch.setattr(needle, "ask", lambda *args: chunks.add(args[-1]) or ask(*args))
    monkeypatch.setattr(other_caches, "PAPER_SINKS", (4,))
    monkeypatch.setattr(peers, "WEIGHED_TOKENS", 256)
    monkeypatch.setitem(sys.modules, "optimum.quanto", None)
    more = ["--peers", "quanto,kivi,lowrank", "--preset", "kv4", "--needle-context-lengths", 320, "--num-trials", 1]
    assert run(SCRIPT, *flags, *more) == 0 and chunks == {32}
    said = capsys.readouterr().out
    assert "quanto 4 bits, residual 128  not run: optimum-quanto is not installed" in said and "KIVI 3 bits" in said
    assert listing(tmp_path / "results") == {"runs/peers_tiny.json", "plots/peers_tiny.png"}
    record = json.loads((tmp_path / "results/runs/peers_tiny.json").read_text())
    assert {"args", "git_commit", "versions", "fingerprint", "text_sha256", "peer_versions"} <= record.keys()
    rows = {row["label"]: row for row in record["rows"]}
    assert len(rows) == 1 + 4 + 3 + 1 + 1 and len(record["needle"]["cells"]) == 5 * (1 + 3 + 1)
    assert sum("not_run" in row for row in record["rows"]) == 5 and "not_run" in rows["low rank"]
    assert rows["kv4"]["preset"] and "needle_exact_match" in rows["KIVI 2 bits"]
    assert rows["KIVI 2 bits"]["kl_nats"] > rows["KIVI 4 bits"]["kl_nats"] > 0
    table = regions.fill("<!-- results: peers_tiny kivi -->\n<!-- end -->", tmp_path / "results/runs")
    assert table.count("| KIVI") == 3 and "quanto" not in table and "| 16-bit cache | 384 | 1.00x |" in table
    more = ["--peers", "fp8", "--preset", "--needle-context-lengths", "none", "--output", "p.json"]
    assert run(SCRIPT, *flags, *more) == 0
    record = json.loads((tmp_path / "p.json").read_text())
    assert record["needle"] is None and [row["label"] for row in record["rows"]] == [BASELINE, "fp8, a scale per layer"]


@pytest.mark.parametrize(("more", "message"), [
    (["--peers", "kivi,nope"], "unknown nope"),
    (["--preset", "none.json"], "no preset file none.json"),
    (["--needle-context-lengths", "64"], "a context of 64 tokens has no room"),
])  # fmt: skip
def test_bad_input_is_one_clear_line_before_any_work(flags, more, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "measure", lambda *args, **kwargs: pytest.fail("it measures"))
    assert run(SCRIPT, *flags, *more) == 2
    assert message in (err := capsys.readouterr().err) and "Traceback" not in err
    assert not list(tmp_path.rglob("*.png"))
