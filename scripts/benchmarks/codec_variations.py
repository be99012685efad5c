"""Explore the joint codec: one choice changed at a time, at the same total bits, on the same tokens.

    python scripts/benchmarks/codec_variations.py
    python scripts/benchmarks/codec_variations.py --text ../wikitext --bits 3 --rows metadata,clipping

Rows by question: arrangement (what shares a basis, and what happens to rotary positions), metric (what squared error
weighs), widths (fixed, by block within its bytes, by block at will), menu (which widths there are), block (tokens in
one), metadata (scale and offset of a channel), clipping (shares of a range that are tried), levels (uniform or a
Gaussian's), rotation (Hadamard among channels of equal width), lattice (E8 over neighbouring tokens). The product is
among every question's rows, and measured once.

It is a simulation: in one forward pass K and V are replaced by what they would read as, the first --sink-tokens apart.
Bits are per coordinate of K and V, with metadata, widths and what blocks leave unused. Bases and budgets come from
--samples sequences of --seq-len tokens, both a multiple of 128 as --eval-seq-len. Shared out by layer at one price.
Writes results/runs/explore_codecs_MODEL.json and results/plots/explore_codecs_MODEL.png, or where --output says.
"""

import argparse

from gpt2 import cli
from gpt2.experiments.codec_variations import QUESTIONS, gather, measure
from gpt2.report import plots, tables


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    cli.add_model_flags(p)
    cli.add_text_flags(p)
    cli.add_calibration_flags(p)
    p.set_defaults(samples=16)
    cli.add_eval_text_flag(p)
    p.add_argument("--eval-tokens", type=cli.positive_int, default=4096, help="tokens that every row is measured on")
    p.add_argument("--eval-seq-len", type=cli.positive_int, default=1024, help="tokens per evaluated segment")
    p.add_argument("--bits", type=cli.int_list, default=[4, 3, 2], help="total bits per coordinate")
    p.add_argument(
        "--rows", type=cli.word_list(list(QUESTIONS)), default=list(QUESTIONS), help="questions whose rows to run"
    )
    cli.add_output_flag(p)
    return p


def main() -> None:
    args = arguments().parse_args()
    script = cli.open_script(args)
    loaded, text, eval_text, paths = script.loaded, script.text, script.eval_text, script.output_files("explore_codecs")
    loaded.require_context(args.seq_len)
    segments = script.evaluation_segments()
    windows = text.segments("calibration", loaded, args.seq_len, args.samples, args.seed)
    gathered = gather(loaded, windows, args.sink_tokens, seed=args.seed, progress=cli.bar("calibrating", "seq"))
    rows, known = [], {}
    record = script.record(
        dtype=str(loaded.model.dtype), calibration_text=text.name,
        text_sha256={"calibration": text.sha256("calibration"), "evaluation": eval_text.sha256("evaluation")},
        calibration_tokens=windows.numel(), segments=list(segments.shape), rows=rows,
    )  # fmt: skip
    for question in args.rows:
        found = measure(
            loaded, segments, gathered, QUESTIONS[question], args.bits, known, seed=args.seed,
            progress=cli.bar(question, "segment"),
        )  # fmt: skip
        rows += [{"question": question, **row} for row in found]
        tables.show("explore_codecs", record, question, note=question == args.rows[-1])
    title = f"{loaded.spec}, {segments.numel():,} tokens of {eval_text.name}, calibrated on {text.name}"
    cli.write(paths, record, lambda: plots.codec_variations(rows, title))


if __name__ == "__main__":
    cli.run(main)
