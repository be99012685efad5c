"""Make presets by compression ratio for a model: kv-2x, kv-3.5x, kv-4x, kv-4.6x, kv-5.3x, kv-6.4x and kv-8x.

With --codec grouped they are fast-2x … fast-8x: a basis that loses more, but whose codes attention reads without
reconstructing them. Any multi-head basis can be given.

    python scripts/make_presets.py --model Qwen/Qwen2.5-0.5B
    python scripts/make_presets.py --text ../wikitext+embedded+self --eval-text ../wikitext
    python scripts/make_presets.py --codec grouped --ratios 4,5.3

Calibrates the basis once (one pass over the text, with gradients), writes it in compact form, finds for every ratio the
bits at which a cache of 2,048 tokens is that much smaller than a 16-bit one, and measures the loss of each preset on
evaluation text that took no part in the calibration. Started by torchrun or accelerate launch, several GPUs share the
calibration, and the first measures. Then

    create_cache_from_preset(get_preset_info("MODEL", "kv-4x"))

works wherever results/presets and results/calibrations are. The text may be a mixture, joined by +; self is sampled
from the model. --tag only measures, such as other calibration texts, quantizers or seeds; it writes no presets.
Writes results/runs/ratio_presets_MODEL[_TAG].json, or ratio_presets_grouped_MODEL…, and a PNG of the frontier, or
the same below --output.
"""

import argparse
import shlex
from pathlib import Path

from gpt2 import cli
from gpt2.common import files, provenance
from gpt2.common.processes import Processes
from gpt2.compression.calibration.file import calibration_folders
from gpt2.compression.codecs import adjustable_quantizers, multi_head_bases
from gpt2.compression.presets import calibration_lookup
from gpt2.report import plots, tables
from gpt2.tuning.ratio_presets import RATIOS, compact_calibration, make_ratio_preset, measure

DEFAULT_CODEC = next(iter(multi_head_bases()))


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    cli.add_model_flags(p)
    cli.add_text_flags(p)
    cli.add_calibration_flags(p)
    cli.add_evaluation_flags(p, tokens=16384)
    p.set_defaults(samples=48)
    cli.add_eval_text_flag(p)
    p.add_argument("--ratios", type=cli.ratio_list, default=list(RATIOS), help="such as 2,4,8")
    bases, quantizers = multi_head_bases(), adjustable_quantizers()
    prefixes = ", ".join(f"{basis.preset_prefix}-* ({name})" for name, basis in bases.items())
    p.add_argument("--codec", choices=list(bases), default=DEFAULT_CODEC, help=f"presets are called {prefixes}")
    p.add_argument("--quantizer", choices=quantizers, default=quantizers[0], help="widths per block, or once")
    p.add_argument("--gradient-checkpointing", action="store_true", help="less memory and more time for the gradients")
    p.add_argument("--calibration-file", type=Path, help="results/calibrations/kv_CODEC_MODEL[_TAG].pt if omitted")
    p.add_argument("--tag", help="only measure, and write ratio_presets_MODEL_TAG.json")
    p.add_argument("--output", type=Path, help="folder for presets, calibrations, runs, plots; else results")
    return p


def main(processes: Processes) -> None:
    args = arguments().parse_args()
    script = cli.open_script(args)
    loaded, text, eval_text = script.loaded, script.text, script.eval_text
    slug = loaded.slug + (f"_{args.tag}" if args.tag else "")
    record_name = f"ratio_presets_{'' if args.codec == DEFAULT_CODEC else args.codec + '_'}{slug}"
    # Before the calibration, since the text may be too short; the other processes don't need it
    segments = cli.evaluation_segments(args, loaded, eval_text, "evaluation") if processes.first else None
    root = args.output or files.RESULTS
    calibrations = args.output / "calibrations" if args.output else calibration_folders()[0]
    path = args.calibration_file or calibrations / f"kv_{args.codec}_{slug}.pt"
    output, folder = root / "runs" / f"{record_name}.json", root / "presets"
    picture = files.picture_beside(output)
    for wanted in (output, picture, folder / f"{slug}.json"):
        files.check_writable(wanted)
    calibration = compact_calibration(
        loaded, text, path, codec=args.codec, samples=args.samples, seq_len=args.seq_len, seed=args.seed,
        sink_tokens=args.sink_tokens, checkpointing=args.gradient_checkpointing, progress=cli.bar("calibrating", "seq"),
        processes=processes,
    )  # fmt: skip
    if not processes.first:
        return
    options = {"quantizer": args.quantizer, "sink_tokens": args.sink_tokens}
    ratios = cli.bar("sizing", "preset")(args.ratios)
    presets = [make_ratio_preset(loaded, calibration, ratio, **options) for ratio in ratios]
    scoring = {"chunk": args.chunk, "batch_size": args.batch_size, "progress": cli.bar("measuring", "batch")}
    measured = measure(loaded, segments, presets, args.seed, **scoring)
    codec_bytes = presets[0].make().codec_bytes()
    made = provenance.provenance(args, text=eval_text.name, text_sha256=eval_text.sha256("evaluation"))
    record = made | {"model": loaded.spec, "fingerprint": loaded.fingerprint, "calibration": calibration.meta}
    record |= {"codec_bytes": codec_bytes, "rows": [preset.row(measured[preset.name]) for preset in presets]}
    tables.show("ratio_presets", record)
    print(f"beside the ratio: {codec_bytes:,} bytes of the basis, which caches that share their compressors hold once")
    if not args.tag:
        command = made_by(args, calibration.meta["text_spec"], [preset.ratio for preset in presets])
        for preset in presets:
            file = folder / f"{loaded.slug}-{preset.name}.json"
            about = {"measured": measured[preset.name], "made_by": command, "provenance": made}
            named = calibration_lookup.reference_to(path, file)
            print(f"wrote {files.write_json(file, preset.preset(loaded, calibration, named, **about))}")
    files.write_run(output, record, picture, lambda: plots.ratio_presets(record))  # last: all files that it names exist
    print(f"wrote {output} and {picture}")


def made_by(args: argparse.Namespace, text: str, ratios: list[float]) -> str:
    """The command that makes the same presets again."""
    flags = {"model": args.model, "text": text, "samples": args.samples, "seq-len": args.seq_len, "seed": args.seed}
    flags |= {"sink-tokens": args.sink_tokens, "eval-text": args.eval_text, "codec": args.codec}
    flags |= {"quantizer": args.quantizer, "calibration-file": args.calibration_file}
    flags["ratios"] = ",".join(f"{ratio:g}" for ratio in ratios)
    words = [word for key, value in flags.items() if value is not None for word in (f"--{key}", str(value))]
    return f"python scripts/make_presets.py {shlex.join(words)}"


if __name__ == "__main__":
    cli.run(main, shared=True)
