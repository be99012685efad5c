"""One page with everything measured: tables that sort, figures, and where each came from. Opens in any browser.

    python scripts/make_report.py
    python scripts/make_report.py --results my_results --model qwen2.5-0.5b --output report.html

Made from results files alone: nothing is measured, and nothing comes from a network, neither now nor when it's read.
Sections are the files in configs/tables and the first screen is configs/report.json. What hasn't been measured is named
where it would be.
"""

import argparse
from pathlib import Path

from gpt2 import cli
from gpt2.common import files
from gpt2.models import embedded
from gpt2.report import html as report


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    p.add_argument("--model", default=embedded.EMBEDDED, help="model as the names of results files have it")
    p.add_argument("--results", type=Path, default=files.RESULTS, help="folder with runs/*.json and plots/*.png")
    p.add_argument("--output", type=Path, help="HTML file; report.html in the results folder if not given")
    return p


def main() -> None:
    args = arguments().parse_args()
    output = args.output or args.results / "report.html"
    files.check_writable(output)
    html, missing = report.page(args.results, report.CONFIGS, args.model)
    with files.atomic(output) as part:
        part.write_text(html, encoding="utf-8")
    for what in missing:
        print(f"not shown: {what}")
    print(f"wrote {files.shown(output)}, {output.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    cli.run(main)
