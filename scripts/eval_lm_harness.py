"""Tasks of lm-evaluation-harness through a compressed cache, beside the uncompressed one.

    pip install 'lm_eval[hf]'
    python scripts/eval_lm_harness.py --preset kv4 --tasks arc_easy --limit 100
    python scripts/eval_lm_harness.py --model YourOrg/YourModel --preset kv4 kv-4x --tasks my_task --task-folder tasks

The harness's own models score log-likelihoods in one forward pass that reads no cache, so that every cache seems to
lose nothing there. This script feeds context and continuation through the cache, --chunk tokens at a time, and gives
`generate` a compressed cache too. Tasks come from the harness, which loads them from the hub, or from YAML files in
--task-folder. Writes results/runs/lm_harness_MODEL.json, or where --output says.
"""

import argparse
from pathlib import Path

from gpt2 import cli
from gpt2.common import files
from gpt2.evaluation.harness import harness_class, harness_model, require_tasks


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    cli.add_model_flags(p)
    cli.add_cache_flags(p, several=True)
    p.add_argument("--tasks", type=lambda words: words.split(","), default=["arc_easy"], help="names, by comma")
    p.add_argument("--task-folder", type=Path, help="folder with further tasks as YAML files")
    p.add_argument("--limit", type=cli.positive_int, help="documents per task; all if omitted")
    p.add_argument("--num-fewshot", type=cli.natural, help="examples before each document; each task's own if omitted")
    cli.add_chunk_flag(p)
    p.add_argument("--batch-size", type=cli.positive_int, default=1, help="sequences scored together")
    cli.add_output_flag(p, picture=False)
    return p


def main() -> None:
    args = arguments().parse_args()
    harness_class()  # fails at once if the package is missing
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(args.task_folder) if args.task_folder else None)
    require_tasks(manager, args.tasks)
    script = cli.open_script(args)
    loaded, (output, _) = script.loaded, script.output_files("lm_harness")
    chosen, caches = cli.compared_caches(args, loaded)
    results = {}
    for name, make in caches.items():
        lm = harness_model(loaded, make, args.chunk, args.batch_size)
        found = lm_eval.simple_evaluate(
            lm, tasks=args.tasks, task_manager=manager, limit=args.limit, num_fewshot=args.num_fewshot,
            bootstrap_iters=0, log_samples=False,
        )  # fmt: skip
        results[name] = found["results"]
        for task, figures in found["results"].items():
            shown = ", ".join(f"{key} {value:.4f}" for key, value in figures.items() if isinstance(value, float))
            print(f"{name:<20} {task}: {shown}", flush=True)
    record = script.record(
        dtype=str(loaded.model.dtype), caches=[choice.record() for choice in chosen], results=results,
        lm_eval=lm_eval.__version__,
    )  # fmt: skip
    files.write_json(output, record)
    print(f"\nwrote {files.shown(output)}")


if __name__ == "__main__":
    cli.run(main)
