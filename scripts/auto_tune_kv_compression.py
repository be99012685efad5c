"""Find the most compressed cache within a perplexity budget, and write it as a preset.

    python scripts/auto_tune_kv_compression.py --target-ppl-delta 0.05
    python scripts/auto_tune_kv_compression.py --model Qwen/Qwen2.5-7B --rank-grid 120,112,96 --bits 16,8 \\
        --output kv_preset_qwen7b.json

Calibrates once (or takes a matching file), scores every (rank, bits) on tuning text, and confirms the winner on
evaluation text that took no part. The search is an Optuna study in SQLite: interrupt it and run the same command to
go on, or run the command twice to share the work. --layer-ablation compresses each layer alone, shows which matter,
and stops; --per-layer uses the same figures to add plans in which sensitive layers keep more. Without a configuration
inside the budget nothing is written and the exit code is 3.
"""

from pathlib import Path

from gpt2 import cli, data, models, plots, results
from gpt2.compression import autotune, presets
from gpt2.compression.calibration import obtain_calibration
from gpt2.compression.codecs import needs_calibration
from gpt2.compression.plan import TARGETS, plan_record
from gpt2.compression.search import Search


def parse():
    p = cli.parser(__doc__)
    cli.add_model_flags(p)
    cli.add_text_flags(p)
    cli.add_calibration_flags(p)
    cli.add_evaluation_flags(p, tokens=8192)
    p.add_argument("--target-ppl-delta", type=cli.fraction, default=0.05, help="largest relative rise of perplexity")
    p.add_argument("--target", choices=list(TARGETS), default="v", help="what to compress: V, K or both")
    p.add_argument("--rank-grid", type=cli.int_list, help="ranks to try, such as 60,56,48; from head_dim if omitted")
    p.add_argument("--bits", type=cli.int_list, default=[16, 8, 4], help="bits to try")
    cli.add_codec_flag(p, "basis of the search")
    p.add_argument(
        "--per-layer", action="store_true", help="also search plans with a setting of its own for each layer"
    )
    p.add_argument("--layer-ablation", action="store_true", help="only measure each layer alone, and show which matter")
    p.add_argument("--calibration", type=Path, help="calibration file; a matching one is found or made if omitted")
    p.add_argument("--study", type=Path, default=results.RESULTS / "studies" / "auto_tune.db", help="SQLite file")
    p.add_argument("--name", help="name of the preset; from target and budget if omitted")
    p.add_argument("--output", type=cli.output_path, help="preset file; results/presets/MODEL-NAME.json if omitted")
    return p.parse_args()


def main() -> None:
    args = parse()
    budget = args.target_ppl_delta
    results.check_writable(args.study)
    text = data.load_text(args.text, args.model)
    loaded = models.load(args.model, args.device, args.dtype)
    head_dim = loaded.geometry.head_dim
    cells = autotune.grid(args.rank_grid, args.bits, head_dim, args.codec)
    tuning, evaluation = (cli.evaluation_segments(args, loaded, text, part) for part in ("tuning", "evaluation"))
    name = args.name or f"{args.target}-{100 * budget:g}pct"
    output = results.check_writable(args.output or results.RESULTS / "presets" / f"{loaded.slug}-{name}.json")
    calibration, calibration_file = None, ""
    if needs_calibration(args.codec):
        calibration, path = obtain_calibration(
            loaded, text, given=args.calibration, rank=cells[0].rank, samples=args.samples, seq_len=args.seq_len,
            seed=args.seed, sink_tokens=args.sink_tokens, progress=cli.bar("calibrating", "seq"),
        )  # fmt: skip
        calibration_file = presets.reference_to(path, output)
    search = Search(loaded, calibration, tuning, evaluation, args.target, args.codec, args.sink_tokens, args.chunk,
                    args.batch_size, args.seed, cli.bar)  # fmt: skip

    study_name = autotune.study_name(search.key(text.sha256("tuning")))
    if args.layer_ablation or args.per_layer:
        beside = args.study.parent / f"layer_ablation_{loaded.slug}_{study_name[-8:]}.json"
        ablation = args.output if args.layer_ablation and args.output else beside
        rows = search.ablate(cells, ablation, text.sha256("tuning"), results.provenance(args, text=text.name))
        report_layers(rows, ablation, f"{args.model}: one layer compressed at a time, {text.name}")
        if args.layer_ablation:
            return
        cells += search.per_layer(rows, budget)
    study = autotune.open_study(args.study, study_name)
    trials = autotune.run_grid(study, args.study, cells, search.evaluate, print_progress)
    print_table(trials, budget)
    best, confirmed, failed = autotune.confirm_best(trials, budget, search.confirm)
    for trial, record in failed:
        print(f"{trial.cell} holds on tuning text but not on evaluation text: {record['ppl_delta']:+.2%}")

    preset = presets.new_preset(
        loaded, calibration, calibration_file, compression_ratio=best.compression_ratio, measured=confirmed, name=name,
        target=args.target, rank=best.cell.rank, bits=best.cell.bits, codec=args.codec, sink_tokens=args.sink_tokens,
        layers=best.cell.layers and plan_record(best.cell.plan(args.target, args.codec, loaded.geometry.num_layers)),
        trials=[trial.record() for trial in trials],
        refused_on_evaluation_text=[{"label": str(trial.cell)} | record for trial, record in failed],
        provenance=results.provenance(args, text=text.name, text_sha256=text.sha256("evaluation")),
    )  # fmt: skip
    results.write_json(output, preset)
    frontier = results.RESULTS / "plots" / f"frontier_{output.stem}.png"
    picture = results.picture_beside(output) if args.output else frontier
    title = f"{args.model}, target {args.target}: {tuning.numel():,} tuning tokens of {text.name}"
    results.write_figure(picture, plots.frontier(preset["trials"], budget, str(best.cell), title))
    low, high = confirmed["ppl_delta_interval"]
    print(f"\nchosen: {best.cell}, {best.compression_ratio:.2f}x over the whole KV cache; on evaluation text "
          f"{confirmed['ppl_delta']:+.2%} perplexity [{low:+.2%}, {high:+.2%}]")  # fmt: skip
    print(f"wrote {output} and {picture}")


def report_layers(rows: list[dict], path: Path, title: str) -> None:
    """The layers that lose most, and a picture of all."""
    picture = results.write_figure(results.picture_beside(path), plots.layer_losses(rows, title))
    print(f"\nlayer by layer, the most sensitive first ({results.shown(path)}, {results.shown(picture)}):")
    for row in sorted(rows, key=lambda row: -row["kl_nats"])[:10]:
        print(f"  layer {row['layer']:2d} {row['side'].upper()}, rank {row['rank']}, {row['bits']} bits: "
              f"KL {row['kl_nats']:.5f} nats, {row['ppl_delta']:+.2%} perplexity")  # fmt: skip


def print_progress(trials: list[autotune.Trial], note: str) -> None:
    last = f"; last {trials[-1].cell}: {trials[-1].ppl_delta:+.2%}" if trials else ""
    print(f"tuning: {len(trials)} measured{last}{'; ' + note if note else ''}", flush=True)


def print_table(trials: list[autotune.Trial], budget: float) -> None:
    width = max(20, *(len(str(trial.cell)) for trial in trials))
    print(f"\n{'configuration':<{width}} {'Δ PPL':>9}  {'95 % interval':>20} {'ratio':>6}  within {budget:+.1%}")
    for trial in sorted(trials, key=lambda t: t.compression_ratio):
        low, high = trial.details["ppl_delta_interval"]
        inside = "yes" if trial.ppl_delta <= budget else "no"
        print(f"{str(trial.cell):<{width}} {trial.ppl_delta:+9.2%}  [{low:+8.2%}, {high:+8.2%}] "
              f"{trial.compression_ratio:5.2f}x  {inside}")  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
