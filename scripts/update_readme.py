"""Write the tables of README and docs/*.md from the committed results, or check that they are what the results say.

    python scripts/update_readme.py
    python scripts/update_readme.py --check

A region of a page names the file in results/runs that it comes from; see gpt2/report/regions.py. --check looks at all
that shows figures, as scripts/reproduce_tables.py --check does.
"""

import argparse

from gpt2 import cli
from gpt2.common import files
from gpt2.common.errors import PluginError
from gpt2.report import regions
from gpt2.runs.check import check


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    p.add_argument("--check", action="store_true", help="change nothing, fail where figures differ")
    return p


def main() -> None:
    args = arguments().parse_args()
    if args.check:
        check(files.ROOT)
        return
    failed = []
    for page in regions.pages(files.ROOT):
        try:
            after = regions.fill(page.read_text(encoding="utf-8"), files.RESULTS / "runs")
        except PluginError as error:  # the other pages are made all the same
            failed.append(f"{files.shown(page)}: {error}")
            continue
        with files.atomic(page) as part:
            part.write_text(after, encoding="utf-8")
    if failed:
        raise PluginError("\n".join(failed))


if __name__ == "__main__":
    cli.run(main)
