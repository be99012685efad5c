"""Is a compressed cache as good on other text, with another calibration, on other questions? Mean, spread, verdict.

    python scripts/eval_stability.py --preset int4-vonly
    python scripts/eval_stability.py --preset kv_preset_mistral_v9.json --num-runs 3 --vary text,calibration
    python scripts/eval_stability.py --policy high_compression --max-ppl-delta 0.03

Run 0 takes everything as given; then each factor alone takes --num-runs - 1 other values: text (another window of the
evaluation text), calibration (other samples of the calibration text; only for a cache that is calibrated), seed (other
needle prompts). The exit code is 3 where the verdict is 'NOT stable'; results are written in any case.
Writes results/runs/stability_MODEL_CACHE.json and a PNG in results/plots, or where --output says.
"""

import argparse
import sys
from functools import cache

from gpt2 import cli
from gpt2.common.errors import PluginError
from gpt2.compression.calibration.calibrate import check_samples, recalibrate
from gpt2.compression.named_caches import CacheChoice, from_preset
from gpt2.compression.presets.calibration_lookup import calibration_of
from gpt2.compression.settings import needs_calibration_file
from gpt2.evaluation import stability
from gpt2.evaluation.stability import FACTORS, METRICS, Setup
from gpt2.models import loading
from gpt2.report import plots
from gpt2.text import sources


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    cli.add_model_flags(p)
    cli.add_text_flags(p)
    cli.add_evaluation_flags(p, tokens=4096)
    cli.add_cache_flags(p)
    p.add_argument("--num-runs", type=cli.positive_int, default=3, help="values that each factor takes")
    p.add_argument("--vary", type=cli.word_list(FACTORS), default=list(FACTORS), help="factors, one at a time")
    p.add_argument("--needle-length", type=cli.positive_int, default=512, help="context of the needle test, tokens")
    p.add_argument("--needle-trials", type=cli.positive_int, default=4, help="needle prompts per depth and run")
    p.add_argument("--max-ppl-delta", type=cli.fraction, default=0.05, help="verdict: worst allowed rise of perplexity")
    p.add_argument("--max-std", type=cli.fraction, default=0.01, help="verdict: allowed deviation of that rise")
    cli.add_output_flag(p)
    return p


def main() -> None:
    args = arguments().parse_args()
    script = cli.open_script(args)
    loaded, text = script.loaded, script.text
    (choice,) = cli.chosen_caches(args, loaded)
    paths = cli.output_files(args.output, f"stability_{loaded.slug}_{choice.label.replace('/', '-')}")
    factors = usable(args, loaded, text, choice)
    setup = prepare(args, loaded, text, choice, args.num_runs if "text" in factors else 1)
    rows = []
    for number, run in enumerate(stability.schedule(factors, args.num_runs, args.seed)):
        rows.append(stability.measure(setup, run, cli.bar(f"run {number}, {run.factor}", "batch")))
        print_run(number, rows[-1])
    summary = stability.summarize(rows)
    verdict = stability.verdict(summary, args.max_ppl_delta, args.max_std)
    record = script.record(cache=choice.record(), metrics=METRICS, rows=rows, summary=summary, verdict=verdict)
    title = f"{loaded.spec}, {choice.label}, {text.name}"
    cli.write(paths, record, lambda: plots.stability(rows, METRICS, title), ["stability"])
    print(verdict["line"])
    sys.exit(3 if verdict["stable"] is False else 0)


def usable(args, loaded: loading.LoadedModel, text: sources.Text, choice: CacheChoice) -> list[str]:
    """The factors that can be varied: a calibration only where there is one, of this text, with other samples."""
    if args.num_runs < 2:
        raise PluginError("--num-runs 1 varies nothing: use 2 or more")
    if "calibration" not in args.vary:
        return args.vary
    try:
        if not needs_calibration_file(choice.preset.plan):
            raise PluginError(f"{choice.label} has none")
        check_samples(calibration_of(choice.preset, loaded), loaded, text)
        return args.vary
    except PluginError as error:
        print(f"note: the calibration is not varied: {error}")
        return [factor for factor in args.vary if factor != "calibration"]


def prepare(args, loaded: loading.LoadedModel, text: sources.Text, choice: CacheChoice, num_windows: int) -> Setup:
    """Text windows, and a cache factory for every calibration number: 0 is the preset's own."""
    length, speed_context = cli.evaluation_length(args, loaded), min(512, args.needle_length)
    loaded.require_context(args.needle_length, "--needle-length")
    loaded.require_context(speed_context, "--needle-length", after=8)
    per_run = args.eval_tokens // length
    haystack = text.tokens("evaluation", loaded)
    segments = text.segments("evaluation", loaded, length, num_windows * per_run, flag="--eval-seq-len")

    @cache
    def make(number: int):
        if not number:
            return choice.make
        given = calibration_of(choice.preset, loaded)
        other = recalibrate(given, loaded, text, number, cli.bar(f"calibration {number}", "seq"))
        print(f"calibration {number}: {other.meta['tokens']:,} tokens drawn anew; the preset's has "
              f"{given.meta['tokens']:,}", flush=True)  # fmt: skip
        return from_preset(choice.preset, loaded, other).make

    return Setup(
        loaded, stability.windows_of(segments, num_windows, per_run), haystack, make, args.chunk, args.batch_size,
        args.needle_length, args.needle_trials, speed_context,
    )  # fmt: skip


def print_run(number: int, row: dict) -> None:
    fails = "" if row["needle_baseline_works"] else ", which fails"
    print(f"run {number} ({row['factor']}): Δ perplexity {row['ppl_delta']:+.2%}, KL {row['kl_nats']:.4f} nats, top-1 "
          f"{row['top1_agreement']:.1%}, needle {row['needle_accuracy']:.0%} (baseline "
          f"{row['needle_accuracy_baseline']:.0%}{fails}), speed {row['speed_ratio']:.2f}x", flush=True)  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
