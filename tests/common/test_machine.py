"""The machine of a result: what is recorded of it, the tag of its files, and what a reader sees."""

import os
import re
import types

import pytest

from gpt2.common import machine

ZEN3 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC
stepping\t: 1
flags\t\t: fpu sse2 avx avx2 fma {more}

processor\t: 1
model name\t: another
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp sve i8mm bf16\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    """Make the machine one with this /proc/cpuinfo."""
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.delenv("KV_CPU_ISA", raising=False)

    def forget() -> None:
        machine.processor.cache_clear()
        machine.instruction_sets.cache_clear()

    def of(text: str) -> dict:
        (tmp_path / "cpuinfo").write_text(text)
        forget()
        return machine.describe("cpu")

    yield of
    forget()


@pytest.mark.skipif(machine.sys.platform != "linux", reason="sysctl names other features")
def test_a_processor_is_named_with_its_model_and_what_it_can(cpuinfo, monkeypatch):
    zen3 = cpuinfo(ZEN3.format(more=""))
    assert zen3["processor"] == "AMD EPYC (family 25, model 1, stepping 1)" and machine.tag(zen3) == "avx2"
    assert zen3["instruction_sets"] == ["avx2", "fma"] and zen3["kernels_for"] == "native" and zen3["cores"] >= 1
    assert machine.tag(cpuinfo(ZEN3.format(more="avx512f"))) == "avx2", "without AVX-512's operations on bytes"
    zen4 = cpuinfo(ZEN3.format(more="avx512f avx512bw avx512_vnni"))
    assert machine.tag(zen4) == "avx512" and "avx512_vnni" in zen4["instruction_sets"]
    monkeypatch.setenv("KV_CPU_ISA", "avx2")
    assert machine.tag(machine.describe("cpu")) == "avx512-as-avx2", "16-bit rows still have AVX-512"
    monkeypatch.delenv("KV_CPU_ISA")
    arm = cpuinfo(ARM)
    assert arm["processor"] == "ARM implementer 0x41, part 0xd40" and machine.tag(arm) == "sve"
    assert machine.tag(cpuinfo("")) == "generic" and machine.tag(gpu="cuda-h100") == "cuda-h100"


def test_names_of_results_are_told_apart_and_found(tmp_path):
    assert machine.named("profile_x", "avx512") == "profile_x"
    assert machine.named("profile_x", "avx2") == "profile_x_avx2" == machine.named("profile_x_avx2", "avx2")
    assert machine.named("attention_step_cuda-h100_b1", "cuda-h100") == "attention_step_cuda-h100_b1"
    for tag in ("avx2", "avx2-laptop", "avx512-as-avx2", "neon", "generic", "cuda-h100"):
        assert machine.untagged(f"benchmark_append_{tag}") == "benchmark_append"
    assert machine.untagged("benchmark_append_window512") == "benchmark_append_window512"
    for name in ("append", "append_avx2", "append_avx2-laptop", "append_window512", "append_window512_avx2", "other"):
        (tmp_path / f"{name}.json").touch()
    assert machine.siblings(tmp_path, "append") == ["append", "append_avx2", "append_avx2-laptop"]
    (tmp_path / "append.json").unlink()
    assert machine.siblings(tmp_path, "append")[0] == "append_avx2" and machine.siblings(tmp_path, "none") == []


def test_machines_are_the_same_only_where_both_recorded_it():
    one = {"processor": "a", "cores": 2, "kernels_for": "native", "load_average_before": 0.1}
    assert machine.same(one, one | {"load_average_before": 3.0})
    for other in (one | {"processor": "b"}, one | {"gpu": "x"}, None, one | {"recorded": machine.AFTERWARDS}):
        assert not machine.same(one, other) and not machine.same(other, one)


@pytest.mark.parametrize(("busy", "warns"), [(0.29, False), (0.7, True), (None, False)])
def test_other_work_is_told_before_times_are_measured(busy, warns, monkeypatch, capsys):
    monkeypatch.setattr(machine, "busy_cores", lambda: busy)
    monkeypatch.setattr(machine, "COPY_BYTES", 1 << 16)
    found = machine.before_timing("cpu")
    assert found["busy_cores_before"] == busy and found["copy_bytes_per_s"] > 0
    warning = f"warning: other work is running (0.7 of this machine's {os.cpu_count()} cores"
    assert (warning in capsys.readouterr().err) == warns
    assert ("busy with other work" in machine.caption({"machine": found})) == warns


def test_other_work_is_what_this_process_did_not_do(tmp_path, monkeypatch):
    """Fields of /proc/stat: user, nice, system, idle, waiting for a disk, interrupts, soft ones, stolen."""
    assert machine.cores_busy(-1, 200, 2) == machine.cores_busy(5, 0, 2) == 0
    monkeypatch.setattr(machine, "STAT", tmp_path / "stat")
    lines = iter(["cpu 100 0 50 800 50 0 0 0 9 9", "cpu 120 0 50 970 50 0 0 10 9 9"])
    monkeypatch.setattr(machine, "time", types.SimpleNamespace(
        sleep=lambda s: (tmp_path / "stat").write_text(next(lines)), process_time=lambda: 0.0))  # fmt: skip
    machine.time.sleep(0)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    assert machine.busy_cores() == pytest.approx(2 * 30 / 200)
    monkeypatch.setattr(machine, "STAT", tmp_path / "none")
    monkeypatch.setattr(machine, "load_average", lambda: 1.5)
    assert machine.busy_cores() == 1.5


def test_a_caption_says_what_is_known():
    """More of it is on the committed pages, which tests/runs/test_pages.py makes again."""
    held = {"processor": "P", "instruction_sets": ["avx2"], "threads": 1, "kernels_for": "generic"}
    captions = {"Machine: P, AVX2, 1 thread, kernels built for generic.": held, "Machine not recorded.": None,
                "Machine: H, driver 5.": {"gpu": "H", "gpu_driver": "5"}}  # fmt: skip
    for said, record in captions.items():
        assert machine.caption({"machine": record}) == said
    records = [{"machine": one} for one in (held, {"instruction_sets": ["avx512bw"]}, held)]
    assert machine.labels(records) == ["AVX2 (1)", "AVX-512", "AVX2 (2)"]
    assert re.fullmatch(machine.TAG, f"_{machine.REFERENCE}")
