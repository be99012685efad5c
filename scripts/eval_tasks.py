"""Tasks of long contexts: does a compressed cache still retrieve, track, count, copy and learn as the baseline does?

    python scripts/eval_tasks.py --preset kv4 --context-lengths 512 --num-trials 2
    python scripts/eval_tasks.py --model YourOrg/YourModel --preset kv8 kv4 kv_preset_yourmodel.json \\
        --context-lengths 1024,4096,8192 --num-trials 10 --prefill-chunk 512
    python scripts/eval_tasks.py --preset kv4 --tasks needle_multi_key,copying --output tasks.json

Prompts are generated, and the evaluation part of --text is what surrounds their facts. Tasks: needles as RULER defines
them (single, several keys, values, queries), variable tracking, frequent words, lookup in a JSON object, copying a
passage, a pattern shown by examples, and a passkey. Every prompt is checked before it is asked: its answers and its
wrong answers are in it, and its length is right. A context length includes room for the answer.

Answers are scored by exact match of greedy `generate`, and by the log-probability of the right answer, which changes
before an answer is lost. A cell where the baseline isn't at least halfway from chance to always right says 'baseline
fails' and counts neither for nor against a cache. --peers adds caches of other packages, fed in chunks by
--prefill-chunk as a server does. Writes results/runs/tasks_MODEL.json and a PNG in results/plots, or where --output
says.
"""

import argparse

from gpt2 import cli
from gpt2.evaluation import asking, tasks
from gpt2.evaluation.tasks import measure
from gpt2.report import plots


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    cli.add_model_flags(p)
    cli.add_text_flags(p)
    cli.add_cache_flags(p, several=True)
    cli.add_peers_flag(p)
    p.add_argument("--tasks", type=cli.word_list(tuple(tasks.TASKS)), default=list(tasks.TASKS), help="by comma")
    p.add_argument("--context-lengths", type=cli.int_list, default=[512, 1024], help="tokens, answer included")
    p.add_argument("--num-trials", type=cli.positive_int, default=5, help="prompts per task and length")
    cli.add_prefill_chunk_flag(p)
    cli.add_output_flag(p)
    return p


def main() -> None:
    args = arguments().parse_args()
    script = cli.open_script(args)
    loaded, text, paths = script.loaded, script.text, script.output_files("tasks")
    chosen, caches = cli.compared_caches(args, loaded)
    rows = measure.measure(
        loaded, text.tokens("evaluation", loaded), caches, args.tasks,
        lengths=args.context_lengths, trials=args.num_trials, seed=args.seed, prefill_chunk=args.prefill_chunk,
        haystack_name=f"the evaluation part of text {text.name!r}", progress=cli.bar("tasks", "prompt"),
    )  # fmt: skip
    cells = measure.cells(rows)
    record = script.record(
        dtype=str(loaded.model.dtype), caches=[choice.record() for choice in chosen],
        summary=asking.summarize(rows, cells, args.seed), by_task=measure.by_task(rows, args.seed), cells=cells,
        rows=rows,
    )  # fmt: skip
    title = f"{loaded.spec}, {text.name}, prompts per cell: {args.num_trials}"
    cli.write(paths, record, lambda: plots.tasks(cells, title), ["tasks", "tasks_pairs"])


if __name__ == "__main__":
    cli.run(main)
