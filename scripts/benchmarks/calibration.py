"""Cost of calibration: time against bare forward passes over the same tokens, and peak memory against samples.

    python scripts/benchmarks/calibration.py
    python scripts/benchmarks/calibration.py --model Qwen/Qwen2.5-7B --device cuda --samples 8,64

Time: bare forward passes, without and with logits, alternate with calibration in this process. Memory: the peak
resident size of the calibration script in a separate process, for each number of samples. Writes
results/runs/benchmark_calibration_MODEL.json.
"""

import gpt2  # noqa: F401  first, so that Ctrl-C during the import of PyTorch prints one line

# isort: split
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import torch

from gpt2 import cli
from gpt2.common import files, provenance
from gpt2.common.errors import PluginError
from gpt2.compression.calibration.statistics import collect
from gpt2.evaluation.instruments import synchronizer
from gpt2.experiments.scaling import seconds
from gpt2.models import loading
from gpt2.report import tables
from gpt2.text import sources


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    cli.add_model_flags(p)
    cli.add_text_flags(p)
    p.add_argument("--samples", type=cli.int_list, default=[8, 64], help="numbers of sequences to measure memory for")
    p.add_argument("--seq-len", type=cli.positive_int, default=1024, help="tokens per sequence")
    p.add_argument("--repeats", type=cli.positive_int, default=9, help="timed rounds")
    cli.add_output_flag(p, picture=False)
    return p


def main() -> None:
    args = arguments().parse_args()
    # Checked before the first calibration; the real name has the model's slug, which is known only after loading
    files.check_writable(args.output or files.RESULTS / "runs" / "benchmark_calibration.json")
    text = sources.load_text(args.text, args.model)
    require_segments(args, text)
    memory = {str(n): peak_megabytes(args, n) for n in args.samples}  # first: a child's peak starts at its parent's
    loaded = loading.load(args.model, args.device, args.dtype)
    output = args.output or files.RESULTS / "runs" / f"benchmark_calibration_{loaded.slug}.json"
    segments = text.segments("calibration", loaded, args.seq_len, args.repeats + 1)
    times = [time_all(loaded, segment, turn) for turn, segment in enumerate(segments)][1:]  # the first one warms up
    ratios = {name: statistics.median(t["capture"] / t[name] for t in times) for name in ("body", "with_logits")}
    record = provenance.provenance(
        args, text=text.name, text_sha256={"calibration": text.sha256("calibration")}, ratio_to_forward=ratios,
        times_s=times, peak_rss_mb_by_samples=memory,
    )  # fmt: skip
    files.write_json(output, record)
    tables.show("benchmark_calibration", record)
    print(f"wrote {output}")


def require_segments(args, text: sources.Text) -> None:
    """Raise PluginError for a text without a segment to warm up and one to time; say if there are fewer than asked.

    Counted before the children run, with the tokenizer alone, as a model loaded here would count as their memory.
    """
    words = SimpleNamespace(tokenizer=loading.read_tokenizer(args.model))
    found, own = text.available("calibration", words, args.seq_len), f"the calibration part of text {text.name!r} has"
    if found < 2:
        raise PluginError(f"{own} one segment of {args.seq_len} tokens: expected at least 2, one to warm up and one to "
                          "time: give a longer --text or a shorter --seq-len")  # fmt: skip
    if found <= args.repeats:
        print(f"note: {own} only {found} of the {args.repeats + 1} segments: {found - 1} timed rounds", flush=True)


@torch.no_grad()
def time_all(loaded: loading.LoadedModel, segment: torch.Tensor, turn: int) -> dict[str, float]:
    """Seconds for the same tokens: layers alone, with logits, and collecting statistics; the order depends on turn."""
    ids = segment[None].to(loaded.device)
    works = {
        "body": lambda: loaded.model.base_model(input_ids=ids, use_cache=True),
        "with_logits": lambda: loaded.model(ids, use_cache=True),
        "capture": lambda: collect(loaded, [segment], sink_tokens=4),
    }
    order = list(works)[turn % 3 :] + list(works)[: turn % 3]
    return {name: seconds(synchronizer(loaded.model), works[name]) for name in order}


def peak_megabytes(args, samples: int) -> float:
    """Peak resident size of the calibration script with so many samples, in MB. Raises PluginError if it fails."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, str(files.ROOT / "scripts/calibrate_kv_lowrank.py"), "--model", args.model]
        command += ["--device", args.device, "--dtype", args.dtype, "--samples", str(samples)]
        command += ["--seq-len", str(args.seq_len), "--output", f"{folder}/calibration.pt"]
        command += ["--text", args.text] if args.text else []
        # In this folder, so that relative paths in --model and --text mean the same there
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(child.pid, 0)
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if status:
        why = said[-1].removeprefix("error: ") if said else f"it ended with code {os.waitstatus_to_exitcode(status)}"
        raise PluginError(f"the calibration with {samples} samples failed: {why}")
    return usage.ru_maxrss / 1024


if __name__ == "__main__":
    cli.run(main)
