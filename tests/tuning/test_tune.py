"""The search over codecs from its script to a preset, and ratios of both; that over a grid is in tests/scripts."""

import json
from functools import partial

import optuna
import pytest
import torch
from kinds import MODELS
from layer_shapes import model_of
from pictures import draw_nothing
from script_runs import SMALL, SMALL_EVAL, TUNE, listing, run
from tiny import save_tiny

from gpt2.common.errors import BudgetNotMet
from gpt2.compression.cache import size
from gpt2.compression.presets import create_cache_from_preset, load_preset
from gpt2.tuning.measurement import Search
from gpt2.tuning.trials import Trial

CODEC = [*SMALL[:2], "--seq-len", "160", *SMALL_EVAL, "--search", "codec", "--study", "s.db", "--output", "p.json"]


def test_it_writes_a_preset_of_the_best_codec_and_resumes(tiny_flags, llama, tmp_path, capsys, monkeypatch):
    families = {"identity", "joint+mixed", "pca"}
    flags = [*tiny_flags, *CODEC, "--num-trials", "6", "--target-ppl-delta", "0.9", "--codecs", ",".join(families)]
    flags += ["--recent-grid", "8"]
    assert run(TUNE, *flags) == 0
    preset = json.loads((tmp_path / "p.json").read_text())
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert {"rank", "sink_tokens", "recent_tokens", "ppl_delta"} <= preset.keys()
    assert {trial["family"] for trial in preset["trials"]} == families and 5 <= len(preset["trials"]) <= 6
    inside = [t["compression_ratio"] for t in preset["trials"] if t["ppl_delta"] <= 0.9]
    worse_on_other_text = len(preset["refused_on_evaluation_text"])
    assert preset["compression_ratio"] == pytest.approx(sorted(inside)[-1 - worse_on_other_text], abs=1e-3)
    assert (preset["codec"], preset["quantizer"]) == ("joint", "mixed") and isinstance(preset["bits"], float)
    cache, x = create_cache_from_preset(preset), torch.randint(2, 97, (1, 80))
    assert llama.model.generate(x, past_key_values=cache, use_cache=True, max_new_tokens=5).shape == (1, 85)
    capsys.readouterr()
    draw_nothing(monkeypatch)
    assert run(TUNE, *flags) == 0
    said = capsys.readouterr().out
    assert "calibration: using" in said and said.count("tuning: ") == 1, "everything is done"


def test_ranks_fit_the_narrower_side_of_latent_attention(tiny_flags, tmp_path, capsys, monkeypatch):
    """K has 16 channels there and V has 8: the default grid is of V's."""
    draw_nothing(monkeypatch)
    folder = save_tiny(tmp_path / "latent", model=model_of("deepseek_v3").model)
    flags = ["--model", folder, *tiny_flags[2:], *SMALL, *SMALL_EVAL, "--bits", "4", "--target-ppl-delta", "0.99"]
    assert run(TUNE, *flags, "--study", "s.db", "--output", "p.json") == 0
    assert json.loads((tmp_path / "p.json").read_text())["rank"] <= 8
    assert run(TUNE, *flags, "--rank-grid", "9", "--study", "s.db", "--output", "q.json") == 2
    assert "--rank-grid: rank 9 is out of range: use 1 to 8" in capsys.readouterr().err


def test_without_calibrated_codecs_there_is_no_calibration_and_over_budget_no_preset(
    tiny_flags, tmp_path, capsys, monkeypatch
):
    flags = [*tiny_flags, *CODEC, "--codecs", "identity", "--num-trials", "2"]
    draw_nothing(monkeypatch)
    with monkeypatch.context() as patch:
        over = {"ppl_delta": 1.0, "ppl_delta_interval": [1.0, 1.0]}
        patch.setattr(Search, "evaluate", lambda self, choice, ratio: Trial(choice, 1.0, ratio, over))
        assert run(TUNE, *flags) == BudgetNotMet.exit_code
    err = capsys.readouterr().err
    assert "PPL degradation too high" in err and "--num-trials" in err
    assert not {"p.json", "p.png"} & listing(tmp_path)
    assert run(TUNE, *flags, "--target-ppl-delta", "0.9") == 0
    preset = json.loads((tmp_path / "p.json").read_text())
    capsys.readouterr()
    assert run(TUNE, *flags, "--calibration", "c.pt") == 2
    assert "--calibration c.pt: no codec of this search takes a calibration" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.pt")) and preset["calibration_file"] == "" and preset["codec"] == "identity"
    assert create_cache_from_preset(tmp_path / "p.json").codec_bytes() == 0


def test_flags_of_the_other_search_are_rejected(tiny_flags, capsys):
    for flags, message in (
        (["--per-layer"], "--per-layer belongs to --search grid"), (["--codecs", "identify"], "unknown identify"),
        (["--search", "grid", "--codecs", "identity"], "--codecs belongs to --search codec"),
    ):  # fmt: skip
        assert run(TUNE, *tiny_flags, *CODEC, *flags) == 2
        assert message in capsys.readouterr().err


GRID = [*SMALL, *SMALL_EVAL, "--codec", "identity", "--target", "kv", "--bits", "8", "--target-ppl-delta", "0.9"]


@pytest.mark.parametrize("alike", [True, False])
def test_ratios_are_of_the_context_length_and_the_preset_says_so(alike, tiny_flags, llama, tmp_path, monkeypatch):
    """Where all layers are alike only an unusual length is said."""
    loaded, folder = llama, tiny_flags[1]
    if not alike:
        loaded = MODELS["windowed"]()
        folder = save_tiny(tmp_path / "mixed", model=loaded.model)
        draw_nothing(monkeypatch)
    ratios = {}
    for length, more in {2048: [], 256: ["--context-length", 256]}.items():
        flags = ["--model", folder, *tiny_flags[2:], *GRID, "--study", "sqlite:///s.db", "--output", f"{length}.json"]
        assert run(TUNE, *flags, *more) == 0
        preset = load_preset(f"{length}.json")
        assert preset.get("context_length") == (None if alike and length == 2048 else length)
        ratios[length] = size.compression_ratio(partial(create_cache_from_preset, preset), loaded.geometry, length)
        assert preset["compression_ratio"] == pytest.approx(ratios[length], abs=1e-4)
        assert preset["trials"][0]["compression_ratio"] == pytest.approx(ratios[length], abs=1e-3)
    assert ratios[256] < ratios[2048]
    assert len(optuna.get_all_study_names("sqlite:///s.db")) == 2, "one for each length"
