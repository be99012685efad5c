"""One conversation through several caches: the same text for all, figures of this text, and what the user is shown."""

import copy
import json
from functools import partial

import pytest
import torch
from script_runs import FREE_PRESET, GENERATE, listing, run
from tiny import save_tiny, tiny_loaded, tiny_model, windows, word_text

from gpt2.common.errors import LossNotFinite, PluginError
from gpt2.compression.attention import enable_compressed_attention
from gpt2.compression.cache.size import held_bytes, plain_bytes
from gpt2.compression.named_caches import from_preset
from gpt2.evaluation import saved_documents, side_by_side
from gpt2.evaluation.asking import greedy
from gpt2.evaluation.perplexity import BASELINE, baseline_factory, score
from gpt2.evaluation.side_by_side import about_document, read, read_document, to_continue
from gpt2.report import plots, tables

TEMPLATE = "{% for m in messages %}w2 w3 {{ m['content'] }} w4{% endfor %}{% if add_generation_prompt %} w5{% endif %}"


@pytest.fixture
def document(llama):
    return llama.tokenizer(word_text(300), return_tensors="pt").input_ids[0]


@pytest.fixture
def exact(llama):
    return from_preset(FREE_PRESET | {"bits": 16, "name": "exact", "sink_tokens": 4, "recent_tokens": 0}, llama)


def test_a_document_is_the_end_of_a_file_or_of_the_evaluation_part(llama, tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text(word_text(500))
    words = llama.tokenizer(word_text(500), add_special_tokens=False).input_ids
    assert read_document(str(tmp_path / "t.txt"), llama, 1000).tolist() == words, "a file as a whole"
    assert read_document(str(tmp_path / "t.txt"), llama, 40).tolist() == words[-40:]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_document("~/t.txt", llama, 1000).tolist() == words, "in the home folder too"
    (tmp_path / "a-valid.txt").write_text("w2 " * 90)
    (tmp_path / "a-test.txt").write_text("w3 " * 50)
    assert read_document(str(tmp_path), llama, 1000).tolist() == [3] * 50, "nothing that a calibration may have read"
    with pytest.raises(PluginError, match="no text"):
        read_document("missing.txt", llama, 10)


def test_a_question_is_put_as_the_chat_template_says(document):
    llama = tiny_loaded()
    plain = about_document(llama, document, "w9 w8")
    assert llama.tokenizer.decode(plain.question).endswith("w9 w8 <pad>")  # "Answer:" isn't in the vocabulary
    llama.tokenizer.chat_template = TEMPLATE
    asked = about_document(llama, document, "w9 w8")
    parts = (asked.start.tolist(), asked.document.tolist(), asked.question.tolist())
    assert parts == ([2, 3], document.tolist(), [9, 8, 4, 5]) and len(asked) == 2 + len(document) + 4
    llama.tokenizer.chat_template = "w2"
    with pytest.raises(PluginError, match="doesn't show the user's message exactly once"):
        about_document(llama, document, "w9")


def test_perplexity_and_answer_are_those_of_the_cache(llama, document, exact):
    conversation = about_document(llama, document, "w9 w8")
    baseline, ours = (read(llama, conversation, c, max_new_tokens=12, chunk=64) for c in (None, exact))
    expected = score(llama, document[None], {BASELINE: baseline_factory(llama)})[BASELINE]
    torch.testing.assert_close(baseline.scores.nll, expected.nll, rtol=0, atol=1e-4)
    assert baseline.scores.nll.shape == (1, len(document) - 1)
    ids = torch.cat((document, conversation.question))[None]
    mask = torch.ones_like(ids)  # else generate takes unknown words, which have the id of padding, for padding
    new = llama.model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert baseline.answer == ours.answer == llama.tokenizer.decode(new, skip_special_tokens=True)
    assert len(baseline.step_ms) == len(ours.step_ms) == 4
    assert ours.record(baseline)["ppl_delta"] == pytest.approx(0, abs=1e-6)
    # A chat template is read but not scored
    llama = tiny_loaded()
    llama.tokenizer.chat_template = TEMPLATE
    reading = read(llama, about_document(llama, document, "w9"), None, max_new_tokens=1)
    whole = torch.cat((torch.tensor([2, 3]), document))[None]
    expected = score(llama, whole, {BASELINE: baseline_factory(llama)})[BASELINE].nll[:, 1:]
    torch.testing.assert_close(reading.scores.nll, expected, rtol=0, atol=1e-4)


def test_bytes_are_those_of_a_16_bit_model(llama, document):
    choice = from_preset("kv4", llama)
    conversation = about_document(llama, document, "w9 w8")
    baseline, ours = (read(llama, conversation, c, max_new_tokens=3) for c in (None, choice))
    tokens = len(conversation) + 2  # the last new token is not in the cache
    assert (baseline.tokens, ours.tokens) == (tokens, tokens)
    plain, held = plain_bytes(llama.geometry, tokens), held_bytes(choice.make, llama.geometry, tokens)
    record = ours.record(baseline)
    assert (baseline.cached_bytes, record["bytes"], record["codec_bytes"]) == (plain, held, choice.make().codec_bytes())
    assert record["compression_ratio"] == plain / held > 1 and record["ppl_delta"] != 0


def test_bytes_are_of_the_same_tokens_when_answers_end_at_different_lengths(document, monkeypatch):
    llama = tiny_loaded()
    conversation, choice = about_document(llama, document, "w9 w8"), from_preset("kv4", llama)
    ours = read(llama, conversation, choice, max_new_tokens=90)
    first = read(llama, conversation, None, max_new_tokens=1)
    ends = llama.tokenizer(first.answer, add_special_tokens=False).input_ids
    monkeypatch.setattr(llama.model.generation_config, "eos_token_id", ends)
    baseline = read(llama, conversation, None, max_new_tokens=90)
    assert baseline.answer == first.answer and len(ours.answer.split()) > 2
    rows, tokens = [reading.record(baseline) for reading in (baseline, ours)], len(conversation) + 89
    ratio = plain_bytes(llama.geometry, tokens) / held_bytes(choice.make, llama.geometry, tokens)
    assert [row["compression_ratio"] for row in rows] == [1, ratio]
    note = tables.side_by_side({"model": "m", "dtype": "float32", "device": "cpu", "rows": rows}, []).note
    assert f"MiB: {tokens} tokens, with an answer of the greatest length" in note


@pytest.mark.parametrize("several", [False, True])
def test_an_answer_stops_at_an_end_token_also_where_the_timed_steps_end(several, document, monkeypatch):
    llama = tiny_loaded()
    conversation = about_document(llama, document, "w9 w8")
    words = read(llama, conversation, None, max_new_tokens=12).answer.split()
    end = llama.tokenizer.convert_tokens_to_ids(words[side_by_side.TIMED_TOKENS - 1])
    monkeypatch.setattr(llama.model.generation_config, "eos_token_id", [1, end] if several else end)
    stopped = read(llama, conversation, None, max_new_tokens=12).answer.split()
    assert stopped == words[: side_by_side.TIMED_TOKENS]


OWN_SETTINGS = [
    {"cache_implementation": "static"}, {"num_beams": 4, "early_stopping": True}, {"no_repeat_ngram_size": 1},
    {"return_dict_in_generate": True}, {"suppress_tokens": list(range(2, 60))},
]  # fmt: skip


@pytest.mark.parametrize("own", OWN_SETTINGS, ids=lambda own: next(iter(own)))
def test_a_checkpoints_own_generation_settings_change_no_answer(own, monkeypatch, capsys):
    """Of a test, in a conversation and about a saved document."""
    llama, ids = tiny_loaded(), windows(1, 40)
    make, choice = baseline_factory(llama), from_preset("kv4", llama)
    conversation = to_continue(llama, word_text(30))

    def asked() -> str:
        cache = choice.make()
        llama.model(ids, past_key_values=cache)
        cache.held_tokens.ids = ids
        return saved_documents.ask(llama, cache, "w5 w6", 8, streamed=True)

    def answered() -> tuple:
        reading = read(llama, conversation, choice, max_new_tokens=8)
        return greedy(llama, make(), ids, 8).tolist(), reading.answer, asked()

    expected = answered()
    settings = copy.deepcopy(llama.model.generation_config)
    for name, value in own.items():
        setattr(settings, name, value)
    monkeypatch.setattr(llama.model, "generation_config", settings)
    assert answered() == expected and llama.model.generation_config is settings


def test_a_loss_that_is_not_finite_is_said_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    """As of a model whose activations are too large for float16."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(1e6)
    save_tiny(tmp_path / "loud", model=model)
    (tmp_path / "words.txt").write_text(word_text(100))
    flags = ["--model", "loud", "--preset", "kv4", "--document", "words.txt", "--dtype", "float16"]
    assert run(GENERATE, *flags, "--max-new-tokens", 2, "--output", "o.json") == 2
    assert "NaN or infinite: try --dtype float32" in capsys.readouterr().err and not (tmp_path / "o.json").exists()
    llama = tiny_loaded()
    llama.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(LossNotFinite, match=side_by_side.UNCOMPRESSED):
        read(llama, to_continue(llama, word_text(9)), None, max_new_tokens=2)


def test_a_cache_is_read_as_stored_where_that_is_enabled_and_few_tokens_show_no_change_of_perplexity(exact):
    llama = tiny_loaded()
    conversation = to_continue(llama, word_text(80))
    assert not read(llama, conversation, exact, max_new_tokens=2).direct
    enable_compressed_attention(llama.model)
    assert read(llama, conversation, exact, max_new_tokens=2).direct
    reading = read(llama, conversation, None, max_new_tokens=1)
    assert not reading.direct
    record = {"model": "m", "dtype": "float32", "device": "cpu", "rows": [reading.record(reading)]}
    (row,) = tables.side_by_side(record, []).rows
    assert row[:3] == [side_by_side.UNCOMPRESSED, row[1], "0.00"] and row[4:6] == ["–", "–"]
    record["rows"][0]["tokens"] = 600
    assert tables.side_by_side(record, []).rows[0][4] == "+0.00%"


def test_of_a_short_document_no_picture_shows_a_change(llama):
    """An interval of one block of tokens has no width."""
    choice, words = from_preset("kv4", llama), to_continue(llama, word_text(40))
    readings = [read(llama, words, each, max_new_tokens=2) for each in (None, choice)]
    record = {"model": "m", "dtype": "float32", "device": "cpu", "rows": [r.record(readings[0]) for r in readings]}
    axis = plots.side_by_side(record).axes[1]
    assert not axis.lines and "too few" in axis.texts[0].get_text()


def test_the_script_shows_one_table_and_writes_what_it_shows(tiny_flags, tmp_path, capsys, rejects):
    (tmp_path / "free.json").write_text(json.dumps(FREE_PRESET))
    flags = [*tiny_flags[:2], "--preset", "free.json", "kv4", "--max-new-tokens", "4", "--direct"]
    assert run(GENERATE, *flags, "--document", "words.txt", "--document-tokens", 200, "--output", "o.json") == 0
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "o.json").read_text())
    assert [row["cache"] for row in record["rows"]] == ["uncompressed", "free.json", "kv4"]
    assert tables.side_by_side(record, []).console() in said and "200 tokens of words.txt" in said
    assert all(f"[{row['cache']}] {row['answer']}" in said for row in record["rows"])
    assert listing(tmp_path) == {"words.txt", "free.json", "o.json", "o.png"}
    flags = [*tiny_flags[:2], "--preset", "kv8", "--prompt"]  # a prompt is continued, and nothing is written
    before = listing(tmp_path)
    assert run(GENERATE, *flags, "w2 w3 w4", "--max-new-tokens", "4") == 0
    out = capsys.readouterr().out
    assert "[uncompressed] w" in out and "[kv8] w" in out and listing(tmp_path) == before
    rejects(partial(run, GENERATE), [
        ([*flags, "w2 w3"], "the prompt has 2 tokens: expected at least 3"),
        ([*flags[:-1], "--document", "words.txt", "--document-tokens", 1], "expected at least 2"),
        ([*flags[:-1], "--document", "words.txt", "--document-tokens", 510], "use --document-tokens"),
        (tiny_flags[:2], "give --preset"),
    ])  # fmt: skip
