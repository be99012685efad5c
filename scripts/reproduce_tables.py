"""Make the tables of configs/tables: run what is missing or out of date, reuse what matches, write results/tables.

    python scripts/reproduce_tables.py --status
    python scripts/reproduce_tables.py ranks bits --text ../wikitext
    python scripts/reproduce_tables.py --quick --text ../wikitext
    python scripts/reproduce_tables.py --study postgresql://user@host/kv --device cuda:1

A table is a file that names its runs, each one script with arguments which makes results/runs/NAME.json. Results are
reused where arguments, the text and files that they name, and the code behind the script are the same; --status tells
of each run what it is, and runs nothing. Without names all tables are made. --pages runs nothing and writes the pages
from the results that there are. --quick takes small arguments and keeps all apart, in results/quick.

Runs are trials of an Optuna study: interrupt the command and start it again to go on; start it N times, each with its
own --device, to share the work. What a dead worker was making another takes over after a minute. On several machines
give all the same --study, a database's URL, and one folder of results. A table measured on several
devices says of each part which one it was.

--check fails where README, docs or a page shows what the committed results don't: tables are made anew and compared,
figures in prose are looked up in them (gpt2/reproduce/figures.py says which).
"""

import argparse
import sys

from gpt2 import cli
from gpt2.common import files
from gpt2.common.errors import PluginError
from gpt2.models import embedded
from gpt2.runs import config, pages
from gpt2.runs.check import check
from gpt2.runs.up_to_date import Matcher
from gpt2.runs.worker import Worker


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    p.add_argument("tables", nargs="*", metavar="NAME", help="tables to make, or single runs; all tables if omitted")
    p.add_argument("--model", default=embedded.EMBEDDED, help="embedded model's name, local folder, or hub id")
    p.add_argument("--text", help="text of every run, such as ../wikitext")
    p.add_argument("--device", help="of this worker's runs: cpu, cuda, cuda:N; what each script chooses if omitted")
    p.add_argument("--study", help="SQLite file or database URL; results/tables/study.db if omitted")
    p.add_argument("--any-code", action="store_true", help="reuse also results of code that was never committed")
    how = p.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="small runs, in results/quick: to try all, not to publish")
    how.add_argument("--status", action="store_true", help="only tell which runs are up to date, and why others aren't")
    how.add_argument("--pages", action="store_true", help="only write pages, from the results that there are")
    how.add_argument("--check", action="store_true", help="only compare README, docs and pages with the results")
    return p


def main() -> None:
    args = arguments().parse_args()
    if args.check:
        check(files.ROOT)
        print("README, docs and results/tables show what results/runs say")
        return
    if args.model == embedded.EMBEDDED and not (args.text or args.quick or args.status or args.pages):
        raise PluginError("the committed tables are of WikiText-2, and would be made anew of another text: give --text")
    setting = config.Setting(args.model, args.text, args.quick, args.device)
    known, runs = config.load(setting)
    if unknown := [name for name in args.tables if name not in known.keys() | runs.keys()]:
        raise PluginError(f"no table {', '.join(unknown)} in configs/tables: there are {', '.join(known)}")
    chosen = [known[name] for name in args.tables or known if name in known]
    single = [name for name in args.tables if name in runs and name not in known]
    wanted = list(dict.fromkeys([*single, *(name for table in chosen for name in table.results)]))
    matcher = Matcher(setting, runs, args.any_code)
    if args.status:
        print_status(matcher, wanted)
        return
    failed = {}
    for table in chosen:
        files.check_writable(pages.page_path(setting, table.name))
    if not args.pages:
        failed = Worker(args.study or setting.results / "tables" / "study.db", matcher).work(wanted)
    for table in chosen:
        print(f"wrote {files.shown(pages.write(setting, table))}")
    for name, why in failed.items():
        print(f"not made: {name}: {why}", file=sys.stderr)
    if failed:
        sys.exit(1)


def print_status(matcher: Matcher, wanted: list[str]) -> None:
    """A line per run; what would be made in their order."""
    for name in wanted:
        print(f"{name:<44} {matcher.why_not(name) or 'up to date'}")
    made = matcher.to_make(wanted)
    print(f"\n{len(made)} runs to make" + (f": {', '.join(made)}" if made else ""))


if __name__ == "__main__":
    cli.run(main)
