"""The report's main picture, laid out for inline SVG: how small a cache is, and what that costs in perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from gpt2.report.table import interval

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 84, 16, 34, 58
NEAR = 90, 20  # across and down: a label has to keep this far from the next point, and from the right edge
LINEAR_BELOW = 0.001  # a change of perplexity of 0.1 %: logarithmic above, and zero has a place
SHARES = (0, 0.001, 0.01, 0.1, 1, 10)


@dataclass
class Chart:
    """Everything in SVG units, y downwards.

    points: family, label, x, y, low and high (ends of the bar), said (all of it in words), leftwards (where its label
    has room, since one of its family or the edge is near on the right). x_ticks, y_ticks: where, and what they say.
    """

    points: list[dict]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    families: list[str]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def compression_against_loss(rows: list[dict]) -> Chart:
    """rows: as `evaluation.peers.measure` gives them; those that weren't run have no point."""
    rows = [row for row in rows if "not_run" not in row]
    bounds = [bound for row in rows for bound in row["ppl_delta_interval"]]
    most = max(row["compression_ratio_2048"] for row in rows)
    x = _scale(0.5, most + 0.5, LEFT, WIDTH - RIGHT)
    up = _scale(_squeezed(min(0, *bounds)), _squeezed(max(LINEAR_BELOW, *bounds)), HEIGHT - BOTTOM - 12, TOP + 12)
    y_ticks = [(up(_squeezed(share)), f"{share:.1%}" if 0 < share < 0.01 else f"{share:.0%}") for share in SHARES]
    return Chart(
        _turn_labels([_point(row, x, up) for row in rows]),
        [(x(ratio), f"{ratio}x") for ratio in range(1, int(most + 0.5) + 1)],
        [(at, text) for at, text in y_ticks if at >= TOP],
        list(dict.fromkeys(row["family"] for row in rows)),
    )


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: round(start + (end - start) * (value - low) / (high - low), 1)


def _squeezed(share: float) -> float:
    return math.asinh(share / LINEAR_BELOW)


def _point(row: dict, x: Callable[[float], float], up: Callable[[float], float]) -> dict:
    ratio, change, bounds = row["compression_ratio_2048"], row["ppl_delta"], row["ppl_delta_interval"]
    low, high = (up(_squeezed(bound)) for bound in bounds)
    said = f"{row['label']}: {ratio:.2f}x, {change:+.2%} ({interval(bounds)})"
    place = {"x": x(ratio), "y": up(_squeezed(change)), "low": low, "high": high}
    return {"family": row["family"], "label": row["label"], "said": said, **place}


def _turn_labels(points: list[dict]) -> list[dict]:
    points = sorted(points, key=lambda point: point["x"])
    for i, point in enumerate(points):
        later = (other for other in points[i + 1 :] if other["family"] == point["family"])
        crowded = any(other["x"] - point["x"] < NEAR[0] and abs(other["y"] - point["y"]) < NEAR[1] for other in later)
        point["leftwards"] = crowded or WIDTH - RIGHT - point["x"] < NEAR[0]
    return points
