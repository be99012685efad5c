"""gpu_check.sh without a GPU: what it runs, what it does when a step fails, and the whole of it on the CPU."""

import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sampling import ALL

from gpt2.common import files

SCRIPT = files.ROOT / "scripts" / "benchmarks" / "gpu_check.sh"
STEPS = ["tests", "attention", "attention-b8", "largest", "profile-4k", "profile-32k"]
RECORDS = {
    "attention_step_cuda-h100", "attention_step_cuda-h100_b8", "largest_batch_cuda-h100_qwen2.5-7b",
    "profile_cuda-h100_qwen2.5-7b_4k", "profile_cuda-h100_qwen2.5-7b_32k",
}  # fmt: skip
# Stands in for Python: names the machine, notes its arguments, writes what a script would, and fails where told
STAND_IN = r"""#!/usr/bin/env bash
case $1 in
-) echo cuda-h100; [[ ! $NO_GPU ]]; exit ;;
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


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the script, whose results/ is its own, and the stand-in."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "scripts" / "benchmarks").mkdir(parents=True)
    (folder / "scripts" / "benchmarks" / SCRIPT.name).write_bytes(SCRIPT.read_bytes())
    (folder / "python").write_text(STAND_IN)
    (folder / "python").chmod(0o755)
    return folder


def start(script: Path, *flags, **environment) -> subprocess.CompletedProcess:
    own = os.environ | {"PYTHON": sys.executable, "OUT": "", "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(["bash", script, *flags], cwd=script.parents[2], env=own, capture_output=True, text=True)


@pytest.fixture(scope="module")
def check(checkout):
    """Run the copy with the stand-in: exit code, output, commands."""

    def run(*flags, fail="", slow="", **environment):
        own = {"PYTHON": str(checkout / "python"), "NOTES": str(checkout / "notes"), "FAIL": fail, "SLOW": slow}
        (checkout / "notes").write_text("")
        done = start(checkout / "scripts" / "benchmarks" / SCRIPT.name, *flags, **own | environment)
        return done.returncode, done.stdout + done.stderr, (checkout / "notes").read_text().splitlines()

    return run


@pytest.fixture(scope="module")
def ran(check):
    """All steps, with the folder `kept` for their results."""
    return check(OUT="kept")


def test_all_steps_run_and_results_are_kept(ran, checkout):
    code, said, commands = ran
    assert code == 0 and len(commands) == 6
    assert [line.split()[1].rstrip(",") for line in said.splitlines() if line.startswith("ok ")] == STEPS
    assert {path.stem for path in (checkout / "results/runs").iterdir()} == RECORDS
    drawn = {path.stem for path in (checkout / "results/plots").iterdir()}
    assert drawn == RECORDS - {"largest_batch_cuda-h100_qwen2.5-7b"}
    kept = {path.name for path in (checkout / "kept").iterdir()}
    assert {f"{name}.json" for name in RECORDS} | {"gpu_check.log"} < kept and len(kept) == 8
    assert (checkout / "kept/gpu_check.log").read_text() == said


def test_a_step_that_fails_is_reported_and_the_others_run(ran, check, checkout):
    """What an earlier run has left is not taken for its results."""
    code, said, commands = check(fail="benchmarks/largest_batch.py", OUT="out")
    assert code == 1 and len(commands) == 6 and said.count("\nok ") == 5
    assert "FAILED   largest, exit code 7" in said
    assert not list((checkout / "out").glob("largest*")) and list((checkout / "out").glob("profile*"))


def test_a_step_that_hangs_is_stopped_and_limits_add_up_to_less_than_eight_minutes_by_the_whole(ran, check):
    limits = [int(line.split()[-2]) for line in ran[1].splitlines() if line.startswith("== ") and "at most" in line]
    assert len(limits) == 6 and sum(limits[:-1]) <= 500 and all(limit <= 470 for limit in limits)
    code, said, commands = check(GPU_CHECK_SECONDS="0")
    assert code == 1 and commands == [] and said.count("NO TIME") == 6
    code, said, commands = check("--only", "attention,largest", slow="benchmarks/attention", GPU_CHECK_SECONDS="2")
    assert code == 1 and "TIMEOUT  attention, after" in said and "NO TIME  largest" in said and len(commands) == 1


def test_without_a_gpu_nothing_is_started(check, monkeypatch):
    """Python says whether there is one: by itself here, where PyTorch needn't be imported again."""
    code, said, commands = check("--only", "tests", NO_GPU="yes")
    assert code == 1 and commands == [] and "==" not in said
    question = SCRIPT.read_text().split("<<'END'\n")[1].split("\nEND\n")[0]
    monkeypatch.setattr(sys, "argv", ["-", "cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU that this PyTorch sees: run with --cpu"):
        exec(question, {})


@pytest.mark.parametrize(("flag", "code", "message"), [
    ("--only=all", 2, "no step all"), ("--gpu", 2, "benchmarks/gpu_check.sh"), ("--help", 0, "GPU_CHECK_SECONDS"),
])  # fmt: skip
def test_help_is_the_manual_and_bad_flags_are_rejected(flag, code, message, check):
    ended, said, commands = check(*flag.split("="))
    assert ended == code and message in said and commands == [] and "set -u" not in said


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_scripts_take_the_flags_they_are_given(device, ran, check, monkeypatch):
    """Up to the device: what isn't there here is rejected last."""
    parsed = []
    for words in map(shlex.split, ran[2] if device == "cuda" else check("--cpu")[2]):
        assert all((files.ROOT / word).is_file() for word in words if word.startswith("configs/")), "shapes"
        if words[0].startswith("scripts/"):
            monkeypatch.setattr(sys, "argv", words)
            arguments = runpy.run_path(str(files.ROOT / words[0]), run_name="not main")["arguments"]
            parsed.append(arguments().parse_args())
            Path(parsed[-1].output).unlink(missing_ok=True)
    assert [args.device for args in parsed] == [device] * 5


@pytest.mark.skipif(not ALL, reason="each step takes seconds of imports: make test-all")
def test_on_the_cpu_from_end_to_end(tmp_path):
    """But for tests within the test, and a second context and batch of the same."""
    done = start(SCRIPT, "--cpu", "--only", "attention,largest,profile-4k", OUT=str(tmp_path), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert records.keys() >= {"attention_step_cpu", "largest_batch_cpu_tiny"}
    assert all(record["rows"] and record["device"] == "cpu" for record in records.values())
    assert all(row["share_of_bound"] > 0 for row in records["attention_step_cpu"]["rows"])
    assert "measured by copying" in " ".join((tmp_path / "gpu_check.log").read_text().split())
    assert (tmp_path / "attention_step_cpu.png").exists()
