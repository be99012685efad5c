"""The preset format: the guide's keys, defaults for ours, every invalid value named, and the settings of each layer."""

import json

import pytest
from presets import PRESET

from gpt2.common.errors import BadArtefact
from gpt2.compression.presets import schema
from gpt2.compression.presets.schema import parse
from gpt2.compression.settings import Setting

SOME = {"codec": "pca", "rank": 4, "bits": 8}


def test_older_presets_get_defaults_and_unknown_keys_are_kept():
    assert tuple(schema.GUIDE_KEYS) == tuple(PRESET)
    preset = parse(PRESET | {"mine": {"a": [None]}})
    assert (preset.sink_tokens, preset.recent_tokens, preset.folder) == (4, 0, None)
    assert preset.plan == {"k": [None] * 3, "v": [Setting("pca", 9, 8)] * 3}
    assert preset.record == PRESET | schema.DEFAULTS | {"mine": {"a": [None]}}
    assert parse(json.loads(json.dumps(preset.record))) == preset
    for unknown in (PRESET | dict.fromkeys(schema.FIGURES), {k: PRESET[k] for k in PRESET if k not in schema.FIGURES}):
        assert parse(unknown).plan == parse(PRESET).plan


def test_missing_keys_are_named():
    needed = [key for key in PRESET if key not in schema.FIGURES]
    for key in needed:
        with pytest.raises(BadArtefact, match=rf"^p\.json: key '{key}': expected .*, found nothing$"):
            parse({name: value for name, value in PRESET.items() if name != key}, "p.json")
    with pytest.raises(BadArtefact, match=rf"^p\.json: missing: {', '.join(needed)}$"):
        parse({"layers": {"v": SOME}}, "p.json")


# test_bad_presets tries every kind of value for every key, and that messages name it; here is what else they say
INVALID = [
    ({"rank": 13}, "key 'rank': expected 1 to 12, as codec pca has coordinates for a head_dim of 12, found 13"),
    ({"codec": "ln_nullspace", "rank": 12}, "key 'rank': expected 1 to 11"),
    ({"codec": "pcaa"}, "key 'codec': unknown codec 'pcaa', did you mean 'pca'"),
    ({"bits": 5}, "keys 'quantizer' and 'bits': bits 5 is not available: use 4, 8, 16"),
    ({"quantizer": "mixd", "bits": 4}, "unknown quantizer 'mixd', did you mean 'mixed'"),
    ({"quantizer": "mixed_fixed", "bits": 4, "codec": "hadamard"}, "use a codec that heads share .framed, "),
    ({"quantizer": "mixed", "bits": 99.5}, "keys 'quantizer' and 'bits': .*takes 0.25 to"),
    ({"quantizer": "mixed", "bits": "4"}, "key 'bits': expected a number between .*, found '4'"),
    ({"quantizer": "int4", "bits": 8}, "bits 8: quantizer int4 has 4"),
    ({"target": "V"}, "key 'target': expected 'v' or 'k' or 'kv', found 'V'"),
    ({"format": "kv-plugin-preset/2"}, "key 'format': expected 'kv-plugin-preset/1', found 'kv-plugin-preset/2'"),
    ({"calibrated_with": 3}, "key 'calibrated_with': expected a dict, found 3"),
    ({"layers": {}}, "key 'layers': expected 'k', 'v' or both, found neither"),
    ({"layers": {"q": [SOME] * 3}}, "key 'layers.q': unknown: the keys are k, v"),
    ({"layers": {"v": [SOME] * 2}}, "key 'layers.v': expected a list of 3, found 2"),
    ({"layers": {"v": [SOME, SOME, 4]}}, r"key 'layers.v\[2\]': expected a dict, found 4"),
    ({"layers": {"v": [SOME, {"codec": "pca"}, SOME]}}, r"key 'layers.v\[1\]': missing: rank, bits"),
    ({"layers": {"v": [SOME | {"rank": 13}, None, None]}}, r"layers.v\[0\]: key 'rank': expected 1 to 12"),
    ({"layers": {"v": [SOME | {"rank": 0}, None, None]}}, r"key 'layers.v\[0\].rank': .*found 0"),
    ({"layers": {"k": SOME | {"codec": "hadamar"}}}, "layers.k: key 'codec'.*did you mean 'hadamard'"),
    ({"layers": {"k": SOME | {"quantizer": "int4_channel"}}}, "layers.k: keys 'quantizer' and 'bits': bits 8"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), INVALID, ids=lambda x: ascii(x)[:40])
def test_invalid_values_are_named(change, message):
    with pytest.raises(BadArtefact, match=message) as error:
        parse(PRESET | change, "p.json")
    assert str(error.value).startswith("p.json: ") and "\n" not in str(error.value)


def test_a_setting_for_all_layers_is_what_a_list_of_it_is():
    """And a side that `layers` leaves out isn't compressed."""
    for one in (SOME, SOME | {"rank": None}, SOME | {"quantizer": "mixed", "bits": 3.5}):
        plan = parse(PRESET | {"layers": {"k": one}}).plan
        assert plan == parse(PRESET | {"layers": {"k": [one] * 3}}).plan == {"k": [Setting(**one)] * 3, "v": [None] * 3}
