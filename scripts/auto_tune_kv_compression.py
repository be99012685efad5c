"""Find the most compressed cache within a perplexity budget, and write it as a preset.

    python scripts/auto_tune_kv_compression.py --target-ppl-delta 0.05
    python scripts/auto_tune_kv_compression.py --model Qwen/Qwen2.5-7B --rank-grid 120,112,96 --bits 16,8 \\
        --output kv_preset_qwen7b.json
    python scripts/auto_tune_kv_compression.py --search codec --num-trials 40 --output best.json

Calibrates once (or takes a matching file), measures candidates on tuning text, and confirms the winner on evaluation
text that took no part. --search grid, the default, scores every (rank, bits) of one codec. --search codec looks through
all codecs for whatever compresses most: K and V together or apart, bits down to fractions, ranks, quantizers by token
or by channel, and how many first tokens stay exact. It starts with a sensible point of each codec and lets Optuna's
constrained TPE choose from there; --num-trials is how many are measured. Others are skipped, at most as many again,
because their compression, known without running the model, can't beat the best so far. Where a codec needs gradients
the calibration takes them: a --calibration of your own should be made with --metric fisher, or it leaves such codecs
out.

The search is an Optuna study in SQLite: interrupt it and run the same command to go on, or run the command twice to
share the work; more --num-trials add to those that are done. --layer-ablation compresses each layer alone, shows which
matter, and stops; --per-layer uses the same figures to add plans in which sensitive layers keep more; both are of the
grid. A candidate without a finite loss is out of the budget. Without one inside the budget nothing is written and the
exit code is 3.
"""

import argparse
from pathlib import Path

from gpt2 import cli
from gpt2.common import files, provenance
from gpt2.compression.codecs import adjustable_quantizers, basis_of
from gpt2.compression.settings import TARGETS
from gpt2.models import loading
from gpt2.report import plots, tables
from gpt2.text import sources
from gpt2.tuning import console, grid_search, search_space, searches, trial_queue

ONLY = {"grid": ("target", "bits", "codec", "per_layer", "layer_ablation"),
        "codec": ("codecs", "num_trials", "recent_grid")}  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    cli.add_model_flags(p)
    cli.add_text_flags(p)
    cli.add_calibration_flags(p)
    cli.add_evaluation_flags(p, tokens=8192)
    p.add_argument("--target-ppl-delta", type=cli.fraction, default=0.05, help="largest relative rise of perplexity")
    p.add_argument("--search", choices=list(ONLY), default="grid", help="one codec's grid, or all codecs")
    p.add_argument("--target", choices=list(TARGETS), default="v", help="grid: what to compress, V, K or both")
    p.add_argument("--rank-grid", type=cli.int_list, help="ranks to try, such as 60,56,48; from head_dim if omitted")
    p.add_argument("--bits", type=cli.int_list, default=[16, 8, 4], help="grid: bits to try")
    cli.add_codec_flag(p, "grid: basis of the search")
    p.add_argument("--per-layer", action="store_true", help="grid: also plans with a setting of its own for each layer")
    p.add_argument("--layer-ablation", action="store_true", help="grid: only measure each layer alone")
    families = search_space.families()
    p.add_argument("--codecs", type=cli.word_list(families), help=f"codec: limit it to some of {','.join(families)}")
    p.add_argument("--num-trials", type=cli.positive_int, default=40, help="codec: how many candidates to measure")
    p.add_argument("--recent-grid", type=cli.int_list, help="codec: numbers of exact latest tokens to try beside none")
    p.add_argument("--calibration", type=Path, help="calibration file; a matching one is found or made if omitted")
    p.add_argument("--study", type=Path, default=files.RESULTS / "studies" / "auto_tune.db", help="SQLite file")
    p.add_argument("--name", help="name of the preset; from target and budget if omitted")
    p.add_argument("--output", type=cli.output_path, help="preset file; results/presets/MODEL-NAME.json if omitted")
    return p


def parse() -> argparse.Namespace:
    p = arguments()
    args = p.parse_args()
    other = "codec" if args.search == "grid" else "grid"
    for name in ONLY[other]:
        if getattr(args, name) != p.get_default(name):
            p.error(f"--{name.replace('_', '-')} belongs to --search {other}")
    basis = basis_of(args.codec)
    if basis.calibrated and not basis.ranked:
        name = f"{args.codec}+{adjustable_quantizers()[0]}"
        p.error(f"--codec {args.codec} has no grid of ranks: use --search codec --codecs {name}")
    return args


def main() -> None:
    args = parse()
    budget = args.target_ppl_delta
    trial_queue.check_file(args.study)
    text = sources.load_text(args.text, args.model)
    loaded = loading.load(args.model, args.device, args.dtype)
    name = args.name or f"{args.target if args.search == 'grid' else 'codec'}-{100 * budget:g}pct"
    output = args.output or files.RESULTS / "presets" / f"{loaded.slug}-{name}.json"
    inputs = {part: cli.evaluation_segments(args, loaded, text, part) for part in ("tuning", "evaluation")}
    inputs["bar"] = cli.bar
    if args.search == "grid":
        found = searches.search_grid(args, loaded, text, output, inputs, show_layers)
    else:
        found = searches.search_codecs(args, loaded, text, output, inputs)
    if found is None:
        return
    search, trials, calibration_file, advice, more = found
    records = [trial.record() for trial in trials]
    tables.show("auto_tune", {"model": args.model, "args": vars(args), "trials": records})
    best, confirmed, failed = grid_search.confirm_best(trials, budget, search.confirm, advice)
    console.print_refused(failed)
    preset = console.new_preset(
        search, best, calibration_file, confirmed, name=name, trials=records, **more,
        refused_on_evaluation_text=[{"label": str(trial.cell)} | record for trial, record in failed],
        provenance=provenance.provenance(args, text=text.name, text_sha256=text.sha256("evaluation")),
    )  # fmt: skip
    what = f"target {args.target}" if args.search == "grid" else "all codecs"
    title = f"{args.model}, {what}: {search.tuning.numel():,} tuning tokens of {text.name}"
    draw = plots.grid_frontier if args.search == "grid" else plots.codec_frontier
    console.print_chosen(best, confirmed)
    console.write(preset, output, lambda: draw(preset["trials"], budget, str(best.cell), title))


def show_layers(rows: list[dict], path: Path, title: str) -> None:
    picture = files.write_figure(files.picture_beside(path), plots.layer_losses(rows, title))
    tables.show("layer_ablation", tables.read(path) | {"rows": rows})
    print(f"wrote {files.shown(path)} and {files.shown(picture)}")


if __name__ == "__main__":
    cli.run(main)
