"""Markdown tables from results records, and README kept in step with them: no figure is typed by hand.

README holds regions that name the results file they come from:

    <!-- results: validate_ppl_smollm2-135m rank,bits -->
    …table…
    <!-- end -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from gpt2.errors import PluginError

REGION = re.compile(r"(<!-- results: (\S+)(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def validation(record: dict, groups: list[str]) -> str:
    """Rows of the perplexity ablation, of some groups or of all."""
    if missing := set(groups) - {row["group"] for row in record["rows"]}:
        raise PluginError(f"the results have no rows of group {', '.join(sorted(missing))}: run the script with them")
    rows = [row for row in record["rows"] if not groups or row["group"] in groups]
    lines = [
        "| cache | Δ perplexity | 95 % interval | KL, nats | top-1 | whole-KV ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["ppl_delta_interval"]
        lines.append(
            f"| {row['label']} | {row['ppl_delta']:+.2%} | {low:+.2%} … {high:+.2%} | {row['kl_nats']:.4f} "
            f"| {row['top1_agreement']:.1%} | {row['compression_ratio_2048']:.2f}x |"
        )
    tokens, baseline = rows[0]["tokens"], rows[0]["baseline_ppl"]
    return "\n".join(lines) + f"\n\n{tokens:,} tokens of {record['text']}, uncompressed perplexity {baseline:.3f}."


def appending(record: dict, _: list[str]) -> str:
    """Time to append one token, a row per codec and a column per number of tokens held."""
    held = sorted({row["tokens_held"] for row in record["rows"]})
    lines = [
        "| codec | " + " | ".join(f"{n:,} tokens held" for n in held) + " | bytes per token |",
        "|---" * (len(held) + 2) + "|",
    ]
    for codec in dict.fromkeys(row["codec"] for row in record["rows"]):
        cells = {row["tokens_held"]: row for row in record["rows"] if row["codec"] == codec}
        times = " | ".join(f"{cells[n]['append_ms_median']:.2f} ms" for n in held)
        lines.append(f"| {codec} | {times} | {cells[held[-1]]['bytes_per_token']:,.0f} |")
    return "\n".join(lines)


def calibrating(record: dict, _: list[str]) -> str:
    """Cost of calibration."""
    lines = [
        "| cost of calibration | |",
        "|---|---|",
        f"| time against bare forward passes | {record['ratio_to_forward']['body']:.2f}x |",
        f"| the same, the forward passes with logits | {record['ratio_to_forward']['with_logits']:.2f}x |",
    ]
    sizes = record["peak_rss_mb_by_samples"].items()
    return "\n".join(lines + [f"| peak memory with {n} samples | {size:,.0f} MB |" for n, size in sizes])


TABLES: dict[str, Callable[[dict, list[str]], str]] = {
    "validate_ppl": validation,
    "benchmark_append": appending,
    "benchmark_calibration": calibrating,
}


def fill(text: str, runs: Path) -> str:
    """Text with every region made anew from the results in `runs`. Raises PluginError where a file is missing."""

    def region(match: re.Match) -> str:
        start, name, words, end = match.groups()
        path = runs / f"{name}.json"
        if not path.is_file():
            raise PluginError(f"a table asks for {path.name}, which is not among the committed results: run it first")
        make = next(table for prefix, table in TABLES.items() if name.startswith(prefix))
        record = json.loads(path.read_text(encoding="utf-8"))
        return f"{start}{make(record, words.split(',') if words else [])}\n{end}"

    return REGION.sub(region, text)
