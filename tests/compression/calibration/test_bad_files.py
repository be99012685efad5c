"""Calibration files that are damaged, foreign or hostile are rejected in one line, and nothing else happens."""

import io
import json
import os
import pickle
import random
import re
import shutil
import zipfile

import bad_files
import calibrations
import pytest
import torch
from bad_files import DEEP, check, flipped, hostile, overwritten, places, put, saved, watched
from calibrations import TEXT, identical
from presets import PRESET
from sampling import ALL
from tiny import tiny_loaded

from gpt2.common import tensor_file
from gpt2.common.errors import BadArtefact, CalibrationNotFound
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.file import META, load_calibration, save_calibration
from gpt2.compression.calibration.reuse import find_reusable
from gpt2.compression.presets import create_cache_from_preset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole calibration and a compact one, in both formats."""
    folder = tmp_path_factory.mktemp("good")
    made = calibrate(tiny_loaded("llama"), TEXT, rank=6, samples=4, seq_len=100, metric="fisher", codec="fisher")
    for suffix in tensor_file.SUFFIXES:
        save_calibration(made, folder / f"whole{suffix}")
        save_calibration(made.compact("joint"), folder / f"compact{suffix}")
    return folder


@pytest.fixture(params=["whole.pt", "compact.pt", "whole.safetensors", "compact.safetensors"])
def good(request, folder):
    return folder / request.param


# --- damage


@pytest.mark.parametrize("damage", [flipped, overwritten])
def test_changed_bits_are_noticed(damage, good, sealed):
    """The file is rejected, or the bits have no meaning (padding and dates of an archive) and all is read as it was."""
    whole, unharmed, rng, count = tensor_file.read(good), 0, random.Random(1), 60 if ALL else 8
    for number in range(count):
        (sealed / "bad.pt").write_bytes(damage(good.read_bytes(), rng))
        try:
            with watched():
                found = tensor_file.read(sealed / "bad.pt")
        except BadArtefact as error:
            assert "bad.pt: not a readable " in str(error), number
        else:
            assert identical(found, whole), number
            unharmed += 1
    # Every byte of safetensors has a meaning; an overwritten byte may be what it was
    assert unharmed <= (count // 4 if good.suffix == ".pt" else int(damage is overwritten))


def test_parts_of_files_are_rejected(good, sealed):
    assert check(sealed, bad_files.parts(good.read_bytes()), message="not a readable calibration file") == 8


def test_noise_is_rejected(sealed):
    rng = random.Random(3)
    heads = (b"", b"PK\x03\x04", b"\x80\x02", b"\x10\0\0\0\0\0\0\0{", b"\x1f\x8b", b"\x89HDF", b"GGUF", b"{",
             b"\x80\x04\x95", b"\x80\x02}q\x00")  # fmt: skip
    for length in (10, 300, 5000):
        check(sealed, ((f"noise after {head}", head + rng.randbytes(length)) for head in heads))


def test_what_is_not_a_file_is_not_opened(sealed):
    with pytest.raises(CalibrationNotFound, match=r"Calibration file not found: .*none\.pt.*lowrank\.py --model M "):
        load_calibration(sealed / "none.pt", "M")
    (sealed / "folder").mkdir()
    os.mkfifo(sealed / "pipe")  # opening it would wait for ever
    for path in ("folder", "pipe", "/dev/zero"):
        with watched(), pytest.raises(BadArtefact, match="not a readable .*it is no regular file.*make it again"):
            load_calibration(path)


# --- contents


@pytest.mark.parametrize("which", ["whole.pt", "compact.pt", "compact.safetensors"])
def test_wrong_tensors(which, folder, sealed):
    def wrong():
        for what, record in bad_files.wrong_tensors(tensor_file.read(folder / which)):
            if "frequencies" in what and what.endswith("cut"):
                continue  # fewer channels may be rotated than there are
            if not which.endswith(".safetensors"):
                yield what, record
            elif not what.endswith("one number for all"):  # its tensors have no strides
                yield what, tensor_file.write(sealed / "p.safetensors", record).rename(sealed / "p.json").read_bytes()

    def message(what: str) -> str:
        """Names the tensor, or the list or pair that holds it."""
        name = re.sub(".prices|.[0-9]+$", "", what.split()[0])
        return "" if what.endswith("one number for all") else f"field '{name}"

    assert check(sealed, wrong(), most=20 if which == "whole.pt" else 12, message=message) > 65


def test_headers_of_safetensors_that_dont_fit_the_file(folder, sealed):
    assert check(sealed, bad_files.wrong_safetensors((folder / "compact.safetensors").read_bytes()), most=40) == 86


def test_wrong_metadata(folder, sealed):
    record = tensor_file.read(folder / "whole.pt")
    values = (None, b"x", 1.5, float("nan"), True, [1], (1,), DEEP, 10**30, torch.ones(2))

    def wrong_values():
        for field in META:
            yield from ((f"{field} {value!r:.40}", put(record, ("meta", field), value)) for value in values)
            if field in record["meta"]:
                others = {name: value for name, value in record["meta"].items() if name != field}
                yield f"{field} missing", record | {"meta": others}

    def other_wrong_values():
        for field in ("num_layers", "num_kv_heads", "head_dim", "rank"):
            yield from ((f"{field} {value}", put(record, ("meta", field), value)) for value in (0, -1, 13, 2**62))
        for field, value in (("sink_tokens", -1), ("samples", 0), ("seq_len", -5)):
            yield f"{field} {value}", put(record, ("meta", field), value)
        for codec in ("", "pcb", "identity", "pca+", "x" * 10**4, "pca+" * 10**4, "\x1b[2J", "\ud800"):
            yield f"codec {codec:.40}", put(record, ("meta", "codec"), codec)
        for key in record:
            yield from ((f"{key} {value!r}", record | {key: value}) for value in (None, 3, "x", [], {}))
        for value in (3, "x", [], {"k": 3}, {"k": ["fisher"]}, {"v": None}):
            yield f"metrics {value!r}", put(record, ("statistics", "metrics"), value)
        for version in ("kv-plugin-calibration/0", "kv-plugin-calibration/2", "x" * 10**4, DEEP):
            yield f"format {version!r:.40}", record | {"format": version}
        for other in ([], {}, torch.ones(3), [record], {"model": {"weight": torch.ones(3)}}, None, 5):
            yield f"{other!r:.40} in place of all", other

    def message(what: str) -> str:
        """Names the field, unless the file has what no record has: bytes, tuples, huge numbers, lists in lists."""
        field, value = what.split(maxsplit=1)
        return "" if value.startswith(("b'", "(", "[[", "1000")) else f"field 'meta.{field}"

    assert check(sealed, wrong_values(), most=20, message=message) > 190
    assert check(sealed, other_wrong_values(), most=20) > 60


def test_wrong_lists_and_groups_of_a_multi_head_basis(folder, sealed):
    """Also tensors where plain values belong, and as many channels in groups of another size."""
    record, whole = tensor_file.read(folder / "compact.pt"), tensor_file.read(folder / "whole.pt")
    wrong = {"layouts": [["diagonal"] * 3, [[]] * 3], "frequencies": [[3] * 3], "widths": [[0, 1, *range(6)]]}
    own = record["joint"]

    def wrong_lists():
        for name, values in wrong.items():
            yield f"joint.{name} missing", record | {"joint": {key: own[key] for key in own if key != name}}
            for value in (own[name][1:], *values):
                yield f"joint.{name} {value}", put(record, ("joint", name), value)
        for at in (("joint", "widths"), ("meta", "anything"), ("meta", "metric"), ("meta", "compact")):
            yield ".".join(at), put(whole, at, [torch.ones(2)] * 8)

    assert check(sealed, wrong_lists(), message=lambda what: f"field '{what.split()[0]}") == 14
    assert find_reusable({"fingerprint": "x", "compact": True}, [sealed]) is None
    grouped = own | {"E": torch.eye(12).expand(3, 4, 12, 12).contiguous(), "mean": torch.zeros(3, 4, 12)}
    grouped |= {"scale": torch.ones(3, 4, 1, 1), "spectrum": torch.ones(3, 4, 12), "errors": torch.ones(3, 4, 12, 8)}
    check(sealed, [("groups", record | {"joint": grouped})], message="field 'joint.")


def test_a_multi_head_basis_whose_numbers_make_no_cache(folder, sealed):
    """Bytes per block that no block takes, rotations beyond any, and bases without an inverse."""
    record = tensor_file.read(folder / "compact.pt")
    own = record["joint"]
    shifted = own["demand"] + torch.tensor([1e7, -1e7, 0])  # the mean is as before: some layers take 10 MB a block
    preset = PRESET | {"codec": "joint", "rank": 12, "target": "kv", "bits": 4, "quantizer": "mixed"}
    (sealed / "p.json").write_text(json.dumps(preset | {"calibration_file": "bad.pt"}))
    wrong = [("demand", value) for value in (shifted, own["demand"] + 1e4, -own["demand"])]
    wrong += [("frequencies", [own["frequencies"][0].double() * 0 + 1e300] * 3)]
    wrong += [("E", own["E"] * 0), ("E", own["E"] * 0 + 1), ("scale", own["scale"] * 0 + 1e-44)]
    check(
        sealed,
        ((name, put(record, ("joint", name), value)) for name, value in wrong),
        read=lambda _: create_cache_from_preset(sealed / "p.json"),
        message=lambda name: "the basis has no inverse" if name in ("E", "scale") else f"field 'joint.{name}",
    )


def test_numbers_of_other_kinds(folder, sealed):
    """Statistics in half precision are read; types that nothing can be computed with, and huge numbers, are not."""
    record = tensor_file.read(folder / "whole.pt")
    tensors, at = dict(places(record)), ("statistics", "k_scatter")
    (sealed / "p.json").write_bytes(saved(put(record, at, tensors[at].half())))
    assert load_calibration(sealed / "p.json").statistics.k.scatter[0].dtype == torch.float64
    for place in (at, ("bases", "k", "E"), ("joint", "errors")):
        kinds = (torch.float8_e4m3fn, torch.bool, torch.int32, torch.complex64)
        check(sealed, ((str(kind), put(record, place, torch.zeros_like(tensors[place]).to(kind))) for kind in kinds))
        large = torch.full_like(tensors[place].double(), 1e68 if place == at else 1e38).to(tensors[place].dtype)
        check(sealed, [(f"{place} too large", put(record, place, large))], message="finite numbers from")


# Which file, keys to a place, its new value or how it is made (`...`: none), and words of the message
DAMAGE = [
    ("whole", "format", ..., "'format'", "kv-plugin-calibration/1", "found nothing"),
    ("whole", "meta", [1], "'meta'", "found list"),
    ("whole", "meta.rank", 13, "'meta.rank'", "from 1 to 12", "found 13"),
    ("whole", "meta.codec", "svd", "'meta.codec'", "pca", "'svd'"),
    ("whole", "meta.codec", "hadamard", "'meta.codec'", "codec hadamard needs no calibration"),
    ("whole", "meta.num_layers", 2, "expected a tensor [2, ", "found a tensor [3, "),
    ("whole", "bases.v.D", lambda D: D[..., :9], "'bases.v.D'", "found a tensor [3, 2, 12, 9]", "make the file again"),
    ("whole", "bases.v.E", lambda E: E * float("nan"), "'bases.v.E'", "finite", "found nan"),
    ("compact", "joint.E", lambda E: E.index_fill(0, torch.tensor([0]), -128),
     "'joint.E'", "finite numbers from -127 to less than 128, found -128"),
    ("compact", "joint.E", lambda E: E.int() + 256, "'joint.E': expected floating-point numbers, found torch.int32"),
    ("compact", "joint.E", lambda E: E[..., :-1], "'joint.E': expected a tensor [3, 1, 48, 48]"),
    ("compact", "joint.scale", lambda scale: scale[..., :1], "'joint.scale': expected", "[3, 1, 1, 48], found", " 1]"),
    ("compact", "joint.scale", lambda scale: scale.mT, "'joint.scale': expected", "[3, 1, 1, 48], found", "48, 1]"),
    ("compact", "joint.scale", lambda scale: scale * float("inf"), "'joint.scale': expected finite numbers"),
    ("compact", "joint.E", lambda E: E.float(), "'joint.scale': expected a tensor [3, 1, 1, 1]"),
]  # fmt: skip


def test_messages_say_what_was_expected_and_what_was_found(folder, sealed):
    """Other tests try every kind of value for every field, and that messages name it; here is what else they say."""
    for which, place, value, *words in DAMAGE:
        calibrations.change(shutil.copy(folder / f"{which}.pt", sealed / "bad.pt"), *place.split("."), value=value)
        calibrations.rejected(sealed / "bad.pt", *words)


# --- hostile files


def test_pickles_that_would_run_code(folder, sealed):
    record = tensor_file.read(folder / "compact.pt")
    assert check(sealed, hostile((folder / "compact.pt").read_bytes(), record), most=33) == 9 * len(bad_files.PAYLOADS)


def test_memory_goes_by_a_files_own_size(folder, sealed):
    good = folder / "whole.pt"
    assert check(sealed, bad_files.too_large(good.read_bytes(), tensor_file.read(good))) == 13


def test_archives_that_two_readers_read_differently(sealed):
    """PyTorch's reader doesn't tell DATA.PKL from data.pkl; which of them it finds goes by their order."""
    good, found = saved({"E": torch.ones(3)}), []
    for order in (1, -1):
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(buffer, "w") as new:
            contents = {part.filename: old.read(part) for part in old.infolist()}
            contents[f"{old.namelist()[0].split('/')[0]}/DATA.PKL"] = pickle.dumps("other", 2)
            for name, content in list(contents.items())[::order]:
                new.writestr(name, content)
        found.append(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
        message = "two of its parts have one name"
        check(sealed, [("two pickles", buffer.getvalue())], read=tensor_file.read, message=message)
    assert "other" in found, "otherwise nothing has to be rejected"


def test_a_search_passes_over_bad_files_and_reads_little_of_others(folder, sealed):
    (sealed / "folder" / "a.pt").mkdir(parents=True)
    record, good = tensor_file.read(folder / "compact.pt"), (folder / "compact.pt").read_bytes()
    key = {name: record["meta"][name] for name in ("fingerprint", "samples")}
    foreign = [b"noise", [1], {"meta": 3}, {"meta": {"fingerprint": key["fingerprint"]}}]
    bad = [*list(hostile(good, record))[::9], *bad_files.too_large(good, record), *enumerate(foreign)]
    for number, (_, content) in enumerate(bad):
        (sealed / "folder" / f"a{number}.pt").write_bytes(content if isinstance(content, bytes) else saved(content))
    large = put(record, ("more",), torch.zeros(2**22)) | {"meta": record["meta"] | {"fingerprint": "other"}}
    tensor_file.write(sealed / "folder" / "b.pt", large)
    wanted = save_calibration(load_calibration(folder / "whole.safetensors"), sealed / "folder" / "z.safetensors")
    before = bad_files.counted("io", "rchar")
    with watched():
        assert find_reusable(key, [sealed / "folder"]) == wanted
    read = bad_files.counted("io", "rchar") - before
    assert read < 2**22, "bytes: less than the 16 MB of the file that doesn't match"


# --- the watch itself


@pytest.mark.parametrize(
    "act",
    [
        lambda: pickle.loads(pickle.dumps(bad_files.Runs(os.mkdir, "folder"))), lambda: open("p.json", "w").close(),
        lambda: os.system("true"), lambda: b"x" * 2**27,
    ],
    ids=["folder", "file", "program", "memory"],
)  # fmt: skip
def test_the_watch_sees_what_it_is_for(act, sealed):
    with pytest.raises(AssertionError), watched():
        act()
