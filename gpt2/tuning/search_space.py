"""The space of the codec search: families of codecs from the registry, each with its own parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import optuna

from gpt2.common.errors import PluginError
from gpt2.compression.calibration.fit import Calibration
from gpt2.compression.calibration.stacks import Stacks
from gpt2.compression.codecs import (
    BASES,
    BITS,
    IDENTITY,
    QUANTIZERS,
    adjustable_quantizers,
    basis_of,
    full_rank,
)
from gpt2.compression.settings import TARGETS, Plan, Setting, uniform
from gpt2.models.geometry import Geometry
from gpt2.tuning.grid_search import default_rank_grid

SPACE_FORMAT = 1  # raise it when a parameter's choices change: Optuna rejects other choices in the same study
LOWEST_BITS, HIGHEST_BITS = 1.5, 8.0  # of adjustable quantizers
FIRST_RATIOS = (4, 5, 3.5)  # approximate compression ratios at which an adjustable quantizer is tried first
SINKS = (0, 1, 4, 8, 16, 32)


@dataclass(frozen=True)
class Family:
    """A codec, and for a multi-head basis one adjustable quantizer."""

    name: str
    codec: str
    quantizer: str | None = None

    @property
    def calibrated(self) -> bool:
        return basis_of(self.codec).calibrated


def families() -> dict[str, Family]:
    """All families by name: every codec of the registry, a multi-head basis once with each adjustable quantizer."""
    shared = [codec for codec, basis in BASES.items() if basis.multi_head]
    found = [Family(f"{codec}+{name}", codec, name) for codec in shared for name in adjustable_quantizers()]
    others = [Family(codec, codec) for codec in (IDENTITY, *BASES) if codec not in shared]
    # This is also the order of the first trials
    return {family.name: family for family in found + sorted(others, key=lambda family: family.calibrated)}


def by_bits() -> tuple[str, ...]:
    """Quantizers of a fixed width to try with codecs that have ranks: those that a preset's `bits` stands for."""
    return tuple(BITS.values())


def lossy() -> tuple[str, ...]:
    """Quantizers of a fixed width to try with codecs that have no ranks: all lossy ones."""
    return tuple(name for name, q in QUANTIZERS.items() if not (q.adjustable or q.lossless))


@dataclass(frozen=True)
class Choice:
    """One configuration of the search. target: "v", "k" or "kv"."""

    family: str
    setting: Setting
    target: str
    sink_tokens: int
    recent_tokens: int = 0

    def plan(self, geometry: Geometry | int) -> Plan:
        """The setting of each layer; geometry: as `settings.uniform` takes it."""
        return uniform(self.target, geometry, self.setting)

    @property
    def bits(self) -> float:
        return self.setting.bits

    @property
    def exact_tokens(self) -> dict[str, int]:
        return {"sink_tokens": self.sink_tokens, "recent_tokens": self.recent_tokens}

    def record(self) -> dict:
        """For results files; `of` is the inverse."""
        return {"family": self.family, "target": self.target, **asdict(self.setting), **self.exact_tokens}

    @classmethod
    def of(cls, record: Mapping) -> Choice:
        setting = Setting(*(record[key] for key in ("codec", "rank", "bits", "quantizer")))
        return cls(record["family"], setting, *(record[key] for key in ("target", "sink_tokens", "recent_tokens")))

    def __str__(self) -> str:
        recent = f", {self.recent_tokens} recent" if self.recent_tokens else ""
        return f"{self.target.upper()} {self.setting}, {self.sink_tokens} sinks{recent}"


@dataclass(frozen=True)
class Space:
    """The possible choices.

    families: names of `families()`. head_dim: the narrowest, where layers or sides differ in it, as `mixed` says.
    ranks: for codecs that have ranks. bits: range for adjustable quantizers. sinks, recent: numbers of exact first and
    latest tokens.
    """

    families: tuple[str, ...]
    head_dim: int
    ranks: tuple[int, ...]
    bits: tuple[float, float] = (LOWEST_BITS, HIGHEST_BITS)
    sinks: tuple[int, ...] = SINKS
    recent: tuple[int, ...] = (0,)
    mixed: bool = False

    def suggest(self, trial: optuna.Trial) -> Choice:
        """Let the trial's sampler choose a family and then only the parameters of that family."""
        family = families()[trial.suggest_categorical("family", self.families)]
        exact = [
            trial.suggest_categorical(name, choices)
            for name, choices in (("sink_tokens", self.sinks), ("recent_tokens", self.recent))
        ]
        rank = full_rank(family.codec, self.head_dim)
        if family.quantizer:
            bits = min(max(round(trial.suggest_float("bits", *self.bits, log=True), 2), self.bits[0]), self.bits[1])
            return Choice(family.name, Setting(family.codec, rank, bits, family.quantizer), "kv", *exact)
        target = trial.suggest_categorical("target", tuple(TARGETS))
        if family.calibrated:
            rank = min(rank, trial.suggest_categorical("rank", self.ranks))
            quantizer = trial.suggest_categorical("width", by_bits())
        else:
            rank = None if self.mixed else rank  # all coordinates, of each layer its own number
            quantizer = trial.suggest_categorical("quantizer", lossy())
        named = None if QUANTIZERS[quantizer].by_bits else quantizer
        setting = Setting(family.codec, rank, QUANTIZERS[quantizer].bits, named)
        return Choice(family.name, setting, target, *exact)

    def starts(self) -> list[dict]:
        """Parameters of the first trials: one for each family, and two more for the first with adjustable bits."""
        exact = {"sink_tokens": min(self.sinks, key=lambda n: abs(n - 4)), "recent_tokens": self.recent[0]}
        points, ratios = [], FIRST_RATIOS
        for family in (families()[name] for name in self.families):
            common = {"family": family.name, **exact}
            if family.quantizer:
                points += [common | {"bits": min(max(round(16 / r, 2), self.bits[0]), self.bits[1])} for r in ratios]
                ratios = FIRST_RATIOS[:1]
            elif family.calibrated:
                fewest = min(by_bits(), key=lambda name: QUANTIZERS[name].bits)
                points.append(common | {"target": "v", "rank": max(self.ranks), "width": fewest})
            else:
                points.append(common | {"target": "kv", "quantizer": _first_quantizer(family)})
        return points

    def key(self) -> dict:
        """Everything that the choices depend on. Searches with different keys have different studies."""
        own = {name: value for name, value in asdict(self).items() if name != "mixed" or value}
        return own | {"quantizers": [by_bits(), lossy()], "format": SPACE_FORMAT}


def _first_quantizer(family: Family) -> str:
    """The quantizer of the first trial of a codec without calibration.

    Without a basis it is the one with the most bits, which loses little; with a basis the last registered one of those
    with the fewest bits.
    """
    bits = [QUANTIZERS[name].bits for name in lossy()]
    wanted = min(bits) if family.codec in BASES else max(bits)
    found = [name for name, width in zip(lossy(), bits, strict=True) if width == wanted]
    return found[-1 if family.codec in BASES else 0]


def metric_for(names: Sequence[str]) -> str | None:
    """The metric that a calibration for these families must gather; None if no family needs a calibration."""
    bases = [basis_of(families()[name].codec) for name in names]
    calibrated = [basis for basis in bases if basis.calibrated]
    return max(calibrated, key=lambda basis: basis.demand).metric if calibrated else None


def default_families() -> list[str]:
    """Names of the families that are searched without --codecs."""
    return [name for name, family in families().items() if basis_of(family.codec).searched]


def usable(
    wanted: Sequence[str] | None, calibration: Calibration | None, head_dim: int
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Families that a calibration has the statistics for, and for each other family the reason why it is left out.

    wanted: names of families, of which each must be usable, else PluginError is raised; None for all usable ones.
    """
    found, reasons, known = [], {}, families()
    for name in wanted or default_families():
        family = known[name]
        try:
            if family.calibrated and calibration is None:
                raise PluginError(f"codec {family.codec} needs a calibration")
            if family.calibrated:
                for layers in Stacks(calibration.geometry, "v").groups.values():  # those of one shape have the same
                    calibration.transform("v", layers[0], None, family.codec)
            full_rank(family.codec, head_dim)  # raises for a codec that would leave no coordinate of this head_dim
            found.append(name)
        except PluginError as error:
            if wanted:
                raise
            reasons[name] = str(error)
    # In the registry's order, so that --codecs a,b and b,a are the same search
    return tuple(name for name in known if name in found), reasons


def space_for(
    calibration: Calibration | None,
    head_dim: int,
    wanted: Sequence[str] | None = None,
    ranks: Sequence[int] | None = None,
    recent: Sequence[int] = (0,),
    mixed: bool = False,
) -> tuple[Space, dict[str, str]]:
    """The space that a calibration allows, and the reasons why families are left out.

    calibration, head_dim, wanted: as for `usable`. ranks, recent, mixed: as for `Space`. Raises PluginError for a rank
    above head_dim.
    """
    names, reasons = usable(wanted, calibration, head_dim)
    ranks = tuple(ranks or default_rank_grid(head_dim))
    for rank in ranks:
        if rank > head_dim:
            raise PluginError(f"--rank-grid: rank {rank} is out of range, this model has head_dim {head_dim}")
    recent, bits = tuple(dict.fromkeys(recent)), bits_range(calibration)
    return Space(names, head_dim, ranks, bits, recent=recent, mixed=mixed), reasons


def bits_range(calibration: Calibration | None) -> tuple[float, float]:
    """The range of bits that all adjustable quantizers accept and that the calibration can allocate to layers."""
    ranges = [(LOWEST_BITS, HIGHEST_BITS), *(QUANTIZERS[name].bits_range for name in adjustable_quantizers())]
    if calibration and (shared := calibration.bits_range()):
        ranges.append(shared)
    low, high = max(low for low, _ in ranges), min(high for _, high in ranges)
    return math.ceil(100 * low) / 100, math.floor(100 * high) / 100
