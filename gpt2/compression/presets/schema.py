"""The preset format: which keys a preset has, which values they take, and the settings of each layer that follow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral

from gpt2.common.errors import BadArtefact, PluginError, brief
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
    String,
    Whole,
)
from gpt2.common.schema import parse as parse_record
from gpt2.compression.codecs import bases_in, basis_of, full_rank, needs_calibration
from gpt2.compression.codecs.base import SIDES
from gpt2.compression.settings import TARGETS, Plan, Setting, kept_whole, quantizer_for
from gpt2.models.geometry import ATTENTION_KINDS, HYBRID_SLIDING, LAYERS, SLIDING, Geometry

WINDOWED = (SLIDING, HYBRID_SLIDING)
FORMAT = "kv-plugin-preset/1"
WIDEST, MOST_LAYERS, MOST_TOKENS = 1024, 1024, 2**31  # larger than any model's
NAME = String(200)  # of a codec or quantizer
LAYER = Record(
    {"codec": NAME, "rank": Nullable(Whole(1, WIDEST)), "bits": Number(above=0), "quantizer": Default(Nullable(NAME))}
)
SIDE = ListOrRecord(ListOf(Nullable(LAYER)), LAYER)
FIGURE = Default(Nullable(Number(above=0)))  # null where it is unknown
GUIDE_KEYS = {
    "model": String(),
    "rank": Whole(1, WIDEST),
    "target": OneOf(tuple(TARGETS)),
    "bits": Number(above=0),
    "compression_ratio": FIGURE,
    "baseline_ppl": FIGURE,
    "compressed_ppl": FIGURE,
    "ppl_delta": Default(Nullable(Number(above=-1))),
    "calibration_file": String(),
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
    "cache_layers": Default(Nullable(LAYERS)),
    "drops_at": Default(Nullable(Whole(1))),
    "context_length": Default(Nullable(Whole(1, MOST_TOKENS))),
    "name": Default(String(200)),
    "folder": Default(String()),
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

    geometry: every layer of the cache. says_layers: whether the preset itself has them; if not, as in the guide's own
    form, all are full attention until `for_model` fills them in. folder: of the preset's file, where its calibration
    may lie too; None for a preset that isn't from a file. context_length: tokens for which bits are shared out over
    layers with and without windows; None: all layers count alike. plan: the setting of each layer's K and V. record:
    the JSON object that it was made from, with defaults filled in and unknown keys kept.
    """

    model: str
    num_layers: int
    head_dim: int
    geometry: Geometry
    says_layers: bool
    sink_tokens: int
    recent_tokens: int
    calibration_file: str
    folder: str | None
    context_length: int | None
    plan: Plan
    record: dict

    def for_model(self, geometry: Geometry, spec: str) -> Preset:
        """This preset with a model's layers. Raises BadArtefact, naming the first layer that differs, of other layers.

        spec: names the model.
        """
        if self.says_layers:
            if difference := geometry.difference(self.geometry):
                raise BadArtefact(f"preset for {self.model}: {difference}, in the cache of {spec}: this preset is of "
                                  "another model")  # fmt: skip
            return replace(self, geometry=replace(self.geometry, drops_at=geometry.drops_at))
        for key in ("num_layers", "head_dim"):
            expected, found = getattr(geometry, key), getattr(self, key)
            if found != expected:
                raise BadArtefact(f"preset for {self.model}: key {key!r}: expected {expected} for {spec}, "
                                  f"found {found}: this preset is of another model")  # fmt: skip
        return replace(self, geometry=geometry, plan=_plan(self.record, geometry, f"preset for {self.model}"))

    def exact_tokens(self, **overrides: int) -> dict[str, int]:
        """Numbers of exact tokens, as a cache takes them. Raises PluginError for another name or kind of one."""
        exact = {"sink_tokens": self.sink_tokens, "recent_tokens": self.recent_tokens}
        if unknown := sorted(set(overrides) - set(exact)):
            raise PluginError(f"unknown {', '.join(unknown)}: a cache takes {' and '.join(exact)}")
        for name, value in overrides.items():
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise PluginError(f"{name}: expected a number of tokens, got {brief(value)}")
        return exact | {name: int(value) for name, value in overrides.items()}  # NumPy's aren't JSON


def parse(preset: dict, where: str = "preset") -> Preset:
    """A JSON object as a preset. Raises BadArtefact with `where` and the key for a missing key or an invalid value."""
    record = parse_record(preset, PRESET, where, noun="key")
    geometry, says_layers = _geometry(record, where)
    geometry = replace(geometry, drops_at=record.get("drops_at"))
    plan = _plan(record, geometry, where)
    _check_work(plan, geometry, where)
    same = ("model", "num_layers", "head_dim", "sink_tokens", "recent_tokens", "calibration_file")
    return Preset(
        **{key: record[key] for key in same}, geometry=geometry, says_layers=says_layers, folder=record.get("folder"),
        context_length=record.get("context_length"), plan=plan, record=record,
    )  # fmt: skip


def _geometry(preset: dict, where: str) -> tuple[Geometry, bool]:
    """The layers that a preset says, or full attention in all; and whether it says them."""
    num_layers, layers = preset["num_layers"], preset.get("cache_layers")
    if layers is None:
        return Geometry.uniform(num_layers, None, preset["head_dim"]), False
    if len(layers) != num_layers:
        raise BadArtefact(f"{where}: key 'cache_layers': expected a list of {num_layers}, found {len(layers)}")
    for index, layer in enumerate(layers):
        attends = layer["type"] in ATTENTION_KINDS
        if attends and not (layer.get("k") and layer.get("v")):
            raise BadArtefact(f"{where}: key 'cache_layers[{index}]': expected 'k' and 'v' of type {layer['type']}")
        if layer["type"] in WINDOWED and not layer.get("window"):
            raise BadArtefact(f"{where}: key 'cache_layers[{index}].window': expected a number of tokens, found none")
    return Geometry.from_record(layers), True


def _plan(preset: dict, geometry: Geometry, where: str) -> Plan:
    """Settings of each layer: those of `layers` where a preset has them, else its own in all layers of its target."""
    layers = preset.get("layers")
    own = _setting(preset, where)
    if layers is None:
        sides = dict.fromkeys(TARGETS[preset["target"]], own)
    elif not layers:
        raise BadArtefact(f"{where}: key 'layers': expected 'k', 'v' or both, found neither")
    else:
        sides = {side: _side(settings, side, geometry, where) for side, settings in layers.items()}
    plan = {side: [None] * geometry.num_layers for side in SIDES}
    widest = max((shape.width for _, _, shape in geometry.sides()), default=0)
    for index, side, shape in geometry.sides():
        settings = sides.get(side)
        plan[side][index] = settings[index] if isinstance(settings, list) else settings
        if plan[side][index]:
            at = f": layers.{side}[{index}]" if isinstance(settings, list) else f": layers.{side}" if layers else ""
            whole = kept_whole(plan[side][index].codec)  # its rank cuts nothing, also not where a layer is narrower
            _check_rank(plan[side][index], widest if whole else shape.width, where + at)
    return plan


def _side(settings: list | dict, side: str, geometry: Geometry, where: str) -> list[Setting | None] | Setting:
    """One setting for all layers, or one for each."""
    if isinstance(settings, dict):
        return _setting(settings, f"{where}: layers.{side}")
    if len(settings) != geometry.num_layers:
        expected = f"expected a list of {geometry.num_layers}, found {len(settings)}"
        raise BadArtefact(f"{where}: key 'layers.{side}': {expected}")
    where = f"{where}: layers.{side}"
    for index, own in enumerate(settings):
        if own and not geometry.layers[index].attends:
            kind = geometry.layers[index].kind
            raise BadArtefact(f"{where}[{index}]: expected null for a layer of type {kind}, which keeps no K and V")
    return [own and _setting(own, f"{where}[{index}]") for index, own in enumerate(settings)]


def _setting(record: dict, where: str) -> Setting:
    """codec, rank, bits and quantizer of a record. Raises BadArtefact unless they exist and fit together."""
    setting = Setting(record["codec"], record["rank"], record["bits"], record.get("quantizer"))
    try:
        basis_of(setting.codec)
    except PluginError as error:
        raise BadArtefact(f"{where}: key 'codec': {error}") from error
    try:
        quantizer_for(setting)
    except PluginError as error:
        raise BadArtefact(f"{where}: keys 'quantizer' and 'bits': {error}") from error
    return setting


def _check_rank(setting: Setting, width: int, where: str) -> None:
    """Raise BadArtefact where a codec has fewer coordinates than the rank for heads of `width` channels, or none."""
    try:
        most = full_rank(setting.codec, width)
    except PluginError as error:
        raise BadArtefact(f"{where}: key 'codec': {error}") from error
    if setting.rank is not None and setting.rank > most:
        raise BadArtefact(f"{where}: key 'rank': expected 1 to {most}, as codec {setting.codec} has coordinates for a "
                          f"head_dim of {width}, found {setting.rank}")  # fmt: skip


def _check_work(plan: Plan, geometry: Geometry, where: str) -> None:
    """Raise BadArtefact where the codecs of a valid preset would take too much time or memory to make."""
    settings = {(plan[side][index], shape.width) for index, side, shape in geometry.sides() if plan[side][index]}
    bases = {codec: len(bases_in(codec)) for codec in {setting.codec for setting, _ in settings}}
    if sum(bases.values()) > MOST_BASES:
        raise BadArtefact(f"{where}: its codecs have {sum(bases.values())} bases: expected at most {MOST_BASES}")
    # Each setting of a codec that needs no calibration has its own basis
    fixed = [(setting, width) for setting, width in settings if not needs_calibration(setting.codec)]
    numbers = sum(bases[setting.codec] * width**2 for setting, width in fixed)
    if numbers > MOST_NUMBERS:
        raise BadArtefact(f"{where}: its bases have {numbers:,} numbers: expected at most {MOST_NUMBERS:,}")
