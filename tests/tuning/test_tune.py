"""The search over codecs from its script to a preset; that over a grid is in tests/scripts."""

import json

import pytest
import torch
from script_runs import SMALL, SMALL_EVAL, TUNE, listing, run
from tiny import tiny_model

from gpt2.common.errors import BudgetNotMet
from gpt2.compression.presets import create_cache_from_preset
from gpt2.tuning.measurement import Search
from gpt2.tuning.trials import Trial

CODEC = [*SMALL[:2], "--seq-len", "160", *SMALL_EVAL, "--search", "codec", "--study", "s.db", "--output", "p.json"]


def test_it_writes_a_preset_of_the_best_codec_and_resumes(tiny_flags, tmp_path, capsys):
    families = {"identity", "joint+mixed", "joint+mixed_fixed", "pca"}
    flags = [*tiny_flags, *CODEC, "--num-trials", "7", "--target-ppl-delta", "0.9", "--codecs", ",".join(families)]
    flags += ["--recent-grid", "8"]
    assert run(TUNE, *flags) == 0
    preset = json.loads((tmp_path / "p.json").read_text())
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    keys = {"codec", "quantizer", "bits", "rank", "sink_tokens", "recent_tokens", "ppl_delta", "trials"}
    assert keys <= preset.keys()
    assert {trial["family"] for trial in preset["trials"]} == families and 6 <= len(preset["trials"]) <= 7
    inside = [t["compression_ratio"] for t in preset["trials"] if t["ppl_delta"] <= 0.9]
    worse_on_other_text = len(preset["refused_on_evaluation_text"])
    assert preset["compression_ratio"] == pytest.approx(sorted(inside)[-1 - worse_on_other_text], abs=1e-3)
    assert preset["quantizer"] in ("mixed", "mixed_fixed") and isinstance(preset["bits"], float)
    cache, x = create_cache_from_preset(preset), torch.randint(2, 97, (1, 80))
    assert tiny_model("llama").generate(x, past_key_values=cache, use_cache=True, max_new_tokens=5).shape == (1, 85)
    capsys.readouterr()
    assert run(TUNE, *flags) == 0
    said = capsys.readouterr().out
    assert "calibration: using" in said and said.count("tuning: ") == 1, "everything is done"


def test_without_a_calibrated_codec_it_makes_no_calibration_and_over_budget_no_preset(tiny_flags, tmp_path, capsys,
                                                                                     monkeypatch):  # fmt: skip
    flags = [*tiny_flags, *CODEC, "--codecs", "identity", "--num-trials", "2"]
    with monkeypatch.context() as patch:
        over = {"ppl_delta": 1.0, "ppl_delta_interval": [1.0, 1.0]}
        patch.setattr(Search, "evaluate", lambda self, choice, ratio: Trial(choice, 1.0, ratio, over))
        assert run(TUNE, *flags) == BudgetNotMet.exit_code
    err = capsys.readouterr().err
    assert "PPL degradation too high" in err and "--num-trials" in err
    assert not {"p.json", "p.png"} & listing(tmp_path)
    assert run(TUNE, *flags, "--target-ppl-delta", "0.9") == 0
    preset = json.loads((tmp_path / "p.json").read_text())
    assert not list(tmp_path.rglob("*.pt")) and preset["calibration_file"] == "" and preset["codec"] == "identity"
    assert create_cache_from_preset(tmp_path / "p.json").codec_bytes() == 0


def test_flags_of_the_other_search_are_rejected(tiny_flags, capsys):
    for flags, message in (
        (["--per-layer"], "--per-layer belongs to --search grid"), (["--codecs", "identify"], "unknown identify"),
        (["--search", "grid", "--codecs", "identity"], "--codecs belongs to --search codec"),
    ):  # fmt: skip
        assert run(TUNE, *tiny_flags, *CODEC, *flags) == 2
        assert message in capsys.readouterr().err
