"""Make the tables of configs/tables: run what is missing or stale, reuse what is up to date, write results/tables.

    python scripts/reproduce_tables.py --status
    python scripts/reproduce_tables.py ranks bits --text ../wikitext
    python scripts/reproduce_tables.py --quick --text ../wikitext
    python scripts/reproduce_tables.py --study postgresql://user@host/kv --device cuda:1
    python scripts/reproduce_tables.py --replay needle --text ../wikitext
    python scripts/reproduce_tables.py --html report.html --results my_results --model qwen2.5-0.5b

A table is defined by a file that names its runs. A run is one script with arguments, which makes
results/runs/NAME.json. Results are up to date if they were made with the same arguments, from files, texts and a
calibration with the same contents, at a commit that is known; presets and policies that go by name count as code, which
--replay checks. Without names all tables are made.

Runs are trials of an Optuna study: start the command again to resume it after an interruption; start it several times,
each with another --device, to share the work. A dead worker's run is taken over after a minute. On several machines,
use a database's URL as --study for all and a shared folder of results. What measures time is of one machine: a CPU with
AVX-512 makes results/runs/NAME.json, others make NAME_avx2.json and the like, and tables show each with its machine.
A machine never adds to the results of another.

--replay measures one segment or one prompt of each results file with the present code, and compares it with the file
within a tolerance (gpt2/runs/replay.py). The outcome is noted in results/replays.json, and --status shows it; the exit
code is 1 if a figure differs.

These flags start no runs: --status prints for each run whether it is up to date; --pages writes results/tables and the
tables within README and docs/*.md from existing results; --check fails if any of these, or a figure in the prose of
README and docs, differs from the committed results (gpt2/runs/check.py describes which figures are checked); --html
writes one page with all measurements, sortable tables, pictures and provenance, which needs no network.
"""

import argparse
import sys
from pathlib import Path

from gpt2 import cli
from gpt2.common import files
from gpt2.common.errors import PluginError
from gpt2.models import embedded, loading
from gpt2.runs import check, config, pages, replay
from gpt2.runs.up_to_date import Matcher
from gpt2.runs.worker import Worker


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    p.add_argument("tables", nargs="*", metavar="NAME", help="tables or single runs to make; all tables if omitted")
    what = "embedded model's name, local folder, or hub id"
    p.add_argument("--model", type=loading.plain_spec, default=embedded.EMBEDDED, help=what)
    p.add_argument("--text", help="--text of every run, such as ../wikitext")
    p.add_argument("--device", help="--device of this worker's runs, such as cuda:1; each script's default if omitted")
    p.add_argument("--machine", default=config.THIS, metavar="TAG",
                   help="tag of results that measure time: by default this machine's kind, else KIND-NAME")  # fmt: skip
    p.add_argument("--study", type=cli.study, help="SQLite file or database URL; results/tables/study.db if omitted")
    p.add_argument("--any-code", action="store_true", help="also reuse results of code that was never committed")
    p.add_argument("--run-generated-code", action="store_true", help="allow runs of eval_code.py, which need this flag")
    how = p.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="small runs in results/quick, not for publication")
    how.add_argument("--status", action="store_true", help="only print which runs are stale, and why")
    how.add_argument("--replay", action="store_true", help="only measure a part of each result again, and compare")
    how.add_argument("--pages", action="store_true", help="only write results/tables and the tables in README and docs")
    how.add_argument("--check", action="store_true", help="only compare README, docs and results/tables with results")
    how.add_argument("--html", nargs="?", type=Path, const=Path(), metavar="FILE", help="only write one HTML page")
    p.add_argument("--results", type=Path, help="folder with runs and plots, for --html; results if omitted")
    return p


def parsed() -> argparse.Namespace:
    p = arguments()
    args = p.parse_args()
    if args.results and args.html is None:
        p.error("--results is for --html alone")
    if args.tables and (args.check or args.html is not None):
        p.error(f"{'--check' if args.check else '--html'} takes no names of tables: it is of all results")
    args.results = args.results or files.RESULTS
    return args


def main() -> None:
    args = parsed()
    if args.check:
        check.check(files.ROOT)
        print("README, docs and results/tables agree with results/runs")
        return
    if args.html is not None:
        write_html(args.results, args.model, args.html if args.html.name else args.results / "report.html")
        return
    if args.model == embedded.EMBEDDED and not (args.text or args.quick or args.status or args.pages or args.replay):
        raise PluginError("the committed tables are of WikiText-2 and would be replaced by another text's: give --text")
    options = config.RunOptions(args.model, args.text, args.quick, args.device, args.machine, args.run_generated_code)
    tables, runs = config.load(options)
    chosen, wanted = config.select(args.tables, tables, runs)
    matcher = Matcher(options, runs, args.any_code)
    failed = {}
    if args.status:
        print(matcher.status(wanted))
        return
    if args.replay:
        sys.exit(1 if replay.replay_all(matcher, wanted) else 0)
    pages.check_writable(options, chosen, args.pages)
    if not args.pages:
        failed = Worker(args.study or options.results / "tables" / "study.db", matcher).work(wanted)
    for table in chosen:
        print(f"wrote {files.shown(pages.write(options, table))}")
    if args.pages:
        pages.write_regions(options.checkout)
    for name, why in failed.items():
        print(f"not made: {name}: {why}", file=sys.stderr)
    if failed:
        sys.exit(1)


def write_html(results: Path, model: str, output: Path) -> None:
    for what in pages.write_html(results, model, output):
        print(f"not shown: {what}")
    print(f"wrote {files.shown(output)}, {output.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    cli.run(main)
