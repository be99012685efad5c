"""Write the tables of README and docs/*.md from the committed results, or check that they are what the results say.

    python scripts/update_readme.py
    python scripts/update_readme.py --check

A region of a page names the file in results/runs that it comes from; see gpt2/tables.py.
"""

import argparse

from gpt2 import cli, results, tables
from gpt2.errors import PluginError


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    p.add_argument("--check", action="store_true", help="change nothing, fail if a table differs from its results")
    return p


def main() -> None:
    args = arguments().parse_args()
    for page in tables.pages(results.ROOT):
        before = page.read_text(encoding="utf-8")
        after = tables.fill(before, results.RESULTS / "runs")
        if args.check and before != after:
            name = results.shown(page)
            raise PluginError(f"{name} shows figures that differ from results/runs: run scripts/update_readme.py")
        if before != after:
            with results.atomic(page) as part:
                part.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
