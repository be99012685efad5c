"""Perplexity ablation: what each choice of a compressed cache costs, measured through the real cache on one text.

    python scripts/validate_ppl_postbugfix.py
    python scripts/validate_ppl_postbugfix.py --text ../wikitext --eval-tokens 16384 --groups control,rank,bits

Groups: control (identity must leave every token's loss unchanged, a lossy codec must change it), basis (PCA against
random), metric (PCA against the metrics of attention and of the loss; takes gradients), target (V, K, both), rank,
bits, sinks (with and without exact first tokens), layers (one range of layers at a time), nullspace (dropping the
all-ones direction against dropping other directions), policies (each with the settings that it chooses).
Writes results/runs/validate_ppl_MODEL.json and results/plots/validate_ppl_MODEL.png, or where --output says.
"""

import argparse

from gpt2 import cli
from gpt2.common import provenance
from gpt2.common.errors import PluginError
from gpt2.compression.calibration.reuse import obtain_calibration
from gpt2.experiments.ablation import GROUPS, Ablation, measure
from gpt2.report import plots, tables
from gpt2.tuning.grid_search import default_rank_grid


def arguments() -> argparse.ArgumentParser:
    p = cli.evaluation_parser(__doc__, tokens=8192, calibrates=True)
    cli.add_calibration_file_flag(p)
    p.add_argument("--groups", type=cli.word_list(GROUPS), default=list(GROUPS), help="which groups of rows to run")
    p.add_argument("--ranks", type=cli.int_list, help="ranks to try, best first; from head_dim if omitted")
    p.add_argument("--bits", type=cli.int_list, default=[16, 8, 4], help="quantizer widths")
    p.add_argument("--layer-groups", type=cli.positive_int, default=5, help="ranges of layers in group `layers`")
    cli.add_output_flag(p)
    return p


def main() -> None:
    args = arguments().parse_args()
    script = cli.open_script(args)
    loaded, text, paths = script.loaded, script.text, script.output_files("validate_ppl")
    ranks = args.ranks or default_rank_grid(loaded.geometry.head_dim)[1:4]
    calibration, _ = obtain_calibration(
        loaded, text, given=args.calibration, rank=ranks[0], samples=args.samples, seq_len=args.seq_len,
        seed=args.seed, sink_tokens=args.sink_tokens, metric="fisher" if "metric" in args.groups else "pca",
        progress=cli.bar("calibrating", "seq"),
    )  # fmt: skip
    ablation = Ablation(loaded, calibration, ranks, args.bits, args.sink_tokens, args.layer_groups)
    segments = script.evaluation_segments()
    wanted = {group: ablation.rows(group) for group in args.groups}  # first, so that invalid settings show early
    rows, known = [], {}
    record = script.record(
        calibration=calibration.meta, dtype=str(loaded.model.dtype), segments=list(segments.shape), rows=rows
    )
    for group, compared in wanted.items():
        rows += measure(
            loaded, segments, compared, known, seed=args.seed, chunk=args.chunk,
            batch_size=args.batch_size, progress=cli.bar(group, "batch"),
        )  # fmt: skip
        tables.show("validate_ppl", record, group)
    title = f"{loaded.spec}, {segments.numel():,} tokens of {text.name}"
    record["wall_s"] = provenance.taken()
    cli.write(paths, record, lambda: plots.perplexity_changes(rows, title))
    check_cache_is_on_the_path(rows)


def check_cache_is_on_the_path(rows: list[dict]) -> None:
    """Raise PluginError if the controls show that the model doesn't read the cache; do nothing without controls."""
    control = [row for row in rows if row["group"] == "control"]
    if not control:
        return
    identity, lossy = control
    # Not exactly zero: with a sliding window DynamicCache holds fewer tokens, and shorter sums round differently
    if identity["largest_nll_change"] > 1e-3 or abs(lossy["ppl_delta"]) < 0.001:
        raise PluginError(
            f"the controls failed: identity changed a token's loss by {identity['largest_nll_change']:.2e} nats, "
            f"the lossy codec changed perplexity by {lossy['ppl_delta']:+.2%}"
        )
    print(
        f"the model reads the cache: identity changes no token's loss by more than "
        f"{identity['largest_nll_change']:.0e} nats, the lossy codec changes perplexity by {lossy['ppl_delta']:+.0%}"
    )


if __name__ == "__main__":
    cli.run(main)
