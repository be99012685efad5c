"""Is a compressed cache as good on other text, with another calibration, on other prompts? Mean, spread, verdict.

    python scripts/eval_stability.py --preset int4-vonly
    python scripts/eval_stability.py --preset kv_preset_mistral_v9.json --num-runs 3 --vary text,calibration
    python scripts/eval_stability.py --policy high_compression --max-ppl-delta 0.03

Run 0 uses everything as given. Then each factor alone takes --num-runs - 1 other values: text (another window of the
evaluation text), calibration (other samples of the calibration text; only if the cache is calibrated), seed (other
needle prompts). The exit code is 3 if the verdict is 'NOT stable'; results are written in any case.
Writes results/runs/stability_MODEL_CACHE.json and a PNG in results/plots, or where --output says.
"""

import argparse
import sys

from gpt2 import cli
from gpt2.evaluation import stability, stability_setup
from gpt2.evaluation.stability import FACTORS, METRICS
from gpt2.report import plots


def arguments() -> argparse.ArgumentParser:
    p = cli.evaluation_parser(__doc__, tokens=4096)
    cli.add_cache_flags(p)
    p.add_argument("--num-runs", type=cli.positive_int, default=3, help="values of each factor")
    p.add_argument("--vary", type=cli.word_list(FACTORS), default=list(FACTORS), help="factors, one at a time")
    p.add_argument("--needle-length", type=cli.positive_int, default=512, help="context of the needle test, tokens")
    p.add_argument("--needle-trials", type=cli.positive_int, default=4, help="needle prompts per depth and run")
    p.add_argument("--max-ppl-delta", type=cli.fraction, default=0.05, help="verdict: largest rise of perplexity")
    p.add_argument("--max-std", type=cli.fraction, default=0.01, help="verdict: largest standard deviation of the rise")
    cli.add_output_flag(p)
    return p


def main() -> None:
    args = arguments().parse_args()
    script = cli.open_script(args)
    loaded, text = script.loaded, script.text
    (choice,) = cli.chosen_caches(args, loaded)
    paths = cli.output_files(args.output, f"stability_{loaded.slug}_{choice.label.replace('/', '-')}")
    factors = stability_setup.usable_factors(args.vary, args.num_runs, choice, loaded, text)
    setup = stability_setup.prepare(
        choice, loaded, text, length=cli.evaluation_length(args, loaded), tokens=args.eval_tokens,
        num_windows=args.num_runs if "text" in factors else 1, needle_length=args.needle_length,
        needle_trials=args.needle_trials, chunk=args.chunk, batch_size=args.batch_size, bar=cli.bar,
    )  # fmt: skip
    rows = []
    for number, run in enumerate(stability.schedule(factors, args.num_runs, args.seed)):
        rows.append(stability.measure(setup, run, cli.bar(f"run {number}, {run.factor}", "batch")))
        print(f"run {number} ({run.factor}): {stability.line(rows[-1])}", flush=True)
    summary = stability.summarize(rows)
    verdict = stability.verdict(summary, args.max_ppl_delta, args.max_std)
    record = script.record(cache=choice.record(), metrics=METRICS, rows=rows, summary=summary, verdict=verdict)
    title = f"{loaded.spec}, {choice.label}, {text.name}"
    cli.write(paths, record, lambda: plots.stability(rows, METRICS, title), ["stability"])
    print(verdict["line"])
    sys.exit(3 if verdict["stable"] is False else 0)


if __name__ == "__main__":
    cli.run(main)
