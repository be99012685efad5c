"""Scripts from the outside, on a tiny model: flags, files, messages, exit codes."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure
from pictures import draw_nothing
from script_runs import CALIBRATE, GENERATE, SMALL, SMALL_EVAL, TUNE, VALIDATE, listing, run
from tiny import tiny_model, word_text

from gpt2.common import files
from gpt2.common.errors import PluginError
from gpt2.compression.calibration.file import load_calibration
from gpt2.compression.codecs import IdentityCompressor
from gpt2.compression.presets import create_cache_from_preset
from gpt2.experiments import ablation
from gpt2.report import plots

FOLDER = files.ROOT / "scripts"
SCRIPTS = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.py"))
NO_BASIS = ["--codec", "identity", "--target", "kv"]
QUICK_EVAL = ["--eval-tokens", "64", "--eval-seq-len", "32", "--chunk", "16"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_a_manual_unknown_flags_are_rejected_and_ctrl_c_is_expected(script, capsys):
    """Of what isn't Python's own a script imports gpt2 first, which takes milliseconds and prepares for Ctrl-C."""
    assert run(script, "--help") == 0
    text = capsys.readouterr().out
    assert f"python scripts/{script}.py" in text, "an example that can be pasted"
    assert "(default:" in text and "(default: None)" not in text
    assert run(script, "--preset", "x", "--no-such-flag") == 2
    assert "--no-such-flag" in capsys.readouterr().err
    imports = [node for node in ast.parse((FOLDER / f"{script}.py").read_text()).body
               if isinstance(node, (ast.Import, ast.ImportFrom))]  # fmt: skip
    names = [getattr(node, "module", None) or node.names[0].name for node in imports]
    packages = [name.split(".")[0] for name in names]
    assert next(name for name in packages if name not in sys.stdlib_module_names) == "gpt2"


def test_calibrate_writes_where_it_is_asked_to(tiny_flags, tmp_path, capsys, monkeypatch):
    assert run(CALIBRATE, *tiny_flags, *SMALL, "--rank", 9, "--output", "out/c.pt", "--gradient-checkpointing") == 0
    assert listing(tmp_path) == {"words.txt", "out/c.pt", "out/c.png"}
    meta = load_calibration(tmp_path / "out/c.pt").meta
    assert (meta["rank"], meta["samples"], meta["seq_len"], meta["tokens"]) == (9, 3, 64, 192)
    said = capsys.readouterr().out
    assert "variance kept at rank 9 of 12" in said and "need no gradients" in said
    draw_nothing(monkeypatch)
    monkeypatch.setattr(files, "RESULTS", tmp_path / "checkout" / "results")
    assert run(CALIBRATE, *tiny_flags, *SMALL) == 0
    (written,) = {name for name in listing(tmp_path) if name.endswith(".pt")} - {"out/c.pt"}
    assert written.startswith("checkout/results/calibrations/kv_lowrank_calib_tiny-llama"), "without --output"
    assert f"wrote {written} and " in (said := capsys.readouterr().out) and "will be replaced" not in said
    assert run(CALIBRATE, *tiny_flags, *SMALL) == 0
    assert f"note: {written} will be replaced" in capsys.readouterr().out
    own = ["--codec", "ln_nullspace+pca", "--rank", 1, "--output", "out/n.pt"]  # of fewer coordinates than channels
    assert run(CALIBRATE, *tiny_flags, *SMALL, *own) == 0 and "kept at rank 1 of 11" in capsys.readouterr().out


def test_safetensors_all_the_way(tiny_flags, tmp_path, monkeypatch):
    """Calibrated into it, tuned from it, found beside the preset."""
    draw_nothing(monkeypatch)
    assert run(CALIBRATE, *tiny_flags, *SMALL, "--output", "out/c.safetensors") == 0
    assert listing(tmp_path) == {"words.txt", "out/c.safetensors", "out/c.png"}
    assert run(TUNE, *tiny_flags, *QUICK_EVAL, "--target-ppl-delta", "0.9", "--rank-grid", "12", "--bits", "8",
               "--study", "s.db", "--calibration", "out/c.safetensors", "--output", "out/p.json") == 0  # fmt: skip
    assert json.loads((tmp_path / "out/p.json").read_text())["calibration_file"] == "c.safetensors"
    flags = [*tiny_flags[:2], "--preset", "out/p.json", "--prompt", "w2 w3 w4", "--max-new-tokens", "3"]
    assert run(GENERATE, *flags) == 0


def test_tune_writes_a_preset_that_makes_a_cache(tiny_flags, tmp_path, capsys):
    flags = [*tiny_flags, *SMALL, *QUICK_EVAL, "--target-ppl-delta", "0.9", "--rank-grid", "12,10", "--bits", "16,8"]
    flags += ["--study", "s.db", "--output", "p.json"]
    assert run(TUNE, *flags) == 0
    assert "chosen: rank" in capsys.readouterr().out
    assert (tmp_path / "p.png").exists()
    preset = json.loads((tmp_path / "p.json").read_text())
    keys = ["model", "rank", "target", "bits", "compression_ratio", "baseline_ppl", "compressed_ppl", "ppl_delta"]
    assert set(keys) | {"calibration_file", "head_dim", "num_layers"} <= preset.keys()
    assert preset["ppl_delta"] == pytest.approx(preset["compressed_ppl"] / preset["baseline_ppl"] - 1, abs=1e-4)
    inside = [t for t in preset["trials"] if t["ppl_delta"] <= 0.9]
    assert preset["compression_ratio"] == pytest.approx(max(t["compression_ratio"] for t in inside), abs=1e-3)
    cache, x = create_cache_from_preset(preset), torch.randint(2, 97, (1, 30))
    assert tiny_model().generate(x, past_key_values=cache, use_cache=True, max_new_tokens=5).shape == (1, 35)
    # The same command again finds the calibration and every trial done
    assert run(TUNE, *flags) == 0
    assert "calibration: using" in (said := capsys.readouterr().out) and "tuning: 3 measured" in said.splitlines()[1]


def test_tune_per_layer(tiny_flags, tmp_path, capsys, monkeypatch):
    flags = [*tiny_flags, *NO_BASIS, *QUICK_EVAL, "--study", "s.db", "--bits", "8,4"]
    assert run(TUNE, *flags, "--layer-ablation", "--output", "a.json") == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert len(rows) == 3 * 2 * 2 and listing(tmp_path) == {"words.txt", "a.json", "a.png"}, "an ablation, no search"
    largest = max(row["kl_nats"] for row in rows)
    assert f" ({largest:.2g}), " in capsys.readouterr().out, "the table names the layers that lose most"
    draw_nothing(monkeypatch)
    assert run(TUNE, *flags, "--per-layer", "--target-ppl-delta", "0.02", "--output", "p.json") == 0
    preset = json.loads((tmp_path / "p.json").read_text())
    assert any(trial["label"].startswith("per layer ") for trial in preset["trials"])
    cache = create_cache_from_preset(preset)
    assert cache.layers[0].stores["V"].compressor.quantizer.bits in (4, 8, 16)


def test_tune_without_a_basis_and_segments(tiny_flags, tmp_path):
    """No calibration is made; segments are as long as the tiny model's 512; no folder of the machine is recorded."""
    flags = [*tiny_flags, *NO_BASIS, "--bits", "8", "--eval-tokens", "512", "--target-ppl-delta", "0.9"]
    study = files.ROOT / "results/demo/test.db"
    assert run(TUNE, *flags, "--study", study, "--output", "p.json") == 0
    assert not list(tmp_path.rglob("*.pt")) and create_cache_from_preset(tmp_path / "p.json").codec_bytes() == 0
    preset = json.loads((tmp_path / "p.json").read_text())
    args = preset["provenance"]["args"]
    assert preset["figures"]["tokens"] == 511
    assert args["study"] == "results/demo/test.db" and args["output"] == "p.json"


def test_validate_proves_that_the_cache_is_on_the_path(tiny_flags, tmp_path, capsys, monkeypatch):
    """A cache that ignores its codec would make every figure look perfect: the script must not succeed then."""
    monkeypatch.setattr(plots, "spectra", lambda *args, **how: Figure(figsize=(1, 1)))  # of its calibration
    flags = [*tiny_flags, *SMALL, *QUICK_EVAL, "--chunk", 32, "--ranks", 9, "--bits", "16,4", "--output", "v.json"]
    assert run(VALIDATE, *flags, "--layer-groups", 2) == 0
    assert "the model reads the cache: identity changes no token" in capsys.readouterr().out
    record = json.loads((tmp_path / "v.json").read_text())
    assert (tmp_path / "v.png").exists()
    assert {row["group"] for row in record["rows"]} == set(ablation.GROUPS)
    identity, lossy = (row for row in record["rows"] if row["group"] == "control")
    assert identity["largest_nll_change"] == 0 and identity["kl_nats"] == 0
    assert record["text_sha256"] and record["calibration"]["fingerprint"] == record["fingerprint"]
    monkeypatch.setattr(ablation, "compressors_for", lambda *args, **how: ([IdentityCompressor()] * 3,) * 2)
    assert run(VALIDATE, *flags, "--groups", "control") == 2
    assert "the controls failed" in capsys.readouterr().err


BAD = [
    ([CALIBRATE, "--model", "smollm2-135"], "Did you mean 'smollm2-135m'?"),
    ([CALIBRATE, "--rank", "13"], "rank 13 is out of range: "),
    ([CALIBRATE, "--rank", "0"], "0 is not a positive number"),
    ([CALIBRATE, "--seq-len", "511", "--text", "short.txt"], "fewer than one segment of 511"),
    ([CALIBRATE, "--device", "cuda:9"], "is not there"),
    ([TUNE, "--eval-seq-len", "1"], "an evaluated segment has 1 token: expected at least 2"),
    ([TUNE, "--target-ppl-delta", "5"], "5 is out of range: 0.05 means 5 %"),
    ([TUNE, "--target-ppl-delta", "-0.1"], "out of range"),
    ([TUNE, "--rank-grid", "12,x"], "argument --rank-grid: '12,x' is not whole numbers with commas between them"),
    ([TUNE, "--num-trials", "x"], "argument --num-trials: 'x' is not a whole number"),
    ([TUNE, "--target-ppl-delta", "5 %"], "argument --target-ppl-delta: '5 %' is not a number"),
    ([TUNE, "--name", "a/b"], "argument --name: 'a/b' becomes a part of a file's name: give a word without / and"),
    ([GENERATE, "--preset", "kv4", "--document", "words.txt", "--prompt", "w2"], "--prompt has no place beside"),
    ([GENERATE, "--preset", "kv4", "--question", "w2"], "--question belongs to --document"),
    ([TUNE, "--rank-grid", "99"], "rank 99 is out of range"),
    ([TUNE, "--bits", "7"], "bits 7 is not available: use 4, 8, 16"),
    ([TUNE, "--target", "q"], "invalid choice"),
    ([TUNE, "--study", "short.txt"], "can't use short.txt as a study (file is not a database)"),
    ([TUNE, "--study", "pipe"], "it is no regular file"),
    ([TUNE, "--study", "mysql://name:secret@host/x"], "can't use host/x as a study (expected an SQLite file, or a URL"),
    ([TUNE, "--calibration", "words.txt", "--output", "link.json"], "--output and --text name the same file"),
    ([CALIBRATE, "--output", "link.pt"], "--output and --text name the same file"),
    ([CALIBRATE, "--output", "x" * 300 + ".pt"], "File name too long"),
    ([CALIBRATE, "--output", "c.json"], "expected a name that ends in .pt or .safetensors, got c.json"),
    ([TUNE, "--output", "p.txt"], "expected a name that ends in .json, got p.txt"),
    (["benchmarks/calibration", "--seq-len", "511", "--text", "short.txt"], "fewer than one segment of 511"),
    (["eval_stability", "--preset", "kv4", "--output", "s"], "expected a name that ends in .json, got s"),
    ([TUNE, "--study", "half.db"], "can't use half.db as a study"),
    ([TUNE, "--calibration", "words.txt", *SMALL_EVAL], "not a readable calibration file"),
    ([VALIDATE, "--groups", "rank,nope"], "unknown nope"),
    ([GENERATE, "--preset", "\x1b[2J.json"], r"no preset file \x1b[2J.json"),
    ([GENERATE, "--preset", "r112-vonly", "--model", "Qwen/Qwen2.5-7B"], "did you mean 'r120-vonly'?"),
    (["reproduce_tables", "--quick", "--results", "elsewhere"], "--results is for --html alone"),
    (["reproduce_tables", "--check", "needle"], "--check takes no names of tables"),
]


@pytest.mark.parametrize(("command", "message"), BAD, ids=lambda value: " ".join(value) if type(value) is list else "")
def test_bad_input_is_one_clear_line(command, message, tiny_flags, tmp_path, capsys):
    (tmp_path / "short.txt").write_text(word_text(300))
    (tmp_path / "half.db").write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    for link in ("link.pt", "link.json"):
        (tmp_path / link).symlink_to("words.txt")
    os.mkfifo(tmp_path / "pipe")
    before = listing(tmp_path)
    script, *flags = command
    defaults = dict(zip(tiny_flags[::2], tiny_flags[1::2], strict=True)) if script != GENERATE else {}
    code = run(script, *(word for pair in defaults.items() for word in pair if pair[0] not in flags), *flags)
    err = capsys.readouterr().err
    assert code == 2 and message in err and "Traceback" not in err and "secret" not in err
    assert listing(tmp_path) == before, "nothing may be left behind"


def test_a_model_without_a_tokenizer_is_no_short_text(tiny_flags, tmp_path, capsys):
    """transformers makes an empty tokenizer for some families where there are no files of one."""
    tiny_model("qwen2").save_pretrained(tmp_path / "bare")
    for flags in (["--document", "words.txt"], ["--prompt", "w5 w6 w7"]):
        assert run(GENERATE, "--model", "bare", "--preset", "kv4", *flags) == 2
        assert "the model's tokenizer makes no token of" in capsys.readouterr().err


def test_the_text_to_time_calibration_on_is_counted_before_calibrations_run(tiny_flags, monkeypatch, capsys):
    """Of 1,800 tokens."""
    popen, said = subprocess.Popen, []

    def child(command, **how):
        if sys.executable in command:
            raise PluginError("a child ran")
        return popen(command, **how)

    monkeypatch.setattr(subprocess, "Popen", child)
    for tokens in (100, 500, 1000):
        assert run("benchmarks/calibration", *tiny_flags, "--seq-len", tokens) == 2
        said.append(capsys.readouterr())
    assert "note" not in said[0].out and "a child ran" in said[0].err and "a child ran" in said[1].err
    assert "has only 3 of the 10 segments: 2 timed rounds" in said[1].out
    assert "has one segment of 1000 tokens: expected at least 2" in said[2].err
