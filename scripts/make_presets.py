"""Make presets by compression ratio for a model: kv-2x, kv-3.5x, kv-4x, kv-4.6x, kv-5.3x, kv-6.4x and kv-8x.

Attention reads their codes without reconstructing K and V. With --codec grouped they are called fast-2x … fast-8x and
are read faster; at the same ratio they lose more, most of all in texts longer than those of the calibration. With
--codec joint they are called store-2x … store-8x: they lose least, and decoding from them is slow, so that they are for
caches in files. Any multi-head basis can be given.

    python scripts/make_presets.py --model Qwen/Qwen2.5-0.5B
    python scripts/make_presets.py --text ../wikitext+embedded+self --eval-text ../wikitext
    python scripts/make_presets.py --codec grouped --ratios 4,5.3
    python scripts/make_presets.py --ratios 4 --whole-cache 8192

Calibrates the basis once (one pass over the text, with gradients), writes it in compact form, finds for every ratio the
bits at which K and V of 2,048 tokens are that much smaller than in 16 bits, and measures the loss of each preset on
evaluation text that the calibration didn't use. With --whole-cache 8192 the ratio is that of all a cache of 8,192
tokens holds, as windows and states leave it, and presets are called kv-4x-whole. Under torchrun or accelerate launch,
several GPUs share the calibration, and the first one measures. Afterwards

    create_cache_from_preset(get_preset_info("MODEL", "kv-4x"))

works wherever results/presets and results/calibrations are. --text may be several texts joined by +; `self` is sampled
from the model. With --tag the presets are measured but not written, to compare calibration texts, quantizers or seeds.
Writes results/runs/ratio_presets_MODEL[_TAG].json (ratio_presets_joint_MODEL… with --codec joint) and a PNG of the
frontier; with --output, the same folders below that one.
"""

import argparse
from pathlib import Path

from gpt2 import cli
from gpt2.common import files, provenance
from gpt2.common.processes import Processes
from gpt2.compression.calibration.file import calibration_folder
from gpt2.compression.calibration.fit import Calibration
from gpt2.compression.codecs import adjustable_quantizers, multi_head_bases
from gpt2.report import plots, tables
from gpt2.tuning import ratio_presets
from gpt2.tuning.ratio_presets import RATIOS, Outputs, compact_calibration, make_ratio_preset, measure, write_presets

DEFAULT_CODEC = next(iter(multi_head_bases()))


def arguments() -> argparse.ArgumentParser:
    p = cli.evaluation_parser(__doc__, tokens=16384, calibrates=True)
    p.set_defaults(samples=48)
    cli.add_eval_text_flag(p)
    p.add_argument("--ratios", type=cli.ratio_list, default=list(RATIOS), help="compression ratios, such as 2,4,8")
    bases, quantizers = multi_head_bases(), adjustable_quantizers()
    prefixes = ", ".join(f"{basis.preset_prefix}-* ({name})" for name, basis in bases.items())
    p.add_argument("--codec", choices=list(bases),
                   help=f"basis; it names presets {prefixes}; the first that fits the layers if omitted")  # fmt: skip
    p.add_argument("--quantizer", choices=quantizers, default=quantizers[0], help="widths per block (mixed) or fixed")
    whole = "ratios of the whole cache of so many tokens, with windows and states, not of K and V in every layer"
    p.add_argument("--whole-cache", type=cli.positive_int, metavar="TOKENS", help=whole)
    p.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time for gradients")
    p.add_argument("--calibration-file", type=Path, help="results/calibrations/kv_CODEC_MODEL[_TAG].pt if omitted")
    p.add_argument("--tag", type=cli.file_word, help="only measure, and write ratio_presets_MODEL_TAG.json")
    p.add_argument("--output", type=Path, help="folder of presets, calibrations, runs and plots; results if omitted")
    return p


def main(processes: Processes) -> None:
    args = arguments().parse_args()
    script = cli.open_script(args)
    loaded, text, eval_text = script.loaded, script.text, script.eval_text
    codec = args.codec or ratio_presets.first_fitting(loaded.geometry)
    slug = loaded.slug + (f"_{args.tag}" if args.tag else "")
    kinds = [codec] * (codec != DEFAULT_CODEC) + ["whole"] * bool(args.whole_cache)
    record_name = "_".join(["ratio_presets", *kinds, slug])
    # Read before calibrating, so that a text that is too short shows early; only the first process measures
    segments = script.evaluation_segments() if processes.first else None
    calibrations = args.output / "calibrations" if args.output else calibration_folder()
    path = args.calibration_file or calibrations / ratio_presets.calibration_name(codec, slug)
    outputs = Outputs.under(args.output or files.RESULTS, path, record_name)
    calibration, file = compact_calibration(
        loaded, text, path, codec=codec, samples=args.samples, seq_len=args.seq_len, seed=args.seed,
        sink_tokens=args.sink_tokens, checkpointing=args.gradient_checkpointing, progress=cli.bar("calibrating", "seq"),
        processes=processes,
    )  # fmt: skip
    if not processes.first:
        return
    options = {"quantizer": args.quantizer, "sink_tokens": args.sink_tokens, "whole_at": args.whole_cache}
    sizing = cli.bar("sizing", "preset")
    presets = [make_ratio_preset(loaded, calibration, ratio, **options) for ratio in sizing(args.ratios)]
    scoring = {"chunk": args.chunk, "batch_size": args.batch_size, "progress": cli.bar("measuring", "batch")}
    measured = measure(loaded, segments, presets, args.seed, **scoring)
    codec_bytes = presets[0].make().codec_bytes()
    rows = [preset.row(measured[preset.name]) for preset in presets]
    shape = list(segments.shape)
    record = script.record(calibration=calibration.meta, codec_bytes=codec_bytes, segments=shape, rows=rows)
    tables.show("ratio_presets", record)
    print(*presets, sep="\n")
    print(f"not in the ratio: {codec_bytes:,} bytes of the basis, held once by all caches that share their compressors")
    ratio_presets.put_in_place(file, path)
    if not args.tag:
        made = provenance.provenance(args, text=eval_text.name, text_sha256=eval_text.sha256("evaluation"))
        about = {"made_by": command(args, calibration), "provenance": made}
        for file in write_presets(loaded, presets, calibration, outputs, measured, **about):
            print(f"wrote {files.shown(file)}")
    files.write_run(outputs.record, record, outputs.picture, lambda: plots.ratio_presets(record))  # after the presets
    print(f"wrote {files.shown(outputs.record)} and {files.shown(outputs.picture)}")


def command(args: argparse.Namespace, calibration: Calibration) -> str:
    """The command that makes the same presets again, whichever basis comes first then."""
    text, codec = calibration.meta["text_spec"], calibration.meta["codec"]
    names = ("samples", "seq_len", "seed", "sink_tokens", "eval_text", "quantizer", "calibration_file")
    defaults = arguments().parse_args([])
    others = ("dtype", "eval_tokens", "eval_seq_len", "chunk")
    names += tuple(name for name in others if getattr(args, name) != getattr(defaults, name))
    flags = {"codec": codec} | {name.replace("_", "-"): getattr(args, name) for name in (*names, "whole_cache")}
    ratios = ",".join(f"{ratio:g}" for ratio in args.ratios)
    return cli.command_line("make_presets", {"model": args.model, "text": text, **flags, "ratios": ratios})


if __name__ == "__main__":
    cli.run(main, shared=True)
