"""Tables of the needle test: by context length, by cell, and by pairs of prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpt2.evaluation.statistics import mean_interval
from gpt2.report.table import Table

NO_INTERVAL = "–"


def needle(record: dict, _: list[str]) -> Table:
    """Exact match and change of log-probability by cache and context length, over all depths."""
    lines = []
    cells = {(c["cache"], c["context_tokens"], c["depth"]): c for c in record["cells"]}
    groups = dict.fromkeys((c["cache"], c["context_tokens"]) for c in record["cells"] if "verdict" in c)
    for cache, length in groups:
        own = [c for (name, tokens, _), c in cells.items() if (name, tokens) == (cache, length)]
        base = [cells["baseline", length, c["depth"]] for c in own]
        works = [c for c in own if c["baseline_works"]]
        exact, reference = (sum(c["exact_match"] for c in some) / len(some) for some in (own, base))
        changes = _logprob_changes(record, cache, length)
        edges = mean_interval(changes) if len(changes) > 1 else None
        matched = sum(c["verdict"] == "matches" for c in works)
        verdict = f"{matched} of {len(works)} depths" if works else "the baseline fails"
        lines.append([cache, f"{length:,}", f"{exact:.0%}", f"{reference:.0%}", f"{changes.mean():+.3f}"])
        lines[-1] += [_interval(edges), verdict]
    prompts = sum(c["trials"] for c in record["cells"] if c["cache"] == "baseline")
    return Table(
        ["cache", "context", "exact match", "baseline's", "change of log p, nats", "95 % interval"]
        + ["matches where the baseline works"],
        lines,
        f"{record['model']}, {prompts} prompts per cache in {record['text']}; a baseline works from "
        f"{record['baseline_works_from']:.0%} exact match on."
        + (" One prompt gives no interval." if any(line[5] == NO_INTERVAL for line in lines) else ""),
    )


def _interval(edges: Sequence[float] | None) -> str:
    """An interval, of which there is none for one prompt."""
    return f"{edges[0]:+.3f} … {edges[1]:+.3f}" if edges else NO_INTERVAL


def _logprob_changes(record: dict, cache: str, length: int) -> np.ndarray:
    """For each prompt of a context length, the change of the answer's log-probability by a cache, in nats."""
    found = {}
    for row in record["rows"]:
        if row["context_tokens"] == length:
            found[row["cache"], row["depth"], row["trial"]] = row["answer_logprob_nats"]
    return np.array([p - found["baseline", *prompt] for (name, *prompt), p in found.items() if name == cache])


def needle_cells(record: dict, _: list[str]) -> Table:
    """Every cell, which is a cache, a context length and a depth, beside the same cell of the baseline."""
    cells = [cell for cell in record["cells"] if "verdict" in cell]
    reference = {(c["context_tokens"], c["depth"]): c for c in record["cells"] if c["cache"] == "baseline"}
    lines = []
    for cell in sorted(cells, key=lambda cell: (cell["cache"], cell["context_tokens"])):
        base = reference[cell["context_tokens"], cell["depth"]]
        lines.append([
            cell["cache"],
            f"{cell['context_tokens']:,}",
            f"{cell['depth']:.0%}",
            f"{cell['exact_match']:.0%}",
            f"{base['exact_match']:.0%}",
            f"{cell['logprob_change_nats']:+.3f}",
            cell["verdict"],
            f"{cell['cache_bytes']:,.0f}",
            f"{base['cache_bytes'] / cell['cache_bytes']:.2f}x",
        ])  # fmt: skip
    dtype = record["dtype"].removeprefix("torch.")
    return Table(
        [
            "cache",
            "context",
            "depth",
            "exact match",
            "baseline's",
            "change of log p, nats",
            "verdict",
            "bytes",
            "ratio",
        ],
        lines,
        f"Bytes are those of the cache of a prompt, the ratio is to the baseline in {dtype}.",
    )


def needle_pairs(record: dict, _: list[str]) -> Table:
    """Each cache over all prompts, paired with the baseline's answers to the same prompts."""
    return pairs(record["summary"])


def pairs(summary: list[dict]) -> Table:
    """A table of what `evaluation.asking.summarize` makes, a row per cache."""
    lines = []
    for row in summary:
        lines.append([
            row["cache"],
            f"{row['cells_matched']} of {row['cells_where_baseline_works']}",
            f"{row['exact_match']:.1%}",
            f"{row['baseline_exact_match']:.1%}",
            str(row["only_baseline_right"]),
            str(row["only_compressed_right"]),
            f"{row['sign_test_p']:.2g}",
            f"{row['logprob_change_nats']:+.3f}",
            _interval(row["logprob_change_nats_interval"]),
        ])  # fmt: skip
    return Table(
        ["cache", "cells matched", "exact match", "baseline's", "only the baseline right", "only the cache right",
         "sign test p", "change of log p, nats", "95 % interval"],
        lines,
        f"{summary[0]['prompts']} prompts per cache in {summary[0]['cells']} cells; only those "
        "where the baseline works can be matched."
        + (" One prompt gives no interval." if summary[0]["prompts"] == 1 else ""),
    )  # fmt: skip
