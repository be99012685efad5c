"""Is a cache as good on other text, with another calibration, on other prompts? Runs that differ in one factor.

Run 0 takes everything as given. Every further run changes one factor and nothing else, so that a change of a figure can
be attributed to it:

    text         another window of the evaluation text; windows don't overlap
    calibration  other samples of the calibration text, if the cache is calibrated
    seed         other needle prompts and other tokens in the speed test; perplexity, KL and agreement stay the same
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.evaluation import needle
from gpt2.evaluation.needle_prompts import Flags
from gpt2.evaluation.perplexity import BASELINE, CacheFactory, baseline_factory, compare, score
from gpt2.evaluation.timing import measure_cell
from gpt2.models.loading import LoadedModel

FACTORS = ("text", "calibration", "seed")
AS_GIVEN = "as given"
MOVES_PREDICTIONS = ("text", "calibration")  # factors that can change PREDICTIONS
PREDICTIONS = ("ppl_delta", "kl_nats", "top1_agreement")
# Key of a record to its name in tables and figures
METRICS = {
    "ppl_delta": "Δ perplexity",
    "kl_nats": "KL, nats",
    "top1_agreement": "top-1 agreement",
    "needle_accuracy": "needle accuracy",
    "needle_accuracy_change": "needle, change",
    "speed_ratio": "decode speed, ratio",
}


@dataclass(frozen=True)
class Run:
    """The settings of one run: number of the text window, number of the calibration (0 is the given one), and seed."""

    factor: str
    text_window: int = 0
    calibration: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Setup:
    """What all runs share.

    windows: evaluation tokens [runs, segments, T]. haystack: token ids [n] of the same text. make: from the number of a
    calibration to a factory of caches.
    """

    loaded: LoadedModel
    windows: Tensor
    haystack: Tensor
    make: Callable[[int], CacheFactory]
    chunk: int = 64
    batch_size: int = 4
    needle_length: int = 512
    needle_trials: int = 4
    speed_context: int = 512
    distractors: int = 0  # without them the embedded model finds nearly every needle, so that a loss would show


def schedule(factors: Sequence[str], num_runs: int, seed: int = 0) -> list[Run]:
    """Run 0, and for each factor `num_runs` − 1 runs in which only this factor has other values."""
    field = {"text": "text_window", "calibration": "calibration", "seed": "seed"}
    first = Run(AS_GIVEN, seed=seed)
    others = [
        replace(first, factor=factor, **{field[factor]: getattr(first, field[factor]) + i})
        for factor in factors
        for i in range(1, num_runs)
    ]
    return [first, *others]


def windows_of(segments: Tensor, num_runs: int, segments_per_run: int) -> Tensor:
    """Evaluation segments [n, T] as windows that don't overlap, [num_runs, segments_per_run, T]."""
    needed = num_runs * segments_per_run
    if len(segments) < needed:
        raise PluginError(
            f"the evaluation text has {len(segments)} segments of {segments.shape[1]} tokens, but {num_runs} runs of "
            f"{segments_per_run} need {needed}: use fewer --num-runs, fewer --eval-tokens, or a longer --text"
        )
    return segments[:needed].unflatten(0, (num_runs, segments_per_run))


def measure(setup: Setup, run: Run, progress=iter) -> dict:
    """Settings and figures of one run: loss, predictions, needle accuracy, decode speed, each beside the baseline."""
    loaded = setup.loaded
    caches = {BASELINE: baseline_factory(loaded), "compressed": setup.make(run.calibration)}
    scores = score(
        loaded,
        setup.windows[run.text_window],
        caches,
        chunk=setup.chunk,
        batch_size=setup.batch_size,
        progress=progress,
    )
    answered = needle.accuracy(
        loaded, setup.haystack, caches, lengths=[setup.needle_length], depths=[0.1, 0.5, 0.9],
        trials=setup.needle_trials, seed=run.seed, distractors=setup.distractors,
        flags=Flags("--needle-length", None, None),
    )  # fmt: skip
    works = answered[BASELINE] >= needle.works_from(setup.distractors)
    speed = measure_cell(loaded, caches, setup.speed_context, 1, decode_tokens=8, repeats=3, seed=run.seed)
    timed = next(row for row in speed if row["cache"] == "compressed")
    if "ratio_to_baseline" not in timed:
        raise PluginError(
            f"the speed test ran out of memory at {setup.speed_context} tokens: use a smaller --needle-length"
        )
    return {
        **asdict(run),
        **compare(scores[BASELINE], scores["compressed"], run.seed),
        "needle_accuracy": answered["compressed"],
        "needle_accuracy_baseline": answered[BASELINE],
        "needle_baseline_works": works,
        # If the baseline itself fails, a change of 0 would mean nothing
        "needle_accuracy_change": answered["compressed"] - answered[BASELINE] if works else None,
        "token_ms": timed["token_ms_median"],
        "speed_ratio": timed["ratio_to_baseline"]["tokens_per_s_median"],
    }


def line(row: dict) -> str:
    """The main figures of one run for a terminal. row: as `measure` returns it."""
    fails = "" if row["needle_baseline_works"] else ", which fails"
    return (
        f"Δ perplexity {row['ppl_delta']:+.2%}, KL {row['kl_nats']:.4f} nats, top-1 {row['top1_agreement']:.1%}, "
        f"needle {row['needle_accuracy']:.0%} (baseline {row['needle_accuracy_baseline']:.0%}{fails}), "
        f"speed {row['speed_ratio']:.2f}x"
    )


def summarize(rows: Sequence[dict]) -> list[dict]:
    """Mean, sample standard deviation and range of every metric, for each factor with run 0 and for all runs.

    Runs of a factor that can't change a metric are left out of that metric, as equal values would make its spread
    look smaller.
    """
    factors = list(dict.fromkeys(row["factor"] for row in rows if row["factor"] != AS_GIVEN))
    groups = {factor: [row for row in rows if row["factor"] in (AS_GIVEN, factor)] for factor in factors}
    summary = []
    for factor, own in (groups | {"all": list(rows)}).items():
        for metric in METRICS:
            moved = [row[metric] for row in own if _moves(row["factor"], metric) and row[metric] is not None]
            if moved and (factor == "all" or _moves(factor, metric)):
                summary.append({"factor": factor, "metric": metric, **_spread(moved)})
    return summary


def _moves(factor: str, metric: str) -> bool:
    return factor in (*MOVES_PREDICTIONS, AS_GIVEN) or metric not in PREDICTIONS


def _spread(values: Sequence[float]) -> dict:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"runs": len(values), "mean": float(np.mean(values)), "std": spread, "min": min(values), "max": max(values)}


def verdict(summary: Sequence[dict], max_delta: float, max_std: float) -> dict:
    """Stable if the worst run's Δ perplexity and its deviation under the factor that changes it most are in bounds.

    The deviation over all runs isn't used: a steady factor would hide another one. `stable` is None if no factor was
    varied that can change perplexity.
    """
    ppl = {row["factor"]: row for row in summary if row["metric"] == "ppl_delta"}
    over_all = ppl.pop("all")
    limits = {"max_ppl_delta": max_delta, "max_std": max_std}
    if not ppl:
        line = f"no verdict: nothing was varied that moves perplexity (that is {' and '.join(MOVES_PREDICTIONS)})"
        return {"stable": None, "line": line, **limits}
    worst, mover = over_all["max"], max(ppl.values(), key=lambda row: row["std"])
    stable = worst <= max_delta and mover["std"] <= max_std
    line = (
        f"{'stable' if stable else 'NOT stable'}: worst Δ perplexity {worst:+.2%} (limit {max_delta:+.2%}) over "
        f"{over_all['runs']} runs, largest standard deviation {mover['std']:.2%} (limit {max_std:.2%}), by "
        f"{mover['factor']}"
    )
    return {"stable": stable, "line": line, **limits}
