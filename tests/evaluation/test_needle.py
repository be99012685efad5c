"""The needle test: prompts that hold what they claim, figures that come from the cache, honest verdicts, its script."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from pictures import is_drawn
from sampling import sampled
from script_runs import NEEDLE, listing
from tiny import char_tokenizer, tiny_loaded, windows, word_tokenizer
from transformers import DynamicCache

from gpt2.common.errors import PluginError
from gpt2.compression.compressed_cache import identity_cache
from gpt2.evaluation import asking, needle, needle_prompts
from gpt2.evaluation.needle_prompts import TEMPLATES, Flags, Needles, Prompt, Template
from gpt2.evaluation.perplexity import BASELINE, baseline_factory
from gpt2.report import plots, tables

LENGTH = 320
DEPTHS = (0, 0.1, 0.5, 0.9, 1)
PROMPTS = [(n, length, trial) for n in (0, 1, 3) for length in (LENGTH, 511) for trial in range(len(TEMPLATES))]


@pytest.mark.parametrize(("distractors", "length", "trial"), sampled(PROMPTS, 8))
def test_the_needle_is_whole_at_every_depth_and_length(builder, length, trial, distractors):
    builder, template = replace(builder, distractors=distractors), TEMPLATES[trial]
    for depth in DEPTHS:
        prompt = builder.build(length, depth, trial)
        assert len(prompt.ids) == length - builder.max_new_tokens
        text = builder.tokenizer.decode(prompt.ids)
        assert prompt.template == template.name
        # Characters are tokens here, so positions in the text are those in the ids
        held = text[slice(*prompt.needle)]
        subject = next(name for name in template.subjects.split() if name in held)
        assert held == f"\n{template.sentence}\n".format(subject=subject, answer=prompt.answer)
        assert text.endswith(f"\n{template.question}".format(subject=subject))
        assert text.count(prompt.answer) == 1, "the answer is read from the needle or not at all"
        assert all(text.count(other) == 1 for other in prompt.other_answers)
        assert len({prompt.answer, *prompt.other_answers}) == 1 + distractors
        assert builder.tokenizer.decode(prompt.answer_ids) == f" {prompt.answer}"


def test_depth_is_the_share_of_haystack_before_the_needle(builder, monkeypatch):
    plain = replace(builder, distractors=0)
    prompts = {depth: plain.build(LENGTH, depth, 0) for depth in DEPTHS}
    start, end = prompts[0].needle
    assert start == 0, "this tokenizer starts no text with a token of its own"
    question = len("\n" + TEMPLATES[0].question.format(subject="Anna"))
    for depth, prompt in prompts.items():
        space = prompt.needle[0] / depth if depth else 0
        assert abs(space - (LENGTH - plain.max_new_tokens - (end - start) - question)) <= 12 or not depth
    assert prompts[1].needle[1] + question <= len(prompts[1].ids) + 2
    monkeypatch.setattr(needle_prompts, "start_tokens", lambda tokenizer: torch.tensor([1]))
    prompt = builder.build(LENGTH, 0.5, 0)
    assert prompt.ids[0] == 1 and len(prompt.ids) == LENGTH - builder.max_new_tokens
    assert prompt.answer in builder.tokenizer.decode(prompt.ids[slice(*prompt.needle)])


def test_prompts_differ_by_trial_seed_and_cell_and_by_nothing_else(builder):
    def ids(length=LENGTH, depth=0.5, trial=0, seed=0):
        return builder.build(length, depth, trial, seed).ids

    assert torch.equal(ids(), ids())
    # Trial 4 has the template of trial 0 again
    for other in (ids(trial=4), ids(seed=1), ids(seed=-1), ids(depth=0.4), ids(length=321)):
        assert not torch.equal(ids()[:20], other[:20]), "another window of the text"


BAD_CELLS = [
    ({"length": 100}, "a context of 100 tokens has no room for needle, distractors \\(1\\), question and answer: use"),
    ({"length": 3001}, "the text has 3,000 tokens, fewer than a context of 3,001"),
    ({"depth": 1.1}, "needle position 1.1 is out of range"),
    ({"depth": -0.1}, "needle position -0.1 is out of range"),
    ({"max_new_tokens": 6}, r"the answer '\d{5}' has 6 tokens: use --max-new-tokens 7 or more"),
    ({"max_new_tokens": 6, "flags": Flags("--needle-length", None, None)}, "has 6 tokens: this test has room for 5"),
    ({"length": 99, "flags": Flags("--needle-length", None, None)}, "has no room .* use --needle-length"),
    ({"length": 3002, "flags": Flags("--needle-length", None, None)}, "longer --text or a smaller --needle-length"),
    ({"distractors": 16}, "use fewer --distractors, a smaller --context-lengths or another --text"),
    ({"distractors": 16, "flags": Flags("--needle-length", None, None)}, "the text: use a smaller --needle-length"),
    ({"distractors": 16}, "has fewer than 17 subjects or answers that don't occur in the text"),
    ({"tokenizer": word_tokenizer()}, "doesn't encode the answer '.*' in separate tokens"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CELLS, ids=lambda value: str(value)[:20])
def test_what_makes_no_prompt_is_an_error(builder, change, message):
    cell = {"length": LENGTH, "depth": 0.5} | {key: change[key] for key in change if key in ("length", "depth")}
    builder = replace(builder, **{key: change[key] for key in change if key not in cell})
    with pytest.raises(PluginError, match=message) as error:
        builder.build(**cell, trial=0)
    if cell["length"] == 100:
        least = int(str(error.value).split("--context-lengths ")[1].split()[0])
        # Names differ in length, and another context draws another name
        assert len(builder.build(least + 8, 0.5, 0).ids) == least + 8 - builder.max_new_tokens


@pytest.mark.parametrize(("damage", "message"), [
    (lambda prompt: {"ids": prompt.ids.roll(1)}, "the needle is not whole"),
    (lambda prompt: {"ids": torch.cat((prompt.ids[-1:], prompt.ids))}, "the needle is not whole"),
    (lambda prompt: {"needle": (prompt.needle[0] - 1, prompt.needle[1])}, "the needle is not whole"),
    (lambda prompt: {"ids": prompt.ids[:-1]}, "the question is not at the end.*its length is wrong"),
    (lambda prompt: {"answer": "nobody"}, "the answer can't be read from the needle"),
])  # fmt: skip
def test_a_prompt_without_its_needle_is_rejected(builder, monkeypatch, damage, message):
    def damaged(*parts) -> Prompt:
        return replace(whole := Prompt(*parts), **damage(whole))

    monkeypatch.setattr(needle_prompts, "Prompt", damaged)
    with pytest.raises(PluginError, match=message):
        builder.build(LENGTH, 0.5, 0)


def test_answers_that_the_text_has_anyway_are_not_used(reader, prose):
    template = Template("town", "{subject} {answer}", "{subject}", "Rome Oslo Bonn", "Anna Tom Eva")
    for seed in range(20):
        drawn = template.draw(np.random.default_rng(seed), 2, "in Rome, Tom said")
        assert {subject for subject, _ in drawn} == {"Anna", "Eva"} and {word for _, word in drawn} == {"Oslo", "Bonn"}
    template = Template("town", "{subject} went to {answer}.", "{subject} went to", "Rome Oslo", "Anna Tom")
    text = prose[:250] + "Tom was in Rome." + prose[250:500]
    builder = Needles(reader.tokenizer, reader.tokenizer(text, return_tensors="pt").input_ids[0], [template], 0)
    assert {builder.build(500, 0.5, trial).answer for trial in range(10)} == {"Oslo"}


def test_an_answer_is_compared_whole():
    assert all(needle.answers(text, "48213") for text in (" 48213.", "48213", "\n48213\nand"))
    assert not any(needle.answers(text, "48213") for text in ("482134", "4821", "", "The 48213", "48213x"))


def as_answered(loaded, prompt):
    """The prompt with what the model says as its answer, so that a random model can be right."""
    ids = prompt.ids[None]
    said = loaded.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    return replace(prompt, answer=loaded.tokenizer.decode(said, skip_special_tokens=True).strip(), answer_ids=said)


@torch.no_grad()
def direct_log_p(loaded, prompt) -> float:
    """One forward pass over prompt and answer without any cache."""
    ids = torch.cat((prompt.ids, prompt.answer_ids))
    log_p = loaded.model(ids[None], use_cache=False).logits[0].double().log_softmax(-1)
    return log_p[len(prompt.ids) - 1 : -1].gather(1, prompt.answer_ids[:, None]).sum().item()


PLAIN, WINDOWS = [("llama", None), ("gpt2", None), ("opt", 50)], [("mistral", 50), ("gemma3_text", None)]


@pytest.mark.parametrize(("family", "prefill_chunk"), [*sampled(PLAIN, 1), *WINDOWS])
def test_log_probability_and_text_are_those_of_plain_inference(family, prefill_chunk, haystack):
    """Also through windows that slide, which can't be cropped back."""
    loaded = tiny_loaded(family, char_tokenizer())
    prompt = as_answered(loaded, Needles(loaded.tokenizer, haystack).build(LENGTH, 0.5, 0))
    for make in (baseline_factory(loaded), lambda: identity_cache(3)):
        record = needle.ask(loaded, make, prompt, 12, prefill_chunk)
        assert record["answer_logprob_nats"] == pytest.approx(direct_log_p(loaded, prompt), abs=1e-3)
        assert record["generated"].strip() == prompt.answer and record["exact_match"]


def test_both_figures_are_read_from_the_cache(reader, builder):
    """A cache that loses the prompt after it was read must lose the answer, whatever the prefill pass gave back."""

    class Forgetful(DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            k, v = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            layer = self.layers[layer_idx]
            if key_states.shape[2] > 100:
                layer.keys, layer.values = torch.zeros_like(layer.keys), torch.zeros_like(layer.values)
            return k, v

    prompt = as_answered(reader, builder.build(LENGTH, 0.5, 0))
    kept, lost = (needle.ask(reader, make, prompt) for make in (baseline_factory(reader), Forgetful))
    assert kept["exact_match"] and not lost["exact_match"]
    assert lost["answer_logprob_nats"] < kept["answer_logprob_nats"] - 1


def test_compression_shows_and_rows_name_their_prompts(reader, haystack, lossy, asked_for):
    caches = {BASELINE: baseline_factory(reader), "identity": lambda: identity_cache(3), "int4": lossy(4)}
    seen = []
    rows = needle.measure(
        reader, haystack, caches, lengths=[LENGTH, 400], depths=[0.1, 0.9], trials=2, distractors=2, seed=5,
        progress=lambda items: seen.extend(items) or seen,
    )  # fmt: skip
    assert len(rows) == 2 * 2 * 2 * 3 and len(seen) == 8, "progress wraps the prompts"
    for row in rows:
        needles = Needles(reader.tokenizer, haystack, distractors=2)
        prompt = needles.build(row["context_tokens"], row["depth"], row["trial"], 5)
        assert row["prompt_tokens"] == row["context_tokens"] - 12 == len(prompt.ids)
        assert (row["answer"], row["template"], row["distractors"]) == (prompt.answer, prompt.template, 2)
        assert (row["needle_start_token"], row["needle_end_token"]) == prompt.needle
    assert len(needle.cells(rows)) == 2 * 2 * 3
    losses, sizes = (
        {name: np.array([row[key] for row in rows if row["cache"] == name]) for name in caches}
        for key in ("answer_logprob_nats", "cache_bytes")
    )
    assert losses["identity"] == pytest.approx(losses[BASELINE], abs=1e-3)
    assert np.abs(losses["int4"] - losses[BASELINE]).min() > 1e-2
    # Of the prompt and of the answer without its last token
    own = [row["prompt_tokens"] + row["answer_tokens"] - 1 for row in rows if row["cache"] == BASELINE]
    assert list(sizes[BASELINE]) == [n * reader.geometry.bytes_per_token(4) for n in own]
    assert (sizes["int4"] < sizes[BASELINE] / 2).all()


def test_what_is_generated_depends_on_prompt_and_cache_alone(reader, builder, lossy):
    """The log-probability is taken from a copy: generation sees the prompt, not the prompt and the answer. Settings of
    a chat model stay out: a repetition penalty would forbid the very answer that is asked for."""
    prompt = builder.build(LENGTH, 0.5, 0)
    text = needle.ask(reader, lossy(4), prompt)["generated"]
    cache, ids = lossy(4)(), prompt.ids[None]
    with torch.no_grad():
        reader.model(ids[:, :-1], past_key_values=cache)
        alone = reader.model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=12)
    assert text == reader.tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)
    loaded = tiny_loaded("llama", char_tokenizer())
    for key, value in {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "num_beams": 3}.items():
        setattr(loaded.model.generation_config, key, value)
    assert needle.ask(loaded, lossy(4), prompt)["generated"] == text


def test_the_prompt_is_fed_in_chunks_where_asked(reader, builder, monkeypatch):
    body, fed = reader.model.base_model.forward, []

    def forward(input_ids, **rest):
        fed.append(input_ids.shape[1])
        return body(input_ids=input_ids, **rest)

    monkeypatch.setattr(reader.model.base_model, "forward", forward)
    for prefill_chunk, chunks in ((None, [307]), (100, [100, 100, 100, 7])):
        fed.clear()
        needle.ask(reader, baseline_factory(reader), builder.build(LENGTH, 0.5, 0), prefill_chunk=prefill_chunk)
        answer = 6  # a space and five digits; then generation, which starts with the prompt's last token
        assert fed[: len(chunks) + 2] == [*chunks, answer, 1]


def test_bytes_are_of_what_windows_keep_also_where_a_prompt_was_fed_at_once():
    """transformers' sliding layers hold the whole prompt until the next token."""
    loaded = tiny_loaded("mistral", sliding_window=16)
    ids, wanted = windows(1, 90)[0], windows(1, 4, seed=1)[0]
    held = [asking.reply(loaded, baseline_factory(loaded), ids, wanted, 2, chunk).cache_bytes for chunk in (None, 1)]
    assert held[0] <= held[1] * 1.3 and held[0] < 90 * 2 * 12 * 2 * 3 * 4, "keys and values of all tokens, in float32"


def test_accuracy_is_the_share_of_prompts(reader, haystack, monkeypatch):
    right = iter([1, 0, 1, 1, 0, 0, 1, 0])  # baseline and other in turn
    monkeypatch.setattr(needle, "ask", lambda *args: {"answer_logprob_nats": -1.0, "exact_match": bool(next(right))})
    both = {BASELINE: None, "other": None}
    shares = needle.accuracy(reader, haystack, both, lengths=[LENGTH], depths=[0.1, 0.9], trials=2, seed=3)
    assert shares == {BASELINE: 0.75, "other": 0.25}


def test_nothing_is_asked_before_all_prompts_are_checked(reader, haystack, monkeypatch):
    class Broken(DynamicCache):
        def update(self, *args, **kwargs):
            k, v = super().update(*args, **kwargs)
            return k * float("nan"), v

    broken = {BASELINE: baseline_factory(reader), "broken": Broken}
    with pytest.raises(PluginError, match="cache 'broken' gives NaN or infinite logits"):
        needle.measure(reader, haystack, broken, lengths=[LENGTH], depths=[0.5], trials=1)
    monkeypatch.setattr(needle, "ask", lambda *args: pytest.fail("asked"))
    for length, message in ((513, "longer than the 512 that .* use --context-lengths 512"), (50, "room")):
        with pytest.raises(PluginError, match=message):
            needle.measure(reader, haystack, broken, lengths=[LENGTH, length], depths=[0.5], trials=1)


def rows_of(right: dict[str, dict[float, list[int]]], distractors: int = 1) -> list[dict]:
    """Records with these exact matches per cache and depth; the log-probability falls by 1 nat without one."""
    return [
        {"cache": cache, "context_tokens": 512, "depth": depth, "trial": trial, "exact_match": bool(hit),
         "distractors": distractors, "distractor_match": not hit, "answer_logprob_nats": -1.0 - (not hit),
         "answer_tokens": 2, "cache_bytes": 1000}
        for cache, by_depth in right.items() for depth, hits in by_depth.items() for trial, hit in enumerate(hits)
    ]  # fmt: skip


def test_verdicts_summary_and_plot_say_when_a_baseline_fails():
    """Half right is no better than guessing between needle and distractor, and well above it without one."""
    grades = rows_of({
        BASELINE: {0.1: [0, 0, 1, 0], 0.5: [1, 1, 1, 0], 0.9: [1, 1, 1, 1]},
        "small": {0.1: [0, 0, 0, 0], 0.5: [1, 1, 0, 1], 0.9: [1, 1, 1, 0]},
    })  # fmt: skip
    cells = {cell["depth"]: cell for cell in needle.cells(grades) if cell["cache"] == "small"}
    verdicts = {depth: cell["verdict"] for depth, cell in cells.items()}
    assert verdicts == {0.1: "baseline fails", 0.5: "matches", 0.9: "loses"}
    worse = cells[0.9]
    assert (worse["exact_match"], worse["distractor_match"], worse["logprob_change_nats"]) == (0.75, 0.25, -0.25)
    assert worse["answer_logprob_nats_per_token"] == -0.625
    assert needle.works_from(0) == 0.5 and needle.works_from(1) == 0.75 and needle.works_from(3) == 0.625
    half = {BASELINE: {0.5: [1, 0]}, "small": {0.5: [1, 0]}}
    verdicts = [needle.cells(rows_of(half, distractors))[1]["verdict"] for distractors in (0, 1)]
    assert verdicts == ["matches", "baseline fails"]
    (summary,) = needle.summarize(grades)
    assert (summary["cells"], summary["cells_where_baseline_works"], summary["cells_matched"]) == (3, 2, 1)
    assert (summary["only_baseline_right"], summary["only_compressed_right"], summary["prompts"]) == (3, 1, 12)
    assert summary["sign_test_p"] == pytest.approx(0.625)
    assert summary["logprob_change_nats"] == pytest.approx(-2 / 12)
    low, high = summary["logprob_change_nats_interval"]
    assert low < -2 / 12 < high
    (summary,) = needle.summarize(rows_of({BASELINE: {0.5: [1]}, "small": {0.5: [0]}}))
    assert summary["logprob_change_nats"] == -1 and summary["logprob_change_nats_interval"] is None, "of one prompt"
    for hits, interval in (([0], "–"), ([0, 1], "-1.000 … +0.000")):
        rows = rows_of({BASELINE: {0.5: [1 for _ in hits]}, "small": {0.5: hits}})
        record = {"rows": rows, "cells": needle.cells(rows), "model": "m", "text": "t", "baseline_works_from": 0.75}
        table = tables.TABLES["needle"](record, [])
        assert table.rows[0][5] == interval and ("One prompt gives no interval" in table.note) == (len(hits) == 1)
    panels = [axis for axis in plots.needles(needle.cells(grades), "title").axes if axis.get_title()]
    shown = [axis.get_title() for axis in panels]
    assert shown == ["baseline: exact match", "small: exact match", "small: change of log p"]
    for axis in panels:
        assert [label.get_text() for label in axis.get_yticklabels()] == ["10%", "50%", "90%"]
        assert ["baseline fails" in text.get_text() for text in axis.texts] == [True, False, False]


FLAGS = ["--text", "prose.txt", "--preset", "p.json", "--num-trials", 2]


def test_the_script_writes_its_grid(script, tmp_path, capsys, asked_for):
    flags = ["--context-lengths", f"{LENGTH},400", "--needle-positions", "0.1,0.9", "--prefill-chunk", 100]
    assert script(NEEDLE, *FLAGS, *flags) == 0 and asked_for == {(12, 100)}
    said = capsys.readouterr().out
    assert said.count("baseline fails") == 4 + 2 and "0 of 0" in said and "8 prompts per cache in 4 cells" in said
    assert "bytes" in said and "baseline in float32" in said
    assert listing(tmp_path / "results") == {"runs/needle_tiny.json", "plots/needle_tiny.png"}
    record = json.loads((tmp_path / "results/runs/needle_tiny.json").read_text())
    assert is_drawn(tmp_path / "results/plots/needle_tiny.png")
    assert len(record["rows"]) == 2 * 2 * 2 * 2 and len(record["cells"]) == 2 * 2 * 2 and len(record["summary"]) == 1
    assert record["baseline_works_from"] == 0.75 and record["text_sha256"] and record["fingerprint"]
    assert record["caches"][0]["bits"] == 4


BAD_FLAGS = [
    (["--needle-positions", "0.5,1.5"], "argument --needle-positions: 1.5 is out of range"),
    (["--needle-positions", "-0.1"], "-0.1 is out of range"),
    (["--needle-positions", "nan"], "nan is out of range"),
    (["--needle-positions", "x"], "'x' is not numbers with commas between them"),
    (["--context-lengths", "600"], "a context of 600 tokens is longer than the 512"),
    (["--context-lengths", "64"], "a context of 64 tokens has no room"),
    (["--context-lengths", "0"], "0 is not a positive number"),
    (["--distractors", "-1"], "-1 is negative"),
    (["--context-lengths", "500", "--text", "short.txt"], "the evaluation part of text 'short.txt' has 60 tokens"),
]


def test_bad_input_is_one_clear_line(script, rejects, tmp_path):
    (tmp_path / "short.txt").write_text("a" * 300)
    rejects(partial(script, NEEDLE, *FLAGS, "--context-lengths", LENGTH), BAD_FLAGS)
