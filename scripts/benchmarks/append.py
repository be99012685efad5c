"""Time to append one token to a cache, by the number of tokens held, on which it must not depend; bytes per token.

    python scripts/benchmarks/append.py
    python scripts/benchmarks/append.py --tokens 1024,16384,65536 --device cuda
    python scripts/benchmarks/append.py --tokens 1024,16384,65536 --window 512

Needs no weights: layers of the given shape are filled with noise, and then each token is appended to all layers.
Nothing is read, as reading belongs to the cost of attention, which grows with any cache.
Writes results/runs/benchmark_append.json and results/plots/benchmark_append.png, with the kind of machine after the
name unless it is a CPU with AVX-512: benchmark_append_avx2.
"""

import gpt2  # noqa: F401  first, so that Ctrl-C during the import of PyTorch prints one line

# isort: split
import argparse

import torch

from gpt2 import cli
from gpt2.common import machine, provenance
from gpt2.compression.codecs import BITS, Compressor, Transform, quantizer_for_bits
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.presets.any_model import ANY_MODEL
from gpt2.compression.settings import build
from gpt2.evaluation import append_times
from gpt2.models import loading
from gpt2.models.geometry import FULL, SLIDING, Geometry, LayerGeometry, Shape
from gpt2.report import plots


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    p.add_argument("--tokens", type=cli.int_list, default=[1024, 4096, 16384], help="tokens held before appending")
    p.add_argument("--layers", type=cli.positive_int, default=30, help="layers of the cache")
    p.add_argument("--kv-heads", type=cli.positive_int, default=3, help="KV heads of a layer")
    p.add_argument("--head-dim", type=cli.positive_int, default=64, help="numbers of a head's key or value")
    p.add_argument("--rank", type=cli.positive_int, default=60, help="coordinates that rows of low rank keep")
    p.add_argument("--window", type=cli.positive_int, help="sliding window of all layers, in tokens")
    p.add_argument("--repeats", type=cli.positive_int, default=200, help="appended tokens per figure")
    cli.add_device_flag(p)
    cli.add_output_flag(p)
    return p


def main() -> None:
    args = arguments().parse_args()
    name = f"benchmark_append_window{args.window}" if args.window else "benchmark_append"
    device = loading.resolve_device(args.device)
    paths = cli.output_files(args.output, cli.of_this_machine(name, device))
    own = machine.before_timing(str(device))

    shape = Shape(args.kv_heads, args.head_dim)
    rows = [
        {"codec": label} | append_times.measure(make, shape, tokens, args.repeats, device)
        for label, make in codecs(args, shape, device).items() for tokens in args.tokens
    ]  # fmt: skip
    lines = {}
    for row in rows:
        lines.setdefault(row["codec"], []).append(row["append_ms_median"])
    window = f", window of {args.window}" if args.window else ""
    record = provenance.provenance(args, machine=own, dtype="bfloat16", rows=rows)
    title = f"{args.layers} layers, {args.kv_heads} KV heads of {args.head_dim}{window}\n{machine.short(record)}"
    cli.write(paths, record, lambda: plots.append_times(args.tokens, lines, title), ["benchmark_append"])


def codecs(args, shape: Shape, device: torch.device) -> dict:
    """Factories: identity, kv4's codecs, and a random rotation cut to the rank with every quantizer."""
    geometry = Geometry((LayerGeometry(SLIDING if args.window else FULL, shape, shape, args.window),) * args.layers)
    g = torch.Generator().manual_seed(0)
    E = torch.linalg.qr(torch.randn(args.kv_heads, args.head_dim, args.head_dim, generator=g)).Q
    basis = Transform(E, E.mT.contiguous(), torch.zeros(args.kv_heads, args.head_dim)).truncate(args.rank).to(device)

    def make(bits: int):
        codec = [Compressor(quantizer_for_bits(bits), basis)] * args.layers
        return lambda: CompressedDynamicCache(codec, codec, geometry=geometry)

    low_rank = {f"rank {args.rank}, {bits} bits": make(bits) for bits in sorted(BITS, reverse=True)}
    settings = {side: [setting] * args.layers for side, setting in zip("kv", ANY_MODEL["kv4"], strict=True)}
    kv4 = [[each.to(device) for each in side] for side in build(settings, geometry)]
    fixed = {"identity": lambda: identity_cache(geometry)}
    fixed |= {"kv4": lambda: CompressedDynamicCache(*kv4, geometry=geometry)}
    return fixed | low_rank


if __name__ == "__main__":
    cli.run(main)
