"""Every script that writes, with flags that make it small, and a folder in which it finds what it reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from checkouts import fake, make_checkout
from script_runs import FREE_PRESET, SMALL, SMALL_EVAL
from tiny import char_tokenizer, save_tiny, word_text

from gpt2.common import files, trial_queue
from gpt2.runs import worker

TEXT = "--model tiny --text words.txt"
PRESET = "--preset free.json"
CALIBRATION, SCORES = " ".join(SMALL), " ".join([*SMALL_EVAL, "--chunk", "32"])
TUNING = f"{TEXT} {CALIBRATION} {SCORES} --target-ppl-delta 0.9 --study s.db --output out/r.json"
GRID = f"{TUNING} --rank-grid 12,10 --bits 8"
DOCUMENT = "out/doc.kv.safetensors"


def soon_stale() -> None:
    """A dead worker's trial is taken over after two seconds."""
    trial_queue.PACE = worker.PACE = trial_queue.Pace(1, 2, 0.1)


def results_here() -> None:
    """What is written without --output, such as a calibration, goes to the working folder, not to this checkout."""
    files.RESULTS = Path.cwd() / "results"


def in_this_checkout() -> None:
    """The working folder is the checkout whose results and pages are made."""
    files.ROOT, files.RESULTS = Path.cwd(), Path.cwd() / "results"


@dataclass(frozen=True)
class Job:
    """A script with flags. record: what it writes last; timed: patterns of its keys for times, and what comes of them.

    before: called before its main; long: seconds of other processes, which `make test` does without.
    """

    script: str
    flags: str
    record: str | None = None
    timed: tuple[str, ...] = ()
    before: tuple[Callable[[], None], ...] = ()
    long: bool = False


RECORD = "out/r.json"


def job(script: str, flags: str, timed: str = "", **how) -> Job:
    """One that writes a record to `RECORD`."""
    return Job(script, f"{flags} --output {RECORD}", RECORD, tuple(timed.split()), **how)


def tuner(flags: str, **how) -> Job:
    return Job("auto_tune_kv_compression", flags, RECORD, before=(soon_stale,), **how)


JOBS = {
    "tune": tuner(GRID),
    "tune per layer": tuner(f"{GRID} --per-layer", long=True),
    "tune codecs": tuner(f"{TUNING} --search codec --codecs identity --num-trials 2"),
    "append": job("benchmarks/append", "--tokens 16,32 --layers 2 --repeats 4", timed="append_ms_*"),
    "attention": job(
        "benchmarks/attention", "--context-lengths 128 --heads 4 --kv-heads 2 --head-dim 64 --repeats 2 --flush-mib 1 "
        "--copy-mib 1 --quantizers int8",
        timed="best_16_bit copy_bytes_per_s bytes_per_s ms ms_* share_of_copy host_ms_median speed_against_*",
    ),
    "calibrating": job(
        "benchmarks/calibration", "--model {home}/tiny --text {home}/words.txt --samples 2 --seq-len 64 --repeats 2",
        timed="peak_rss_mb_by_samples ratio_to_forward times_s", long=True,
    ),
    "calibrate": Job("calibrate_kv_lowrank", f"{TEXT} {CALIBRATION} --output out/c.pt"),
    "peers": job("compare_peers", f"{TEXT} {SCORES} --peers kivi {PRESET} --needle-context-lengths none"),
    "needle": job(
        "eval_long_context_needle", f"{TEXT} {PRESET} --context-lengths 256 --num-trials 1 --needle-positions 0.5"
    ),
    "tasks": job("eval_tasks", f"{TEXT} {PRESET} --context-lengths 300 --num-trials 1 --tasks passkey"),
    "positions": job(
        "eval_by_position", f"{TEXT} {PRESET} --segments 1 --prompt-tokens 20 --new-tokens 20 --greedy-tokens 4"
    ),
    "stability": job(
        "eval_stability",
        f"{TEXT} {PRESET} {SCORES} --num-runs 2 --vary text --needle-length 256 --needle-trials 1",
        timed="speed_ratio token_ms",
    ),
    "explore": job(
        "benchmarks/codec_variations",
        f"{TEXT} {CALIBRATION} --seq-len 128 --eval-tokens 128 --eval-seq-len 128 --bits 4 --rows rotation",
    ),
    "generate": job(
        "generate_with_preset", f"--model tiny {PRESET} --document words.txt --document-tokens 200 --max-new-tokens 3",
        timed="token_ms*",
    ),
    "document": Job(
        "cache_tool", "read --model tiny --preset kv4 --document words.txt --document-tokens 300 --prefill-chunk 64 "
        f"--save-every 0 --output {DOCUMENT}", DOCUMENT,
    ),
    "batch": job(
        "benchmarks/largest_batch", f"--model tiny {PRESET} --context-length 64 --most 2 --decode-tokens 2",
        timed="token_ms tokens_per_s",
    ),
    "parking": job(
        "benchmarks/parking", "--model tiny --shapes h64.json --presets kv4 --context-lengths 150,400 "
        "--shape-tokens 130 --repeats 1",
        timed="read_s load_ms* first_token_ms* wake_ms_* times_faster",
    ),
    "architectures": job("benchmarks/architectures", "--families llama"),
    "presets": Job(
        "make_presets", f"{TEXT} {CALIBRATION} {SCORES} --seq-len 100 --ratios 2,6.4 --output out",
        "out/runs/ratio_presets_tiny.json",
    ),
    "report": Job("reproduce_tables", "--html out/r.html --results results"),
    "bytes": job("benchmarks/cache_bytes", f"--model tiny {PRESET} --context-lengths 64"),
    "scaling": job(
        "benchmarks/scaling", "--model four --quick --shapes h64.json --timed-shapes h64.json,h96.json,h128.json "
        "--cache-shapes h64.json --context-lengths 256 --presets kv8 --timed-presets kv4 --repeats 1",
        timed="fitting_s ratio_median ratio_quartiles exponent exponent_interval farthest_from_line medians values",
        long=True,
    ),
    "profile": job(
        "profile_kv_performance",
        f"--model tiny {PRESET} --context-lengths 32 --batch-sizes 1 --repeats 1 --decode-tokens 2",
        timed="instrumented_token_ms peak_memory_* ratio_to_baseline share_of_step token_ms* tokens_per_s_* ttft_ms*",
    ),
    "validate": job("validate_ppl_postbugfix", f"{TEXT} {CALIBRATION} {SCORES} --groups control"),
    "tables": Job("reproduce_tables", "one two three --text words.txt", before=(in_this_checkout, soon_stale)),
    "readme": Job("reproduce_tables", "--pages", before=(in_this_checkout,)),
}  # fmt: skip


def make_home(home: Path) -> None:
    """The tiny model and a text, and a folder `space` to be copied for each run."""
    for name, layers in (("tiny", 3), ("four", 4)):
        save_tiny(home / name, tokenizer=char_tokenizer(), num_hidden_layers=layers)
    (home / "words.txt").write_text(word_text(3000))
    runs = {name: fake({"size": size}) for size, name in enumerate(("one", "two"))}
    space = make_checkout(home / "space", t=runs | {"three": fake(needs=["one"])})
    for name in ("tiny", "four"):
        (space / name).symlink_to(home / name)
    shape = json.loads((home / "four" / "config.json").read_text())
    for hidden in (64, 96, 128):
        made = shape | {"hidden_size": hidden, "head_dim": hidden // 4}
        (space / f"h{hidden}.json").write_text(json.dumps(made))
    shutil.copy(home / "words.txt", space)
    (space / "free.json").write_text(json.dumps(FREE_PRESET))
    (space / "results" / "runs").mkdir(parents=True)
    shutil.copy(files.RESULTS / "runs" / "benchmark_append.json", space / "results" / "runs")
    (space / "docs").mkdir()
    for page in ("README.md", "docs/a.md"):
        (space / page).write_text("# Page\n\n<!-- results: benchmark_append -->\nold\n<!-- end -->\n")
