"""Search over codecs, bits, ranks and exact tokens for the most whole-KV compression within a perplexity budget.

An Optuna study: TPE (tree-structured Parzen estimator) maximises the compression ratio under the constraint
Δ perplexity ≤ budget. With one objective instead of two, trials concentrate near the budget. The ratio is known before
the model runs, so a choice that can't beat the best so far is skipped at no cost. The first trials are one point of
each codec family and are always measured, which gives a frontier even with few trials. Loss falls as bits rise, so
every other trial bisects the bits of the best choice so far: TPE alone finds the family and its exact tokens, but
rarely the last few per cent of bits.

Each trial is a slot of a `TrialQueue`: a first point, or one whose parameters the sampler chooses when it is claimed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import optuna
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from gpt2.common.errors import PluginError
from gpt2.common.trial_queue import TrialQueue, key_of
from gpt2.compression.settings import plan_record
from gpt2.evaluation.perplexity import CacheFactory
from gpt2.tuning.measurement import Search
from gpt2.tuning.search_space import LOWEST_BITS, Choice, Space, families
from gpt2.tuning.trials import Trial, within_budget

LEAST_GAP = 1.02  # smallest ratio of the best choice's bits to bits that failed at which bisection is worth a trial
FIRST_STEP = 0.7  # lower end of the bisection, as a share of the best choice's bits, while no lower bits have failed
START, SAMPLED = "start", "sampled"  # kinds of slots: a first point, and one whose parameters the sampler chooses
NOT_FINITE = 1e6  # value of the constraint if the loss isn't finite: worse than any finite loss
ADVICE = """What helps:
  1. more trials: --num-trials
  2. a codec that keeps more: --codecs identity (8 bits lose next to nothing)
  3. a larger budget: --target-ppl-delta"""


@dataclass(kw_only=True)
class CodecSearch(Search):
    """Measures choices of a space. budget: largest relative rise of perplexity of a feasible choice."""

    space: Space
    budget: float

    def factory(self, candidate: Choice) -> CacheFactory:
        return self.caches(candidate.plan(self.loaded.geometry), **candidate.exact_tokens)

    def preset_keys(self, candidate: Choice) -> dict:
        keys = {key: value for key, value in candidate.record().items() if key != "family"}
        if keys["rank"] is None:  # a preset's own rank is one number: its layers say that each has all of its own
            keys |= {"rank": self.space.head_dim, "layers": plan_record(candidate.plan(self.loaded.geometry))}
        return keys

    def key(self, text_sha256: str) -> dict:
        return super().key(text_sha256) | {"search": "codec", "space": self.space.key(), "budget": self.budget}


class _BisectingTPE(BaseSampler):
    """Constrained TPE that bisects the bits of the best choice in every other trial.

    It is seeded with the number of each slot, so that workers draw differently, and a resumed search draws the same as
    an uninterrupted one. starts: number of slots that are first points.
    """

    def __init__(self, seed: int, budget: float, starts: int):
        self.seed, self.budget, self.starts = seed, budget, starts
        self._tpe = self._seeded(0)

    def _seeded(self, number: int) -> TPESampler:
        with warnings.catch_warnings():
            # Optuna 5 recommends Trial.set_constraint, which Optuna 4 doesn't have
            warnings.simplefilter("ignore")
            return TPESampler(
                seed=(100_003 * self.seed + number) % 2**32, multivariate=True, group=True,
                constraints_func=self._constraints,
            )  # fmt: skip

    def _constraints(self, trial: FrozenTrial) -> tuple[float]:
        """A trial is feasible if this is at most 0. A skipped choice, whose loss is unknown, counts as feasible."""
        if "ppl_delta" not in trial.user_attrs:
            return (0.0,)
        delta = trial.user_attrs["ppl_delta"]
        return (NOT_FINITE if delta is None else delta - self.budget,)

    def _slot(self, trial: FrozenTrial) -> int:
        """The number that seeds a trial: that of the same trial in a search that is never interrupted.

        After the death of two workers it is another, even number: with the old one the choice that may have killed them
        would be drawn again.
        """
        if trial.user_attrs.get("deaths", 0) > 1:
            return 2 * (1000 + trial.number)
        kind, _, index = (key_of(trial) or f"{START} {trial.number}").partition(" ")
        return int(index) + (self.starts if kind == SAMPLED else 0)

    def before_trial(self, study, trial) -> None:
        self._tpe = self._seeded(self._slot(trial))

    def infer_relative_search_space(self, study, trial) -> dict:
        return self._tpe.infer_relative_search_space(study, trial)

    def sample_relative(self, study, trial, search_space) -> dict:
        sampled = self._tpe.sample_relative(study, trial, search_space)
        bisected = _bisected(_measured(study.get_trials(deepcopy=False)), self.budget) if self._slot(trial) % 2 else {}
        return sampled | {name: value for name, value in bisected.items() if name in search_space}

    def sample_independent(self, study, trial, param_name, param_distribution):
        return self._tpe.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study, trial, state, values) -> None:
        self._tpe.after_trial(study, trial, state, values)


def _bisected(trials: Sequence[Trial], budget: float) -> dict:
    """Parameters of the best choice with bits halfway, on a logarithmic scale, to the nearest lower bits that failed.

    Empty if nothing is within the budget, if the best choice's bits can't be adjusted, or if the gap is small enough.
    """
    within = within_budget(trials, budget)
    if not within or not families()[within[0].candidate.family].quantizer:
        return {}
    best = within[0].candidate
    failed = [t.candidate.bits for t in trials if t.ppl_delta > budget and _alike(t.candidate, best)]
    lower = max((bits for bits in failed if bits < best.bits), default=FIRST_STEP * best.bits)
    lower = max(lower, LOWEST_BITS)
    if best.bits < LEAST_GAP * lower:
        return {}
    return {"family": best.family, **best.exact_tokens, "bits": math.sqrt(lower * best.bits)}


def _alike(choice: Choice, other: Choice) -> bool:
    """Whether two choices are equal except for their bits."""
    return (choice.family, choice.exact_tokens) == (other.family, other.exact_tokens)


def run_search(
    queue: TrialQueue,
    space: Space,
    budget: float,
    ratio: Callable[[Choice], float],
    evaluate: Callable[[Choice, float], Trial],
    *,
    num_trials: int,
    seed: int = 0,
    report: Callable[[list[Trial], str], None] = lambda trials, note: None,
) -> list[Trial]:
    """Work on the queue until `num_trials` choices are measured, by this process or by others; return all measured.

    A skipped choice is replaced by another one, up to `num_trials` times. ratio: the compression ratio of a choice,
    without running the model. evaluate: measures a choice whose ratio is known. report: as for `grid_search.run_grid`.
    """
    starts = space.starts()[:num_trials]
    queue.study.sampler = _BisectingTPE(seed, budget, len(starts))

    def wanted() -> dict[str, dict]:
        trials = queue.trials()
        total = num_trials + min(len(_skipped(trials)), num_trials)
        slots = {f"{START} {index}": parameters for index, parameters in enumerate(starts)}
        slots |= {f"{SAMPLED} {index}": {} for index in range(total - len(starts))}
        done = {key_of(trial) for trial in _skipped(trials) + _complete(trials)}
        return {key: parameters for key, parameters in slots.items() if key not in done}

    def objective(trial: optuna.Trial, key: str) -> float:
        choice = space.suggest(trial)
        with queue.lock():  # if two workers draw the same choice at the same time, the second one must see the first
            trial.set_user_attr("choice", choice.record())
            taken = _taken(queue.trials(), trial.number)
        if choice in taken:
            _skip(trial, "tried already")
        try:
            size = ratio(choice)
        except PluginError as error:
            _skip(trial, str(error))
        trial.report(size, step=0)  # TPE ranks skipped choices by this value
        best = max((t.compression_ratio for t in finished(queue) if t.ppl_delta <= budget), default=1.0)
        if size <= best and not key.startswith(START):
            _skip(trial, f"{size:.2f}x can't beat {best:.2f}x")
        return evaluate(choice, size).write(trial)

    def progress(note: str) -> None:
        trials = queue.trials()
        skipped = len(_skipped(trials))
        report(_measured(trials), "; ".join(filter(None, (f"{skipped} skipped" if skipped else "", note))))

    given_up = queue.work(wanted, objective, progress)
    for key, why in given_up.items():
        progress(f"trial {key} is left out: {why}")
    return finished(queue)


def _skip(trial: optuna.Trial, reason: str) -> None:
    trial.set_user_attr("skipped", reason)
    raise optuna.TrialPruned(reason)


def _skipped(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if trial.state == TrialState.PRUNED and "skipped" in trial.user_attrs]


def _complete(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if trial.state == TrialState.COMPLETE]


def _taken(trials: list[FrozenTrial], number: int) -> list[Choice]:
    """Choices that trials other than `number` have measured or are measuring."""
    at_it = (TrialState.COMPLETE, TrialState.RUNNING)
    others = [trial for trial in trials if trial.state in at_it and trial.number != number]
    return [_choice(trial) for trial in others if "choice" in trial.user_attrs]


def finished(queue: TrialQueue) -> list[Trial]:
    """Measured choices, in the order of their trials."""
    return _measured(queue.trials())


def _measured(trials: list[FrozenTrial]) -> list[Trial]:
    return [Trial.read(trial, _choice(trial)) for trial in _complete(trials)]


def _choice(trial: FrozenTrial) -> Choice:
    return Choice.of(trial.user_attrs["choice"])


def skipped_records(queue: TrialQueue) -> list[dict]:
    """Results records of skipped choices, with the reason."""
    return [{"label": str(_choice(trial)), "skipped": trial.user_attrs["skipped"], **trial.user_attrs["choice"]}
            for trial in _skipped(queue.trials())]  # fmt: skip
