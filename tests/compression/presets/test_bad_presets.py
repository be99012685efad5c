"""Presets that are damaged, foreign or ask for too much: refused in one line, and nothing else."""

import itertools
import json
import math
import os
import pickle

import pytest
from bad_files import DEEP, Runs, check, make, saved, untouched, watched
from presets import PRESET

from gpt2.common.errors import BadArtefact, CalibrationNotFound, printable
from gpt2.compression.presets.schema import GUIDE_KEYS

CODED = PRESET | {"codec": "hadamard", "calibration_file": "", "rank": 12}


@pytest.fixture
def space(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with untouched(tmp_path):
        yield tmp_path


def presets_refused(space, wrong, message="") -> int:
    texts = ((what, value if isinstance(value, bytes) else json.dumps(value).encode()) for what, value in wrong)
    return check(space, texts, read=make, message=message, name="p.json")  # `.pt` would be taken for a calibration


def test_wrong_keys(space):
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

    assert presets_refused(space, wrong, message) > 200


def test_wrong_layers(space):
    one = {"codec": "hadamard", "rank": 12, "bits": 4}
    wrong = [{"q": one}, {}, [one] * 3, {"k": [one]}, {"k": [one] * 4}, {"k": "x"}, {"k": [3] * 3}, {"k": DEEP}]
    many = "+".join(["hadamard"] * 9999)
    for key in one:
        wrong += [{"k": one | {key: value}} for value in ("x", -1, 2**40, 1.5, [], {}, math.nan, many)]
        wrong.append({"v": {k: v for k, v in one.items() if k != key}})
    wrong.append({"k": one | {"more": 1}})
    assert (
        presets_refused(space, ((f"{layers!r:.60}", CODED | {"layers": layers}) for layers in wrong), message="layers")
        == 36
    )


def test_presets_that_ask_for_much(space):
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
    assert presets_refused(space, wrong) == 5
    mixed = CODED | {"head_dim": 128, "rank": 128, "num_layers": 80, "layers": {"k": ranks[:80], "v": ranks[20:100]}}
    for right in (large, large | {"codec": "hadamard+ln_nullspace+hadamard", "rank": 1023}, mixed):
        (space / "p.json").write_text(json.dumps(right))
        with watched():
            assert make(space / "p.json").codec_bytes() > 0


def test_no_presets(space):
    wrong = ["", "{", "[]", "3", '"x"', "null", '{"rank": NaN}', "\0\1", "[" * 10**5, '{"rank": ' * 10**5, "9" * 10**5]
    wrong += [
        "\ufeff{}",
        " " * (2**20 + 1),
        f'{{"rank": [{"[]," * 2 * 10**6}1]}}',
        json.dumps(CODED | {"more": math.nan}),
    ]
    wrong = [text.encode() for text in wrong]
    wrong += [b"\xff\xfe{}", pickle.dumps(Runs(os.mkdir, "pwned")), saved({"format": "x"})]
    assert presets_refused(space, ((repr(content[:20]), content) for content in wrong)) == len(wrong)


PATHS = (
    "lost.pt", "../" * 40 + "etc/passwd", "../" * 40 + "etc/hostname", "/dev/zero", "/dev/stdin", "/dev/tty",
    "/proc/self/mem", "/proc/self/environ", "~/lost.pt", "~nobody-here/lost.pt", "~/../lost.pt", ".", "..", "/",
    "victim", "./victim", "folder", "pipe", "x" * 300, "x/" * 2000, "/" + "../x/" * 700, "https://example.org/c.pt",
    "file:///etc/passwd", "c.pt\n", "c.pt\0", "\x1b[2Jc.pt", "\u202ec.pt", "c.pt; touch pwned", "$(touch pwned)",
    "`touch pwned`", "| touch pwned", "-c.pt", "%s%n", "{0}", "C:\\c.pt", "\\\\host\\share\\c.pt", "con", "\ud800",
    " ", "",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ascii(path)[:30])
def test_paths_of_calibrations(path, space):
    """Not found, or no calibration; the file that it names isn't changed, and nothing of it is shown."""
    (space / "folder").mkdir()
    os.mkfifo(space / "pipe")
    (space / "p.json").write_text(json.dumps(PRESET | {"calibration_file": path}))
    with watched(), pytest.raises((CalibrationNotFound, BadArtefact)) as error:
        make(space / "p.json")
    said = printable(str(error.value))
    assert said.isprintable() and "as it was" not in said and "root:" not in said
    assert any(words in said for words in ("Calibration file not found: ", "not a readable calibration file",
                                           "key 'calibration_file': expected"))  # fmt: skip
