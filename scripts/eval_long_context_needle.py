"""Needle in a haystack: does a compressed cache still find one sentence in a long context, where the baseline does?

    python scripts/eval_long_context_needle.py --preset int4-vonly --context-lengths 512,1024 --num-trials 3
    python scripts/eval_long_context_needle.py --model YourOrg/YourModel --preset kv_preset_yourmodel_v9.json \\
        --context-lengths 512,1024,2048 --num-trials 5
    python scripts/eval_long_context_needle.py --preset int8-vonly int4-vonly --output needle.json

The evaluation part of --text is the haystack. A sentence such as "The locker number of Anna is 48213." is inserted at
each of --needle-positions, and --distractors sentences of the same form about others at random positions. The prompt
ends with a question and "The locker number of Anna is", which `generate` continues, with the uncompressed cache and
with each compressed one. Beside exact match the log-probability of the answer is reported, which changes before an
answer is lost.

A context length includes --max-new-tokens for the answer. A cell is marked 'baseline fails', and counts neither for nor
against a compressed cache, if the baseline's exact match is below halfway between guessing and always being right.
Writes results/runs/needle_MODEL.json and a PNG in results/plots, or where --output says.
"""

import argparse

from gpt2 import cli
from gpt2.evaluation import needle
from gpt2.report import plots


def positions(words: str) -> list[float]:
    """`0.1,0.9` as [0.1, 0.9]: numbers from 0 to 1 in the given order, without repetitions."""
    values = list(dict.fromkeys(float(word) for word in words.split(",")))
    if outside := [value for value in values if not 0 <= value <= 1]:
        raise argparse.ArgumentTypeError(f"{outside[0]} is out of range: 0 is the prompt's beginning, 1 its end")
    return values


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    cli.add_model_flags(p)
    cli.add_text_flags(p)
    cli.add_cache_flags(p, several=True)
    p.add_argument("--context-lengths", type=cli.int_list, default=[512, 1024, 2048], help="tokens, answer included")
    p.add_argument("--needle-positions", type=positions, default=[0.1, 0.3, 0.5, 0.7, 0.9], help="share of text before")
    p.add_argument("--num-trials", type=cli.positive_int, default=5, help="prompts per length and position")
    p.add_argument("--distractors", type=cli.natural, default=1, help="other needles in each prompt")
    p.add_argument("--max-new-tokens", type=cli.positive_int, default=12, help="tokens to generate")
    cli.add_prefill_chunk_flag(p)
    cli.add_output_flag(p)
    return p


def main() -> None:
    args = arguments().parse_args()
    script = cli.open_script(args)
    loaded, text, paths = script.loaded, script.text, script.output_files("needle")
    chosen, caches = cli.compared_caches(args, loaded)
    rows = needle.measure(
        loaded, text.tokens("evaluation", loaded), caches,
        lengths=args.context_lengths, depths=args.needle_positions, trials=args.num_trials, seed=args.seed,
        prefill_chunk=args.prefill_chunk, distractors=args.distractors, max_new_tokens=args.max_new_tokens,
        haystack_name=f"the evaluation part of text {text.name!r}", progress=cli.bar("needles", "prompt"),
    )  # fmt: skip
    cells, summaries = needle.cells(rows), needle.summarize(rows, args.seed)
    record = script.record(
        dtype=str(loaded.model.dtype), caches=[choice.record() for choice in chosen],
        baseline_works_from=needle.works_from(args.distractors), summary=summaries, cells=cells, rows=rows,
    )  # fmt: skip
    title = f"{loaded.spec}, {text.name}, prompts per cell: {args.num_trials}, distractors: {args.distractors}"
    shown = ("needle_cells", "needle_pairs", "needle")
    cli.write(paths, record, lambda: plots.needles(cells, title), shown)


if __name__ == "__main__":
    cli.run(main)
