"""What a preset may say: keys, ranges and what they mean for each layer."""

from __future__ import annotations

import re

from gpt2.common.errors import BadArtefact, PluginError, brief
from gpt2.compression.codecs import BITS, bases_in, codec_name, full_rank, needs_calibration, quantizer_of
from gpt2.compression.codecs.base import SIDES
from gpt2.compression.settings import TARGETS, Plan, Setting, uniform

FORMAT = "kv-plugin-preset/1"
GUIDE_KEYS = {
    "model": str,
    "rank": int,
    "target": str,
    "bits": (int, float),
    "compression_ratio": float,
    "baseline_ppl": float,
    "compressed_ppl": float,
    "ppl_delta": float,
    "calibration_file": str,
    "head_dim": int,
    "num_layers": int,
}
# Figures may be unknown (null); without the rest there is no cache to make
FIGURES = ("compression_ratio", "baseline_ppl", "compressed_ppl", "ppl_delta")
DEFAULTS = {"format": FORMAT, "codec": "pca", "quantizer": None, "sink_tokens": 4, "recent_tokens": 0}
# Beyond any model's, and small enough that a preset of a few bytes can't ask for a machine's memory
RANGES = {"num_layers": (1, 1024), "head_dim": (1, 1024), "sink_tokens": (0, 2**31), "recent_tokens": (0, 2**31)}
TEXTS = {"model": 4096, "calibration_file": 4096, "folder": 4096, "name": 200}  # letters
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")  # what isn't read but obeyed
LONGEST_CODEC = 200  # letters
# Of all layers together: codecs, each fitted to all statistics; bases joined in one; and numbers in bases that aren't
# calibrated, each as large as head_dim squared and made for every setting
MOST_CODECS, MOST_BASES, MOST_NUMBERS = 8, 4, 2**23


def check_preset(preset: dict, where: str = "preset") -> dict:
    """A preset with its defaults filled in. Raises BadArtefact for a missing key or an absurd value, naming it."""
    if not isinstance(preset, dict):
        raise BadArtefact(f"{where}: expected a JSON object, found {type(preset).__name__}")
    preset = DEFAULTS | preset

    def expect(good: bool, key: str, expected: str) -> None:
        if not good:
            raise BadArtefact(f"{where}: key {key!r}: expected {expected}, found {brief(preset.get(key))}")

    for key, kind in GUIDE_KEYS.items():
        value = preset.get(key)
        if key in FIGURES:
            number = type(value) in (int, float) and abs(value) < 1e15  # which NaN isn't
            expect(value is None or (number and value > (-1 if key == "ppl_delta" else 0)), key, kind.__name__)
        elif key != "bits":  # whose kind depends on the quantizer
            expect(type(value) is kind, key, kind.__name__)
    for key, most in TEXTS.items():
        text = preset.get(key, "")
        expect(type(text) is str and len(text) <= most and not CONTROL.search(text), key, f"up to {most} letters")
    expect(isinstance(preset.get("calibrated_with", {}), dict), "calibrated_with", "an object of calibration metadata")
    expect(preset["format"] == FORMAT, "format", repr(FORMAT))
    expect(preset["target"] in TARGETS, "target", "v, k or kv")
    for key, (least, most) in RANGES.items():
        right = type(preset[key]) is int and least <= preset[key] <= most
        expect(right, key, f"a whole number from {least} to {most}")
    _check_setting(preset, preset["head_dim"], where)
    if preset.get("layers") is not None:
        _check_layers(preset, where)
    _check_work(preset, where)
    return preset


def _check_setting(setting: dict, head_dim: int, where: str) -> None:
    """Raise BadArtefact unless codec, rank and bits exist and fit together."""
    most = full_rank_of(setting["codec"], head_dim, where)
    rank, bits, quantizer = setting["rank"], setting.get("bits"), setting.get("quantizer")
    if type(rank) is not int or not 1 <= rank <= most:
        full = f"1 to head_dim {most}" if most == head_dim else f"1 to {most}, as {setting['codec']} has coordinates"
        raise BadArtefact(f"{where}: key 'rank': expected {full}, found {brief(rank)}")
    if quantizer is None and (type(bits) is not int or bits not in BITS):
        raise BadArtefact(f"{where}: key 'bits': expected {' or '.join(map(str, sorted(BITS)))}, found {brief(bits)}")
    if type(bits) not in (int, float):
        raise BadArtefact(f"{where}: key 'bits': expected a number, found {brief(bits)}")
    try:
        quantizer_of(quantizer, bits)
    except (PluginError, TypeError) as error:
        raise BadArtefact(f"{where}: keys 'quantizer' and 'bits': {error}") from error


def full_rank_of(codec, head_dim: int, where: str) -> int:
    """Coordinates of a preset's codec. Raises BadArtefact for a name that isn't one's."""
    if type(codec) is not str or len(codec) > LONGEST_CODEC:
        raise BadArtefact(f"{where}: key 'codec': expected a codec's name, found {brief(codec)}")
    try:
        return full_rank(codec_name(codec), head_dim)
    except PluginError as error:
        raise BadArtefact(f"{where}: key 'codec': {error}") from error


def _check_layers(preset: dict, where: str) -> None:
    """Raise BadArtefact unless `layers` has, for K, V or both, a setting for all layers or a list with one for each."""
    layers, L = preset["layers"], preset["num_layers"]
    if not isinstance(layers, dict) or not layers or set(layers) - set(SIDES):
        raise BadArtefact(f"{where}: key 'layers': expected an object with 'k', 'v' or both, found {brief(layers)}")
    for side, settings in layers.items():
        if isinstance(settings, dict):
            _check_layer(settings, preset["head_dim"], f"{where}: layers.{side}")
            continue
        if not isinstance(settings, list) or len(settings) != L:
            found = len(settings) if isinstance(settings, list) else type(settings).__name__
            raise BadArtefact(f"{where}: key 'layers.{side}': expected a list of {L} entries, found {found}")
        for layer, setting in enumerate(settings):
            if setting is not None:
                _check_layer(setting, preset["head_dim"], f"{where}: layers.{side}[{layer}]")


def _check_layer(setting: dict, head_dim: int, place: str) -> None:
    if not isinstance(setting, dict) or set(setting) - {"quantizer"} != {"codec", "rank", "bits"}:
        raise BadArtefact(f"{place}: expected null or codec, rank and bits, found {brief(setting)}")
    full = full_rank_of(setting["codec"], head_dim, place)
    _check_setting(setting | ({"rank": full} if setting["rank"] is None else {}), head_dim, place)


def _check_work(preset: dict, where: str) -> None:
    """Raise BadArtefact where what a preset asks for is right, but would take minutes or a machine's memory."""
    settings = {setting for side in plan_of(preset).values() for setting in side if setting}
    bases = {setting.codec: len(bases_in(setting.codec)) for setting in settings}
    if sum(map(bool, bases.values())) > MOST_CODECS or max(bases.values(), default=0) > MOST_BASES:
        raise BadArtefact(f"{where}: expected at most {MOST_CODECS} codecs, each of at most {MOST_BASES} bases")
    fixed = [bases[setting.codec] for setting in settings if not needs_calibration(setting.codec)]
    numbers = sum(fixed) * preset["head_dim"] ** 2
    if numbers > MOST_NUMBERS:
        raise BadArtefact(
            f"{where}: its settings ask for bases of {numbers:,} numbers: expected {MOST_NUMBERS:,} at most"
        )


def plan_of(preset: dict) -> Plan:
    """What a preset stores each layer's K and V with: its `layers` where it has them, else one setting for all."""
    L = preset["num_layers"]
    if layers := preset.get("layers"):
        plan = {side: layers.get(side) or [None] * L for side in SIDES}
        plan = {side: [settings] * L if isinstance(settings, dict) else settings for side, settings in plan.items()}
        return {side: [setting and Setting(**setting) for setting in settings] for side, settings in plan.items()}
    return uniform(preset["target"], L, Setting(preset["codec"], preset["rank"], preset["bits"], preset["quantizer"]))
