"""The largest batch whose caches of some length fit beside a model, and how fast it is decoded.

The batch is doubled until memory runs out, then bisected. A cache is filled with noise, layer by layer and some tokens
at a time: a prompt of the whole batch at once would need memory that has nothing to do with the cache. Then the model
decodes from it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from gpt2.common.errors import is_out_of_memory
from gpt2.compression.cache import size
from gpt2.compression.cache.attention import disable_compressed_attention, enable_compressed_attention
from gpt2.evaluation.instruments import synchronizer
from gpt2.evaluation.noise import fill
from gpt2.evaluation.perplexity import BASELINE, CacheFactory
from gpt2.models.loading import LoadedModel

RESOLUTION = 32  # bisection ends when the batch is known to one part in 32
WARM_STEPS = 1
clock = time.perf_counter


def search(fits: Callable[[int], bool], most: int, resolution: int = RESOLUTION) -> int:
    """The largest batch that fits, to 1 / `resolution` of itself and at most `most`; 0 if one sequence doesn't fit.

    If `most` fits it is found exactly, since a search that nothing ended doesn't know the largest.
    """
    fit, batch = 0, 1
    while batch <= most and fits(batch):
        fit, batch = batch, 2 * batch
    if batch > most:
        if fit == most or fits(most):
            return most
        batch = most
    too_large = batch
    while too_large - fit > 1 + fit // resolution:
        middle = (fit + too_large) // 2
        if fits(middle):
            fit = middle
        else:
            too_large = middle
    return fit


def measure(
    loaded: LoadedModel, name: str, make: CacheFactory, context: int, *, decode_tokens: int = 8, most: int = 1024,
    seed: int = 0,
) -> dict:  # fmt: skip
    """Results record of one cache: its largest batch at `context` tokens each, and the speed of every batch tried.

    Attention reads the codes of our caches directly if it can. most: largest batch to try.
    """
    tries: dict[int, dict | None] = {}

    def fits(batch: int) -> bool:
        tries[batch] = attempt(loaded, make, context, batch, decode_tokens, seed)
        return tries[batch] is not None

    (disable_compressed_attention if name == BASELINE else enable_compressed_attention)(loaded.model)
    try:
        largest = search(fits, most)
    finally:
        disable_compressed_attention(loaded.model)
    tried = [{"batch_size": batch, "fits": run is not None} | (run or {}) for batch, run in tries.items()]
    best = {"largest_batch": largest, "at_limit": largest == most}
    return {"cache": name, "context_tokens": context} | best | (tries.get(largest) or {}) | {"tried": tried}


def attempt(
    loaded: LoadedModel, make: CacheFactory, context: int, batch: int, steps: int, seed: int = 0
) -> dict | None:
    """Fill a cache for a batch and decode `steps` tokens from it: tokens per second of the batch, and bytes held.

    None if it doesn't fit. Nothing of it stays in memory.
    """
    try:
        found = _filled_and_decoded(loaded, make(), context, batch, steps, seed)
    except Exception as error:  # out of memory has another type on each device
        if not is_out_of_memory(error):
            raise
        found = None
    gc.collect()  # only now is the error gone, whose traceback held tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


@torch.no_grad()
def _filled_and_decoded(loaded: LoadedModel, cache: Cache, context: int, batch: int, steps: int, seed: int) -> dict:
    model, wait = loaded.model, synchronizer(loaded.model)
    fill(cache, loaded, context, batch, seed)
    token = decode(model, cache, torch.zeros(batch, 1, dtype=torch.long, device=loaded.device), WARM_STEPS)
    wait()
    start = clock()
    decode(model, cache, token, steps)
    wait()
    seconds = clock() - start
    return {
        "tokens_per_s": batch * steps / seconds,
        "token_ms": 1000 * seconds / steps,
        "cache_bytes": size.cache_bytes(cache),
    }


def decode(model: PreTrainedModel, cache: Cache, token: Tensor, steps: int) -> Tensor:
    """Greedy steps from a token [B, 1]; returns the last token, [B, 1]."""
    for _ in range(steps):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    return token
