"""Measured candidates of any search, and the choice of the best one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import optuna
from optuna.trial import FrozenTrial

from gpt2.common.errors import BudgetNotMet


class Candidate(Protocol):
    """One configuration of a cache that a search may try. Its str is its name in tables and messages."""

    def record(self) -> dict:
        """For results files."""


@dataclass(frozen=True)
class Trial:
    """A candidate with its measurements: relative change of perplexity and whole-KV compression ratio.

    ppl_delta: infinite if the loss is not finite; in `details` it is then None, as JSON has no infinity.
    """

    candidate: Candidate
    ppl_delta: float
    compression_ratio: float
    details: dict

    def record(self) -> dict:
        """For results files, and for the frontier plot."""
        sizes = {"compression_ratio": self.compression_ratio}
        return {"label": str(self.candidate), **self.candidate.record(), **sizes, **self.details}

    def write(self, trial: optuna.Trial) -> float:
        """Store the measurements in a study's trial; returns the trial's value, the compression ratio."""
        trial.set_user_attr("ppl_delta", self.ppl_delta if math.isfinite(self.ppl_delta) else None)
        trial.set_user_attr("details", self.details)
        return self.compression_ratio

    @classmethod
    def read(cls, trial: FrozenTrial, candidate: Candidate) -> Trial:
        """The trial that `write` stored."""
        delta = trial.user_attrs["ppl_delta"]
        return cls(candidate, math.inf if delta is None else delta, trial.value, trial.user_attrs["details"])


def within_budget(trials: Sequence[Trial], budget: float) -> list[Trial]:
    """Trials within the budget, highest compression first."""
    return sorted((t for t in trials if t.ppl_delta <= budget), key=lambda t: (-t.compression_ratio, t.ppl_delta))


def percent(delta: float | None) -> str:
    """A relative change of perplexity as text. delta: None or infinite if the loss is not finite."""
    return "no finite loss" if delta is None or math.isinf(delta) else f"{delta:+.2%}"


def confirm_best(
    trials: Sequence[Trial], budget: float, confirm: Callable[[Candidate], dict], advice: str
) -> tuple[Trial, dict, list[tuple[Trial, dict]]]:
    """The most compressed trial that is within the budget on evaluation text too.

    Returns the trial, its figures there, and the trials that failed there with theirs. confirm: measures a candidate on
    evaluation text. Raises BudgetNotMet, with the nearest result and `advice`, if no trial is within the budget.
    """
    failed = []
    for trial in within_budget(trials, budget):
        record = confirm(trial.candidate)
        if record["ppl_delta"] is not None and record["ppl_delta"] <= budget:
            return trial, record, failed
        failed.append((trial, record))
    if not trials:
        raise BudgetNotMet(f"nothing could be measured. No preset was written.\n{advice}")
    nearest = min(trials, key=lambda t: t.ppl_delta)
    held = f"; {len(failed)} met it on tuning text but not on evaluation text" if failed else ""
    raise BudgetNotMet(
        f"PPL degradation too high: nothing stays within {budget:+.1%}{held}. Nearest: {nearest.candidate} at "
        f"{percent(nearest.ppl_delta)} ({nearest.compression_ratio:.2f}x). No preset was written.\n{advice}"
    )
