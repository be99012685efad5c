"""Bytes of whole caches at several context lengths, and their compression ratio to a 16-bit cache.

    python scripts/benchmarks/cache_bytes.py
    python scripts/benchmarks/cache_bytes.py --preset kv4 kv-4x --context-lengths 128,2048,32768
    python scripts/benchmarks/cache_bytes.py --model configs/models/deepseek-v3.json --preset kv8 kv4

Real caches are filled with noise, as sizes don't depend on values: half of the tokens as a prompt, the rest 64 at a
time. One layer stands for all that are like it. Counted are codes with their scales, exact sinks, the exact tail of
less than a block, and allocated room that is not yet used; and separately the codec's basis, which all conversations
share. In contexts of more than 8,192 tokens the caches grow in the same way, with tensors that have shapes and no
values.

The 16-bit cache is transformers' own for this model: layers with a sliding window forget, and recurrent states and the
keys of indexers, which stay as they are, count on both sides. `attention_ratio` is of K and V alone. Ratios are of one
sequence, and the same in a batch.

The model doesn't run. Of a shape such as those in configs/models only the config is read, whatever its size.
Writes results/runs/cache_bytes_MODEL.json and results/plots/cache_bytes_MODEL.png, or where --output says.
"""

import argparse

from gpt2 import cli
from gpt2.evaluation.bytes_by_context import measure
from gpt2.report import plots


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    cli.add_shape_flags(p)
    cli.add_cache_flags(p, several=True)
    p.set_defaults(preset=["kv8", "kv4"], device="cpu")
    p.add_argument("--context-lengths", type=cli.int_list, default=[2**n for n in (10, 11, 13, 15, 17)],
                   help="tokens held")  # fmt: skip
    cli.add_output_flag(p)
    return p


def main() -> None:
    args = arguments().parse_args()
    script = cli.open_script(args, runs=False)
    loaded, paths = script.loaded, script.output_files("cache_bytes")
    choices = cli.chosen_caches(args, loaded)
    each = [(choice, tokens) for choice in choices for tokens in args.context_lengths]
    rows = [
        {"cache": choice.label} | measure(choice.make, loaded.geometry, tokens)
        for choice, tokens in cli.bar("caches", "context")(each)
    ]
    caches = [choice.record() for choice in choices]
    record = script.record(cache_layers=loaded.geometry.record(), caches=caches, rows=rows)
    cli.write(paths, record, lambda: plots.ratios_by_context(rows, loaded.spec), ["cache_bytes"])


if __name__ == "__main__":
    cli.run(main)
