"""Compare our compressed caches with others: on the same text, by streamed perplexity, with all bytes counted.

    python scripts/compare_peers.py
    python scripts/compare_peers.py --text ../wikitext --eval-tokens 4096 --peers kivi,fp8 --preset int4-vonly
    python scripts/compare_peers.py --model YourOrg/YourModel --preset kv_preset_yourmodel_v9.json

Peers: transformers' QuantizedCache with quanto and hqq (pip install -r requirements-peers.txt), fp8, KIVI and
TurboQuant with 4, 3 and 2 bits, and the guide's low rank if the model has such a preset. Ours: --preset, by default
every built-in preset of the model. A cache that isn't installed or fails gets a row 'not run' with the reason; the
others are still measured.

transformers' caches keep the newest chunk exact, and beside it a residual of exact latest tokens: one row has their
default of 128, another has none. KIVI, TurboQuant and our caches compress the newest chunk before attention reads it.
Bytes are those of a cache of 2048 tokens of a 16-bit model, fed --chunk tokens at a time. Needle prompts are fed in
chunks too.
Writes results/runs/peers_MODEL.json and results/plots/peers_MODEL.png, or where --output says.
"""

import argparse
import contextlib
import importlib.metadata

from gpt2 import cli
from gpt2.evaluation import lineup, needle, other_caches, peers
from gpt2.evaluation.needle_prompts import Flags
from gpt2.report import plots

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


def lengths(words: str) -> list[int]:
    """`512,1024` to [512, 1024]; `none` or `0` to []."""
    return [] if words in ("none", "0") else cli.int_list(words)


def arguments() -> argparse.ArgumentParser:
    p = cli.evaluation_parser(__doc__, tokens=32768)
    p.set_defaults(batch_size=1)  # fp8 has one scale per batch, so a batch would change its results
    cli.add_peers_flag(p, default=lineup.PEERS, single=True)
    p.add_argument("--preset", nargs="*", help="preset files or built-in names; all of the model's if omitted")
    p.add_argument("--needle-context-lengths", type=lengths, default=[1024], help="tokens; none or 0 for no needles")
    p.add_argument("--num-trials", type=cli.positive_int, default=3, help="needle prompts per length and depth")
    cli.add_output_flag(p)
    return p


def main() -> None:
    args = arguments().parse_args()
    script = cli.open_script(args)
    loaded, text, paths = script.loaded, script.text, script.output_files("peers")
    compared = lineup.for_quality(loaded, args.peers, args.preset, args.only_peers)
    segments = script.evaluation_segments()
    grid = {"lengths": args.needle_context_lengths, "depths": DEPTHS, "trials": args.num_trials, "seed": args.seed,
            "prefill_chunk": args.chunk, "haystack_name": f"the evaluation part of text {text.name!r}",
            "flags": Flags("--needle-context-lengths", None, None)}  # fmt: skip
    if args.needle_context_lengths:
        haystack = text.tokens("evaluation", loaded)
        needle.measure(loaded, haystack, {}, **grid)  # builds the prompts only, so that errors in them show early

    rows = peers.measure(
        loaded, segments, compared, seed=args.seed, chunk=args.chunk, batch_size=args.batch_size,
        weighing=cli.bar("weighing", "cache"), progress=cli.bar("perplexity of all caches", "batch"),
    )  # fmt: skip
    asked = None
    if args.needle_context_lengths:
        asked = peers.ask_needles(
            loaded, haystack, compared, rows, progress=lambda label: cli.bar(f"needles, {label}", "prompt"), **grid
        )

    record = script.record(
        dtype=str(loaded.model.dtype), segments=list(segments.shape), peer_versions=peer_versions(),
        rows=rows, needle=asked,
    )  # fmt: skip
    title = f"{loaded.spec}, {segments.numel():,} tokens of {text.name}"
    cli.write(paths, record, lambda: plots.peers(rows, title), ["peers"])


def peer_versions() -> dict[str, str]:
    """Versions of the optional packages that are installed."""
    versions = {}
    for _, package in other_caches.PACKAGES.values():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


if __name__ == "__main__":
    cli.run(main)
