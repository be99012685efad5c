"""The search over one codec's grid of ranks and bits, and over plans with a setting per layer: all are measured."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from gpt2.common.errors import PluginError
from gpt2.common.trial_queue import TrialQueue, key_of
from gpt2.compression.codecs import adjustable_quantizers, basis_of, full_rank, needs_calibration, quantizer_for_bits
from gpt2.compression.codecs.base import SIDES
from gpt2.compression.settings import TARGETS, Plan, Setting, plan_record, uniform
from gpt2.evaluation.perplexity import CacheFactory
from gpt2.models.geometry import Geometry
from gpt2.tuning.layer_sensitivity import ablate, plans, setting_of
from gpt2.tuning.measurement import Search
from gpt2.tuning.trials import Trial

ADVICE = """What helps:
  1. increase the rank (less compression, better quality): --rank-grid
  2. compress V only instead of K and V: --target v
  3. use int8 instead of int4: --bits 16,8"""


def check_ranked(codec: str) -> None:
    """Raise PluginError for a codec that stores all coordinates of a calibrated basis: it has no ranks to search."""
    basis = basis_of(codec)
    if basis.calibrated and not basis.ranked:
        name = f"{codec}+{adjustable_quantizers()[0]}"
        raise PluginError(f"--codec {codec} has no grid of ranks: use --search codec --codecs {name}")


@dataclass(frozen=True)
class Cell:
    """One configuration of the grid.

    layers: settings of K and V per layer where these differ; rank and bits are then the smallest of them.
    """

    rank: int
    bits: int
    layers: tuple[tuple[Setting | None, ...], tuple[Setting | None, ...]] | None = None

    @classmethod
    def of_plan(cls, plan: Plan) -> Cell:
        """The cell of a plan whose layers have different settings."""
        used = [setting for settings in plan.values() for setting in settings if setting]
        layers = tuple(tuple(plan[side]) for side in SIDES)
        return cls(min(s.rank for s in used), min(s.bits for s in used), layers)

    def plan(self, target: str, codec: str, geometry: Geometry | int) -> Plan:
        """The setting of each layer's K and V; geometry: as `settings.uniform` takes it."""
        if self.layers is None:
            return uniform(target, geometry, Setting(codec, self.rank, self.bits))
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
    def key(self) -> str:
        """The key of its trial in a study."""
        key = f"rank={self.rank},bits={self.bits}"
        return key if self.layers is None else f"{key},layers={self.digest}"

    @property
    def digest(self) -> str:
        """A hash of the settings of all layers."""
        record = json.dumps(plan_record(dict(zip(SIDES, self.layers, strict=True))))
        return hashlib.sha256(record.encode()).hexdigest()[:16]


def default_rank_grid(head_dim: int) -> list[int]:
    """All of head_dim, 15/16, 7/8, 3/4 and 1/2 of it: 64, 60, 56, 48, 32 for head_dim 64."""
    return list(dict.fromkeys(max(1, round(head_dim * part)) for part in (1, 15 / 16, 7 / 8, 3 / 4, 1 / 2)))


def grid(ranks: Sequence[int] | None, bits: Sequence[int], head_dim: int, codec: str) -> list[Cell]:
    """All cells of a grid but full rank at 16 bits, which would save nothing.

    ranks: `default_rank_grid` if None; a codec without calibration has only its full rank. Raises PluginError for ranks
    and bits out of range, and for a grid without cells.
    """
    full = full_rank(codec, head_dim)
    if not needs_calibration(codec):
        ranks = ranks or [full]
        if ranks != [full]:
            raise PluginError(f"--rank-grid: codec {codec} has no rank to cut; leave it out or give {full}")
    ranks = ranks or [rank for rank in default_rank_grid(head_dim) if rank <= full]
    for rank in ranks:
        if not 1 <= rank <= full:
            raise PluginError(f"--rank-grid: rank {rank} is out of range: use 1 to {full}, by the narrowest head")
    for width in bits:
        quantizer_for_bits(width)
    cells = [Cell(r, b) for r, b in itertools.product(ranks, bits) if not (r == head_dim and b == 16)]
    if not cells:
        raise PluginError("--rank-grid and --bits leave nothing to try: rank = head_dim at 16 bits compresses nothing")
    return cells


@dataclass(kw_only=True)
class GridSearch(Search):
    """Measures cells of one codec. target: "v", "k" or "kv"."""

    target: str
    codec: str
    sink_tokens: int

    def factory(self, candidate: Cell) -> CacheFactory:
        return self.caches(self._plan(candidate), sink_tokens=self.sink_tokens)

    def preset_keys(self, candidate: Cell) -> dict:
        keys = {"target": self.target, **candidate.record(), "codec": self.codec, "sink_tokens": self.sink_tokens}
        return keys | {"layers": candidate.layers and plan_record(self._plan(candidate))}

    def key(self, text_sha256: str) -> dict:
        own = {"target": self.target, "codec": self.codec, "sink_tokens": self.sink_tokens}
        return super().key(text_sha256) | own

    def _plan(self, cell: Cell) -> Plan:
        return cell.plan(self.target, self.codec, self.loaded.geometry)

    def ablate(self, cells: Sequence[Cell], path: Path, text_sha256: str, provenance: dict) -> list[dict]:
        """Measure every layer alone in the setting of every cell, on a quarter of the tuning text; rows of `ablate`.

        KL needs fewer tokens than perplexity for the same precision, and this takes most of a search's time. path:
        results file, from which an interrupted ablation is resumed.
        """
        part = self.tuning[: max(1, len(self.tuning) // 4)]
        settings = [Setting(self.codec, cell.rank, cell.bits) for cell in cells]
        key = self.key(text_sha256) | {"ablated": list(part.shape)}
        rows = ablate(
            self.loaded, part, self.calibration, self.target, settings, path=path, key=key,
            sink_tokens=self.sink_tokens, made_by=provenance, progress=self.bar("layer by layer", "layer"),
            chunk=self.chunk, batch_size=self.batch_size,
        )  # fmt: skip
        return [row for row in rows if setting_of(row) in settings]

    def per_layer(self, rows: Sequence[dict], budget: float) -> list[Cell]:
        """Cells with a setting per layer whose loss, predicted from the rows of `ablate`, is near the budget."""
        found = plans(rows, self.loaded.geometry, budget)
        mixed = [plan for plan in found if len({s for side in TARGETS[self.target] for s in plan[side]}) > 1]
        return [Cell.of_plan(plan) for plan in mixed]  # plans with one setting are already in the grid


def run_grid(
    queue: TrialQueue,
    cells: Sequence[Cell],
    evaluate: Callable[[Cell], Trial],
    report: Callable[[list[Trial], str], None] = lambda trials, note: None,
) -> list[Trial]:
    """Work on the queue until every cell is measured, by this process or by others; return all trials.

    evaluate: measures a cell. report: called after each trial with the trials so far and a note, usually "".
    """
    by_key = {cell.key: cell for cell in cells}

    def wanted() -> dict[str, dict]:
        done = _done(queue)
        return {key: {"rank": cell.rank, "bits": cell.bits} for key, cell in by_key.items() if key not in done}

    def objective(trial: optuna.Trial, key: str) -> float:
        # The cell was enqueued with its values, and `suggest` records them. Optuna wants the same ranges in all grids
        trial.suggest_int("rank", 1, 1 << 16)
        trial.suggest_int("bits", 1, 16)
        return evaluate(by_key[key]).write(trial)

    given_up = queue.work(wanted, objective, lambda note: report(finished(queue, cells), note))
    for key, why in given_up.items():
        report(finished(queue, cells), f"{by_key[key]} is left out: {why}")
    return finished(queue, cells)


def finished(queue: TrialQueue, cells: Sequence[Cell]) -> list[Trial]:
    """Measured cells, in the grid's order."""
    done = _done(queue)
    return [Trial.read(done[cell.key], cell) for cell in cells if cell.key in done]


def _done(queue: TrialQueue) -> dict[str, FrozenTrial]:
    return {key_of(trial): trial for trial in queue.trials() if trial.state == TrialState.COMPLETE}
