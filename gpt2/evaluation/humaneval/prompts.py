"""Prompts for problems, where an answer stops, and the program that an answer makes.

Two styles, each as Qwen's own evaluation of its code models does it (github.com/QwenLM/Qwen2.5-Coder,
evaluation/eval_plus/generate.py and model.py, which go back to EvalPlus):

    chat    for instruct models, in the model's own chat template: a system message, and the problem in a block of
            Python that the user asks to complete. The assistant's turn is begun with the opening of such a block, so
            that the answer is code. It ends with the block. The answer repeats the head of the function
    plain   for base models: the problem's prompt alone, stripped, and its continuation up to the next definition,
            class, import, assertion or call at the beginning of a line

One difference: in the chat style the program is the problem's prompt followed by the answer, so that imports and helper
functions of the prompt exist although the answer doesn't repeat them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.evaluation.humaneval.problems import Problem
from gpt2.evaluation.prompt_tokens import encode
from gpt2.models.loading import LoadedModel
from gpt2.text.texts import start_tokens

CHAT, PLAIN, AUTO = "chat", "plain", "auto"
SYSTEM = "You are an intelligent programming assistant to produce Python algorithmic solutions"
ASKED = "Can you complete the following Python function?\n```python\n{prompt}\n```\n"
BEGUN = "```python\n"  # of the assistant's turn
ENDS = ("\nif __name__", "\ndef main(", "\nprint(")
STOPS = {CHAT: (*ENDS, "\n```"), PLAIN: (*ENDS, "\ndef", "\nclass ", "\nimport ", "\nfrom ", "\nassert ")}


def style_for(loaded: LoadedModel, wanted: str = AUTO) -> str:
    """The style of prompts: with AUTO, chat for a model that has a chat template, else plain.

    Raises PluginError for CHAT and a model without a template.
    """
    template = loaded.tokenizer.chat_template
    if wanted == CHAT and not template:
        raise PluginError(f"{loaded.spec} has no chat template: use --prompt plain")
    return wanted if wanted != AUTO else CHAT if template else PLAIN


def prompt_ids(loaded: LoadedModel, problem: Problem, style: str) -> Tensor:
    """Token ids [T] of a problem's prompt."""
    tokenizer, asked = loaded.tokenizer, problem.prompt.strip()
    if style == PLAIN:
        return torch.cat((start_tokens(tokenizer), encode(tokenizer, asked)))
    user = {"role": "user", "content": ASKED.format(prompt=asked)}
    how = {"tokenize": False, "add_generation_prompt": True}
    try:
        words = tokenizer.apply_chat_template([{"role": "system", "content": SYSTEM}, user], **how)
    except Exception:  # templates without a system role raise errors of their own
        words = tokenizer.apply_chat_template([user], **how)
    return encode(tokenizer, words + BEGUN)


def cut(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of some stops, none of which is in it then."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def program(problem: Problem, answer: str, style: str) -> str:
    """The source that an answer makes, without the test. Tabs become four spaces, as in Qwen's evaluation."""
    join = "\n\n" if style == CHAT else ""
    return problem.prompt.strip() + join + answer.replace("\t", "    ") + "\n"
