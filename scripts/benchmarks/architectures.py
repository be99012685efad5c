"""Which of transformers' decoder families work with a compressed cache, each tried in miniature.

    python scripts/benchmarks/architectures.py
    python scripts/benchmarks/architectures.py --families llama,gemma3_text,mamba --output architectures.json

A family is tried as a small random model of its default config, on the CPU, without a download. Results are:
direct-capable (compressed attention reads its codes), reconstruct-only, refused (with the reason), not tried
(transformers itself can't make or run such a model), and failed, which is a bug of this toolkit. Each row has the
layers of the model's cache by kind: full attention, sliding window, recurrent, and more. Working families are run with
reconstruction, and with a lossless cache they must generate the same tokens as with DynamicCache.
Writes results/runs/architectures.json, or where --output says.
"""

import argparse

from gpt2 import cli
from gpt2.common import files, provenance
from gpt2.experiments import architectures
from gpt2.report import tables


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    families = cli.word_list(["all", *architectures.families()])
    p.add_argument("--families", type=families, default="all", help="model types, or all")
    default = files.RESULTS / "runs" / "architectures.json"
    p.add_argument("--output", type=cli.output_file(".json"), default=default, help="JSON file")
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
