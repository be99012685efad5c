"""Search over codecs, bits, ranks and exact tokens for the most whole-KV compression within a perplexity budget.

An Optuna study: TPE maximises the compression ratio under the constraint Δ perplexity ≤ budget. One objective and not a
frontier of two: the budget says where on the frontier the answer lies, and two objectives would spend most trials far
from it. The ratio is known before the model runs, so a configuration that couldn't win is skipped at no cost. The first
trials are one sensible point of each codec family: they give a frontier even where few trials are allowed, and are
never skipped for losing. Loss falls with bits, so in every other trial the leader's bits are bisected: TPE alone finds
the family and its windows, but seldom the last few per cent of bits.

The study is a queue as the grid's is (`autotune.run_queue`): a slot per trial, what a dead worker held is tried again,
and workers share the slots. TPE fills a slot with values when it is claimed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from gpt2.common.errors import PluginError
from gpt2.tuning import trial_queue
from gpt2.tuning.grid_search import Trial, record_measured, run_queue, within_budget
from gpt2.tuning.measurement import CacheFactory, Search
from gpt2.tuning.search_space import LOWEST_BITS, Choice, Space, families

LEAST_GAP = 1.02  # between the leader's bits and bits that failed, for a bisection to be worth a trial
FIRST_STEP = 0.7  # of the leader's bits, where nothing of its kind has failed yet
SAMPLED = "sampled"  # what keys of slots begin with that TPE fills
LOST = 1e6  # constraint of a loss that isn't finite: worse than all that have one
ADVICE = """What helps:
  1. more trials: --num-trials
  2. a codec that keeps more: --codecs identity (8 bits lose next to nothing)
  3. a larger budget: --target-ppl-delta"""


@dataclass
class CodecSearch(Search):
    """Measures choices as `Search` measures cells; `target`, `codec` and `sink_tokens` are each choice's own."""

    space: Space
    budget: float

    def factory(self, cell: Choice) -> CacheFactory:
        return self.caches(cell.plan(self.loaded.geometry.num_layers), **cell.windows)

    def preset_keys(self, cell: Choice) -> dict:
        return {key: value for key, value in cell.record().items() if key != "family"}

    def key(self, text_sha256: str) -> dict:
        """As of the grid's search; the budget decides what is feasible and what is skipped."""
        of_choices = {"target": None, "codec": None, "sink_tokens": None}
        of_search = {"search": "codec", "space": self.space.key(), "budget": self.budget}
        return super().key(text_sha256) | of_choices | of_search


class _BisectingTPE(BaseSampler):
    """Constrained TPE that bisects the leader's bits in every other trial.

    Seeded by each slot's number: workers draw differently, and a resumed search draws what it would have drawn.
    starts: slots before those that it fills.
    """

    def __init__(self, seed: int, budget: float, starts: int):
        self.seed, self.budget, self.starts = seed, budget, starts
        self._tpe = self._seeded(0)

    def _seeded(self, number: int) -> TPESampler:
        with warnings.catch_warnings():
            # Optuna 5 would rather have Trial.set_constraint, which 4 has not
            warnings.simplefilter("ignore")
            return TPESampler(
                seed=(100_003 * self.seed + number) % 2**32, multivariate=True, group=True,
                constraints_func=self._constraints,
            )  # fmt: skip

    def _constraints(self, trial: FrozenTrial) -> tuple[float]:
        if "ppl_delta" not in trial.user_attrs:  # skipped: nobody knows
            return (0.0,)
        delta = trial.user_attrs["ppl_delta"]
        return (LOST if delta is None else delta - self.budget,)

    def _slot(self, trial: FrozenTrial) -> int:
        """The number that its trial has where nothing is tried twice; even ones of others for what killed two workers,
        which a bisection would try again."""
        if trial.user_attrs.get("deaths", 0) > 1:
            return 2 * (1000 + trial.number)
        kind, _, index = trial.user_attrs.get("cell", f"start {trial.number}").partition(" ")
        return int(index) + (self.starts if kind == SAMPLED else 0)

    def before_trial(self, study, trial) -> None:
        self._tpe = self._seeded(self._slot(trial))

    def infer_relative_search_space(self, study, trial) -> dict:
        return self._tpe.infer_relative_search_space(study, trial)

    def sample_relative(self, study, trial, search_space) -> dict:
        sampled = self._tpe.sample_relative(study, trial, search_space)
        halfway = _halfway(finished(study), self.budget) if self._slot(trial) % 2 else {}
        return sampled | {name: value for name, value in halfway.items() if name in search_space}

    def sample_independent(self, study, trial, param_name, param_distribution):
        return self._tpe.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study, trial, state, values) -> None:
        self._tpe.after_trial(study, trial, state, values)


def _halfway(trials: Sequence[Trial], budget: float) -> dict:
    """Parameters between the leader and the nearest of its kind that failed; none where its bits can't be adjusted."""
    within = within_budget(trials, budget)
    if not within or not families()[within[0].cell.family].quantizer:
        return {}
    leader = within[0].cell
    failed = [t.cell.bits for t in trials if t.ppl_delta > budget and _alike(t.cell, leader)]
    lower = max((bits for bits in failed if bits < leader.bits), default=FIRST_STEP * leader.bits)
    lower = max(lower, LOWEST_BITS)
    if leader.bits < LEAST_GAP * lower:
        return {}
    return {"family": leader.family, **leader.windows, "bits": math.sqrt(lower * leader.bits)}


def _alike(choice: Choice, other: Choice) -> bool:
    """Whether two choices differ in bits at most."""
    return (choice.family, choice.windows) == (other.family, other.windows)


def run_search(
    study: optuna.Study,
    path: Path,
    space: Space,
    budget: float,
    ratio: Callable[[Choice], float],
    evaluate: Callable[[Choice, float], Trial],
    *,
    num_trials: int,
    seed: int = 0,
    report: Callable[[list[Trial], str], None] = lambda trials, note: None,
    poll_seconds: float = 2.0,
) -> list[Trial]:
    """Work on the study until `num_trials` choices are measured, by this process or by others; return all measured.

    A choice that is skipped unmeasured is replaced by another, up to `num_trials` of them. ratio: compression of a
    choice, cheap. evaluate: measures a choice whose ratio is known. report: as in `autotune.run_grid`.
    """
    starts = space.starts()[:num_trials]
    study.sampler = _BisectingTPE(seed, budget, len(starts))

    def wanted() -> dict[str, dict]:
        total = num_trials + min(len(_skipped(study)), num_trials)
        slots = {f"start {index}": parameters for index, parameters in enumerate(starts)}
        return slots | {f"{SAMPLED} {index}": {} for index in range(total - len(starts))}

    def objective(trial: optuna.Trial, key: str) -> float:
        choice = space.suggest(trial)
        with trial_queue.locked(path):  # of two workers that draw the same at once, the second sees the first
            trial.set_user_attr("choice", choice.record())
            taken = _taken(study, trial.number)
        if choice in taken:
            _skip(trial, "tried already")
        try:
            size = ratio(choice)
        except PluginError as error:
            _skip(trial, str(error))
        trial.report(size, step=0)  # by which TPE ranks what is skipped
        best = max((t.compression_ratio for t in finished(study) if t.ppl_delta <= budget), default=1.0)
        if size <= best and not key.startswith("start"):
            _skip(trial, f"{size:.2f}x can't beat {best:.2f}x")
        return record_measured(trial, evaluate(choice, size))

    def told(note: str) -> None:
        skipped = len(_skipped(study))
        report(finished(study), "; ".join(filter(None, (f"{skipped} skipped" if skipped else "", note))))

    run_queue(study, path, wanted, objective, told, poll_seconds, in_order=True)
    return finished(study)


def _skip(trial: optuna.Trial, reason: str) -> None:
    trial.set_user_attr("skipped", reason)
    raise optuna.TrialPruned(reason)


def _skipped(study: optuna.Study) -> list[FrozenTrial]:
    pruned = study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
    return [trial for trial in pruned if "skipped" in trial.user_attrs]


def _taken(study: optuna.Study, number: int) -> list[Choice]:
    """Choices that other trials than `number` have measured or are at."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING))
    return [Choice.of(t.user_attrs["choice"]) for t in trials if t.number != number and "choice" in t.user_attrs]


def finished(study: optuna.Study) -> list[Trial]:
    """Measured choices, in the order of their trials."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [_measured(trial) for trial in sorted(done, key=lambda t: t.number) if "choice" in trial.user_attrs]


def _measured(trial: FrozenTrial) -> Trial:
    delta = trial.user_attrs["ppl_delta"]
    choice = Choice.of(trial.user_attrs["choice"])
    return Trial(choice, math.inf if delta is None else delta, trial.value, trial.user_attrs["details"])


def skipped_records(study: optuna.Study) -> list[dict]:
    """What was skipped and why, for results files."""
    return [{"label": str(Choice.of(t.user_attrs["choice"])), "skipped": t.user_attrs["skipped"],
             **t.user_attrs["choice"]} for t in _skipped(study)]  # fmt: skip
