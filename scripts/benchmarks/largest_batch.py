"""How many sequences fit: the largest batch whose caches fit beside a model, and its tokens per second.

    python scripts/benchmarks/largest_batch.py --model configs/models/qwen2.5-7b.json --preset kv4 kv8 \\
        --context-length 32768
    python scripts/benchmarks/largest_batch.py --preset int4-vonly --context-length 1024 --most 4 --device cpu

Measures the uncompressed cache and those of --preset and --policy, whose codes attention reads directly if it can. The
batch grows until memory runs out or, on a CPU, where that would harm other programs, until --most. Caches are filled
with noise, and a shape from configs/models gets random weights, as size and speed don't depend on values.
Writes results/runs/largest_batch_DEVICE_MODEL.json, or where --output says.
"""

import argparse

from gpt2 import cli
from gpt2.common import files, machine, provenance
from gpt2.common.errors import PluginError
from gpt2.evaluation import largest_batch
from gpt2.evaluation.perplexity import BASELINE, baseline_factory
from gpt2.report import tables


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    cli.add_shape_flags(p)
    cli.add_cache_flags(p, several=True)
    p.add_argument("--context-length", type=cli.positive_int, default=32768, help="tokens held by every sequence")
    p.add_argument("--decode-tokens", type=cli.positive_int, default=8, help="tokens decoded to measure speed")
    p.add_argument("--most", type=cli.positive_int, help="largest batch to try; 1024 on a GPU, 4 on a CPU")
    p.add_argument("--seed", type=cli.seed, default=0, help="of the noise that fills the caches")
    cli.add_output_flag(p, picture=False)
    return p


def main() -> None:
    args = arguments().parse_args()
    script = cli.open_script(args)
    loaded = script.loaded
    after = args.decode_tokens + largest_batch.WARM_STEPS
    loaded.require_context(args.context_length, "--context-length", after=after, after_flag="--decode-tokens")
    stem = f"largest_batch_{provenance.device_slug(loaded.device)}_{loaded.slug}"
    output = args.output or files.check_writable(files.RESULTS / "runs" / f"{stem}.json")
    choices = cli.chosen_caches(args, loaded)
    most = args.most or (1024 if loaded.device.type == "cuda" else 4)
    rows = []
    own = machine.before_timing(args.device)
    caches = {BASELINE: baseline_factory(loaded)} | {choice.label: choice.make for choice in choices}
    for name, make in cli.bar("largest batches", "cache")(caches.items()):
        rows.append(
            largest_batch.measure(
                loaded, name, make, args.context_length, decode_tokens=args.decode_tokens, most=most, seed=args.seed
            )
        )
    about = [choice.record() for choice in choices]
    record = script.record(machine=own, rows=rows, weights=script.weights, dtype=script.dtype, caches=about)
    files.write_json(output, record)
    tables.show("largest_batch", record)
    print(f"\nwrote {files.shown(output)}")
    if not any(row["largest_batch"] for row in rows):
        raise PluginError(f"not one sequence of {args.context_length:,} tokens fits: use a shorter --context-length")


if __name__ == "__main__":
    cli.run(main)
