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
from gpt2.common import files, provenance
from gpt2.experiments.codec_variations import QUESTIONS, gather, measure
from gpt2.models import loading
from gpt2.report import plots_variations
from gpt2.text import sources


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    cli.add_model_flags(p)
    cli.add_text_flags(p)
    cli.add_calibration_flags(p)
    p.set_defaults(samples=16)
    p.add_argument("--eval-text", help="text to measure on; --text if omitted")
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
    text = sources.load_text(args.text, args.model)
    eval_text = sources.load_text(args.eval_text or args.text, args.model)
    loaded = loading.load(args.model, args.device, args.dtype)
    output, picture = cli.output_files(args.output, f"explore_codecs_{loaded.slug}")
    loaded.require_context(args.seq_len)
    segments = cli.evaluation_segments(args, loaded, eval_text, "evaluation")
    windows = text.segments("calibration", loaded, args.seq_len, args.samples, args.seed)
    gathered = gather(loaded, windows, args.sink_tokens, seed=args.seed, progress=cli.bar("calibrating", "seq"))
    rows, known = [], {}
    print_head(args.bits)
    for question in args.rows:
        found = measure(
            loaded, segments, gathered, QUESTIONS[question], args.bits, known, seed=args.seed,
            progress=cli.bar(question, "segment"),
        )  # fmt: skip
        rows += [{"question": question, **row} for row in found]
        print_question(question, found)

    record = provenance.provenance(
        args, model=loaded.spec, fingerprint=loaded.fingerprint, dtype=str(loaded.model.dtype), text=eval_text.name,
        calibration_text=text.name,
        text_sha256={"calibration": text.sha256("calibration"), "evaluation": eval_text.sha256("evaluation")},
        calibration_tokens=windows.numel(), segments=list(segments.shape), rows=rows,
    )  # fmt: skip
    title = f"{loaded.spec}, {segments.numel():,} tokens of {eval_text.name}, calibrated on {text.name}"
    files.write_run(output, record, picture, lambda: plots_variations.explored(rows, title))
    print(f"\nwrote {files.shown(output)} and {files.shown(picture)}")


def print_head(budgets: list[int]) -> None:
    figures = f"{'bits':>6} {'KL':>9} {'change':>7} {'Δ PPL':>8} {'top-1':>7}"
    print(f"{'':<58} " + " | ".join(figures for _ in budgets))


def print_question(question: str, rows: list[dict]) -> None:
    print(question)
    for label in dict.fromkeys(row["label"] for row in rows):
        cells = [
            f"{r['bits_counted']:6.3f} {r['kl_nats']:9.5f} {r.get('kl_change', 0):+7.0%} {r['ppl_delta']:+8.2%} "
            f"{r['top1_agreement']:7.2%}"
            for r in rows
            if r["label"] == label
        ]
        print(f"  {label:<56} " + " | ".join(cells), flush=True)


if __name__ == "__main__":
    cli.run(main)
