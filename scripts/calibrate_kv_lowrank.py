"""Calibrate low-rank bases for a model's KV cache: one pass over a text, one file for every rank.

    python scripts/calibrate_kv_lowrank.py
    python scripts/calibrate_kv_lowrank.py --model Qwen/Qwen2.5-7B --rank 120 --samples 100 --output calib_qwen7b.pt

The first `--sink-tokens` tokens of each sequence are left out of the statistics, since the cache keeps them exact.
`--rank` is the file's default rank; the file serves every other rank as well. Good ranks to start with are 60, 56, 48
for head_dim 64, and 120, 112, 96 for head_dim 128. To compress K as well, choose --seq-len as long as the contexts that
you will use: RoPE rotates keys by position, and a basis doesn't fit positions beyond those it was calibrated on. A PNG
beside the file shows what each rank would lose in every layer.

Several GPUs, each with a copy of the model, can share the sequences; the result is that of one process, to rounding:

    torchrun --nproc-per-node 8 scripts/calibrate_kv_lowrank.py --model Qwen/Qwen2.5-7B

(or with accelerate launch). A model that doesn't fit on one GPU is spread over all by --device all, in one process.
"""

import argparse

from gpt2 import cli
from gpt2.common import files, tensor_file
from gpt2.common.processes import Processes
from gpt2.compression.calibration.calibrate import calibrate, chosen_codec, suggested_rank
from gpt2.compression.calibration.file import calibration_folder, save_calibration
from gpt2.compression.codecs import metric_names, multi_head_bases, takes_gradients
from gpt2.report import plots
from gpt2.report.tables import calibration as calibration_tables


def arguments() -> argparse.ArgumentParser:
    several = list(multi_head_bases())
    p = cli.parser(__doc__)
    cli.add_model_flags(p)
    cli.add_text_flags(p)
    cli.add_calibration_flags(p)
    p.add_argument("--rank", type=cli.positive_int, help="default rank of the file; 3/4 of head_dim if omitted")
    p.add_argument(
        "--metric",
        choices=metric_names(),
        help="which error the basis minimizes: of K and V (pca), of attention's output (attention), or of the loss "
        f"(fisher: takes gradients, and is needed for codecs fisher, {', '.join(several)}); what --codec needs if "
        "omitted",
    )
    cli.add_codec_flag(p, "the codec whose basis is fitted; the one of --metric if omitted", default=None)
    p.add_argument(
        "--compact",
        action="store_true",
        help=f"fit and store only one codec ({' or '.join(several)}; {several[0]} if --codec is omitted), in eight "
        "bits: a file of a few MB, for presets",
    )
    p.add_argument(
        "--output",
        type=cli.output_file(*tensor_file.SUFFIXES),
        help="calibration file, .pt or .safetensors; a .pt under results/calibrations if omitted",
    )
    p.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute activations in the backward pass of --metric fisher: less memory, more time, same result",
    )
    return p


def main(processes: Processes) -> None:
    args = arguments().parse_args()
    codec, metric = chosen_codec(args.codec, args.metric, args.compact)
    script = cli.open_script(args)
    loaded, text = script.loaded, script.text
    if args.gradient_checkpointing and not takes_gradients(metric):
        print(f"note: {metric} statistics need no gradients; --gradient-checkpointing changes nothing here")
    rank = args.rank or suggested_rank(loaded.geometry.head_dim)
    default = calibration_folder() / f"kv_lowrank_calib_{loaded.slug}_r{rank}.pt"
    output = files.check_writable(args.output or default)
    if processes.first and not args.output and output.exists():
        print(f"note: {files.shown(output)} will be replaced, also for presets that name it; --output keeps it")
    calibration = calibrate(
        loaded, text, rank=rank, samples=args.samples, seq_len=args.seq_len, seed=args.seed,
        sink_tokens=args.sink_tokens, codec=codec, metric=metric, compact=args.compact,
        checkpointing=args.gradient_checkpointing, progress=cli.bar("calibrating", "seq"), processes=processes,
    )  # fmt: skip
    if not processes.first:
        return
    save_calibration(calibration, output)
    used = calibration.meta["tokens"] // args.seq_len
    if used < args.samples:
        print(f"note: {text.name} has only {used} sequences of {args.seq_len} tokens; all of them were used")
    variance = calibration.kept_variance()
    # A compact file has one basis for several heads: show the same share of its coordinates
    first = next(share for share in next(iter(variance.values())) if share is not None)
    shown = min(rank * max(first.shape[-1] // loaded.geometry.head_dim, 1), first.shape[-1])
    print(f"\n{calibration_tables.kept_variance(variance, shown).console()}")
    title = f"{args.model}: {calibration.meta['tokens']:,} tokens of {text.name}"
    shares = {side: [None if own is None else own.numpy() for own in layers] for side, layers in variance.items()}
    picture = plots.spectra(shares, shown, title)
    files.write_figure(files.picture_beside(output), picture)
    print(f"\nwrote {files.shown(output)} and {files.shown(files.picture_beside(output))}")


if __name__ == "__main__":
    cli.run(main, shared=True)
