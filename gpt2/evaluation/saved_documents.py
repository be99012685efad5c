"""A document that is read once into a file and asked many times: what scripts/cache_tool.py does."""

from __future__ import annotations

import logging
import math
import random
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import TextStreamer

from gpt2.common.errors import BadArtefact
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.cache.recoding import held
from gpt2.compression.codecs.formats import BLOCK
from gpt2.compression.named_caches import CacheChoice
from gpt2.evaluation.asking import decoding_greedily
from gpt2.evaluation.side_by_side import about_document, read_document
from gpt2.models.geometry import FULL
from gpt2.models.loading import LoadedModel

log = logging.getLogger(__name__)
ALL = 2**31  # tokens, more than any document has
SAME = 0.5  # difference of recomputed tokens, against their spread, up to which they are the same: others have 1.4


def document_ids(spec: str, loaded: LoadedModel, most: int | None = None) -> Tensor:
    """What a cache of a document holds, [n]: the chat template up to the document, and its first `most` tokens.

    spec: as of `side_by_side.read_document`. Raises PluginError if there is no such text, or if it is longer than the
    model's context.
    """
    conversation = about_document(loaded, read_document(spec, loaded, ALL)[:most], "")
    loaded.require_context(len(conversation.document), "--document-tokens", after=len(conversation.start))
    return torch.cat((conversation.start, conversation.document))


@torch.no_grad()
def read(
    loaded: LoadedModel,
    choice: CacheChoice,
    ids: Tensor,
    output: Path,
    *,
    chunk: int = 1024,
    save_every_s: float = 60,
    progress=iter,
) -> CompressedDynamicCache:
    """Read tokens ids [n] into a cache, and save it.

    chunk: tokens fed at a time. save_every_s: seconds after which what is read so far is saved beside `output`; a run
    that is started again goes on from there, as the KeyboardInterrupt of a Ctrl-C then says. progress: wraps the
    iterable of chunks.
    """
    part = output.with_name(f".{output.name}.part")
    cache, chunk = _begun(part, loaded, choice, ids), loaded.chunk_of(len(ids), chunk)
    kept, saved_at = cache.get_seq_length(), time.monotonic()
    try:
        for at in progress(range(kept, len(ids), chunk)):
            loaded.model(ids[None, at : at + chunk].to(loaded.device), past_key_values=cache, use_cache=True)
            if at + chunk < len(ids) and time.monotonic() - saved_at >= save_every_s:
                cache.save(part, token_ids=ids[: at + chunk], model=loaded)
                kept, saved_at = at + chunk, time.monotonic()
    except KeyboardInterrupt as stop:
        if not kept:
            raise
        raise KeyboardInterrupt(f"{part} has the first {kept:,} tokens: the same command goes on from there") from stop
    cache.save(output, token_ids=ids, model=loaded)
    part.unlink(missing_ok=True)
    return cache


def _begun(part: Path, loaded: LoadedModel, choice: CacheChoice, ids: Tensor) -> CompressedDynamicCache:
    """What an interrupted run has read of the same document with the same preset, else an empty cache."""
    empty = choice.make()
    if not part.exists():
        return empty
    try:
        cache = CompressedDynamicCache.load(part, model=loaded)
    except BadArtefact as error:
        log.warning("what was read before can't be used: %s", error)
        return empty
    n = cache.get_seq_length()
    same = cache.recipe.record(part.parent) == empty.recipe.record(part.parent)
    same &= all(layer.dtype == loaded.model.dtype for layer in cache.compressed)
    if same and torch.equal(cache.token_ids[0], ids[:n]) and n < len(ids):
        log.warning("going on behind the %d tokens that were read before", n)
        return cache
    log.warning("%s is of another document, preset or dtype, so this one is read from its start", part)
    return empty


@torch.no_grad()
def ask(
    loaded: LoadedModel, cache: CompressedDynamicCache, question: str, max_new_tokens: int, *, streamed: bool = False
) -> str:
    """The answer to a question about the document that a cache holds, decoded greedily; the cache then holds both.

    streamed: print the answer as its words come. Raises PluginError if document, question and answer are longer than
    the model's context.
    """
    streamer = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True) if streamed else None
    words = about_document(loaded, torch.empty(0, dtype=torch.long), question).question
    before = cache.get_seq_length() + len(words)
    loaded.require_context(max_new_tokens, "--max-new-tokens", after=before, after_flag="--document-tokens")
    inputs = cache.inputs(new=words)
    with decoding_greedily(loaded.model):
        out = loaded.model.generate(**inputs, past_key_values=cache, max_new_tokens=max_new_tokens, streamer=streamer)
    return loaded.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def read_again_whole(loaded: LoadedModel, cache: CompressedDynamicCache) -> str | None:
    """Why `verify` can't recompute single blocks of a cache, so that it reads all tokens again; None if it can."""
    if any(layer.kind != FULL for layer in cache.geometry.layers):
        return "the model has windows or states, whose past isn't kept"
    if cache.rows > 1:
        return "the cache holds a batch, whose rows have padding of their own"
    return (
        "the model reads a text of this length in one pass" if loaded.needs_one_pass(cache.get_seq_length()) else None
    )


@torch.no_grad()
def verify(
    loaded: LoadedModel, cache: CompressedDynamicCache, blocks: int, seed: int = 0, progress=iter
) -> list[tuple[int, float]]:
    """Blocks of 64 tokens recomputed from their ids: first token of each, and the largest difference in any layer.

    The difference is the root of the squared error over the squared spread of the block's tokens; up to SAME they are
    the same. A block is recomputed behind the tokens before it as the cache holds them, so a few blocks cost little.
    Where `read_again_whole` gives a reason, all tokens are read again, and of windows the last of them compared.
    """
    ids, length = cache.token_ids, cache.get_seq_length()
    padded, how = _padding_mask(cache, loaded.device), {}
    chunk, whole = loaded.chunk_of(length, 16 * BLOCK), read_again_whole(loaded, cache) is not None
    starts = [0] if whole or length <= 2 * BLOCK else range(BLOCK, length - BLOCK + 1, BLOCK)
    if not whole and len(starts) > blocks:
        starts = sorted(random.Random(seed).sample(starts, blocks))
    found = []
    for start in progress(starts):
        again, end = cache.fork(), length if start == 0 else start + BLOCK
        again.reset() if start == 0 else again.crop(start - length)
        for at in range(start, end, chunk):
            part = slice(at, min(at + chunk, end))
            if padded is not None:  # some models take no position_ids
                positions = (padded.cumsum(-1) - 1).masked_fill(padded == 0, 1)
                how = {"attention_mask": padded[:, : part.stop], "position_ids": positions[:, part]}
            loaded.model(ids[:, part].to(loaded.device), past_key_values=again, use_cache=True, **how)
        pairs = zip(again.compressed, cache.compressed, strict=True)
        found.append((start, max(_difference(own, other, start, end, padded) for own, other in pairs)))
    return found


def _padding_mask(cache: CompressedDynamicCache, device: torch.device) -> Tensor | None:
    """A mask [B, T] that is 0 where a cache holds left padding and 1 where it holds text; None without padding."""
    if cache.padding is None:
        return None
    return (torch.arange(cache.get_seq_length()) >= cache.padding.cpu()[:, None]).long().to(device)


def _difference(own, other, start: int, end: int, mask: Tensor | None) -> float:
    """Of tokens `start` to `end` in one layer of two caches, as far as both hold them and `mask` [B, T] is 1."""
    worst = 0.0
    (*read, gone), (*expected, gone_too) = held(own), held(other)
    for found, wanted in zip(read, expected, strict=True):
        first = max(start, gone, gone_too)
        found, wanted = found[:, :, first - gone : end - gone], wanted[:, :, first - gone_too : end - gone_too]
        text = torch.ones_like(wanted[:, :1, :, :1]) if mask is None else mask[:, None, first:end, None].to(wanted)
        text, found, wanted = text.float(), found.float(), wanted.float()
        mean = (wanted * text).sum(2, keepdim=True) / text.sum(2, keepdim=True).clamp_min(1)
        spread, error = ((own.square() * text).sum() for own in (wanted - mean, found - wanted))
        off = float((error / spread.clamp_min(1e-12)).sqrt())
        worst = max(worst, math.inf if math.isnan(off) else off)  # NaN is no token's, and larger than nothing
    return worst
