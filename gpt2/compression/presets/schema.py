"""The preset format: which keys a preset has, which values they take, and the settings of each layer that follow."""

from __future__ import annotations

from dataclasses import dataclass

from gpt2.common.errors import BadArtefact, PluginError
from gpt2.common.schema import (
    ABSENT,
    Anything,
    Default,
    ListOf,
    ListOrRecord,
    Nullable,
    Number,
    OneOf,
    Record,
    Text,
    Whole,
)
from gpt2.common.schema import parse as parse_record
from gpt2.compression.codecs import bases_in, full_rank, needs_calibration, quantizer_of
from gpt2.compression.codecs.base import SIDES
from gpt2.compression.settings import TARGETS, Plan, Setting, uniform

FORMAT = "kv-plugin-preset/1"
WIDEST, MOST_LAYERS, MOST_TOKENS = 1024, 1024, 2**31  # larger than any model's
NAME = Text(200)  # of a codec or quantizer
LAYER = Record(
    {"codec": NAME, "rank": Nullable(Whole(1, WIDEST)), "bits": Number(above=0), "quantizer": Default(Nullable(NAME))}
)
SIDE = ListOrRecord(ListOf(Nullable(LAYER)), LAYER)
FIGURE = Default(Nullable(Number(above=0)))  # null where it is unknown
GUIDE_KEYS = {
    "model": Text(),
    "rank": Whole(1, WIDEST),
    "target": OneOf(tuple(TARGETS)),
    "bits": Number(above=0),
    "compression_ratio": FIGURE,
    "baseline_ppl": FIGURE,
    "compressed_ppl": FIGURE,
    "ppl_delta": Default(Nullable(Number(above=-1))),
    "calibration_file": Text(),
    "head_dim": Whole(1, WIDEST),
    "num_layers": Whole(1, MOST_LAYERS),
}
FIGURES = tuple(key for key, kind in GUIDE_KEYS.items() if isinstance(kind, Default))
OUR_KEYS = {
    "format": Default(OneOf((FORMAT,)), FORMAT),
    "codec": Default(NAME, "pca"),
    "quantizer": Default(Nullable(NAME), None),
    "sink_tokens": Default(Whole(0, MOST_TOKENS), 4),
    "recent_tokens": Default(Whole(0, MOST_TOKENS), 0),
    "layers": Default(Nullable(Record({side: Default(SIDE) for side in SIDES}))),
    "name": Default(Text(200)),
    "folder": Default(Text()),
    "calibrated_with": Default(Record(others=Anything())),
}
PRESET = Record(GUIDE_KEYS | OUR_KEYS, others=Anything())
DEFAULTS = {key: kind.value for key, kind in OUR_KEYS.items() if kind.value is not ABSENT}
# Without these, a preset of 100 KB could ask for 16 GB (1,024 ranks of a basis of 1,024 channels, for K and for V) or
# for 20 minutes (64 codecs of 32 bases each, fitted to 32 layers)
MOST_BASES, MOST_NUMBERS = 16, 2**23


@dataclass(frozen=True)
class Preset:
    """A valid preset. Only `parse` makes one, so no code that is given one has to check it again.

    folder: of the preset's file, where its calibration may lie too; None for a preset that isn't from a file.
    plan: the setting of each layer's K and V. record: the JSON object that it was made from, with defaults filled in
    and unknown keys kept.
    """

    model: str
    num_layers: int
    head_dim: int
    sink_tokens: int
    recent_tokens: int
    calibration_file: str
    folder: str | None
    plan: Plan
    record: dict

    def windows(self, **overrides: int) -> dict[str, int]:
        """Numbers of exact tokens, as a cache takes them. Raises PluginError for an override of another name."""
        windows = {"sink_tokens": self.sink_tokens, "recent_tokens": self.recent_tokens}
        if unknown := sorted(set(overrides) - set(windows)):
            raise PluginError(f"unknown {', '.join(unknown)}: a cache takes {' and '.join(windows)}")
        return windows | overrides


def parse(preset: dict, where: str = "preset") -> Preset:
    """A JSON object as a preset. Raises BadArtefact with `where` and the key for a missing key or an invalid value."""
    record = parse_record(preset, PRESET, where, noun="key")
    plan = _plan(record, where)
    _check_work(plan, record["head_dim"], where)
    same = ("model", "num_layers", "head_dim", "sink_tokens", "recent_tokens", "calibration_file")
    return Preset(**{key: record[key] for key in same}, folder=record.get("folder"), plan=plan, record=record)


def _plan(preset: dict, where: str) -> Plan:
    """Settings of each layer: those of `layers` where a preset has them, else its own in all layers of its target."""
    num_layers, head_dim, layers = preset["num_layers"], preset["head_dim"], preset.get("layers")
    setting = _setting(preset, head_dim, where)
    if layers is None:
        return uniform(preset["target"], num_layers, setting)
    if not layers:
        raise BadArtefact(f"{where}: key 'layers': expected 'k', 'v' or both, found neither")
    plan = {side: [None] * num_layers for side in SIDES}
    for side, settings in layers.items():
        if isinstance(settings, dict):
            plan[side] = [_setting(settings, head_dim, f"{where}: layers.{side}")] * num_layers
            continue
        if len(settings) != num_layers:
            raise BadArtefact(f"{where}: key 'layers.{side}': expected a list of {num_layers}, found {len(settings)}")
        for layer, own in enumerate(settings):
            plan[side][layer] = own and _setting(own, head_dim, f"{where}: layers.{side}[{layer}]")
    return plan


def _setting(record: dict, head_dim: int, where: str) -> Setting:
    """codec, rank, bits and quantizer of a record. Raises BadArtefact unless they exist and fit together."""
    setting = Setting(record["codec"], record["rank"], record["bits"], record.get("quantizer"))
    try:
        most = full_rank(setting.codec, head_dim)
    except PluginError as error:
        raise BadArtefact(f"{where}: key 'codec': {error}") from error
    if setting.rank is not None and setting.rank > most:
        raise BadArtefact(f"{where}: key 'rank': expected 1 to {most}, as codec {setting.codec} has coordinates for a "
                          f"head_dim of {head_dim}, found {setting.rank}")  # fmt: skip
    try:
        quantizer_of(setting.quantizer, setting.bits)
    except PluginError as error:
        raise BadArtefact(f"{where}: keys 'quantizer' and 'bits': {error}") from error
    return setting


def _check_work(plan: Plan, head_dim: int, where: str) -> None:
    """Raise BadArtefact where the codecs of a valid preset would take too much time or memory to make."""
    settings = {setting for side in plan.values() for setting in side if setting}
    bases = {codec: len(bases_in(codec)) for codec in {setting.codec for setting in settings}}
    if sum(bases.values()) > MOST_BASES:
        raise BadArtefact(f"{where}: its codecs have {sum(bases.values())} bases: expected at most {MOST_BASES}")
    # Each setting of a codec that needs no calibration has its own basis
    numbers = sum(bases[setting.codec] for setting in settings if not needs_calibration(setting.codec)) * head_dim**2
    if numbers > MOST_NUMBERS:
        raise BadArtefact(f"{where}: its bases have {numbers:,} numbers: expected at most {MOST_NUMBERS:,}")
