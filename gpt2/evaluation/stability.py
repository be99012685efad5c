"""Does a cache do as well on other text, with another calibration, on other questions? Runs that differ in one thing.

Run 0 takes everything as given. Every further run changes one named factor and nothing else, so that what moves can be
told from what moved it:

    text         another window of the evaluation text; windows don't overlap
    calibration  other samples of the calibration text, for a cache that is calibrated
    seed         other needle prompts, and other tokens in the speed test
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from torch import Tensor

from gpt2.errors import PluginError
from gpt2.evaluation import needle
from gpt2.evaluation.perplexity import BASELINE, CacheFactory, baseline_factory, compare, score
from gpt2.evaluation.timing import measure_cell
from gpt2.models import LoadedModel

FACTORS = ("text", "calibration", "seed")
AS_GIVEN = "as given"
# Record key to what people read; a larger figure is better for the last three
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
    """What one run takes: a window of the evaluation text, a calibration (0 is the given one), a seed."""

    factor: str
    text_window: int = 0
    calibration: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Setup:
    """What all runs share. windows: evaluation tokens [runs, segments, T]; haystack: token ids [n] of the same text.

    make: from a run's calibration number to a factory of caches.
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


def schedule(factors: Sequence[str], num_runs: int, seed: int = 0) -> list[Run]:
    """Run 0, and `num_runs` − 1 more for each factor, in which it alone takes other values."""
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
    """One run's figures, with what it took: perplexity and predictions, needle, decode speed beside the baseline."""
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
    found = needle.accuracy(
        loaded, setup.haystack, caches, lengths=[setup.needle_length], depths=[0.1, 0.5, 0.9],
        trials=setup.needle_trials, seed=run.seed,
    )  # fmt: skip
    speed = measure_cell(loaded, caches, setup.speed_context, 1, decode_tokens=8, repeats=3, seed=run.seed)
    timed = next(row for row in speed if row["cache"] == "compressed")
    return {
        **asdict(run),
        **compare(scores[BASELINE], scores["compressed"], run.seed),
        "needle_accuracy": found["compressed"],
        "needle_accuracy_baseline": found[BASELINE],
        "needle_accuracy_change": found["compressed"] - found[BASELINE],
        "token_ms": timed["token_ms_median"],
        "speed_ratio": timed["ratio_to_baseline"]["tokens_per_s_median"],
    }


def summarize(rows: Sequence[dict]) -> list[dict]:
    """Mean, standard deviation (of a sample) and range of every metric, for each factor with run 0 and for all runs."""
    factors = list(dict.fromkeys(row["factor"] for row in rows if row["factor"] != AS_GIVEN))
    groups = {factor: [row for row in rows if row["factor"] in (AS_GIVEN, factor)] for factor in factors}
    return [
        {"factor": factor, "metric": metric, **_spread([row[metric] for row in own])}
        for factor, own in (groups | {"all": list(rows)}).items()
        for metric in METRICS
    ]


def _spread(values: Sequence[float]) -> dict:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"runs": len(values), "mean": float(np.mean(values)), "std": spread, "min": min(values), "max": max(values)}


def verdict(summary: Sequence[dict], max_delta: float, max_std: float) -> dict:
    """Stable when the worst run's Δ perplexity, and its deviation under the factor that moves it most, are in bounds.

    Not the deviation over all runs: those of a factor that moves nothing would make it small.
    """
    ppl = {row["factor"]: row for row in summary if row["metric"] == "ppl_delta"}
    worst, runs = ppl["all"]["max"], ppl["all"]["runs"]
    mover = max((row for factor, row in ppl.items() if factor != "all" or len(ppl) == 1), key=lambda row: row["std"])
    stable = worst <= max_delta and mover["std"] <= max_std
    line = (
        f"{'stable' if stable else 'NOT stable'}: worst Δ perplexity {worst:+.2%} (limit {max_delta:+.2%}) over {runs} "
        f"runs, largest standard deviation {mover['std']:.2%} (limit {max_std:.2%}), by {mover['factor']}"
    )
    return {"stable": stable, "line": line, "max_ppl_delta": max_delta, "max_std": max_std}
