"""Calibrate low-rank bases for a model's KV cache: one pass over a text, one file for every rank.

    python scripts/calibrate_kv_lowrank.py
    python scripts/calibrate_kv_lowrank.py --model Qwen/Qwen2.5-7B --rank 120 --samples 100 --output calib_qwen7b.pt

The first `--sink-tokens` of each sequence stay out of the statistics, since the cache keeps them exact. `--rank` is
the file's default; any other rank is cut from the same file. Good first ranks: 60, 56, 48 for head_dim 64, and 120,
112, 96 for head_dim 128. To compress K as well, choose --seq-len as long as the contexts to come: rotary positions
turn keys, and a basis doesn't hold for positions that it never saw. Beside the .pt a PNG shows what each rank would
lose in every layer.
"""

import argparse

from tqdm import tqdm

from gpt2 import cli, data, models, plots, results
from gpt2.compression.calibration import Calibration, calibrate, suggested_rank
from gpt2.compression.calibration_file import calibration_folders, save_calibration
from gpt2.compression.codecs import is_measured, metric_of
from gpt2.errors import PluginError


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    cli.add_model_flags(p)
    cli.add_text_flags(p)
    cli.add_calibration_flags(p)
    p.add_argument("--rank", type=cli.positive_int, help="default rank of the file; 3/4 of head_dim if omitted")
    p.add_argument(
        "--metric",
        choices=("pca", "attention", "fisher"),
        help="what error the basis keeps small: of K and V as they are (pca), of what attention reads (attention), of "
        "the loss (fisher: takes gradients, and gives codecs fisher, joint, grouped); what --codec needs if omitted",
    )
    cli.add_codec_flag(p, "how the file's own basis is fitted; of --metric if omitted", default=None)
    p.add_argument(
        "--compact",
        action="store_true",
        help="keep codec joint alone, or grouped where --codec says so, in half precision: a few MB for presets",
    )
    p.add_argument("--output", type=cli.output_path, help="calibration file; under results/calibrations if omitted")
    p.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute activations in the backward pass of --metric fisher: less memory, more time, the same result",
    )
    return p


def main() -> None:
    args = arguments().parse_args()

    codec = args.codec or args.metric or "pca"
    metric = args.metric or metric_of(codec)
    if args.compact and metric != "fisher":  # now, and not after an hour
        raise PluginError(f"--compact keeps codec joint or grouped alone, and both need gradients, which --metric "
                          f"{metric} doesn't take: give --metric fisher, --codec joint or --codec grouped")  # fmt: skip
    kept = codec if is_measured(codec) else "joint"  # of a compact file
    text = data.load_text(args.text, args.model)
    loaded = models.load(args.model, args.device, args.dtype)
    if args.gradient_checkpointing and metric != "fisher":
        print(f"note: {metric} statistics need no gradients; --gradient-checkpointing changes nothing here")
    rank = args.rank or suggested_rank(loaded.geometry.head_dim)
    default = calibration_folders()[0] / f"kv_lowrank_calib_{loaded.slug}_r{rank}.pt"
    output = results.check_writable(args.output or default)
    calibration = calibrate(
        loaded,
        text,
        rank=rank,
        samples=args.samples,
        seq_len=args.seq_len,
        seed=args.seed,
        sink_tokens=args.sink_tokens,
        codec=kept if args.compact else codec,
        metric=metric,
        checkpointing=args.gradient_checkpointing,
        progress=lambda windows: tqdm(windows, desc="calibrating", unit="seq"),
    )
    save_calibration(calibration.compact(kept) if args.compact else calibration, output)
    used = calibration.meta["tokens"] // args.seq_len
    if used < args.samples:
        print(f"note: {text.name} has text for {used} sequences of {args.seq_len}; all of them were used")
    print_summary(calibration, rank)
    energy = {side: calibration.energy(side).numpy() for side in ("k", "v")}
    picture = plots.spectra(energy, rank, f"{args.model}: {calibration.meta['tokens']:,} tokens of {text.name}")
    print(f"wrote {output} and {results.write_figure(results.picture_beside(output), picture)}")


def print_summary(calibration: Calibration, rank: int) -> None:
    """Energy kept at the rank, worst and mean over the KV heads of each layer, and how flat the spectrum is."""
    print(f"\nenergy kept at rank {rank} of {calibration.geometry.head_dim}, and rank that keeps 99 %")
    print(f"{'layer':>5}  {'K mean':>8} {'K worst':>8} {'K r99':>6}  {'V mean':>8} {'V worst':>8} {'V r99':>6}")
    for layer in range(calibration.geometry.num_layers):
        cells = []
        for side in ("k", "v"):
            kept = calibration.energy(side)[layer]  # [H, d]
            r99 = int((kept < 0.99).sum(-1).max()) + 1
            cells.append(f"{kept[:, rank - 1].mean():8.2%} {kept[:, rank - 1].min():8.2%} {r99:6d}")
        print(f"{layer:5d}  {cells[0]}  {cells[1]}")


if __name__ == "__main__":
    cli.run(main)
