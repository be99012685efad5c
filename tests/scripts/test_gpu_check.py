"""gpu_check.sh without a GPU: what it runs, what it does when a step fails, and the whole of it on the CPU."""

import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from sampling import ALL

from gpt2.common import files

SCRIPT = files.ROOT / "scripts" / "benchmarks" / "gpu_check.sh"
STEPS = ["tests", "attention", "attention-b8", "largest", "profile-4k", "profile-32k"]
# Stands in for Python: names the machine, notes its arguments, writes what a script would, and fails where told
STAND_IN = r"""#!/usr/bin/env bash
case $1 in
-) echo "$NAME"; exit 0 ;;
-c) exit 1 ;;
esac
printf '%q ' "$@" >>"$NOTES"; echo >>"$NOTES"
[[ $FAIL && "$*" == *$FAIL* ]] && exit 7
[[ $SLOW && "$*" == *$SLOW* ]] && sleep 20
script=$1
while (($#)); do
    [[ $1 == --output ]] && echo '{}' >"$2" && [[ $script != *largest_batch.py ]] && touch "${2%.json}.png"
    shift
done
exit 0
"""


@pytest.fixture
def check(tmp_path):
    """Run a copy of the script, whose results/ is its own, with the stand-in; gives exit code, output, commands."""
    (tmp_path / "scripts" / "benchmarks").mkdir(parents=True)
    (tmp_path / "scripts" / "benchmarks" / SCRIPT.name).write_bytes(SCRIPT.read_bytes())
    stand_in, notes = tmp_path / "python", tmp_path / "notes"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)

    def run(*flags, fail="", slow="", name="cuda-h100", **environment):
        notes.write_text("")
        own = {"PYTHON": str(stand_in), "NOTES": str(notes), "NAME": name, "FAIL": fail, "SLOW": slow, "OUT": ""}
        done = subprocess.run(
            ["bash", "scripts/benchmarks/gpu_check.sh", *flags], cwd=tmp_path, env=os.environ | own | environment,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr, notes.read_text().splitlines()

    return run


def test_all_steps_run_and_results_are_kept(check, tmp_path):
    code, said, commands = check(OUT="out/here")
    assert code == 0 and len(commands) == 6
    assert [line.split()[1].rstrip(",") for line in said.splitlines() if line.startswith("ok ")] == STEPS
    names = {
        "attention_step_cuda-h100", "attention_step_cuda-h100_b8", "largest_batch_cuda-h100_qwen2.5-7b",
        "profile_cuda-h100_qwen2.5-7b_4k", "profile_cuda-h100_qwen2.5-7b_32k",
    }  # fmt: skip
    assert {path.stem for path in (tmp_path / "results/runs").glob("*")} == names
    assert {path.stem for path in (tmp_path / "results/plots").glob("*.png")} == names - {
        "largest_batch_cuda-h100_qwen2.5-7b"
    }
    kept = {path.name for path in (tmp_path / "out/here").iterdir()}
    assert {f"{name}.json" for name in names} | {"gpu_check.log"} < kept and len(kept) == 8
    assert (tmp_path / "out/here/gpu_check.log").read_text() == said


def test_limits_add_up_to_less_than_eight_minutes_by_the_whole(check):
    _, said, _ = check()
    limits = [int(line.split()[-2]) for line in said.splitlines() if line.startswith("== ") and "at most" in line]
    assert len(limits) == 6 and sum(limits[:-1]) <= 500 and all(limit <= 470 for limit in limits)
    code, said, commands = check(GPU_CHECK_SECONDS="0")
    assert code == 1 and commands == [] and said.count("NO TIME") == 6


def test_a_step_that_fails_is_reported_and_the_others_run(check, tmp_path):
    """What an earlier run has left is not taken for its results."""
    assert check()[0] == 0
    code, said, commands = check(fail="benchmarks/largest_batch.py", OUT="out")
    assert code == 1 and len(commands) == 6 and said.count("\nok ") == 5
    assert "FAILED   largest, exit code 7" in said
    assert not list((tmp_path / "out").glob("largest*")) and list((tmp_path / "out").glob("profile*"))


def test_a_step_that_hangs_is_stopped(check):
    code, said, commands = check("--only", "attention,largest", slow="benchmarks/attention", GPU_CHECK_SECONDS="2")
    assert code == 1 and "TIMEOUT  attention, after" in said and "NO TIME  largest" in said and len(commands) == 1


def test_without_a_gpu_nothing_is_started():
    done = subprocess.run(
        ["bash", SCRIPT, "--only", "tests"], env=os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "no GPU that this PyTorch sees: run with --cpu" in done.stderr
    assert "==" not in done.stdout


@pytest.mark.parametrize(("flag", "code", "message"), [
    ("--only=all", 2, "no step all"), ("--gpu", 2, "benchmarks/gpu_check.sh"), ("--help", 0, "GPU_CHECK_SECONDS"),
])  # fmt: skip
def test_help_is_the_manual_and_bad_flags_are_rejected(flag, code, message, check):
    ended, said, commands = check(*flag.split("="))
    assert ended == code and message in said and commands == [] and "set -u" not in said


@pytest.mark.parametrize("where", [[], ["--cpu"]], ids=["gpu", "cpu"])
def test_scripts_take_the_flags_they_are_given(where, check, monkeypatch):
    """Up to the device: what isn't there here is rejected last."""
    for line in check(*where)[2]:
        words = shlex.split(line)
        assert all((files.ROOT / word).is_file() for word in words if word.startswith("configs/")), "shapes"
        script = files.ROOT / words[0]
        if script.name not in {"attention.py", "largest_batch.py", "profile_kv_performance.py"}:
            continue
        monkeypatch.setattr(sys, "argv", words)
        args = runpy.run_path(str(script), run_name="not main")["arguments"]().parse_args()
        assert args.device == ("cpu" if where else "cuda")
        Path(args.output).unlink(missing_ok=True)


def test_on_the_cpu_from_end_to_end(tmp_path):
    """But for tests within the test, and a second context and batch of the same; one step of them in `make test`."""
    steps = ["attention", "largest", "profile-4k"] if ALL else ["attention"]
    done = subprocess.run(
        ["bash", SCRIPT, "--cpu", "--only", ",".join(steps)],
        env=os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert records.keys() >= {"attention_step_cpu", *["largest_batch_cpu_tiny"] * ALL}
    assert all(record["rows"] and record["device"] == "cpu" for record in records.values())
    assert all(row["share_of_bound"] > 0 for row in records["attention_step_cpu"]["rows"])
    assert "measured by copying" in " ".join((tmp_path / "gpu_check.log").read_text().split())
    assert (tmp_path / "attention_step_cpu.png").exists() and (tmp_path / "gpu_check.log").exists()
