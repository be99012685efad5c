"""Predicted costs of 7B and 70B models, and measured exponents that show whether costs grow as predicted.

    python scripts/benchmarks/scaling.py
    python scripts/benchmarks/scaling.py --quick --output quick.json
    python scripts/benchmarks/scaling.py --shapes llama-3.1-8b.json,qwen2.5-72b.json --context-lengths 32768,131072
    python scripts/benchmarks/scaling.py --counted-only --shapes gemma-3-4b.json,gpt-oss-20b.json --output paper.json

Predicted: bytes of caches, and time and memory of calibration, by counting layer by layer. Measured:
calibration and evaluation on the model, with fewer samples, tokens and layers; caches on one layer of the model's shape
and of shapes without weights. A power law is fitted to each series; its exponent, with a bootstrap interval, is
compared with that of the counted costs at the same sizes. Times are only valid on a machine that is otherwise idle.
Writes results/runs/scaling_MODEL.json and results/plots/scaling_MODEL.png; with --counted-only, which is valid on any
machine, no picture.
"""

from functools import partial

from gpt2 import cli
from gpt2.common import files
from gpt2.experiments import power_law, predictions
from gpt2.experiments.scaling import FITTING, QUICK, Sizes, all_series, pass_ratios
from gpt2.models import random_weights
from gpt2.report import plots, tables

SHAPES = "qwen2.5-7b.json,llama-3.1-8b.json,qwen2.5-72b.json"
TIMED = "qwen2.5-0.5b.json,gemma-2-2b.json,llama-3.1-8b.json,qwen2.5-72b.json"


def arguments():
    p = cli.parser(__doc__)
    cli.add_model_flags(p)
    p.add_argument("--shapes", type=names, default=SHAPES, help="models to predict: files of configs/models")
    p.add_argument("--context-lengths", type=cli.int_list, default=[32768, 131072], help="tokens of predicted caches")
    p.add_argument("--presets", type=names, default="kv8,kv4,kv-4x,fast-4x,store-4x", help="caches to predict")
    p.add_argument("--samples", type=cli.positive_int, default=48, help="samples of predicted calibrations")
    p.add_argument("--seq-len", type=cli.positive_int, default=1024, help="tokens per sample of these")
    p.add_argument("--flops-per-s", type=cli.positive_float, default=2e14, help="assumed speed of calibration")
    p.add_argument("--timed-shapes", type=names, default=TIMED, help="shapes of which one layer is calibrated")
    p.add_argument("--cache-shapes", type=names, default="llama-3.1-8b.json", help="shapes of measured caches")
    p.add_argument("--timed-presets", type=names, default="kv4,kv-4x,fast-4x,store-4x", help="caches to measure")
    p.add_argument("--repeats", type=cli.positive_int, default=4, help="timings of every point; 3 or more for verdicts")
    p.add_argument("--counted-only", action="store_true", help="leave out all that is timed")
    p.add_argument("--quick", action="store_true", help="the smallest sizes, only to try the script")
    cli.add_output_flag(p)
    return p


def names(words: str) -> list[str]:
    """`a,b` as ["a", "b"], each name once."""
    return list(dict.fromkeys(words.split(",")))


def main() -> None:
    args = arguments().parse_args()
    script = cli.open_script(args)
    loaded, paths = script.loaded, script.output_files("scaling")
    own, read = {loaded.slug: loaded.model.config}, random_weights.read_shapes
    paper = own | read(args.shapes)
    caches = predictions.cache_rows(paper, args.context_lengths, args.presets, cli.bar("caches", "model"))
    count = partial(predictions.calibration_rows, paper, args.samples, args.seq_len, args.flops_per_s)
    if args.counted_only:
        record = script.record(caches=caches, calibrations=count())
        files.write_json(paths[0], record)
        for rows in ("bytes", "time", "memory"):
            tables.show("scaling", record, rows)
        print(f"\nwrote {files.shown(paths[0])}")
        return
    slopes, sizes = [], QUICK if args.quick else Sizes()
    found = all_series(loaded, own | read(args.timed_shapes), own | read(args.cache_shapes), args.timed_presets, sizes)
    for series in cli.bar("measured", "series")(found):
        slopes.append(power_law.measure(series, args.repeats))
    fitting = next(slope for slope in slopes if slope["step"] == FITTING)
    passes = pass_ratios(loaded, sizes, args.repeats)
    calibrations = count(partial(power_law.at, fitting))
    record = script.record(caches=caches, calibrations=calibrations, passes=passes, slopes=slopes)
    shown = [f"scaling {rows}" for rows in ("bytes", "time", "memory", "passes", "slopes")]
    cli.write(paths, record, lambda: plots.growth(record), shown)


if __name__ == "__main__":
    cli.run(main)
