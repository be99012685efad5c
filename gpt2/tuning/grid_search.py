"""Find the preset with the highest whole-KV compression within a perplexity budget, by an Optuna study.

The study is the list of grid cells: every cell is enqueued once, workers claim cells atomically, and what a killed
worker had claimed is enqueued again. So the same command resumes, and two of them share the work.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import create_engine
from sqlalchemy.exc import SQLAlchemyError

from gpt2.common.errors import BudgetNotMet, PluginError
from gpt2.compression.codecs import full_rank, needs_calibration, quantizer_for_bits
from gpt2.compression.codecs.base import SIDES
from gpt2.compression.settings import Plan, Setting, plan_record, uniform
from gpt2.tuning import trial_queue

HEARTBEAT_SECONDS = 5
STALE_SECONDS = 20  # without a heartbeat for this long, a trial's worker is dead
ADVICE = """What helps:
  1. increase the rank (less compression, better quality): --rank-grid
  2. compress V only instead of K and V: --target v
  3. use int8 instead of int4: --bits 16,8"""


@dataclass(frozen=True)
class Cell:
    """One configuration of the search. layers: settings of K and V per layer; then rank and bits are the smallest."""

    rank: int
    bits: int
    layers: tuple[tuple[Setting | None, ...], tuple[Setting | None, ...]] | None = None

    @classmethod
    def of_plan(cls, plan: Plan) -> Cell:
        """A cell that has a setting of its own for every layer."""
        used = [setting for settings in plan.values() for setting in settings if setting]
        layers = tuple(tuple(plan[side]) for side in SIDES)
        return cls(min(s.rank for s in used), min(s.bits for s in used), layers)

    def plan(self, target: str, codec: str, num_layers: int) -> Plan:
        """What each layer is stored with."""
        if self.layers is None:
            return uniform(target, num_layers, Setting(codec, self.rank, self.bits))
        return {side: list(settings) for side, settings in zip(SIDES, self.layers, strict=True)}

    def record(self) -> dict:
        """For results files."""
        return {"rank": self.rank, "bits": self.bits}

    def __str__(self) -> str:
        if self.layers is None:
            return f"rank {self.rank}, {self.bits} bits"
        sides = []
        for side, settings in zip(SIDES, self.layers, strict=True):
            if any(settings):
                counts = Counter("exact" if s is None else f"r{s.rank} {s.bits} bits" for s in settings)
                words = " + ".join(f"{n} × {kind}" for kind, n in sorted(counts.items()))
                sides.append(f"{side.upper()} {words}")
        return f"per layer {self.digest[:4]}: {', '.join(sides)}"

    @property
    def digest(self) -> str:
        """A name for the settings of all layers."""
        record = json.dumps(plan_record(dict(zip(SIDES, self.layers, strict=True))))
        return hashlib.sha256(record.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Trial:
    """A cell with what was measured: relative change of perplexity and whole-KV compression ratio.

    cell: of the grid, or another configuration that has `record()` and a name as str. ppl_delta: infinite where the
    loss is not finite; details then have None, as JSON can't say it.
    """

    cell: Cell
    ppl_delta: float
    compression_ratio: float
    details: dict

    def record(self) -> dict:
        """For results files, and for the frontier plot."""
        return {
            "label": str(self.cell),
            **self.cell.record(),
            "compression_ratio": self.compression_ratio,
            **self.details,
        }


def default_rank_grid(head_dim: int) -> list[int]:
    """All of head_dim, 15/16, 7/8, 3/4 and 1/2 of it: 64, 60, 56, 48, 32 for head_dim 64."""
    return list(dict.fromkeys(max(1, round(head_dim * part)) for part in (1, 15 / 16, 7 / 8, 3 / 4, 1 / 2)))


def grid(ranks: Sequence[int] | None, bits: Sequence[int], head_dim: int, codec: str) -> list[Cell]:
    """All cells that compress: every coordinate at 16 bits would be a rotation that saves nothing.

    ranks: those of `default_rank_grid` when None; a codec without calibration has only its full one.
    """
    full = full_rank(codec, head_dim)
    if not needs_calibration(codec):
        ranks = ranks or [full]
        if ranks != [full]:
            raise PluginError(f"--rank-grid: codec {codec} has no rank to cut; leave it out or give {full}")
    ranks = ranks or [rank for rank in default_rank_grid(head_dim) if rank <= full]
    for rank in ranks:
        if not 1 <= rank <= full:
            raise PluginError(f"--rank-grid: rank {rank} is out of range, this model has head_dim {head_dim}")
    for width in bits:
        quantizer_for_bits(width)
    cells = [Cell(r, b) for r, b in itertools.product(ranks, bits) if not (r == head_dim and b == 16)]
    if not cells:
        raise PluginError("--rank-grid and --bits leave nothing to try: rank = head_dim at 16 bits compresses nothing")
    return cells


def study_name(key: dict) -> str:
    """Name of the study that belongs to a search: the same search resumes, another one starts afresh."""
    return "auto-tune-" + hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def open_study(path: Path, name: str) -> optuna.Study:
    """Open or create a study in an SQLite file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with trial_queue.locked(path):  # two processes creating the tables at once trip over each other
            storage = trial_queue.open_storage(f"sqlite:///{path}", HEARTBEAT_SECONDS, STALE_SECONDS)
            return optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
    except (SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        raise trial_queue.cant_use(path, error) from error


def run_grid(
    study: optuna.Study,
    path: Path,
    cells: Sequence[Cell],
    evaluate: Callable[[Cell], Trial],
    report: Callable[[list[Trial], str], None] = lambda trials, note: None,
    poll_seconds: float = 2.0,
) -> list[Trial]:
    """Work on the study until every cell is measured, by this process or by others; return all trials.

    evaluate: measures a cell. report: called after each step with the trials so far and a line on what goes on.
    """
    wanted = {_key(cell): cell for cell in cells}
    parameters = {key: {"rank": cell.rank, "bits": cell.bits} for key, cell in wanted.items()}

    def objective(trial: optuna.Trial, key: str) -> float:
        # The cell was enqueued with its values, this records them; the ranges must suit every grid of the study
        trial.suggest_int("rank", 1, 1 << 16)
        trial.suggest_int("bits", 1, 16)
        return record_measured(trial, evaluate(wanted[key]))

    run_queue(study, path, lambda: parameters, objective, lambda note: report(finished(study, cells), note),
              poll_seconds)  # fmt: skip
    return finished(study, cells)


def record_measured(trial: optuna.Trial, measured: Trial) -> float:
    """Write what was measured into a study's trial; returns its value, the compression ratio."""
    trial.set_user_attr("ppl_delta", measured.ppl_delta if math.isfinite(measured.ppl_delta) else None)
    trial.set_user_attr("details", measured.details)
    return measured.compression_ratio


def run_queue(
    study: optuna.Study,
    path: Path,
    wanted: Callable[[], dict[str, dict]],
    objective: Callable[[optuna.Trial, str], float],
    report: Callable[[str], None] = lambda note: None,
    poll_seconds: float = 2.0,
    in_order: bool = False,
) -> None:
    """Work on a study until all that is wanted is done, by this process or by others.

    wanted: key of everything that is to be tried to its parameters; those that are left out are the sampler's to
    choose. objective: gets a trial and its key. A trial that is pruned counts as done if it has a user attribute
    `skipped`. report: called after each step with a line on what goes on. in_order: what a dead worker was trying
    comes before all that is wanted after it, so that one worker that is killed and started again ends as if it hadn't
    been; workers that share the work then ask more often in vain.
    """

    def claimed(trial: optuna.Trial) -> float:
        key = trial.user_attrs.get("cell")
        if key not in wanted():  # another worker took the last one between our look and our claim
            raise optuna.TrialPruned
        return objective(trial, key)

    with trial_queue.usable(path):
        while True:
            waiting, running = _enqueue_missing(study, path, wanted, 1 if in_order else None)
            report(f"{running} running elsewhere" if running else "")
            if waiting:
                study.optimize(claimed, n_trials=1)
            elif running:
                time.sleep(poll_seconds)
            else:
                return


def _enqueue_missing(
    study: optuna.Study, path: Path, wanted: Callable[[], dict[str, dict]], at_most: int | None = None
) -> tuple[int, int]:
    """Enqueue what is neither done, waiting nor being worked on. Returns how many wait and how many run.

    at_most: how many may wait then.
    """
    with trial_queue.locked(path):
        _fail_stale(study, path)
        parameters = wanted()
        at, lost = {state: set() for state in TrialState}, {}
        for trial in study.get_trials(deepcopy=False):
            key = trial.user_attrs.get("cell")
            if trial.state == TrialState.FAIL:
                lost.setdefault(key, []).append(trial.params)
            elif trial.state != TrialState.PRUNED or "skipped" in trial.user_attrs:
                at[trial.state].add(key)
        taken = set().union(*at.values())
        room = None if at_most is None else max(0, at_most - len(at[TrialState.WAITING] & parameters.keys()))
        for key in [key for key in parameters if key not in taken][:room]:
            # What a dead worker was trying is tried again, once: it may be what kills workers
            deaths = len(lost.get(key, []))
            again = lost[key][0] if deaths == 1 else {}
            study.enqueue_trial(parameters[key] | again, user_attrs={"cell": key, "deaths": deaths})
            at[TrialState.WAITING].add(key)
    return tuple(len(at[state] & parameters.keys()) for state in (TrialState.WAITING, TrialState.RUNNING))


def _fail_stale(study: optuna.Study, path: Path) -> None:
    """Fail the trials of dead workers, also of those that died before their first heartbeat."""
    optuna.storages.fail_stale_trials(study)
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 60})
    silent = trial_queue.without_heartbeat(engine, study.study_name)
    engine.dispose()
    oldest = datetime.now() - timedelta(seconds=STALE_SECONDS)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.number in silent and trial.datetime_start < oldest:
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def finished(study: optuna.Study, cells: Sequence[Cell]) -> list[Trial]:
    """Measured cells, in the grid's order."""
    done = {t.user_attrs["cell"]: t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}
    return [_trial(cell, done[_key(cell)]) for cell in cells if _key(cell) in done]


def within_budget(trials: Sequence[Trial], budget: float) -> list[Trial]:
    """Trials within the budget, highest compression first."""
    return sorted((t for t in trials if t.ppl_delta <= budget), key=lambda t: (-t.compression_ratio, t.ppl_delta))


def percent(delta: float | None) -> str:
    """A relative change of perplexity for people; None or infinite where the loss is not finite."""
    return "no finite loss" if delta is None or math.isinf(delta) else f"{delta:+.2%}"


def confirm_best(
    trials: Sequence[Trial], budget: float, confirm: Callable[[Cell], dict], advice: str = ADVICE
) -> tuple[Trial, dict, list[tuple[Trial, dict]]]:
    """The most compressed trial whose change also holds on other text, its figures there, and those that failed there.

    Raises BudgetNotMet, with the nearest result and what helps, when none does.
    """
    failed = []
    for trial in within_budget(trials, budget):
        record = confirm(trial.cell)
        if record["ppl_delta"] is not None and record["ppl_delta"] <= budget:
            return trial, record, failed
        failed.append((trial, record))
    if not trials:
        raise BudgetNotMet(f"nothing could be measured. No preset was written.\n{advice}")
    nearest = min(trials, key=lambda t: t.ppl_delta)
    held = f"; {len(failed)} met it on tuning text but not on evaluation text" if failed else ""
    raise BudgetNotMet(
        f"PPL degradation too high: nothing stays within {budget:+.1%}{held}. Nearest: {nearest.cell} at "
        f"{percent(nearest.ppl_delta)} ({nearest.compression_ratio:.2f}x). No preset was written.\n{advice}"
    )


def _key(cell: Cell) -> str:
    key = f"rank={cell.rank},bits={cell.bits}"
    return key if cell.layers is None else f"{key},layers={cell.digest}"


def _trial(cell: Cell, frozen: FrozenTrial) -> Trial:
    delta = frozen.user_attrs["ppl_delta"]
    return Trial(cell, math.inf if delta is None else delta, frozen.value, frozen.user_attrs["details"])
