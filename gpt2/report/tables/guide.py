"""Rows of the perplexity ablation beside the integration guide's figures for the same configuration.

Two configurations are the same if target, bits, and rank as a share of head_dim agree. The guide's figures are in
`configs/guide.json`.
"""

from __future__ import annotations

import functools
import json
import re

from gpt2.common import files
from gpt2.report.table import Table, interval, select

GUIDE = files.ROOT / "configs" / "guide.json"
CELL = re.compile(r"(KV|K|V) (?:rank (\d+)|(LN nullspace))(?:, (\d+) bits)?")


def beside_guide(record: dict, groups: list[str]) -> Table:
    """Our results for rows of some groups or of all; the last column has the guide's figures."""
    rows, lines = select(record["rows"], "group", groups), []
    for row in rows:
        cell = _cell(row["label"], record["calibration"]["head_dim"])
        share = f"{cell['share']:.1%}" if cell and cell["share"] else "–"
        change, spread = f"{row['ppl_delta']:+.2%}", interval(row["ppl_delta_interval"])
        lines.append([row["label"], share, change, spread, f"{row['compression_ratio_2048']:.2f}x", _guide(cell)])
    tokens, baseline = rows[0]["tokens"], rows[0]["baseline_ppl"]
    return Table(
        [f"{record['model']}: cache", "share of head_dim", "Δ perplexity", "95 % interval", "whole-KV ratio",
         "*the guide, not run here*"],
        lines,
        f"{tokens:,} tokens of {record['text']}, uncompressed perplexity {baseline:.3f}. In italics what the guide "
        "says of other models, for the same share of head_dim.",
    )  # fmt: skip


def _cell(label: str, head_dim: int) -> dict | None:
    """Target, share of head_dim, nullspace and bits of a row's label; None for labels of other kinds."""
    if not (match := CELL.fullmatch(label)):
        return None
    target, rank, nullspace, bits = match.groups()
    share = int(rank) / head_dim if rank else None
    return {"target": target.lower(), "share": share, "nullspace": bool(nullspace), "bits": int(bits or 16)}


def _guide(cell: dict | None) -> str:
    found = [figure for figure in _figures() if cell and _same_cell(figure, cell)]
    return "; ".join(_in_words(figure) for figure in found) or "–"


def _same_cell(figure: dict, cell: dict) -> bool:
    if (figure["target"], figure["bits"]) != (cell["target"], cell["bits"]):
        return False
    if ("codec" in figure) != cell["nullspace"]:
        return False
    return "rank" not in figure or figure["rank"] / figure["head_dim"] == cell["share"]


def _in_words(figure: dict) -> str:
    words = [f"rank {figure['rank']}:"] if "rank" in figure else []
    if "ppl_delta" in figure:
        delta = figure["ppl_delta"]
        words.append(f"{delta:+.2%}" if round(delta, 2) != delta else f"{delta:+.0%}")
    words += [f"at {figure['compression_ratio']:.2f}x"] if "compression_ratio" in figure else []
    words += [figure["says"]] if "says" in figure else []
    return f"*{' '.join(words)} ({figure['model']})*"


@functools.cache
def _figures() -> list[dict]:
    return json.loads(GUIDE.read_text(encoding="utf-8"))["figures"]
