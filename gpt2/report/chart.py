"""The main picture of the HTML report, laid out for inline SVG: compression ratio against change of perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from gpt2.report.table import interval

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 84, 16, 34, 58
LABEL_SIZE = 90, 20  # width and height that a label needs beside its point
LINEAR_BELOW = 0.001  # the vertical axis is linear for changes of perplexity below 0.1 % and logarithmic above
SHARES = (0, 0.001, 0.01, 0.1, 1, 10)


@dataclass
class Chart:
    """Positions in SVG units, y downwards.

    points: dicts with family, label, x, y, low and high (ends of the bar), description (the figures as text), leftwards
    (whether the label goes to the left, because a point of the same family or the edge is close on the right).
    x_ticks, y_ticks: position and text of each.
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
    """The chart of rows as `evaluation.peers.measure` gives them; those that weren't run have no point."""
    rows = [row for row in rows if "not_run" not in row]
    bounds = [bound for row in rows for bound in row["ppl_delta_interval"]]
    most = max(row["compression_ratio_2048"] for row in rows)
    x = _scale(0.5, most + 0.5, LEFT, WIDTH - RIGHT)
    up = _scale(_symlog(min(0, *bounds)), _symlog(max(LINEAR_BELOW, *bounds)), HEIGHT - BOTTOM - 12, TOP + 12)
    y_ticks = [(up(_symlog(share)), f"{share:.1%}" if 0 < share < 0.01 else f"{share:.0%}") for share in SHARES]
    return Chart(
        _place_labels([_point(row, x, up) for row in rows]),
        [(x(ratio), f"{ratio}x") for ratio in range(1, int(most + 0.5) + 1)],
        [(at, text) for at, text in y_ticks if at >= TOP],
        list(dict.fromkeys(row["family"] for row in rows)),
    )


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """A linear map from low … high to start … end."""
    return lambda value: round(start + (end - start) * (value - low) / (high - low), 1)


def _symlog(share: float) -> float:
    """A share on the vertical axis, which is linear near zero."""
    return math.asinh(share / LINEAR_BELOW)


def _point(row: dict, x: Callable[[float], float], up: Callable[[float], float]) -> dict:
    ratio, change, bounds = row["compression_ratio_2048"], row["ppl_delta"], row["ppl_delta_interval"]
    low, high = (up(_symlog(bound)) for bound in bounds)
    description = f"{row['label']}: {ratio:.2f}x, {change:+.2%} ({interval(bounds)})"
    place = {"x": x(ratio), "y": up(_symlog(change)), "low": low, "high": high}
    return {"family": row["family"], "label": row["label"], "description": description, **place}


def _place_labels(points: list[dict]) -> list[dict]:
    """Points from left to right, each with the side on which its label has room."""
    points = sorted(points, key=lambda point: point["x"])
    for i, point in enumerate(points):
        later = (other for other in points[i + 1 :] if other["family"] == point["family"])
        width, height = LABEL_SIZE
        crowded = any(other["x"] - point["x"] < width and abs(other["y"] - point["y"]) < height for other in later)
        point["leftwards"] = crowded or WIDTH - RIGHT - point["x"] < width
    return points
