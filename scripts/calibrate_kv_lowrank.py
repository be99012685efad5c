"""Calibrate low-rank bases for a model's KV cache: one pass over a text, one file for every rank.

    python scripts/calibrate_kv_lowrank.py
    python scripts/calibrate_kv_lowrank.py --model Qwen/Qwen2.5-7B --rank 120 --samples 100 --output calib_qwen7b.pt

The first `--sink-tokens` of each sequence stay out of the statistics, since the cache keeps them exact. `--rank` is
the file's default; any other rank is cut from the same file. Good first ranks: 60, 56, 48 for head_dim 64, and 120,
112, 96 for head_dim 128. To compress K as well, choose --seq-len as long as the contexts to come: rotary positions
turn keys, and a basis doesn't hold for positions that it never saw. Beside the .pt a PNG shows what each rank would
lose in every layer.

Several GPUs share the sequences where each holds the model; the file is that of one process, to rounding:

    torchrun --nproc-per-node 8 scripts/calibrate_kv_lowrank.py --model Qwen/Qwen2.5-7B

or accelerate launch in the place of torchrun. A model that fits on none alone is spread over all: --device all, in one
process.
"""

import argparse

from gpt2 import cli
from gpt2.common import files
from gpt2.common.errors import PluginError
from gpt2.common.processes import Processes
from gpt2.compression.calibration.calibrate import calibrate, suggested_rank
from gpt2.compression.calibration.file import calibration_folders, save_calibration
from gpt2.compression.codecs import basis_of, metric_names, multi_head_bases, takes_gradients
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
        help="what error the basis keeps small: of K and V as they are (pca), of what attention reads (attention), of "
        f"the loss (fisher: takes gradients, and gives codecs fisher, {', '.join(several)}); what --codec needs if "
        "omitted",
    )
    cli.add_codec_flag(p, "how the file's own basis is fitted; of --metric if omitted", default=None)
    p.add_argument(
        "--compact",
        action="store_true",
        help=f"gather and keep one codec of {', '.join(several)} alone, {several[0]} if --codec is omitted, in half "
        "precision: a few MB for presets",
    )
    p.add_argument(
        "--output",
        type=cli.output_path,
        help="calibration file, .pt or .safetensors; a .pt under results/calibrations if omitted",
    )
    p.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute activations in the backward pass of --metric fisher: less memory, more time, the same result",
    )
    return p


def main(processes: Processes) -> None:
    args = arguments().parse_args()
    several = list(multi_head_bases())
    codec = args.codec or args.metric or "pca"
    metric = args.metric or basis_of(codec).metric
    if args.compact and not basis_of(codec).multi_head:  # checked here, before an hour of work
        if args.codec or not takes_gradients(metric):
            raise PluginError(f"--compact keeps one codec that heads share, which needs gradients: give --codec "
                              f"{' or '.join(several)}")  # fmt: skip
        codec = several[0]
    script = cli.open_script(args)
    loaded, text = script.loaded, script.text
    if args.gradient_checkpointing and not takes_gradients(metric):
        print(f"note: {metric} statistics need no gradients; --gradient-checkpointing changes nothing here")
    rank = args.rank or suggested_rank(loaded.geometry.head_dim)
    default = calibration_folders()[0] / f"kv_lowrank_calib_{loaded.slug}_r{rank}.pt"
    output = files.check_writable(args.output or default)
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
        print(f"note: {text.name} has text for {used} sequences of {args.seq_len}; all of them were used")
    energies = calibration.energies()
    # Of a compact file the same share of its coordinates
    first = next(share for share in next(iter(energies.values())) if share is not None)
    shown = rank * first.shape[-1] // loaded.geometry.head_dim
    print(f"\n{calibration_tables.energies(energies, shown).console()}")
    title = f"{args.model}: {calibration.meta['tokens']:,} tokens of {text.name}"
    shares = {side: [None if own is None else own.numpy() for own in layers] for side, layers in energies.items()}
    picture = plots.spectra(shares, shown, title)
    files.write_figure(files.picture_beside(output), picture)
    print(f"\nwrote {files.shown(output)} and {files.shown(files.picture_beside(output))}")


if __name__ == "__main__":
    cli.run(main, shared=True)
