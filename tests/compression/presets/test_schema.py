"""The preset format: defaults, settings of each layer; what is damaged, foreign or asks for too much is refused."""

import itertools
import json
import math
import os
import pickle

import pytest
from bad_files import DEEP, Runs, check, saved, watched
from presets import PRESET

from gpt2.common.errors import BadArtefact, CalibrationNotFound, printable
from gpt2.compression.presets import create_cache_from_preset, schema
from gpt2.compression.presets.schema import GUIDE_KEYS, parse
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


# test_wrong_keys tries every kind of value for every key, and that messages name it; here is what else they say
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


# --- what is no preset is refused in one line, and nothing else happens


CODED = PRESET | {"codec": "hadamard", "calibration_file": "", "rank": 12}


def presets_refused(sealed, wrong, message="") -> int:
    texts = ((what, value if isinstance(value, bytes) else json.dumps(value).encode()) for what, value in wrong)
    # `.pt` would be taken for a calibration
    return check(sealed, texts, read=create_cache_from_preset, message=message, name="p.json")


def test_wrong_keys(sealed):
    values = (None, True, "", "x", [], {}, [1], -1, 0, 1.5, 2**31, 10**30, 10**400, math.nan, math.inf, DEEP)
    values += ("\0", "\x9b31m", "\u202e", "\ud800", "x" * 10**6)
    figures = {"compression_ratio", "baseline_ppl", "compressed_ppl", "ppl_delta"}

    def right(key: str, value) -> bool:
        if key in figures:
            number = type(value) in (int, float) and abs(value) < 1e15
            return value is None or (number and value > (-1 if key == "ppl_delta" else 0))
        if key in {"model", "calibration_file", "name"} and type(value) is str:
            return value.isprintable() and len(value) < 200
        return (key in ("sink_tokens", "recent_tokens") and type(value) is int and 0 <= value <= 2**31) or (
            key in ("layers", "quantizer") and value is None
        )

    keys = (*GUIDE_KEYS, "codec", "quantizer", "sink_tokens", "recent_tokens", "layers", "format", "name")
    wrong = [(f"{k} {v!r:.40}", CODED | {k: v}) for k in keys for v in values if not right(k, v)]

    def message(what: str) -> str:
        """Names the key, unless the file was no JSON: it has no such numbers, and is read to a limited depth."""
        key, value = what.split(maxsplit=1)
        return "" if value.startswith(("nan", "inf", "[[", "1000")) else f"'{key}"

    assert presets_refused(sealed, wrong, message) > 200


def test_wrong_layers(sealed):
    one = {"codec": "hadamard", "rank": 12, "bits": 4}
    wrong = [{"q": one}, {}, [one] * 3, {"k": [one]}, {"k": [one] * 4}, {"k": "x"}, {"k": [3] * 3}, {"k": DEEP}]
    many = "+".join(["hadamard"] * 9999)
    for key in one:
        wrong += [{"k": one | {key: value}} for value in ("x", -1, 2**40, 1.5, [], {}, math.nan, many)]
        wrong.append({"v": {k: v for k, v in one.items() if k != key}})
    wrong.append({"k": one | {"more": 1}})
    presets = ((f"{layers!r:.60}", CODED | {"layers": layers}) for layers in wrong)
    assert presets_refused(sealed, presets, message="layers") == 36


def test_presets_that_ask_for_much(sealed):
    """Every layer's setting is right, and all of them together would take minutes, or gigabytes."""
    large = CODED | {"head_dim": 1024, "rank": 1024, "num_layers": 1024}
    ranks = [{"codec": "hadamard", "rank": 1 + i, "bits": 4} for i in range(1024)]
    bits = [{"codec": "hadamard", "rank": 1024, "bits": 4 + i / 1024, "quantizer": "mixed"} for i in range(1024)]
    names = ["+".join((*word, "pca")) for word in itertools.product(("pca", "fisher"), repeat=3)]
    codecs = [{"codec": name, "rank": 1, "bits": 4} for name in (*names, "random+pca")]
    wrong = [
        ("bases", large | {"codec": "+".join(["hadamard"] * 22)}),
        ("calibrated bases", PRESET | {"codec": "+".join(["pca"] * 40)}),
        ("ranks", large | {"layers": {"k": ranks}}),
        ("bits", large | {"layers": {"v": bits, "k": bits[::-1]}}),
        ("codecs", PRESET | {"num_layers": len(codecs), "layers": {"k": codecs}}),
    ]
    assert presets_refused(sealed, wrong) == 5
    mixed = CODED | {"head_dim": 128, "rank": 128, "num_layers": 80, "layers": {"k": ranks[:80], "v": ranks[20:100]}}
    for right in (large, large | {"codec": "hadamard+ln_nullspace+hadamard", "rank": 1023}, mixed):
        (sealed / "p.json").write_text(json.dumps(right))
        with watched():
            assert create_cache_from_preset(sealed / "p.json").codec_bytes() > 0


def test_no_presets(sealed):
    wrong = ["", "{", "[]", "3", '"x"', "null", '{"rank": NaN}', "\0\1", "[" * 10**5, '{"rank": ' * 10**5, "9" * 10**5]
    wrong += ["\ufeff{}", " " * (2**20 + 1), f'{{"rank": [{"[]," * 10**6}1]}}', json.dumps(CODED | {"more": math.nan})]
    wrong = [text.encode() for text in wrong]
    wrong += [b"\xff\xfe{}", pickle.dumps(Runs(os.mkdir, "pwned")), saved({"format": "x"})]
    assert presets_refused(sealed, ((repr(content[:20]), content) for content in wrong)) == len(wrong)


PATHS = (
    "lost.pt", "../" * 40 + "etc/passwd", "../" * 40 + "etc/hostname", "/dev/zero", "/dev/stdin", "/dev/tty",
    "/proc/self/mem", "/proc/self/environ", "~/lost.pt", "~nobody-here/lost.pt", "~/../lost.pt", ".", "..", "/",
    "victim", "./victim", "folder", "pipe", "x" * 300, "x/" * 2000, "/" + "../x/" * 700, "https://example.org/c.pt",
    "file:///etc/passwd", "c.pt\n", "c.pt\0", "\x1b[2Jc.pt", "\u202ec.pt", "c.pt; touch pwned", "$(touch pwned)",
    "`touch pwned`", "| touch pwned", "-c.pt", "%s%n", "{0}", "C:\\c.pt", "\\\\host\\share\\c.pt", "con", "\ud800",
    " ", "",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ascii(path)[:30])
def test_paths_of_calibrations(path, sealed):
    """Not found, or no calibration; the file that it names isn't changed, and nothing of it is shown."""
    (sealed / "folder").mkdir()
    os.mkfifo(sealed / "pipe")
    (sealed / "p.json").write_text(json.dumps(PRESET | {"calibration_file": path}))
    with watched(), pytest.raises((CalibrationNotFound, BadArtefact)) as error:
        create_cache_from_preset(sealed / "p.json")
    said = printable(str(error.value))
    assert said.isprintable() and "as it was" not in said and "root:" not in said
    assert any(words in said for words in ("Calibration file not found: ", "not a readable calibration file",
                                           "key 'calibration_file': expected"))  # fmt: skip
