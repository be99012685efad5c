"""Figures: labels that lie apart, and what a reader must see in each."""

import numpy as np
import pytest
from matplotlib.text import Annotation, Text

from gpt2.common.errors import PluginError
from gpt2.report import plots, tables

BASELINE = "baseline"


def figures(label: str, family: str, size: float, change: float, **more) -> dict:
    row = {"label": label, "family": family, "bytes_per_token": size, "compression_ratio_2048": 1000 / size}
    row |= {"ppl": 20.0, "ppl_delta": change, "ppl_delta_interval": [change - 0.01, change + 0.01], "tokens": 2047}
    return row | {"kl_nats": abs(change), "top1_agreement": 0.9} | more


RECORD = {
    "model": "m", "text": "t", "args": {"needle_context_lengths": [1024]},
    "needle": {"cells": [{"cache": "baseline", "trials": 15}]},
    "rows": [
        figures(BASELINE, BASELINE, 1000, 0.0, needle_exact_match=1.0),
        {"label": "hqq 4 bits", "family": "hqq", "not_run": "ValueError: a | b"},
        figures("fp8", "fp8", 500, -0.001, needle_not_run="out of memory"),
        figures("kv8", "ours", 500, 0.125, needle_exact_match=0.8),
    ],
}  # fmt: skip


def test_a_table_names_what_was_not_run_and_not_asked():
    """Its other lines are on the committed pages. Markdown needs pipes escaped, and short rows filled."""
    lines = tables.peers(RECORD, []).markdown().splitlines()
    assert lines[3] == "| hqq 4 bits | not run: ValueError: a \\| b | | | | | | |"
    assert lines[4].endswith("| 90.0% | – |")
    assert "15 prompts of 1,024 tokens. Not asked: fp8 (out of memory)." in lines[-1]
    with pytest.raises(PluginError, match="no rows of family kivi"):
        tables.peers(RECORD, ["kivi"])


def test_the_frontier_has_a_panel_per_model():
    second = {**RECORD, "model": "folder/two", "rows": [*RECORD["rows"], figures("kv4", "ours", 300, 0.2)]}
    second["rows"].append(figures("worse", "ours", 400, 0.3))
    figure = plots.frontier([record | {"segments": [2, 512]} for record in (RECORD, second)])
    assert [axis.get_title() for axis in figure.axes] == ["m, 1,024 tokens of t", "two, 1,024 tokens of t"]
    for axis, names in zip(figure.axes, (["fp8", "kv8"], ["fp8", "kv8", "kv4", "worse"]), strict=True):
        assert [text.get_text() for text in axis.texts] == names and axis.get_yscale() == "log"
    last = next(line for line in figure.axes[1].lines if line.get_linestyle() == "-")
    assert list(last.get_xdata()) == [300, 500], "the frontier of our presets is joined"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["16-bit cache", "fp8", "ours"]


def test_labels_of_the_frontier_lie_apart():
    points = np.random.default_rng(0).uniform((300, -0.02), (500, 0.02), (9, 2))
    rows = [figures(f"a cache whose name is as long as {i}", "ours", *point) for i, point in enumerate(points)]
    figure = plots.peers([*RECORD["rows"], *rows], "title")
    assert [axis.get_ylabel().split(",")[0] for axis in figure.axes] == [
        "change of perplexity", "KL from the uncompressed model", "top-1 agreement",
    ]  # fmt: skip
    figure.draw_without_rendering()
    notes = [text for text in figure.axes[0].texts if isinstance(text, Annotation)]
    assert [note.get_text() for note in notes] == [row["label"] for row in [*RECORD["rows"], *rows] if "ppl" in row]
    boxes = [Text.get_window_extent(note) for note in notes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(figure.axes[0].get_window_extent().contains(*corner) for box in boxes for corner in (box.min, box.max))
