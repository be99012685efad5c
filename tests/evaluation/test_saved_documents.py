"""A document read into a file in one run or several, asked from the file, and recomputed from its tokens."""

from __future__ import annotations

import itertools
from copy import deepcopy
from functools import partial

import pytest
import torch
from script_runs import listing, run
from tiny import longrope, word_text

from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.named_caches import from_preset
from gpt2.evaluation import saved_documents
from gpt2.models import loading
from gpt2.models.loading import wrap


@pytest.fixture
def ids(llama, tmp_path):
    (tmp_path / "words.txt").write_text(word_text(300))
    return saved_documents.document_ids(str(tmp_path / "words.txt"), llama, 290)


def test_an_interrupted_reading_goes_on(llama, ids, tmp_path, caplog):
    """With the same tokens as one that wasn't interrupted; of another document it starts again."""
    path, choice, fed = tmp_path / "doc.safetensors", from_preset("kv4", llama), []

    def interrupted(chunks):
        for at in chunks:
            if len(fed) == 3:
                raise KeyboardInterrupt
            fed.append(at)
            yield at

    how = {"chunk": 64, "save_every_s": 0}
    with pytest.raises(KeyboardInterrupt, match="doc.safetensors.part has the first 192 tokens: the same command"):
        saved_documents.read(llama, choice, ids, path, progress=interrupted, **how)
    assert not path.exists() and len(fed) == 3
    went_on = []
    saved_documents.read(llama, choice, ids, path, progress=lambda c: went_on.extend(c) or went_on, **how)
    assert went_on[0] == 192 and listing(tmp_path) == {"words.txt", "doc.safetensors"}
    whole = saved_documents.read(llama, choice, ids, tmp_path / "whole", **how)
    again = CompressedDynamicCache.load(path, model=llama)
    assert torch.equal(again.token_ids[0], ids) and "going on behind the 192 tokens" in caplog.text
    assert all(map(torch.equal, again.layers[1].read(), whole.layers[1].read()))


def test_a_reading_in_another_dtype_begins_anew(llama, ids, tmp_path, caplog):
    """Going on would keep half of the blocks as they are in the other dtype, and nothing would say so."""
    path, half = tmp_path / "doc.safetensors", wrap(deepcopy(llama.model).bfloat16(), llama.tokenizer, llama.spec)

    def interrupted(chunks):
        yield from itertools.islice(chunks, 3)
        raise KeyboardInterrupt

    how = {"chunk": 64, "save_every_s": 0}
    with pytest.raises(KeyboardInterrupt):
        saved_documents.read(llama, from_preset("kv4", llama), ids, path, progress=interrupted, **how)
    cache = saved_documents.read(half, from_preset("kv4", half), ids, path, **how)
    assert "is of another document, preset or dtype, so this one is read from its start" in caplog.text
    whole = saved_documents.read(half, from_preset("kv4", half), ids, tmp_path / "whole", **how)
    assert all(map(torch.equal, cache.layers[1].read(), whole.layers[1].read()))


def test_blocks_are_those_of_the_tokens_or_not(llama, ids, tmp_path):
    path = tmp_path / "doc.safetensors"
    saved_documents.read(llama, from_preset("kv8", llama), ids, path, chunk=64)
    cache = CompressedDynamicCache.load(path, model=llama)
    right = saved_documents.verify(llama, cache, 2)
    assert len(right) == 2 and max(difference for _, difference in right) < 0.1
    cache.held_tokens.ids = cache.held_tokens.ids.flip(1)
    assert min(difference for _, difference in saved_documents.verify(llama, cache, 2)) > saved_documents.SAME
    assert cache.get_seq_length() == len(ids), "forks were recomputed, not the cache"


def test_a_document_past_the_switch_of_longrope_is_read_in_one_pass(llama, ids, tmp_path, caplog):
    """In chunks, keys of the first ones have other rotary factors than those of one pass."""
    loaded = longrope(200)
    choice = from_preset("kv8", loaded)
    short = saved_documents.read(loaded, choice, ids[:200], tmp_path / "short", chunk=64)
    assert "one pass" not in caplog.text and len(saved_documents.verify(loaded, short, 2)) == 2
    cache = saved_documents.read(loaded, choice, ids, tmp_path / "long", chunk=64)
    assert f"switch at 200 tokens, so a text of {len(ids)} is fed in one pass, not 64" in caplog.text
    ((start, difference),) = saved_documents.verify(loaded, cache, 2)
    assert start == 0 and difference < 0.1
    assert "in one pass" in saved_documents.read_again_whole(loaded, cache)
    assert saved_documents.read_again_whole(loaded, short) is None
    mixed = choice.make()
    for part in ids[None].split(64, dim=1):
        loaded.model(part, past_key_values=mixed, use_cache=True)
    mixed.save(tmp_path / "mixed", token_ids=ids)
    ((_, difference),) = saved_documents.verify(
        loaded, CompressedDynamicCache.load(tmp_path / "mixed", model=loaded), 2
    )
    assert difference > saved_documents.SAME


def test_nan_is_not_the_same(llama, ids, tmp_path, monkeypatch):
    cache = saved_documents.read(llama, from_preset("kv8", llama), ids, tmp_path / "doc.safetensors", chunk=64)
    found, held = partial(saved_documents.verify, llama, cache, 2), saved_documents.held
    assert max(difference for _, difference in found()) < 0.1

    def spoilt(layer) -> tuple:
        bad = layer is cache.compressed[1]
        return tuple(x * torch.nan if bad and torch.is_tensor(x) else x for x in held(layer))

    monkeypatch.setattr(saved_documents, "held", spoilt)
    assert max(difference for _, difference in found()) > saved_documents.SAME


@pytest.mark.parametrize("padding", [(0, 0), (0, 30), (70, 5)])
def test_each_row_of_a_batch_is_recomputed_from_its_own_tokens(llama, ids, tmp_path, padding):
    batch = torch.stack((ids[:200], ids[90:]))
    mask = (torch.arange(200) >= torch.tensor(padding)[:, None]).long()
    batch[mask == 0] = 0
    cache = from_preset("kv8", llama).make()
    llama.model.generate(batch, attention_mask=mask, past_key_values=cache, max_new_tokens=1)
    cache.save(tmp_path / "batch.safetensors", token_ids=batch, model=llama)
    cache = CompressedDynamicCache.load(tmp_path / "batch.safetensors", model=llama)
    ((start, difference),) = saved_documents.verify(llama, cache, 2)
    assert start == 0 and difference < 0.1
    cache.held_tokens.ids = cache.held_tokens.ids.flip(0)
    ((_, difference),) = saved_documents.verify(llama, cache, 2)
    assert difference > saved_documents.SAME


def test_verify_tells_that_all_tokens_are_read_again(tmp_path, monkeypatch, capsys, model_folder):
    """Whatever --blocks says; here of a batch."""
    monkeypatch.chdir(tmp_path)
    loaded = loading.load(str(model_folder))
    cache, batch = from_preset("kv8", loaded).make(), torch.randint(2, 90, (2, 200))
    loaded.model(batch, past_key_values=cache, use_cache=True)
    cache.save(tmp_path / "batch.safetensors", token_ids=batch, model=loaded)
    assert run("cache_tool", "verify", "--model", model_folder, "--cache", "batch.safetensors", "--blocks", 1) == 0
    said = capsys.readouterr().out
    assert "note: all 200 tokens are read again, whatever --blocks says: the cache holds a batch" in said


def test_the_script(tmp_path, monkeypatch, capsys, model_folder, rejects):
    """From a document to an answer, to another preset, and to messages."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text(word_text(300))
    tool, model = "cache_tool", ["--model", model_folder, "--cache", "doc.safetensors"]
    reading = ["read", *model[:2], "--preset", "kv8", "--document", "words.txt", "--output", "doc.safetensors"]
    assert run(tool, *reading, "--document-tokens", 200) == 0
    assert "200 tokens, 1 rows" in capsys.readouterr().out
    assert run(tool, "info", "--cache", "doc.safetensors") == 0 and "preset kv8" in capsys.readouterr().out
    for _ in range(2):
        assert run(tool, "ask", *model, "--prompt", "w5 w6 w7", "--max-new-tokens", 6) == 0
    first, second = capsys.readouterr().out.strip().splitlines()
    assert first == second and first.count("w") >= 3, "the file stays as it is"
    assert run(tool, "verify", *model, "--blocks", 2) == 0 and "the same" in capsys.readouterr().out
    assert run(tool, "transcode", *model, "--preset", "kv4", "--output", "small.safetensors") == 0
    assert (tmp_path / "small.safetensors").stat().st_size < (tmp_path / "doc.safetensors").stat().st_size
    assert run(tool, "ask", *model, "--prompt", "w5 w6 w7", "--max-new-tokens", 400) == 2
    longest = int((said := capsys.readouterr().err).split("use --max-new-tokens ")[1].split()[0])
    assert "longer than the 512" in said and 200 < longest < 312, "the document and the question are held too"
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "doc.safetensors").read_bytes()[:-1])
    rejects(partial(run, tool), [
        ([], "give one of read, ask"), (["ask", *model], "ask needs --prompt"),
        (["verify", *model, "--prompt", "w5"], "--prompt is not used by verify"),
        (["info", "--cache", "cut.safetensors"], "not a readable saved cache"),
    ])  # fmt: skip
