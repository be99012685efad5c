"""Which of the decoder families that transformers knows work with a compressed cache, each tried in miniature.

    python scripts/benchmarks/architectures.py
    python scripts/benchmarks/architectures.py --families llama,gemma3_text,mamba --output architectures.json

A family is tried as a small random model of its default config, on the CPU, without a download. Modes: direct-capable
(its attention can be replaced, so that it may come to read compressed K and V as they are), reconstruct-only, refused
with the reason, not tried where transformers itself makes or runs no such model, and failed, which is a bug of ours.
Both working modes run by reconstruction today; their tokens with a cache that loses nothing are those of DynamicCache.
Writes results/runs/architectures.json, or where --output says.
"""

import argparse
from pathlib import Path

from gpt2 import cli
from gpt2.common import files, provenance
from gpt2.experiments import architectures
from gpt2.report import tables


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    families = cli.word_list(["all", *architectures.families()])
    p.add_argument("--families", type=families, default="all", help="model types")
    p.add_argument("--output", type=Path, default=files.RESULTS / "runs" / "architectures.json", help="JSON file")
    return p


def main() -> None:
    args = arguments().parse_args()
    files.check_writable(args.output)

    names = architectures.families() if "all" in args.families else args.families
    rows = [architectures.examine(family) for family in cli.bar("families", "family")(names)]
    record = provenance.provenance(args, device="cpu", **architectures.settings(), rows=rows)
    files.write_json(args.output, record)
    tables.show("architectures", record)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    cli.run(main)
