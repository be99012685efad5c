"""Replay: results that today's code still gives are confirmed, and an error planted in a codec is named."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkouts import matcher_of, write_table
from pictures import draw_nothing, small_pictures  # noqa: F401
from script_runs import INT4_PRESET, run
from tiny import word_text

from gpt2.common import files, provenance
from gpt2.common.errors import PluginError
from gpt2.compression.codecs.integer import Int4
from gpt2.compression.codecs.multi_head import JointTransform
from gpt2.evaluation import stability
from gpt2.runs import replay
from gpt2.runs.record import write_record

PEERS = {"peers": "kivi", "preset": ["p.json"], "needle-context-lengths": "none", "text": "words.txt",
         "eval-tokens": 128, "eval-seq-len": 64, "chunk": 32}  # fmt: skip
POSITIONS = {"preset": ["p.json"], "text": "words.txt", "segments": 2, "prompt-tokens": 20, "new-tokens": 40}
PRESETS = {"text": "words.txt", "samples": 2, "seq-len": 100, "eval-tokens": 200, "eval-seq-len": 100, "chunk": 50,
           "ratios": "4,6.4"}  # fmt: skip
RUNS = {
    "peers_x": {"script": "compare_peers", "args": PEERS},
    "by_position_x": {"script": "eval_by_position", "args": POSITIONS | {"greedy-tokens": 4, "chunk": 16}},
    "attention_step_x": {"script": "benchmarks/append", "args": {}},
}
PRESETS_RUN = "ratio_presets_tiny-llama"


def in_this_process(command: list[str], **_) -> SimpleNamespace:
    script = Path(command[1]).with_suffix("")
    code = run(script.relative_to(next(p for p in script.parents if p.name == "scripts")), *command[2:])
    return SimpleNamespace(returncode=code, stderr="")


@pytest.fixture(scope="module")
def results(tmp_path_factory, model_folder):
    """A checkout with results of two runs that can be replayed, and one whose times can't."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "words.txt").write_text(word_text(3000))
    (folder / "p.json").write_text(json.dumps(INT4_PRESET))
    (folder / "scripts").symlink_to(files.ROOT / "scripts")
    (folder / "configs" / "tables").mkdir(parents=True)
    presets = {PRESETS_RUN: {"script": "make_presets", "args": PRESETS, "output": "."}}
    write_table(folder, "t", runs=RUNS | presets, show=[{"results": name} for name in RUNS])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COMMIT", provenance.git_commit() or "")
        made = matcher_of(folder, model=str(model_folder))
        for name in ("peers_x", "by_position_x"):
            in_this_process(made.command(made.runs[name]))
    return folder


@pytest.fixture
def matcher(results, tmp_path, model_folder, monkeypatch):
    """A copy of that checkout as the working folder, where scripts run in this process."""
    shutil.copytree(results, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setattr(replay, "subprocess", SimpleNamespace(run=in_this_process))
    draw_nothing(monkeypatch)
    return matcher_of(tmp_path / "copy", model=str(model_folder))


def test_presets_by_ratio_are_measured_again_with_their_calibration(matcher, monkeypatch, capsys):
    """One segment of each preset, its bits too; the calibration is read, neither made again nor replaced."""
    in_this_process(matcher.command(matcher.runs[PRESETS_RUN]))
    (calibration,) = (matcher.options.results / "calibrations").glob("*.pt")
    made, preset = calibration.stat().st_mtime_ns, next((matcher.options.results / "presets").glob("*.json"))
    assert "segment_sums" not in preset.read_text(), "sums are of results files"
    capsys.readouterr()
    assert replay.replay(matcher, PRESETS_RUN) == []
    assert "calibration: using" in capsys.readouterr().out
    outcome = matcher.replay(PRESETS_RUN)
    assert outcome["agrees"] and outcome["figures"] == 2 * 3 and outcome["largest_share_of_tolerance"] < 0.5
    assert calibration.stat().st_mtime_ns == made
    # Kernels dequantize in the place of the quantizer: what both of them return goes through `heads_of`
    monkeypatch.setattr(JointTransform, "heads_of", wrong_channel(JointTransform.heads_of))
    differing = replay.replay(matcher, PRESETS_RUN)
    assert any(line.startswith("kv-4x, kl_nats of the first segment is") for line in differing)
    assert not any("bits" in line for line in differing)
    calibration.unlink()
    why = replay.replayable(matcher, PRESETS_RUN)
    assert f"calibrations/{calibration.name}, which it was made with, isn't there" in why


def test_results_are_confirmed_until_a_codec_has_one_wrong_offset(matcher, monkeypatch, capsys):
    said = []
    assert replay.replay_all(matcher, list(RUNS), said.append) == []
    assert [line.split()[1] for line in said] == ["agrees", "agrees", "not"] and "missing" in said[2]
    outcome = matcher.replay("peers_x")
    assert outcome["agrees"] and outcome["commit"] == provenance.git_commit() and outcome["figures"] == 3
    assert outcome["largest_share_of_tolerance"] < 0.5
    assert f"up to date, replayed at {outcome['commit']}" in matcher.status(["peers_x"])

    monkeypatch.setattr(Int4, "dequantize", wrong_offset(Int4.dequantize))
    said.clear()
    assert replay.replay_all(matcher, list(RUNS), said.append) == ["peers_x", "by_position_x"]
    assert "int4, kl_nats of the first segment is" in said[0] and "recorded" in said[0] and "baseline" not in said[0]
    assert f"its replay at {outcome['commit']} differs" in matcher.status(["peers_x"])
    path = matcher.record_path("peers_x")
    path.write_text(path.read_text() + "\n")
    assert matcher.replay("peers_x") is None, "the outcome was of another file"


def wrong_offset(dequantize):
    """Every channel gets the code of the channel before it."""
    return lambda self, encoded, rank: dequantize(self, encoded, rank).roll(1, -1)


def wrong_channel(heads_of):
    """Every channel gets what the channel before it was reconstructed to."""
    return lambda self, x, head_dim, start=0: heads_of(self, x.roll(1, -1), head_dim, start)


QUICK = {"text": "words.txt", "codec": "identity", "bits": "8,4", "eval-tokens": 128, "eval-seq-len": 64, "chunk": 32}
VARIED = {"text": "words.txt", "samples": 3, "seq-len": 128, "eval-tokens": 512, "eval-seq-len": 256, "bits": "4,2",
          "rows": "levels,rotation"}  # fmt: skip
STABLE = {"preset": ["p.json"], "text": "words.txt", "eval-tokens": 128, "eval-seq-len": 128, "chunk": 32,
          "num-runs": 3, "vary": "text,seed", "needle-length": 100, "needle-trials": 2}  # fmt: skip
BYTES = {"preset": ["kv4", "kv8"], "context-lengths": "90,300"}
OTHERS = {  # name: definition, figures of its replay
    "layers_x": ({"script": "auto_tune_kv_compression", "args": QUICK | {"layer-ablation": True}}, 3),
    "variations_x": ({"script": "benchmarks/codec_variations", "args": VARIED}, 2),
    "stable_x": ({"script": "eval_stability", "args": STABLE}, 2),
    "bytes_x": ({"script": "benchmarks/cache_bytes", "args": BYTES}, 2),
    "tuned_x": ({"script": "auto_tune_kv_compression", "output": "presets/tuned.json",
                 "args": QUICK | {"target-ppl-delta": 0.9, "study": "s.db"}}, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_part_of_other_results_is_measured_again(name, matcher, model_folder, monkeypatch):
    """The part that the flags leave, and an error in what its figures come from."""
    definition, figures = OTHERS[name]
    # The words of the tiny tokenizer make no needles, and times aren't compared
    monkeypatch.setattr(stability.needle, "accuracy", lambda *args, **how: {"baseline": 0.0, "compressed": 0.0})
    times = {"cache": "compressed", "token_ms_median": 1.0, "ratio_to_baseline": {"tokens_per_s_median": 1.0}}
    monkeypatch.setattr(stability, "measure_cell", lambda *args, **how: [times])
    write_table(Path(), name, runs={name: definition}, show=[])
    matcher = matcher_of(Path().absolute(), model=str(model_folder))
    in_this_process(matcher.command(matcher.runs[name]))
    write_record(matcher, matcher.runs[name])
    assert replay.replay(matcher, name) == [] and matcher.replay(name)["figures"] == figures
    assert not Path("study.db").exists()
    record = json.loads(matcher.record_path(name).read_text())
    matcher.record_path(name).write_text(json.dumps(doubled(record)))
    assert len(replay.replay(matcher, name)) == figures


CALIBRATED = {
    "calib_x": {"script": "calibrate_kv_lowrank", "output": "calibrations/calib_x.pt",
                "args": {"text": "words.txt", "samples": 2, "seq-len": 100}},
    "ranks_x": {"script": "validate_ppl_postbugfix", "needs": ["calib_x"],
                "args": {"text": "words.txt", "groups": "rank", "eval-tokens": 128, "eval-seq-len": 64, "chunk": 32,
                         "calibration": "{results}/calibrations/calib_x.pt"}},
}  # fmt: skip


def test_a_calibration_that_isnt_committed_is_made_for_the_replay(matcher, model_folder, caplog):
    write_table(Path(), "ranks", runs=CALIBRATED, show=[])
    matcher = matcher_of(Path().absolute(), model=str(model_folder))
    for name in CALIBRATED:
        in_this_process(matcher.command(matcher.runs[name]))
        write_record(matcher, matcher.runs[name])
    calibration = matcher.product("calib_x")
    for there in (True, False):
        caplog.clear()
        assert replay.replay(matcher, "ranks_x") == [] and matcher.replay("ranks_x")["figures"] > 1
        assert ("calibrations/calib_x.pt, which it needs, isn't there" in caplog.text) is not there
        calibration.unlink(missing_ok=True)
    assert not calibration.exists()


def doubled(record: dict | list | float):
    """Every measured number of a record, which is any with decimals or a count of bytes, twice as large."""
    if isinstance(record, dict):
        return {key: value if key in ("args", "bits") else 2 * value if key == "bytes" else doubled(value)
                for key, value in record.items()}  # fmt: skip
    if isinstance(record, list):
        return [doubled(value) for value in record]
    return 2 * record if isinstance(record, float) else record


def test_a_replay_computes_as_the_recorded_machine(matcher, monkeypatch):
    """With its threads, and with AVX2 alone where it had no more than that."""
    path, seen = matcher.record_path("peers_x"), []
    record = json.loads(path.read_text())

    def kept(command, env, **_):
        seen.append(env)
        return in_this_process(command)

    monkeypatch.setattr(replay, "subprocess", SimpleNamespace(run=kept))
    monkeypatch.setattr(replay.machine, "instruction_sets", lambda: ["avx2", "fma", "avx512f"])
    for sets in (["avx2", "fma"], ["avx2", "fma", "avx512f"]):
        path.write_text(json.dumps(record | {"threads": 3, "machine": record["machine"] | {"instruction_sets": sets}}))
        replay.replay(matcher, "peers_x")
        assert matcher.replay("peers_x")["of_another_processor"] is False
    assert [env["OMP_NUM_THREADS"] for env in seen] == ["3", "3"]
    assert [env.get("ATEN_CPU_CAPABILITY") for env in seen] == ["avx2", None]


def test_a_file_of_another_processor_may_differ_by_more(matcher, monkeypatch):
    """By so much more that one wrong offset is still found."""
    path, figure, how = matcher.record_path("peers_x"), 0.01, replay.REPLAYS["compare_peers"]
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"machine": record["machine"] | {"processor": "another, stepping 1"}}))
    assert how.allowed(figure, elsewhere=True) == replay.ELSEWHERE * how.allowed(figure)
    assert replay.replay(matcher, "peers_x") == [] and matcher.replay("peers_x")["of_another_processor"]
    monkeypatch.setattr(Int4, "dequantize", wrong_offset(Int4.dequantize))
    assert replay.replay(matcher, "peers_x"), "a wrong offset is found all the same"


def test_what_can_not_be_replayed_says_why(matcher, monkeypatch):
    path = matcher.record_path("peers_x")
    record = json.loads(path.read_text())
    for row in record["rows"]:
        row.pop("segment_sums", None)  # a cache that was not run has none
    path.write_text(json.dumps(record))
    assert "before sums of segments were kept" in replay.replayable(matcher, "peers_x")
    del record["segments"]
    path.write_text(json.dumps(record))
    assert "its record lacks what a replay needs (KeyError: 'segments')" in replay.replayable(matcher, "peers_x")
    path.write_text(json.dumps(record | {"args": record["args"] | {"chunk": 3}}))
    assert replay.replayable(matcher, "peers_x") == "made with --chunk 3, now 32"
    broken = SimpleNamespace(run=lambda *args, **how: SimpleNamespace(returncode=2, stderr="error: no model\n"))
    monkeypatch.setattr(replay, "subprocess", broken)
    with pytest.raises(PluginError, match="its script made no results, exit code 2: error: no model"):
        replay.replay(matcher, "by_position_x")


def test_committed_prompts_can_be_replayed():
    """Of every prompt and cache in a file there is a figure, and the flags choose a prompt that it has."""
    record = json.loads((files.RESULTS / "runs" / "needle_smollm2-135m.json").read_text())
    how = replay.REPLAYS["eval_long_context_needle"]
    figures = how.figures(record)
    assert len(figures) == len(record["rows"])
    flags = how.flags(record)
    assert f"baseline {flags['context-lengths']} {flags['needle-positions']} 0" in figures
    row = {"cache": "a", "task": "copying", "context_tokens": 512, "trial": 0, "depth": 0.3, "answer_logprob_nats": -1}
    assert replay.REPLAYS["eval_tasks"].figures({"rows": [row]}) == {"a copying 512 0": -1}


NOT_REPLAYED = {"benchmarks/calibration", "benchmarks/scaling", "calibrate_kv_lowrank"}  # times, and a calibration


def test_every_committed_result_but_times_can_be_replayed():
    """Each has figures, and flags that leave a part of it."""
    checked = set()
    for model in ("smollm2-135m", "Qwen/Qwen2.5-Coder-0.5B-Instruct", "google/gemma-3-270m"):
        matcher = matcher_of(files.ROOT, model=model)
        for name, defined in matcher.runs.items():
            record, how = matcher.record(name), replay.how_to(defined)
            if record is None or defined.tag is not None or defined.script in NOT_REPLAYED:
                continue
            assert how.figures(record), f"{name}: made before files kept what a replay compares"
            assert isinstance(how.flags(record), dict)
            checked.add(name)
    assert {"tasks_smollm2-135m", "peers_gemma-3-270m", "long_context_qwen2.5-coder-0.5b-instruct"} <= checked
