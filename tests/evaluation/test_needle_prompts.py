"""Prompts of the needle test hold what they claim, or aren't made."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sampling import sampled
from tiny import word_tokenizer

from gpt2.common.errors import PluginError
from gpt2.evaluation import needle_prompts
from gpt2.evaluation.needle_prompts import TEMPLATES, Needles, Prompt, Template

LENGTH = 320
DEPTHS = (0, 0.1, 0.5, 0.9, 1)
PROMPTS = [(n, length, trial) for n in (0, 1, 3) for length in (LENGTH, 511) for trial in range(len(TEMPLATES))]


@pytest.mark.parametrize(("distractors", "length", "trial"), sampled(PROMPTS, 8))
def test_the_needle_is_whole_at_every_depth_and_length(builder, length, trial, distractors):
    builder = replace(builder, distractors=distractors)
    for depth in DEPTHS:
        prompt = builder.build(length, depth, trial)
        assert len(prompt.ids) == length - builder.max_new_tokens
        text = builder.tokenizer.decode(prompt.ids)
        template = TEMPLATES[trial]
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


def test_depth_is_the_share_of_haystack_before_the_needle(builder):
    builder = replace(builder, distractors=0)
    prompts = {depth: builder.build(LENGTH, depth, 0) for depth in DEPTHS}
    start, end = prompts[0].needle
    assert start == 0, "this tokenizer starts no text with a token of its own"
    question = len("\n" + TEMPLATES[0].question.format(subject="Anna"))
    for depth, prompt in prompts.items():
        space = prompt.needle[0] / depth if depth else 0
        assert abs(space - (LENGTH - builder.max_new_tokens - (end - start) - question)) <= 12 or not depth
    assert prompts[1].needle[1] + question <= len(prompts[1].ids) + 2


def test_start_tokens_come_first(builder, monkeypatch):
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
    ({"distractors": 16}, "has fewer than 17 subjects or answers that don't occur in the text"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CELLS, ids=lambda value: str(value) if type(value) is dict else "")
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
    (lambda prompt: replace(prompt, ids=prompt.ids.roll(1)), "the needle is not whole"),
    (lambda prompt: replace(prompt, ids=torch.cat((prompt.ids[-1:], prompt.ids))), "the needle is not whole"),
    (lambda prompt: replace(prompt, needle=(prompt.needle[0] - 1, prompt.needle[1])), "the needle is not whole"),
    (lambda prompt: replace(prompt, ids=prompt.ids[:-1]), "the question is not at the end.*its length is wrong"),
    (lambda prompt: replace(prompt, answer="nobody"), "the answer can't be read from the needle"),
])  # fmt: skip
def test_a_prompt_without_its_needle_is_rejected(builder, haystack, monkeypatch, damage, message):
    monkeypatch.setattr(needle_prompts, "Prompt", lambda *parts: damage(Prompt(*parts)))
    with pytest.raises(PluginError, match=message):
        builder.build(LENGTH, 0.5, 0)
    with pytest.raises(PluginError, match="doesn't encode the answer '.*' in separate tokens"):
        Needles(word_tokenizer(), haystack).build(LENGTH, 0.5, 0)


def test_answers_that_the_text_has_anyway_are_not_used(reader, prose):
    template = Template("town", "{subject} {answer}", "{subject}", "Rome Oslo Bonn", "Anna Tom Eva")
    for seed in range(20):
        drawn = template.draw(np.random.default_rng(seed), 2, "in Rome, Tom said")
        assert {subject for subject, _ in drawn} == {"Anna", "Eva"} and {word for _, word in drawn} == {"Oslo", "Bonn"}
    template = Template("town", "{subject} went to {answer}.", "{subject} went to", "Rome Oslo", "Anna Tom")
    text = prose[:250] + "Tom was in Rome." + prose[250:500]
    builder = Needles(reader.tokenizer, reader.tokenizer(text, return_tensors="pt").input_ids[0], [template], 0)
    assert {builder.build(500, 0.5, trial).answer for trial in range(10)} == {"Oslo"}
