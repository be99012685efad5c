"""Find the most compressed cache within a perplexity budget, and write it as a preset.

    python scripts/auto_tune_kv_compression.py --target-ppl-delta 0.05
    python scripts/auto_tune_kv_compression.py --model Qwen/Qwen2.5-7B --rank-grid 120,112,96 --bits 16,8 \\
        --output kv_preset_qwen7b.json
    python scripts/auto_tune_kv_compression.py --search codec --num-trials 40 --output best.json

Calibrates once, or reuses a matching file, measures candidates on tuning text, and confirms the best one on separate
evaluation text. --search grid, the default, measures every (rank, bits) of one codec. --search codec searches all
codecs: K and V together or apart, fractional bits, ranks, quantizers by token or by channel, and how many first tokens
stay exact. It starts with one point of each codec; Optuna's constrained TPE chooses the rest. --num-trials candidates
are measured, and at most as many are skipped, because their compression ratio, which is known without running the
model, can't beat the best so far. Some codecs need a calibration with gradients: make a --calibration file of your own
with --metric fisher, or these codecs are left out.

The search is an Optuna study: run the same command to resume it after an interruption, or run it twice at
once to share the work; more --num-trials add to those that are done. With --search grid, --layer-ablation compresses
each layer alone, shows which layers matter, and stops; --per-layer uses the same figures to add plans in which
sensitive layers keep more. A candidate whose loss is not finite counts as over the budget. If no candidate is within
the budget, nothing is written and the exit code is 3.
"""

import argparse
from pathlib import Path

from gpt2 import cli
from gpt2.common import files, trial_queue
from gpt2.compression.settings import TARGETS
from gpt2.report import plots, tables
from gpt2.tuning import grid_search, search_space, tune

ONLY = {"grid": ("target", "bits", "codec", "per_layer", "layer_ablation"),
        "codec": ("codecs", "num_trials", "recent_grid")}  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    p = cli.evaluation_parser(__doc__, tokens=8192, calibrates=True)
    p.add_argument("--target-ppl-delta", type=cli.fraction, default=0.05, help="largest relative rise of perplexity")
    p.add_argument("--search", choices=list(ONLY), default="grid", help="one codec's grid, or all codecs")
    p.add_argument("--target", choices=list(TARGETS), default="v", help="grid: what to compress, V, K or both")
    p.add_argument("--rank-grid", type=cli.int_list, help="ranks to try, such as 60,56,48; from head_dim if omitted")
    p.add_argument("--bits", type=cli.int_list, default=[16, 8, 4], help="grid: bits to try")
    cli.add_codec_flag(p, "grid: basis of the search")
    p.add_argument("--per-layer", action="store_true", help="grid: also plans with different settings of layers")
    p.add_argument("--layer-ablation", action="store_true", help="grid: only measure each layer alone, then stop")
    families = search_space.families()
    p.add_argument("--codecs", type=cli.word_list(families), help=f"codec: search only some of {','.join(families)}")
    p.add_argument("--num-trials", type=cli.positive_int, default=40, help="codec: how many candidates to measure")
    p.add_argument("--recent-grid", type=cli.int_list, help="codec: numbers of exact latest tokens to try, besides 0")
    cli.add_calibration_file_flag(p)
    p.add_argument("--context-length", type=cli.positive_int, default=2048, help="tokens at which the ratio counts")
    study = files.RESULTS / "studies" / "auto_tune.db"
    p.add_argument("--study", type=cli.study, default=study, help="SQLite file, or a PostgreSQL database's URL")
    p.add_argument("--name", type=cli.file_word, help="name of the preset; from target and budget if omitted")
    p.add_argument(
        "--output", type=cli.output_file(".json"), help="preset file; results/presets/MODEL-NAME.json if omitted"
    )
    return p


def parse() -> argparse.Namespace:
    p = arguments()
    args = p.parse_args()
    other = "codec" if args.search == "grid" else "grid"
    p.reject_changed(args, ONLY[other], f"belongs to --search {other}")
    grid_search.check_ranked(args.codec)
    return args


def main() -> None:
    args = parse()
    if isinstance(args.study, Path):
        trial_queue.check_file(args.study)
    script = cli.open_script(args)
    loaded, text = script.loaded, script.text
    grid = args.search == "grid"
    name = args.name or f"{args.target if grid else 'codec'}-{100 * args.target_ppl_delta:g}pct"
    output = args.output or files.RESULTS / "presets" / f"{loaded.slug}-{name}.json"
    segments = [script.evaluation_segments(part) for part in ("tuning", "evaluation")]
    job = tune.Job(args, loaded, text, *segments, output, cli.bar)
    found = tune.search_grid(job, show_layers) if grid else tune.search_codecs(job)
    if found is None:
        return
    tables.show("auto_tune", {"model": args.model, "args": vars(args), "trials": found.records})
    preset, best = tune.choose(job, found, name)
    what = f"target {args.target}" if grid else "all codecs"
    title = f"{args.model}, {what}: {job.tuning.numel():,} tuning tokens of {text.name}"
    draw = plots.grid_frontier if grid else plots.codec_frontier
    paths = output, files.picture_beside(output)
    cli.write(paths, preset, lambda: draw(preset["trials"], args.target_ppl_delta, str(best.candidate), title))


def show_layers(rows: list[dict], path: Path, title: str) -> None:
    picture = files.write_figure(files.picture_beside(path), plots.layer_losses(rows, title))
    tables.show("layer_ablation", tables.read(path) | {"rows": rows})
    print(f"wrote {files.shown(path)} and {files.shown(picture)}")


if __name__ == "__main__":
    cli.run(main)
