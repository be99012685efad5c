"""The benchmark of a decode step's attention: every row is right before it is timed, and figures are what they say."""

import json

import pytest
import torch
from pictures import is_drawn
from script_runs import run

from gpt2.common import files, machine, provenance
from gpt2.common.errors import PluginError
from gpt2.compression.cache import direct_attention
from gpt2.compression.codecs import Compressor
from gpt2.compression.codecs.per_channel import Int4Channel
from gpt2.experiments import attention_speed
from gpt2.report import regions, tables

SHAPE = attention_speed.AttentionShape(heads=6, kv_heads=2, head_dim=16, batch=2)
CPU = torch.device("cpu")


@pytest.fixture
def timer():
    return attention_speed.Timer(CPU, 1 << 10)


def measured(timer, codecs=("int8",), bits=(4.0,), **how) -> list[dict]:
    return attention_speed.measure(SHAPE, 100, codecs, bits, timer, 1e9, **{"repeats": 2} | how)


def test_every_codec_gives_what_its_stores_hold(timer):
    rows = measured(timer, attention_speed.CODECS, bits=(3.0, 4.5))
    held = {row["row"]: row["bytes_held"] for row in rows}
    assert list(held)[:2] == ["sdpa", "sdpa, heads packed"] and len(held) == len(rows)
    assert {"mixed, 3 bits", "mixed, 4.5 bits", "kv4", "kv8", "none"} < set(held)
    T = 100 + attention_speed.GENERATED
    assert held["sdpa"] == 2 * (2 * 2 * T * 16) * 2 and held["sdpa, float32"] == 2 * held["sdpa"]
    assert held["kv4"] < held["kv8"] < held["sdpa"]
    assert {(row["tokens_held"], row["batch_size"]) for row in rows} == {(T, 2)}
    assert str(SHAPE) == "b2_h6-2x16"


def test_stores_that_are_timed_have_sinks_blocks_and_a_tail():
    k, v = (torch.randn(2, 2, 128 + attention_speed.GENERATED, 16).bfloat16() for _ in "kv")
    store, _ = attention_speed.filled_stores((Compressor(Int4Channel()),) * 2, k, v)
    assert (store.sinks.shape[2], store.compressed_tokens, store.tail.shape[2], len(store)) == (4, 124, 33, 161)


def test_a_row_that_gives_something_else_is_rejected(timer, monkeypatch):
    attend = direct_attention.attend
    for factor, message in ((1.1, "int8: .* away from attention over the same K and V"), (torch.nan, "int8: nan away")):
        monkeypatch.setattr(direct_attention, "attend", lambda *args, f=factor, **how: f * attend(*args, **how))
        with pytest.raises(PluginError, match=message):
            measured(timer)


def test_figures_are_medians_and_ratios_paired_by_repeat(timer, monkeypatch):
    """Times are scripted: all are twice as long in the second repeat, which a ratio of medians would see."""
    order, labels = [], {}
    own = {"sdpa": 8.0, "sdpa, heads packed": 4.0, "int8": 2.0}
    check = attention_speed.check
    monkeypatch.setattr(attention_speed, "check", lambda row: labels.update({id(row.step): row.label}) or check(row))
    monkeypatch.setattr(timer, "warm_up", lambda steps: None)

    def scripted(self, step):
        order.append(labels[id(step)])
        ms = own.get(order[-1], 9.0) * (2 if len(labels) <= len(order) - 1 < 2 * len(labels) else 1)
        return ms, ms / 2

    monkeypatch.setattr(attention_speed.Timer, "__call__", scripted)
    rows = {row["row"]: row for row in measured(timer, repeats=3)}
    sdpa, packed, int8 = (rows[name] for name in own)
    names = list(rows)
    assert order == [*names, *names[::-1], *names], "turns in alternating order"
    assert int8["ms"] == [2.0, 4.0, 2.0] and int8["ms_median"] == 2.0 and int8["ms_quartiles"] == [2.0, 3.0]
    assert int8["speed_against_sdpa_median"] == 4.0 and int8["speed_against_sdpa_quartiles"] == [4.0, 4.0]
    assert int8["speed_against_best_16_bit_median"] == 2.0 and packed["best_16_bit"] and not sdpa["best_16_bit"]
    assert int8["bytes_per_s"] == int8["bytes_held"] / 0.002
    assert int8["share_of_copy"] == int8["bytes_per_s"] / 1e9
    assert "host_ms_median" not in int8, "on a CPU it is the same"


def test_the_timer_flushes_before_it_starts(monkeypatch):
    timer, seen = attention_speed.Timer(CPU, 64), []
    monkeypatch.setattr(timer, "flush", lambda: seen.append("flush"))
    monkeypatch.setattr(attention_speed, "clock", lambda: seen.append("clock") or 0.0)
    assert timer(lambda: seen.append("step")) == (0.0, 0.0)
    assert seen == ["flush", "clock", "step", "clock"]
    monkeypatch.setattr(attention_speed.Timer, "__call__", lambda self, step: (step() is None, 2.0)[::-1])
    assert attention_speed.copy_bandwidth(timer, 1000) == 2 * 1000 / 0.002, "bytes read and written"


def test_on_a_gpu_it_keeps_it_busy_while_the_host_launches(monkeypatch):
    """Simulated: a flush takes the GPU 1 ms, launching a step takes the host 2.25 ms."""
    timer, seen, now = attention_speed.Timer(CPU, 64), [], [0.0]
    timer.cuda = True

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream == ("stream of", CPU), "not of the device that is current"
            seen.append("event")

        def synchronize(self):
            seen.append("wait")

        def elapsed_time(self, other):
            return 7.0 if seen[-3:-2] == ["step"] else 1.0

    def step():
        seen.append("step")
        now[0] += 0.00225

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream of", device))
    monkeypatch.setattr(timer, "flush", lambda: seen.append("flush"))
    monkeypatch.setattr(attention_speed, "clock", lambda: now[0])
    timer.warm_up([step])
    seen.clear()
    ms, host_ms = timer(step)
    assert (ms, host_ms) == (7.0, pytest.approx(2.25)) and timer.flushes == 6
    assert seen == 6 * ["flush"] + ["event", "step", "event", "wait"]


def test_the_compiled_row_is_read_by_its_functions(timer, monkeypatch):
    """And gives what attention gives, as every row. Compiling takes seconds, so functions stay as they are."""
    called = []

    def uncompiled(fn, **how):
        assert how == {"dynamic": False}
        return lambda *args, **codes: called.append(fn.__name__) or fn(*args, **codes)

    monkeypatch.setattr(torch, "compile", uncompiled)
    row = measured(timer, codecs=(), compiled=True)[-1]
    assert (row["row"], row["kind"]) == ("int4_channel, torch.compile", "torch.compile")
    assert set(called) == {"int4_scores", "int4_sums"} and row["compile_s"].keys() == {"scores", "sums"}


SCRIPT = "benchmarks/attention"
SMALL = ["--heads", 4, "--kv-heads", 2, "--head-dim", 16, "--flush-mib", 1, "--copy-mib", 1, "--repeats", 2]
SMALL += ["--device", "cpu"]


def test_the_script_writes_figures_a_plot_and_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    assert run(SCRIPT, *SMALL, "--context-lengths", "64,130", "--quantizers", "int4,kv4", "--batch-size", 3) == 0
    stem = machine.named("attention_step_cpu_b3_h4-2x16", machine.tag())
    assert is_drawn(tmp_path / "plots" / f"{stem}.png")
    record = json.loads((tmp_path / "runs" / f"{stem}.json").read_text())
    said = " ".join(capsys.readouterr().out.split())  # notes are wrapped
    assert record["kernels"] in ("C++", "PyTorch") and f"codes read by {record['kernels']}" in said
    assert len(record["rows"]) == 2 * 8 and record["machine"]["copy_bytes_per_s"] > 0
    table = tables.attention_step(record, []).markdown()
    assert table.count("\n| 64 |") == table.count("\n| 130 |") == 8 and table.count("**") == 4
    assert "each of 3 sequences, 4 query heads, 2 KV heads of 16, bfloat16, on cpu" in table
    assert f"Machine: {machine.short(record)}" in table
    with pytest.raises(PluginError, match=r"no rows of context tokens 131"):
        tables.attention_step(record, ["131"])
    page = regions.fill(f"<!-- results: {stem} 130 -->\n<!-- end -->", tmp_path / "runs").replace("**", "")
    assert "| 130 | sdpa" in page and "| 64 |" not in page


def test_bad_input_is_one_clear_line(tmp_path, capsys):
    for flags, message in (
        (["--quantizers", "int5"], "unknown int5"), (["--heads", 5], "5 query heads don't share 2 KV heads"),
        (["--quantizers", "mixed", "--bits", 99], "bits 99.0"), (["--dtype", "float32"], "invalid choice"),
    ):  # fmt: skip
        assert run(SCRIPT, *SMALL, "--context-lengths", 64, *flags, "--output", tmp_path / "x.json") == 2
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err


def test_devices_in_file_names(monkeypatch):
    assert provenance.device_slug("cpu") == "cpu"
    for name, slug in {
        "NVIDIA H100 80GB HBM3": "cuda-h100", "NVIDIA A100-SXM4-80GB": "cuda-a100-sxm4-80gb",
        "NVIDIA GeForce RTX 4090": "cuda-4090", "Some GPU": "cuda-some-gpu",
    }.items():  # fmt: skip
        monkeypatch.setattr(provenance, "device_name", lambda device, name=name: name)
        assert provenance.device_slug("cuda:0") == slug
