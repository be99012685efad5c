"""Tasks: prompts that hold what they claim, scores that know what is right, verdicts, and the script."""

import json
import math
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from pictures import is_drawn
from script_runs import listing
from tiny import char_tokenizer, tiny_loaded, tokenizer_of, word_tokenizer

from gpt2.common.errors import PluginError
from gpt2.compression.codecs.integer import Int8
from gpt2.evaluation import asking
from gpt2.evaluation.perplexity import BASELINE, baseline_factory
from gpt2.evaluation.tasks import TASKS, Source, frequent_words, measure
from gpt2.report import plots, tables

LENGTH = 900  # a token is a character here


@pytest.fixture(scope="module")
def long_reader():
    """A tiny Llama that reads characters, with a context in which every task has room."""
    return tiny_loaded("llama", char_tokenizer(), max_position_embeddings=2048)


@pytest.fixture(scope="module")
def source(long_reader, prose):
    return Source(long_reader.tokenizer, long_reader.tokenizer(prose, return_tensors="pt").input_ids[0])


@pytest.mark.parametrize("name", TASKS)
def test_a_prompt_has_its_answers_its_wrong_answers_and_its_length(source, name):
    task = TASKS[name]
    for length, trial in ((LENGTH, 0), (1500, 1)):
        prompt = task.build(source, length, trial)
        text = source.tokenizer.decode(prompt.ids)
        room = length - task.max_new_tokens
        assert 0.8 * room <= len(prompt.ids) <= room
        assert prompt.others and all(word in text for word in (*prompt.answers, *prompt.others))
        assert not set(prompt.answers) & set(prompt.others)
        asked = text[text.rindex("\n") if name == "few_shot" else text.rindex("\nQuestion") :]
        assert not any(word in asked for word in prompt.answers), "the question alone doesn't give the answer"
        assert 0 < prompt.chance <= 0.5 and 0 <= prompt.depth < 1
        right = source.tokenizer.decode(prompt.answer_ids)
        assert right.startswith(" ") and prompt.exact(right) and prompt.exact(f"{right}\nQuestion: another")
        assert not prompt.exact("") and not prompt.exact(prompt.others[0])
        again, other = task.build(source, length, trial), task.build(source, length, trial, seed=1)
        assert torch.equal(again.ids, prompt.ids) and not torch.equal(other.ids[:200], prompt.ids[:200])


def test_several_answers_are_all_needed_and_no_wrong_one(source):
    prompt = TASKS["needle_multi_value"].build(source, LENGTH, 0)
    a, b, c = prompt.answers
    assert prompt.exact(f" {c} and {a}, {b}.") and not prompt.exact(f" {a}, {b}, {c}, {prompt.others[0]}")
    assert prompt.found(f"{a} {b}1 {c}") == [True, False, True]


def test_answers_follow_from_the_prompt(source):
    """Read from the text again by another way than the one that wrote it."""

    def drawn(name: str):
        prompt = TASKS[name].build(source, LENGTH, 1)
        return source.tokenizer.decode(prompt.ids), prompt

    said, prompt = drawn("variable_tracking")
    values = {}
    for line in said.split("\n"):
        if line.startswith("VAR "):
            name, value = line.removeprefix("VAR ").removesuffix(".").split(" = ")
            values[name] = values[value.removeprefix("VAR ")] if value.startswith("VAR ") else value
    wanted = said.split("have the value ")[1].split("?")[0]
    assert {name for name, value in values.items() if value == wanted} == set(prompt.answers) and len(values) == 8
    assert prompt.chance == 1 / math.comb(8, 4)
    said, prompt = drawn("frequent_words")
    words = said.split("\n")[0].removeprefix("A list of words: ").split()
    often = Counter(words).most_common(4)
    assert tuple(word for word, _ in often[:3]) == prompt.answers and often[2][1] > often[3][1]
    said, prompt = drawn("key_value")
    held = json.loads(said.split("\n")[0])
    assert held[said.rsplit('"', 2)[1]] == prompt.answers[0] and prompt.chance == 1 / len(held)
    said, prompt = drawn("needle_multi_key")
    asked = said.rsplit("number of ", 1)[1].split(" ")[0]
    assert f"The special number of {asked} is {prompt.answers[0]}." in said
    said, prompt = drawn("few_shot")
    labels = dict(line.split(" -> ") for line in said.split("\n")[:-1])
    assert said.rsplit("\n")[-1].removesuffix(" ->") not in labels and set(labels.values()) > {prompt.answers[0]}


def test_word_counts_fall_with_rank_whatever_the_length():
    for total in range(frequent_words.least_total(), 400):
        counts = frequent_words.counts(total)
        assert counts[1] > counts[2] > max(counts[3:]), total


DAMAGE = [  # of a prompt as it was drafted
    (lambda made: {"answers": ["99999"]}, "an answer is in no passage"),
    (lambda made: {"evidence": ["The special number"] * 2 + ["nowhere 12345"]}, "a passage with an answer is missing"),
    (lambda made: {"others": []}, "it has no wrong answers, or lacks some"),
    (lambda made: {"others": ["00000"]}, "it has no wrong answers, or lacks some"),
    (lambda made: {"body": torch.tensor([5] * 10)}, "a passage with an answer is missing.*tokens in a room of"),
    (lambda made: {"question": f"{made.question} {made.answers[0]} or", "others": [*made.others, *made.answers]},
     "an answer is in the question; a wrong answer is right"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=lambda value: value if type(value) is str else "")
def test_a_prompt_that_no_cache_could_answer_is_rejected(source, monkeypatch, damage, message):
    task, draft = TASKS["needle_single"], type(TASKS["needle_single"]).draft
    monkeypatch.setattr(type(task), "draft", lambda *args: replace(made := draft(*args), **damage(made)))
    with pytest.raises(PluginError, match=f"task needle_single, a prompt of .*{message}"):
        task.build(source, LENGTH, 0)


@pytest.mark.parametrize("name", TASKS)
def test_what_makes_no_prompt_is_an_error(source, name):
    with pytest.raises(PluginError, match="too few, it needs about|tokens: use --max|fewer than a context"):
        TASKS[name].build(source, 100, 0)
    if "needle" in name:
        with pytest.raises(PluginError, match="the text has 50 tokens, fewer than a context"):
            TASKS[name].build(replace(source, haystack=source.haystack[:50]), LENGTH, 0)
        with pytest.raises(PluginError, match=f"task {name}: this tokenizer doesn't encode the answer"):
            TASKS[name].build(replace(source, tokenizer=word_tokenizer()), LENGTH, 0)


def test_a_text_without_spaces_gives_an_error_on_the_text_not_on_the_context(source):
    characters = "".join(map(chr, range(0x4E00, 0x4E00 + 90)))
    for tokenizer, text, message in (
        (tokenizer_of(characters + "\n", unk_token="\n"), (characters + "\n") * 40,
         "too few spaces between words: give another --text, or leave it out"),
        (source.tokenizer, "extraordinarily long words " * 200,
         "passages of 12 words have more than 63 tokens: give another --text"),
    ):  # fmt: skip
        ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
        with pytest.raises(PluginError, match=message):
            TASKS["copying"].build(Source(tokenizer, ids), LENGTH, 0)


def test_a_context_of_half_a_million_tokens_has_room_for_pairs():
    class Counting(Source):
        def encode(self, text: str) -> range:
            return range(len(text) // 8)

    draft = TASKS["key_value"].draft(Counting(None, torch.empty(0)), 500_000, np.random.default_rng(0))
    assert len(draft.answers[0]) == 5


def measured(long_reader, source, caches: dict) -> list[dict]:
    """Of every task once. Nothing is generated, which would take nine tenths of the time: test_needle shows that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asking, "generated_text", lambda *args: "nothing")
        return measure.measure(long_reader, source.haystack, caches, lengths=[LENGTH], trials=1)


@pytest.fixture(scope="module")
def rows(long_reader, source, lossy):
    """By an uncompressed cache and two of 4 and 8 bits."""
    caches = {BASELINE: baseline_factory(long_reader), "int4": lossy(4), "int8": lossy(8)}
    return measured(long_reader, source, caches)


def test_compression_shows_in_every_task(rows):
    assert [row["task"] for row in rows[::3]] == list(TASKS)
    for base_row, worse in zip(rows[::3], rows[1::3], strict=True):
        assert abs(worse["answer_logprob_nats"] - base_row["answer_logprob_nats"]) > 1e-2, worse["task"]
        assert worse["cache_bytes"] < base_row["cache_bytes"] / 2


def test_one_wrong_offset_in_a_codec_is_caught_by_most_tasks(rows, long_reader, source, lossy, monkeypatch):
    """Int8 loses next to nothing; with each channel shifted by one, the same cache changes the answers' probability."""

    def changes(found: list[dict]) -> dict[str, float]:
        """In nats per token of the answer."""
        nats, pairs = "answer_logprob_nats", zip(rows[::3], found, strict=True)
        return {a["task"]: abs(b[nats] - a[nats]) / a["answer_tokens"] for a, b in pairs}

    dequantize = Int8.dequantize
    monkeypatch.setattr(Int8, "dequantize", lambda *args: dequantize(*args).roll(1, -1))
    right, wrong = changes(rows[2::3]), changes(measured(long_reader, source, {"off": lossy(8)}))
    caught = [name for name in TASKS if wrong[name] > 0.5 > 5 * right[name]]
    assert len(caught) >= 3, (right, wrong)


def graded(right: dict[str, dict[str, list[int]]], chance: float) -> list[dict]:
    return [
        {"cache": cache, "task": task, "context_tokens": 512, "trial": trial, "exact_match": bool(hit), "recall": hit,
         "chance": chance, "answer_logprob_nats": -1.0 - (not hit), "answer_tokens": 2, "cache_bytes": 1000}
        for cache, tasks in right.items() for task, hits in tasks.items() for trial, hit in enumerate(hits)
    ]  # fmt: skip


GRADES = {
    BASELINE: {"copying": [1, 1, 0, 0], "passkey": [1, 1, 1, 0], "key_value": [1, 1, 1, 1]},
    "small": {"copying": [1, 0, 0, 0], "passkey": [1, 1, 1, 0], "key_value": [1, 1, 1, 0]},
}


@pytest.mark.parametrize(("chance", "half_right"), [(0, "loses"), (0.4, "baseline fails")])
def test_half_right_is_compared_where_chance_is_nothing_and_no_better_than_guessing_else(chance, half_right):
    cells = measure.cells(graded(GRADES, chance))
    verdicts = [cell["verdict"] for cell in cells if cell["cache"] == "small"]
    assert verdicts == [half_right, "matches", "loses"]


def test_tasks_have_rows_of_their_own_in_records_table_and_plot():
    rows = graded(GRADES, 0.4)
    cells, by_task = measure.cells(rows), {record["task"]: record for record in measure.by_task(rows)}
    assert by_task["copying"]["only_baseline_right"] == 1 and by_task["passkey"]["logprob_change_nats"] == 0
    record = {"model": "m", "cells": cells, "summary": asking.summarize(rows, cells)}
    table = tables.TABLES["tasks"](record, ["copying", "passkey"])
    assert [row[-1] for row in table.rows] == ["the baseline fails", "matches"] and "from chance" in table.note
    figure = plots.tasks(cells, "title")
    ticks = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert ticks == ["copying", "passkey", "key value"] and "baseline fails" in figure.axes[0].texts[0].get_text()


FLAGS = ["--text", "prose.txt", "--preset", "p.json", "--num-trials", 1]


def test_the_script_writes_what_it_asked(script, tmp_path, capsys):
    flags = ["--tasks", "passkey,needle_single", "--context-lengths", 400, "--prefill-chunk", 200]
    assert script("eval_tasks", *FLAGS, *flags) == 0
    assert capsys.readouterr().out.count("the baseline fails") == 2, "it is random"
    assert listing(tmp_path / "results") == {"runs/tasks_tiny.json", "plots/tasks_tiny.png"}
    assert is_drawn(tmp_path / "results/plots/tasks_tiny.png")
    record = json.loads((tmp_path / "results/runs/tasks_tiny.json").read_text())
    assert len(record["rows"]) == 4 and len(record["by_task"]) == 2 and record["text_sha256"]


def test_bad_input_is_one_clear_line(script, rejects):
    rejects(partial(script, "eval_tasks", *FLAGS, "--tasks", "passkey"), [
        (["--tasks", "nonsense"], "unknown nonsense: choose from needle_single"),
        (["--context-lengths", "600"], "longer than the 512"), (["--context-lengths", "60"], "too few, it needs about"),
        (["--tasks", "key_value", "--context-lengths", "64"], "task key_value: 48 tokens for the prompt are too few"),
    ])  # fmt: skip
