"""Cost of calibration: time against bare forward passes over the same tokens, and peak memory against samples.

    python scripts/benchmark_calibration.py
    python scripts/benchmark_calibration.py --model Qwen/Qwen2.5-7B --device cuda --samples 8,64

Time: forward passes with and without the statistics alternate in this process. Memory: every number of samples runs
the calibration script in a process of its own and reads its peak resident size from the operating system.
Writes results/runs/benchmark_calibration_MODEL.json.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from gpt2 import cli, data, models, results
from gpt2.compression.capture import collect
from gpt2.errors import PluginError


def main() -> None:
    p = cli.parser(__doc__)
    cli.add_model_flags(p)
    cli.add_text_flags(p)
    p.add_argument("--samples", type=cli.int_list, default=[8, 64], help="numbers of sequences for the memory figure")
    p.add_argument("--seq-len", type=cli.positive_int, default=1024, help="tokens per sequence")
    p.add_argument("--repeats", type=cli.positive_int, default=5, help="timed pairs")
    p.add_argument("--output", type=Path, help="JSON file")
    args = p.parse_args()
    loaded = models.load(args.model, args.device, args.dtype)
    output = results.check_writable(
        args.output or results.RESULTS / "runs" / f"benchmark_calibration_{loaded.slug}.json"
    )
    windows = data.load_text(args.text, args.model).segments(
        "calibration", loaded.tokenizer, args.seq_len, args.repeats
    )
    pairs = [time_pair(loaded, window) for window in windows]
    ratio = statistics.median(with_statistics / bare for bare, with_statistics in pairs)
    print(f"calibrating costs {ratio:.2f}x the bare forward pass (median of {len(pairs)} pairs)")
    del loaded
    memory = {str(n): peak_megabytes(args, n) for n in args.samples}
    for samples, size in memory.items():
        print(f"peak resident size with {samples:>3} samples: {size:,.0f} MB")
    record = results.provenance(args, ratio_to_forward=ratio, pairs_s=pairs, peak_rss_mb_by_samples=memory)
    results.write_json(output, record)
    print(f"wrote {output}")


@torch.no_grad()
def time_pair(loaded: models.LoadedModel, window: torch.Tensor) -> tuple[float, float]:
    """Seconds of one forward pass as a user would run it, with logits, and of the same tokens through capture."""
    ids = window[None].to(loaded.device)
    return clock(lambda: loaded.model(ids, use_cache=True)), clock(lambda: collect(loaded, [window], sink_tokens=4))


def clock(work) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_megabytes(args, samples: int) -> float:
    """Peak resident size of the calibration script with that many samples."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "scripts/calibrate_kv_lowrank.py", "--model", args.model, "--device", args.device]
        command += ["--dtype", args.dtype, "--samples", str(samples), "--seq-len", str(args.seq_len)]
        command += ["--output", f"{folder}/calibration.pt", *(["--text", args.text] if args.text else [])]
        child = subprocess.Popen(command, cwd=results.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise PluginError(f"the calibration with {samples} samples failed: run it by hand to see why")
    return usage.ru_maxrss / 1024


if __name__ == "__main__":
    cli.run(main)
