"""Text: three parts that never overlap, segments that don't either, and every missing text explained."""

import hashlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import word_text, word_tokenizer
from tokenizers.processors import TemplateProcessing

from gpt2.common.errors import PluginError
from gpt2.common.provenance import inputs
from gpt2.compression.presets import resolve_preset
from gpt2.models import random_weights
from gpt2.models.embedded import EMBEDDED
from gpt2.models.loading import read_config
from gpt2.text.sources import PARTS, by_official_split, by_position, default_text, load_text

# Every word once, so that an overlap shows
NUMBERED = "\n".join(" ".join(f"n{i}" for i in range(a, a + 10)) for a in range(0, 3000, 10))
WHOLE = [
    NUMBERED, "\n" * 5 + NUMBERED + "\n", NUMBERED.replace("\n", " "), NUMBERED.replace("\n", "\r\n"), "abc",
]  # fmt: skip
READER = SimpleNamespace(tokenizer=word_tokenizer())  # what a written text needs of a model
WORDS = by_position("words", "words.txt", word_text(3000))


def parts(text) -> list[str]:
    return [getattr(text, part) for part in PARTS]


@pytest.mark.parametrize("whole", WHOLE, ids=["lines", "newlines around", "one line", "CRLF", "three letters"])
def test_parts_by_position_cover_the_text_without_overlap(whole):
    found = parts(by_position("t", "t.txt", whole))
    assert "".join(found) == whole, "each part begins where the one before it ends"
    assert all(part.strip() for part in found)


def test_shares_and_hashes_of_parts_by_position_and_by_official_split():
    text, tail = by_position("t", "t.txt", NUMBERED), by_position("t", "t.txt", NUMBERED[:-1] + "X")
    assert [len(part) / len(NUMBERED) for part in parts(text)] == pytest.approx([0.6, 0.2, 0.2], abs=0.01)
    assert text.calibration.endswith("\n") and text.tuning.endswith("\n"), "no word is cut"
    assert [text.sha256(part) for part in PARTS] == [hashlib.sha256(x.encode()).hexdigest() for x in parts(text)]
    assert [text.sha256(p) == tail.sha256(p) for p in PARTS] == [True, True, False]
    text = by_official_split("t", "folder", NUMBERED, "some test")
    assert text.calibration + text.tuning == NUMBERED and text.evaluation == "some test"
    assert len(text.calibration) / len(NUMBERED) == pytest.approx(0.8, abs=0.01) and text.calibration.endswith("\n")


def test_parts_of_tokens_have_no_start_token_in_the_middle_and_every_segment_has_one():
    tokenizer = word_tokenizer()
    bos = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = bos  # as most models have it
    reader = SimpleNamespace(tokenizer=tokenizer)
    joined = torch.cat([WORDS.tokens(part, reader) for part in PARTS])
    assert torch.equal(joined, tokenizer(word_text(3000), return_tensors="pt").input_ids[0, 1:])
    segments = WORDS.segments("calibration", reader, 9)
    assert (segments[:, 0] == 1).all() and segments.shape[1] == 9
    found = segments[:, 1:].flatten()
    assert torch.equal(found, joined[: len(found)]), "no token is lost between segments"


@pytest.mark.parametrize(("seed", "length"), [(None, 7), (0, 64)])
def test_segments_tile_the_part(length, seed):
    """All of them, sorted by where they begin, are the part's tokens: no overlap and no gap."""
    ids = WORDS.tokens("calibration", READER)
    segments = WORDS.segments("calibration", READER, length, seed=seed)
    tiles = ids[: len(ids) // length * length].view(-1, length)
    assert sorted(segments.tolist()) == sorted(tiles.tolist())
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
    assert " the " in text.evaluation and text == load_text(None)


def test_files_of_any_name_and_in_the_home_folder(tmp_path, monkeypatch):
    """Without the byte order mark of Windows, which is no text."""
    content = NUMBERED + " é ü 漢"
    path = tmp_path / "some words.txt"
    path.write_text(content, encoding="utf-8-sig")
    monkeypatch.setenv("HOME", str(tmp_path))
    for spec in (str(path), "~/some words.txt"):
        assert load_text(spec) == by_position("some words.txt", spec, content)


def test_a_folder_has_both_official_splits(tmp_path):
    for name in ("wiki_valid.txt", "wiki_test.txt", "README.md"):
        (tmp_path / name).write_text(f"{name} {NUMBERED}")
    valid, test = f"wiki_valid.txt {NUMBERED}", f"wiki_test.txt {NUMBERED}"
    assert load_text(str(tmp_path)) == by_official_split("wiki_valid + wiki_test", str(tmp_path), valid, test)


@pytest.mark.parametrize(("names", "message"), [
    (["a_valid.txt"], r"expected one \*test\*.txt, found 0"),
    (["a_test.txt"], r"expected one \*valid\*.txt, found 0"),
    (["a_valid.txt", "b_valid.txt", "a_test.txt"], r"expected one \*valid\*.txt, found 2"),
])  # fmt: skip
def test_other_folders_are_rejected(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_text(NUMBERED)
    with pytest.raises(PluginError, match=message):
        load_text(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\n \n", b"ab", b"a\n\n\n\n\n", bytes(range(256))])
def test_files_without_text_are_rejected(tmp_path, content):
    (tmp_path / "valid.txt").write_bytes(content)
    message = r"text 'valid\.txt' is empty or too short|can't read text file .*valid\.txt: 'utf-8' codec"
    with pytest.raises(PluginError, match=message):
        load_text(str(tmp_path / "valid.txt"))


def test_a_pipe_is_never_read(tmp_path):
    """To read from it is to wait for ever."""
    os.mkfifo(tmp_path / "valid.txt")
    (tmp_path / "test.txt").write_text("some words")
    for spec, message in ((tmp_path, "expected one .valid..txt, found 0"), (tmp_path / "valid.txt", "no text")):
        with pytest.raises(PluginError, match=message):
            load_text(str(spec))


def test_wikitext2_is_cut_at_its_own_splits_and_offline_the_error_says_what_to_use(monkeypatch):
    lines = {"validation": ["v\n"] * 100, "test": ["t\n"] * 100, "train": ["x\n"]}
    hub = SimpleNamespace(load_dataset=lambda *name: {split: {"text": own} for split, own in lines.items()})
    monkeypatch.setitem(sys.modules, "datasets", hub)  # which takes seconds to import
    text = load_text(None, "some/model")
    assert (text.name, text.evaluation, text.calibration + text.tuning) == ("wikitext2", "t\n" * 100, "v\n" * 100)
    hub.load_dataset = lambda *name: Path("/no/such/file").read_text()
    with pytest.raises(PluginError, match="can't load wikitext2 .FileNotFoundError.*Give --text embedded, a text file"):
        load_text("wikitext2")


@pytest.mark.parametrize(
    "name", ["x" * 5000, "x/" * 3000, "~nobody-here/x", "~", "x\0y", "\ud800"], ids=lambda name: ascii(name)[:15]
)
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
