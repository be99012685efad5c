"""The table of loss by position, in generated text and along a long context."""

from __future__ import annotations

import numpy as np

from gpt2.report.table import Table, select

QUARTERS = ("first", "second", "third", "last")


def by_position(record: dict, caches: list[str]) -> Table:
    """KL by quarter of the positions, of some caches or of all, and how long greedy decoding stays the same."""
    lines = []
    for row in select(record["rows"], "cache", caches):
        quarters = row["quarters"]
        kl = [f"{cell['kl_nats']:.5f}" for cell in quarters]
        growth = quarters[-1]["kl_nats"] / quarters[0]["kl_nats"] if quarters[0]["kl_nats"] else 1
        same = row["greedy_tokens_same"]
        greedy = f"{np.median(same):,.0f} of {record['args']['greedy_tokens']:,}" if same else "–"
        lines.append([
            row["cache"], *kl, f"{growth:.2f}x", f"{quarters[0]['top1_agreement']:.1%}",
            f"{quarters[-1]['top1_agreement']:.1%}", f"{quarters[0]['ppl_delta']:+.2%}",
            f"{quarters[-1]['ppl_delta']:+.2%}", greedy,
        ])  # fmt: skip
    count, length = record["segments"]
    over = "sampled by the model after prompts of" if record["args"]["over"] == "generated" else "of"
    asked = any(row["greedy_tokens_same"] for row in record["rows"])
    greedy = (
        "median number before the first that differs from the uncompressed cache's" if asked else "not decoded here"
    )
    return Table(
        ["cache", *(f"KL, {name} quarter" for name in QUARTERS[: len(kl)]), "last over first", "top-1, first", "last"]
        + ["Δ perplexity, first", "last", "greedy tokens the same"],
        lines,
        f"{record['model']}, {count} segment{'s' * (count > 1)} of {length - 1 - record['first']:,} predictions {over} "
        f"{record['text']}. KL in nats. Greedy tokens: {greedy}.",
    )
