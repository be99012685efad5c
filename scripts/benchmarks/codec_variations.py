"""Variations of the joint codec: one choice changed at a time, at equal total bits, on the same tokens.

    python scripts/benchmarks/codec_variations.py
    python scripts/benchmarks/codec_variations.py --text ../wikitext --bits 3 --rows metadata,clipping

Rows by question: arrangement (what shares a basis, and how keys are un-rotated), frame (tokens whose keys are
un-rotated by one position), queries (floats, or integers of so many bits, as kernels may multiply codes with), metric
(of squared error), widths (fixed, by block within fixed bytes, by block with any number of bytes), menu (the possible
widths), block (its tokens), metadata (scale and offset of a channel), clipping (shares of the range to try), levels
(uniform or a Gaussian's), rotation (Hadamard among channels of equal width), lattice (E8 over neighbouring tokens). The
product is among the rows of every question and is measured once.

It is a simulation: in one forward pass K and V are replaced by their reconstruction, except the first --sink-tokens.
Bits are per coordinate of K and V and include metadata, widths and unused bits of blocks. Bases and budgets are fitted
to --samples sequences of --seq-len tokens; --seq-len and --eval-seq-len must be multiples of 128. Bits are shared out
over layers so that one bit saves the same error in each.
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
    p.add_argument("--eval-tokens", type=cli.positive_int, default=4096, help="tokens to measure every row on")
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
    calibrating = text.segments("calibration", loaded, args.seq_len, args.samples, args.seed)
    gathered = gather(loaded, calibrating, args.sink_tokens, seed=args.seed, progress=cli.bar("calibrating", "seq"))
    rows, known = [], {}
    record = script.record(
        dtype=str(loaded.model.dtype), calibration_text=text.name,
        text_sha256={"calibration": text.sha256("calibration"), "evaluation": eval_text.sha256("evaluation")},
        calibration_tokens=calibrating.numel(), segments=list(segments.shape), rows=rows,
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
