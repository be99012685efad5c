"""Bytes of whole caches at several context lengths, and their compression ratio to a 16-bit cache.

    python scripts/benchmarks/cache_bytes.py
    python scripts/benchmarks/cache_bytes.py --preset kv4 kv-4x fast-4x --context-lengths 128,2048,32768
    python scripts/benchmarks/cache_bytes.py --model configs/models/qwen2.5-7b.json --layers 2 --preset kv8 kv4

Real caches are filled with noise, as sizes don't depend on values: half of the tokens as a prompt, the rest 64 at a
time. Counted are codes with their scales, exact sinks, the exact tail of less than a block, and allocated room that is
not yet used; and separately the codec's basis, which all conversations share. The 16-bit cache is transformers' own.
The model is only loaded for its shape and its presets; it doesn't run.
Writes results/runs/cache_bytes_MODEL.json and results/plots/cache_bytes_MODEL.png, or where --output says.
"""

import argparse

from gpt2 import cli
from gpt2.compression.cache import size
from gpt2.compression.named_caches import CacheChoice
from gpt2.models.loading import LoadedModel
from gpt2.report import plots


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    cli.add_shape_flags(p)
    cli.add_cache_flags(p, several=True)
    p.set_defaults(preset=["kv8", "kv4"], device="cpu")
    p.add_argument("--context-lengths", type=cli.int_list, default=[128, 512, 2048, 8192], help="tokens held")
    cli.add_output_flag(p)
    return p


def main() -> None:
    args = arguments().parse_args()
    script = cli.open_script(args)
    loaded, paths = script.loaded, script.output_files("cache_bytes")
    choices = cli.chosen_caches(args, loaded)
    rows = [measure(choice, tokens, loaded) for choice in choices for tokens in args.context_lengths]
    record = script.record(caches=[choice.record() for choice in choices], rows=rows)
    cli.write(paths, record, lambda: plots.ratios_by_context(rows, loaded.spec), ["cache_bytes"])


def measure(choice: CacheChoice, tokens: int, loaded: LoadedModel) -> dict:
    """Results record of one sequence of `tokens` tokens: bytes, and ratios to the 16-bit cache."""
    cache = size.filled(choice.make, loaded.geometry, tokens)
    plain = size.plain_bytes(loaded.geometry, tokens)
    held, (exact, unused) = size.cache_bytes(cache), size.exact_and_unused_bytes(cache)
    return {
        "cache": choice.label, "context_tokens": tokens, "bytes": held, "bytes_per_token": held / tokens,
        "plain_bytes": plain, "exact_bytes": exact, "unused_bytes": unused, "codec_bytes": cache.codec_bytes(),
        "compression_ratio": plain / held, "ratio_with_codec": plain / (held + cache.codec_bytes()),
    }  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
