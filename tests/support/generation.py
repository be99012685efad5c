"""Ways to generate, each a function of a model and a cache, and their tokens with transformers' own cache."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from tiny import tiny_model, windows
from torch import Tensor
from transformers import DynamicCache

NEW = 12  # generated tokens: prompt and answer together are three windows of the sliding families

model_of = functools.cache(tiny_model)


@functools.cache
def assistant_of(model):
    """The model itself with noise on its weights: some of its guesses are right and some are wrong."""
    assistant = copy.deepcopy(model)
    for parameter in assistant.parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        parameter.add_(noise * 0.05 * parameter.std(correction=0))
    config = assistant.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = 4, "constant"
    config.assistant_confidence_threshold = 0.0
    return assistant


def prompt(length: int = 12, batch: int = 1, seed: int = 0) -> Tensor:
    return windows(batch, length, seed)


def generate(model, cache, ids: Tensor, **how) -> Tensor:
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW} | how
    return model.generate(ids, past_key_values=cache, **how)


def sample(model, cache, ids: Tensor, **how) -> Tensor:
    torch.manual_seed(0)
    return generate(model, cache, ids, do_sample=True, **how)


def left_padded(model, cache, **how) -> Tensor:
    ids = prompt(batch=2)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return generate(model, cache, ids.masked_fill(mask == 0, 0), attention_mask=mask, **how)


def multi_turn(model, cache, extra: int = 7) -> Tensor:
    answer = generate(model, cache, prompt())
    return generate(model, cache, torch.cat((answer, prompt(extra, seed=1)), dim=1))


def after_reset(model, cache) -> Tensor:
    """Another conversation, of another batch size, in the same cache."""
    generate(model, cache, prompt(9, batch=2, seed=1))
    cache.reset()
    return generate(model, cache, prompt())


def warm_beams(model, cache) -> Tensor:
    """One shared prompt is read once, then continued by several beams."""
    ids = prompt()
    model(ids[:, :-1], past_key_values=cache)
    cache.batch_repeat_interleave(3)
    return generate(model, cache, ids, num_beams=3)


def assisted(model, cache, **how) -> Tensor:
    return generate(model, cache, prompt(), assistant_model=assistant_of(model), **how)


def prompt_lookup(model, cache) -> Tensor:
    return generate(model, cache, prompt().repeat(1, 2), prompt_lookup_num_tokens=3)


MODES: dict[str, Callable[..., Tensor]] = {
    "greedy": lambda model, cache: generate(model, cache, prompt()),
    "sampling": lambda model, cache: sample(model, cache, prompt()),
    "sampling-return": lambda model, cache: sample(model, cache, prompt(), num_return_sequences=2),
    "beams": lambda model, cache: generate(model, cache, prompt(), num_beams=3),
    "beams-batch": lambda model, cache: generate(model, cache, prompt(batch=2), num_beams=3),
    "beams-return": lambda model, cache: generate(model, cache, prompt(), num_beams=4, num_return_sequences=3),
    "assisted": assisted,
    "assisted-sampling": lambda model, cache: (torch.manual_seed(0), assisted(model, cache, do_sample=True))[1],
    "prompt-lookup": prompt_lookup,
    "left-padded": left_padded,
    "left-padded-beams": lambda model, cache: left_padded(model, cache, num_beams=2),
    "chunked-prefill": lambda model, cache: generate(model, cache, prompt(), prefill_chunk_size=5),
    "multi-turn": multi_turn,
    "reset": after_reset,
    "warm-beams": warm_beams,
}
# Two ways to the same tokens: what a cache returns for a token may not depend on how the token came in
SAME_TOKENS: dict[str, Callable[..., Tensor]] = {
    "assisted": MODES["greedy"],
    "prompt-lookup": lambda model, cache: generate(model, cache, prompt().repeat(1, 2)),
    "chunked-prefill": MODES["greedy"],
    "reset": MODES["greedy"],
    "warm-beams": MODES["beams"],
}


@functools.cache
def with_dynamic_cache(family: str, mode: str) -> Tensor:
    """The tokens with transformers' own cache; a mode that fails there is none that ours could offer."""
    model = model_of(family)
    try:
        return MODES[mode](model, DynamicCache(config=model.config))
    except Exception as error:
        pytest.skip(f"transformers itself can't do {mode} on {family}: {error}")
