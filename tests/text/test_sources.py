"""Text: three parts that never overlap, segments that don't either, and every missing text explained."""

import hashlib
import os
from types import SimpleNamespace

import pytest
import torch
from bad_files import watched
from tiny import tokenizer_of, word_text, word_tokenizer
from tokenizers.processors import TemplateProcessing

from gpt2.common.errors import PluginError
from gpt2.common.provenance import inputs
from gpt2.compression.presets import get_preset_info, resolve_preset
from gpt2.models import random_weights
from gpt2.models.embedded import EMBEDDED
from gpt2.models.loading import read_config
from gpt2.text.overlap import shared
from gpt2.text.sources import PARTS, by_official_split, by_position, default_text, load_text
from gpt2.text.texts import start_tokens

# Every word once, so that an overlap shows
NUMBERED = "\n".join(" ".join(f"n{i}" for i in range(a, a + 10)) for a in range(0, 3000, 10))
WHOLE = {
    "lines": NUMBERED, "final newline": NUMBERED + "\n", "leading newlines": "\n" * 5 + NUMBERED,
    "one line": NUMBERED.replace("\n", " "), "one line and a newline": NUMBERED.replace("\n", " ") + "\n",
    "CRLF": NUMBERED.replace("\n", "\r\n"), "three letters": "abc",
}  # fmt: skip
READER = SimpleNamespace(tokenizer=word_tokenizer())  # what a written text needs of a model
WORDS = by_position("words", "words.txt", word_text(3000))


def parts(text) -> list[str]:
    return [getattr(text, part) for part in PARTS]


@pytest.mark.parametrize("whole", WHOLE)
def test_parts_by_position_cover_the_text_without_overlap(whole):
    found = parts(by_position("t", "t.txt", WHOLE[whole]))
    assert "".join(found) == WHOLE[whole], "each part begins where the one before it ends"
    assert all(part.strip() for part in found)


def test_shares_and_hashes_of_parts_by_position_and_by_official_split():
    text = by_position("t", "t.txt", NUMBERED)
    words = [set(part.split()) for part in parts(text)]
    assert len(set.union(*words)) == sum(map(len, words))
    assert [len(part) / len(NUMBERED) for part in parts(text)] == pytest.approx([0.6, 0.2, 0.2], abs=0.01)
    assert text.calibration.endswith("\n") and text.tuning.endswith("\n")
    tail = by_position("t", "t.txt", NUMBERED[:-1] + "X")
    assert text.sha256("tuning") == hashlib.sha256(text.tuning.encode()).hexdigest()
    assert len({text.sha256(part) for part in PARTS}) == 3
    assert [text.sha256(p) == tail.sha256(p) for p in PARTS] == [True, True, False]
    test = NUMBERED.replace("n", "t")
    text = by_official_split("t", "folder", NUMBERED, test)
    assert text.calibration + text.tuning == NUMBERED and text.evaluation == test
    assert len(text.calibration) / len(NUMBERED) == pytest.approx(0.8, abs=0.01) and text.calibration.endswith("\n")


def test_parts_of_tokens_have_no_start_token_in_the_middle_and_every_segment_has_one():
    tokenizer = word_tokenizer()
    bos = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = bos  # as most models have it
    reader = SimpleNamespace(tokenizer=tokenizer)
    text = by_position("t", "t.txt", word_text(500))
    joined = torch.cat([text.tokens(part, reader) for part in PARTS])
    assert torch.equal(joined, tokenizer(word_text(500), return_tensors="pt").input_ids[0, 1:])
    segments = text.segments("calibration", reader, 9)
    assert (segments[:, 0] == 1).all() and segments.shape[1] == 9
    found = segments[:, 1:].flatten()
    assert torch.equal(found, joined[: len(found)]), "no token is lost between segments"
    with pytest.raises(PluginError, match="room for the start token alone: give --eval-seq-len 2 or more"):
        text.segments("calibration", reader, 1, flag="--eval-seq-len")


def test_a_start_token_is_found_without_a_letter_a():
    """As in a vocabulary of the four bases of DNA."""
    tokenizer = tokenizer_of("ACGT", "<s>")
    assert tokenizer("a").input_ids == [0] and start_tokens(tokenizer).tolist() == [0]


@pytest.mark.parametrize(("seed", "length"), [(None, 7), (0, 64), (1, 7), (None, 64)])
def test_segments_tile_the_part(length, seed):
    """All of them, sorted by where they begin, are the part's tokens: no overlap and no gap."""
    ids = WORDS.tokens("calibration", READER)
    segments = WORDS.segments("calibration", READER, length, seed=seed)
    assert segments.shape == (len(ids) // length, length)
    tiles = ids[: segments.numel()].view(-1, length)
    assert sorted(map(tuple, segments.tolist())) == sorted(map(tuple, tiles.tolist()))
    assert torch.equal(segments, tiles) == (seed is None), "in reading order without a seed"


def test_segments_are_drawn_by_seed_fewer_where_the_text_is_short_but_not_none():
    first, other, again = (WORDS.segments("calibration", READER, 16, 5, seed) for seed in (0, 1, 0))
    assert first.shape == (5, 16) and not torch.equal(first, other) and torch.equal(first, again)
    more = WORDS.segments("calibration", READER, 16, 9, seed=0)
    assert torch.equal(more[:5], first), "more samples add segments and keep those before"
    assert WORDS.segments("tuning", READER, 100, 50).shape == (6, 100)
    with pytest.raises(PluginError, match="tuning part of text 'words' has 600 tokens, fewer than one segment of 601"):
        WORDS.segments("tuning", READER, 601)


def test_the_default_text_follows_the_model_and_embedded_is_long_english():
    assert (default_text(EMBEDDED), default_text("some/model")) == ("embedded", "wikitext2")
    text = load_text("embedded", "some/model")
    assert sum(map(len, parts(text))) > 400_000 and text.spec == "embedded"
    assert " the " in text.evaluation and text == load_text("embedded") == load_text(None)


def test_files_of_any_name_and_in_the_home_folder(tmp_path, monkeypatch):
    path = tmp_path / "some words.txt"
    path.write_text(NUMBERED + " é ü 漢", encoding="utf-8-sig")
    text = load_text(str(path))
    assert parts(text)[0].startswith("n0 "), "the byte order mark of Windows is no text"
    assert (text.name, text.spec) == (path.name, str(path)) and text.evaluation.endswith("漢")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_text("~/some words.txt") == by_position(path.name, "~/some words.txt", NUMBERED + " é ü 漢")


def test_a_folder_needs_both_official_splits(tmp_path):
    def rejected(message: str) -> None:
        with pytest.raises(PluginError, match=message):
            load_text(str(tmp_path))

    rejected(r"text folder '/.*': expected one \*valid\*.txt, found 0: give a file, or a folder with")
    for name in ("README.md", "wiki_test.txt", "wiki_valid.txt"):
        rejected(r"expected one \*valid\*.txt, found 0")
        (tmp_path / name).write_text(f"{name} " + NUMBERED.replace("n", name[5]))
    text = load_text(str(tmp_path))
    assert text.evaluation.startswith("wiki_test.txt") and text.calibration.startswith("wiki_valid.txt")
    assert (text.name, text.spec) == ("wiki_valid + wiki_test", str(tmp_path))
    (tmp_path / "wiki_test.txt").rename(tmp_path / "other.txt")
    rejected(r"expected one \*test\*.txt, found 0")
    (tmp_path / "b_valid.txt").touch()
    rejected(r"expected one \*valid\*.txt, found 2")


@pytest.mark.parametrize("copy", [slice(None), slice(len(NUMBERED) // 2)], ids=["the whole", "half of it"])
def test_what_is_measured_on_is_in_no_other_file_that_is_used(tmp_path, copy):
    """A folder of one file for both splits, of a copy, and a file of a folder beside the folder."""

    def rejected(message: str, spec: str) -> None:
        with pytest.raises(PluginError, match=message):
            load_text(spec)

    folder, both = tmp_path / "wiki", tmp_path / "both"
    for path in (folder, both):
        path.mkdir()
    (both / "latest_valid.txt").write_text(NUMBERED)
    rejected("latest_valid.txt and latest_valid.txt have text in common", str(both))
    (folder / "valid.txt").write_text(NUMBERED)
    (folder / "test.txt").write_text(NUMBERED[copy])
    rejected("valid.txt and test.txt have text in common, so figures would be of text that was used", str(folder))
    (folder / "test.txt").write_text(NUMBERED.replace("n", "t"))
    other = tmp_path / "other.txt"
    other.write_text(NUMBERED.replace("n", "o"))
    assert load_text(f"{folder}+{other}").sha256("tuning")
    other.write_text(NUMBERED.replace("n", "t")[copy])
    for spec in (f"{folder}+{other}", f"{other}+{folder}"):
        rejected("calibration part of .*other.txt' has text of the evaluation part of .*wiki'", spec)


def test_a_licence_that_two_texts_have_is_no_reason_to_reject_them():
    licence = " ".join(f"clause{i}" for i in range(60)) + "\n"
    assert not shared(licence + NUMBERED, licence + NUMBERED.replace("n", "t"))
    assert shared(licence, licence) and shared(licence + NUMBERED, NUMBERED[9000:13000])


def test_no_part_of_the_embedded_text_repeats_another():
    """Topics of Python's documentation contain each other: by position alone a third of tuning was in calibration."""
    calibration, tuning, evaluation = (" ".join(part.split()) for part in parts(load_text("embedded")))
    for part, earlier in ((tuning, calibration), (evaluation, calibration), (evaluation, tuning)):
        windows = [part[at : at + 200] for at in range(0, len(part) - 200, 100)]
        assert len(windows) > 400 and not any(window in earlier for window in windows)


def test_files_without_text_are_rejected(tmp_path):
    path = tmp_path / "valid.txt"

    def rejected(message: str, spec=path) -> None:
        with pytest.raises(PluginError, match=message):
            load_text(str(spec))

    for content in (b"", b"\n \n", b"ab", b"a\n\n\n\n\n"):
        path.write_bytes(content)
        rejected(r"text 'valid\.txt' is empty or too short")
    path.write_bytes(bytes(range(256)))
    rejected(r"can't read text file .*valid\.txt: 'utf-8' codec")
    path.unlink()
    os.mkfifo(path)  # to read from a pipe is to wait for ever
    (tmp_path / "test.txt").write_text("some words")
    rejected("no text")
    rejected("expected one .valid..txt, found 0", tmp_path)
    rejected("--text: its name is empty", "")


def test_wikitext2_is_cut_at_its_own_splits_and_offline_the_error_says_what_to_use(tmp_path, monkeypatch):
    """conftest set HF_HUB_OFFLINE before `datasets` read it; an empty cache makes it the same on every machine."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(PluginError, match="can't load wikitext2 .*Give --text embedded, a text file, or a folder"):
        load_text("wikitext2")
    lines = {"validation": ["v\n"] * 100, "test": ["t\n"] * 100, "train": ["x\n"]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *a: {k: {"text": v} for k, v in lines.items()})
    text = load_text(None, "some/model")
    assert (text.name, text.evaluation) == ("wikitext2", "t\n" * 100)
    assert text.calibration + text.tuning == "v\n" * 100


STRANGE = ("x" * 5000, "x/" * 3000, "~nobody-here/x", "~", "x\0y", "\ud800")


@pytest.mark.parametrize("name", STRANGE, ids=lambda name: ascii(name)[:15])
def test_names_that_no_file_can_have(name, tmp_path, monkeypatch):
    """Of a text, a model, a shape and a preset."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    loaded = SimpleNamespace(spec="tiny", random_weights=False)
    for read, given in ((load_text, (name,)), (read_config, (f"{name}/",)), (random_weights.load, (f"{name}.json",)),
                        (resolve_preset, (name, loaded)), (resolve_preset, (f"{name}.json", loaded))):  # fmt: skip
        with pytest.raises(PluginError):
            read(*given)
    assert inputs({"prompt": name, "output": name}) == {}


def test_a_config_of_a_million_layers(tmp_path):
    """Laying them out would take hours."""
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1000000}')
    with watched(), pytest.raises(PluginError, match="says that it has more than 1024 layers"):
        get_preset_info(str(tmp_path), "kv4")
