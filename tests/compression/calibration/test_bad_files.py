"""Files that are damaged, foreign or hostile, two thousand of them: refused in one line, and nothing else."""

import io
import json
import os
import pickle
import random
import zipfile

import pytest
import torch
from bad_files import (
    DEEP,
    PRESET,
    Runs,
    check,
    cut,
    flipped,
    hostile,
    in_archive,
    make,
    out_of_place,
    overwritten,
    payloads,
    places,
    put,
    refused,
    saved,
    too_large,
    too_many,
    untouched,
    watched,
    wrong_safetensors,
    wrong_tensors,
)
from tiny import tiny_loaded, word_text

from gpt2.common import tensor_file
from gpt2.common.errors import BadArtefact
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.file import load_calibration, save_calibration
from gpt2.compression.calibration.reuse import find_reusable
from gpt2.compression.presets import create_cache_from_preset
from gpt2.text.sources import by_position


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Good files: a whole calibration and a compact one, in both formats."""
    folder = tmp_path_factory.mktemp("good")
    text = by_position("words", "words.txt", word_text(3000))
    made = calibrate(tiny_loaded("llama"), text, rank=6, samples=4, seq_len=100, metric="fisher", codec="fisher")
    for suffix in tensor_file.SUFFIXES:
        save_calibration(made, folder / f"whole{suffix}")
        save_calibration(made.compact("joint"), folder / f"compact{suffix}")
    return folder


@pytest.fixture
def space(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with untouched(tmp_path):
        yield tmp_path


@pytest.fixture(params=["whole.pt", "compact.pt", "whole.safetensors", "compact.safetensors"])
def good(request, folder):
    return folder / request.param


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# --- damage


@pytest.mark.parametrize("damage", [flipped, overwritten])
def test_changed_bits_are_seen(damage, good, space):
    """Refused, or what they changed has no meaning (the archive's padding and dates) and all is read as it was."""
    whole, unharmed = tensor_file.read(good), 0
    for what, content in damage(good.read_bytes(), 60, random.Random(1)):
        (space / "bad.pt").write_bytes(content)
        try:
            with watched():
                found = tensor_file.read(space / "bad.pt")
        except BadArtefact as error:
            assert "bad.pt: not a readable " in str(error), what
            continue
        assert same(found, whole), what
        unharmed += 1
    # safetensors has no byte without a meaning
    assert unharmed <= (15 if good.suffix == ".pt" else int(damage is overwritten)), unharmed


def test_parts_of_files(good, space):
    assert check(space, cut(good.read_bytes(), 30, random.Random(2))) == 30
    left = []
    for what, content in out_of_place(good.read_bytes()):
        (space / "bad.pt").write_bytes(content)
        try:
            with watched():
                found = tensor_file.read(space / "bad.pt")
        except BadArtefact:
            left.append(what)
        else:
            assert same(found, tensor_file.read(good)), what
    assert len(left) >= 3


def test_noise(space):
    rng = random.Random(3)
    heads = (b"", b"PK\x03\x04", b"\x80\x02", b"\x10\0\0\0\0\0\0\0{", b"\x1f\x8b", b"\x89HDF", b"GGUF")
    files = ((f"noise behind {head}", head + rng.randbytes(rng.randrange(5000))) for head in heads for _ in range(6))
    assert check(space, files) == 42


def test_what_is_no_file(space, monkeypatch):
    (space / "folder").mkdir()
    os.mkfifo(space / "pipe")  # opening it would wait for ever
    for path in ("folder", "pipe", "/dev/zero"):
        with watched(), pytest.raises(BadArtefact, match="it is no regular file"):
            load_calibration(path)


# --- contents

# No reader needs them: energies are for people, queries are left out where none were gathered, and a rotation may turn
# fewer channels than there are
UNREAD = ("energy",)
RIGHT = ("cut",)


@pytest.mark.parametrize("which", ["whole", "compact"])
def test_wrong_tensors(which, folder, space):
    wrong = wrong_tensors(tensor_file.read(folder / f"{which}.pt"))
    files = (
        (what, saved(record)) for what, record in wrong
        if not what.startswith(UNREAD) and not ("frequencies" in what and what.endswith(RIGHT))
    )  # fmt: skip
    assert check(space, files) == {"whole": 277, "compact": 77}[which]


def test_wrong_tensors_as_safetensors(folder, space):
    """What only its shape or values tell is told by the same code; what can be said in this format alone is below."""
    record = tensor_file.read(folder / "compact.safetensors")
    for what, wrong in wrong_tensors(record):
        if what.startswith("joint.E") and "all" not in what:
            tensor_file.write(space / "p.safetensors", wrong).rename(space / "bad.pt")
            refused(space / "bad.pt", what, "field 'joint.E'")


def test_headers_that_lie(folder, space):
    files = wrong_safetensors((folder / "compact.safetensors").read_bytes())
    assert check(space, files) == 86


META = ("model", "fingerprint", "num_layers", "num_kv_heads", "head_dim", "rank", "codec", "sink_tokens", "samples")
META += ("seq_len", "seed", "text", "text_spec", "text_sha256", "tokens", "dtype", "versions")
NUMBERS = ("num_layers", "num_kv_heads", "head_dim", "rank")


def test_wrong_metadata(folder, space):
    record = tensor_file.read(folder / "whole.pt")
    values = (None, b"x", 1.5, float("nan"), True, [1], (1,), DEEP, 10**30, torch.ones(2))

    def listing():
        for field in META:
            for value in values:
                yield f"{field} {value!r:.40}", saved(put(record, ("meta", field), value))
            yield f"no {field}", saved(record | {"meta": {k: v for k, v in record["meta"].items() if k != field}})
        for field in NUMBERS:
            for value in (0, -1, 13, 10**9, 2**62):
                yield f"{field} {value}", saved(put(record, ("meta", field), value))
        for field, value in (("sink_tokens", -1), ("samples", 0), ("seq_len", -5)):
            yield f"{field} {value}", saved(put(record, ("meta", field), value))
        for codec in ("", "pcb", "identity", "pca+", "x" * 10**6, "pca+" * 10**5, "\x1b[2J", "\ud800"):
            yield f"codec {codec:.40}", saved(put(record, ("meta", "codec"), codec))
        for key in record:
            for value in (None, 3, "x", [], {}):
                if key != "energy":
                    yield f"{key} {value!r}", saved(record | {key: value})
        for value in (3, "x", [], {"k": 3}, {"k": ["fisher"]}, {"v": None}):
            yield f"metrics {value!r}", saved(put(record, ("statistics", "metrics"), value))
        for version in ("kv-plugin-calibration/0", "kv-plugin-calibration/2", "kv-plugin-preset/1", "x" * 10**6, DEEP):
            yield f"format {version!r:.40}", saved(record | {"format": version})
        for other in ([], {}, torch.ones(3), [record], {"model": {"weight": torch.ones(3)}}, None, 5):
            yield f"{other!r:.40} in place of all", saved(other)

    assert check(space, listing()) == 266


def test_hostile_pickles(folder, space):
    record = tensor_file.read(folder / "compact.pt")
    assert check(space, hostile((folder / "compact.pt").read_bytes(), record)) == 9 * len(list(payloads()))


def test_sizes_that_are_claimed(folder, space):
    assert check(space, too_large((folder / "whole.pt").read_bytes(), tensor_file.read(folder / "whole.pt"))) == 16


def test_more_values_or_parts_than_a_calibration_has(folder, space):
    """Rejected by their number, before any value is built: by a read of the whole file and by a search of a folder."""
    (space / "folder").mkdir()
    for what, content in too_many((folder / "compact.pt").read_bytes()):
        (space / "bad.pt").write_bytes(content)
        with watched(most_calls=500_000), pytest.raises(BadArtefact, match="bytes beside its tensors|it has .* parts"):
            load_calibration(space / "bad.pt")
        (space / "folder" / f"{what}.pt").write_bytes(content)
    with watched(most_calls=1_000_000):
        assert find_reusable({"fingerprint": "x"}, [space / "folder"]) is None


def test_archives_that_two_readers_read_differently(folder, space):
    """PyTorch's reader takes names that differ in case for one."""
    good = (folder / "compact.pt").read_bytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(buffer, "w") as new:
        top = old.namelist()[0].split("/")[0]
        new.writestr(f"{top}/DATA.PKL", pickle.dumps(Runs(bytearray, 10**9), 2))
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    (space / "bad.pt").write_bytes(buffer.getvalue())
    refused(space / "bad.pt", "two pickles", "two of its parts have one name")


def test_only_what_was_looked_at_is_loaded(folder, space, monkeypatch):
    """What PyTorch is given is written anew from the parts that were checked; it never sees the file."""
    monkeypatch.setattr(tensor_file.torch, "load", lambda file, **how: type(file).__name__)
    monkeypatch.setattr(tensor_file._Copy, "of", lambda self, value: value)
    assert tensor_file.read(folder / "compact.pt") == "BytesIO"


@pytest.mark.parametrize("suffix", tensor_file.SUFFIXES)
def test_tensors_where_plain_values_belong(suffix, folder, space):
    record = tensor_file.read(folder / "whole.pt")
    for key in ("compact", "metric", "anything"):
        content = tensor_file.write(space / f"p{suffix}", put(record, ("meta", key), torch.ones(2)))
        content.rename(space / "bad.pt")
        refused(space / "bad.pt", key, f"field 'meta.{key}'")
        assert find_reusable({"fingerprint": "x", "compact": True}, [space]) is None
    tensor_file.write(space / f"p{suffix}", put(record, ("joint", "widths"), [torch.ones(2)] * 8)).rename("bad.pt")
    refused(space / "bad.pt", "widths", "field 'joint.widths")


def test_a_basis_of_another_grouping(folder, space):
    """As many channels, in other groups than the codec gathers."""
    record = tensor_file.read(folder / "compact.pt")
    own = dict(record["joint"])
    own |= {"E": torch.eye(12).expand(3, 4, 12, 12).contiguous(), "mean": torch.zeros(3, 4, 12)}
    own |= {"scale": torch.ones(3, 4, 1, 1), "spectrum": torch.ones(3, 4, 12), "errors": torch.ones(3, 4, 12, 8)}
    (space / "bad.pt").write_bytes(saved(record | {"joint": own}))
    refused(space / "bad.pt", "groups", "field 'joint.")


def test_a_measured_codec_that_asks_for_memory_or_gives_no_numbers(folder, space):
    """Bytes per block, rotations and a basis, each of the right shape and finite, and nothing of a model."""
    record = tensor_file.read(folder / "compact.pt")
    own = record["joint"]
    shifted = own["demand"] + torch.tensor([1e7, -1e7, 0])  # on average as before: layers of 10 MB a block
    preset = PRESET | {"codec": "joint", "rank": 12, "target": "kv", "bits": 4, "quantizer": "mixed"}
    (space / "p.json").write_text(json.dumps(preset | {"calibration_file": "bad.pt"}))
    wrong = {
        "demand": [shifted, own["demand"] + 1e4, -own["demand"]],
        "frequencies": [[own["frequencies"][0].double() * 0 + 1e300] * 3],
        "E": [own["E"] * 0, own["E"] * 0 + 1],
        "scale": [own["scale"] * 0 + 1e-44],
    }
    for name, values in wrong.items():
        for value in values:
            (space / "bad.pt").write_bytes(saved(put(record, ("joint", name), value)))
            message = "the basis has no inverse" if name in ("E", "scale") else f"field 'joint.{name}"
            refused(space / "bad.pt", name, message, read=lambda _: make(space / "p.json"))


def test_long_names_and_shapes_are_cut_in_messages(folder, space):
    record = tensor_file.read(folder / "whole.pt")
    deep = torch.ones((1,) * 3000)
    metrics = ("statistics", "metrics", "k", "x" * 10**4)
    for at in (metrics, ("statistics", "k_mean"), ("joint", "mean")):
        (space / "bad.pt").write_bytes(saved(put(record, at, deep)))
        refused(space / "bad.pt", f"{at}"[:40], f"field '{at[0]}.")


def test_kinds_of_numbers(folder, space):
    """Statistics in fewer bits are read into those that are worked with; what nothing can be computed with isn't."""
    record = tensor_file.read(folder / "whole.pt")
    at = ("statistics", "k_scatter")
    tensor_file.write(space / "folder.pt", put(record, at, record["statistics"]["k_scatter"].half())).rename("p.json")
    assert load_calibration(space / "p.json").statistics.k.scatter.dtype == torch.float64
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.int32, torch.complex64):
        for place in (at, ("bases", "k", "E"), ("joint", "errors")):
            tensor = torch.zeros_like(dict(places(record))[place]).to(kind)
            refused_as = tensor_file.write(space / "p.safetensors", put(record, place, tensor))
            refused_as.rename(space / "bad.pt")
            refused(space / "bad.pt", f"{place} {kind}")
    for place in (at, ("bases", "k", "E"), ("joint", "mean")):
        large = torch.full_like(dict(places(record))[place].float(), 1e38).to(dict(places(record))[place].dtype)
        (space / "bad.pt").write_bytes(saved(put(record, place, large * (1e30 if place == at else 1))))
        refused(space / "bad.pt", f"{place} too large", "finite numbers from")


def test_packed_archives(folder, space):
    """Of a part that packing doesn't make smaller a mapped file has other bytes than were packed."""
    noise = saved({"meta": torch.randint(0, 256, (2**20,), dtype=torch.uint8)})
    (space / "bad.pt").write_bytes(in_archive(noise, None, compression=zipfile.ZIP_DEFLATED))
    refused(space / "bad.pt", "packed noise", "its parts", read=tensor_file.read)


def test_bad_files_are_passed_over_where_one_is_looked_for(folder, space):
    """In a folder of one's own anything may lie; what doesn't fit isn't read to its end."""
    (space / "folder").mkdir()
    record, good = tensor_file.read(folder / "compact.pt"), (folder / "compact.pt").read_bytes()
    for number, (_, content) in enumerate([*hostile(good, record), *too_large(good, record)]):
        (space / "folder" / f"a{number}.pt").write_bytes(content)
    wanted = save_calibration(load_calibration(folder / "whole.safetensors"), space / "folder" / "z.safetensors")
    with watched():
        assert find_reusable({"fingerprint": record["meta"]["fingerprint"]}, [space / "folder"]) == wanted


# --- of another model, another version


def test_other_models(folder, space):
    """Of a calibration and a preset that are both good, and don't belong together."""
    path, good = folder / "whole.pt", load_calibration(folder / "whole.pt")
    made = {"calibration_file": str(path), "rank": 6}
    assert create_cache_from_preset(PRESET | made).codec_bytes() > 0
    wrong = [{"num_layers": n} for n in range(1, 30) if n != 3] + [{"head_dim": d} for d in range(6, 40) if d != 12]
    wrong += [{"calibrated_with": {key: "other"}} for key in META]
    for change in wrong:
        (space / "p.json").write_text(json.dumps(PRESET | made | change))
        with watched(), pytest.raises(BadArtefact, match="whole.pt: field 'meta"):
            make(space / "p.json")
    for seed in range(1, 30):
        other = tiny_loaded("llama", seed=seed)
        with pytest.raises(BadArtefact, match="calibrate this model"):
            good.check_model(other.fingerprint, other.spec, str(path))


# --- the watch itself


@pytest.mark.parametrize(
    "act",
    [
        lambda: pickle.loads(pickle.dumps(Runs(os.mkdir, "folder"))),
        lambda: open("pwned.txt", "w").close(),
        lambda: os.system("true"),
        lambda: b"x" * 2**27,
        lambda: [len("") for _ in range(10**6)],
    ],
    ids=["directory", "file", "program", "memory", "calls"],
)
def test_the_watch_sees_what_it_is_for(act, space):
    with pytest.raises(AssertionError), watched(most_calls=1_000_000):
        act()
    for name in ("pwned.txt", "folder"):
        path = space / name
        if path.exists():
            path.rmdir() if path.is_dir() else path.unlink()


def test_places_of_tensors():
    record = {"a": {"b": [torch.ones(1), 3]}, "c": torch.zeros(1)}
    assert [at for at, _ in places(record)] == [("a", "b", 0), ("c",)]
    assert put(record, ("a", "b", 1), 4)["a"]["b"][1] == 4 and record["a"]["b"][1] == 3
