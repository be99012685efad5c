"""One conversation through several caches: bytes, perplexity of the document, time per token and the answer of each.

A conversation is a document that fills the cache and a question whose answer is decoded from it. The document is fed
in chunks, and its perplexity is measured in the same pass: the tokens of a chunk attend to what the cache returns for
all tokens before them and for themselves, as in `perplexity.score`.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from gpt2.common.errors import LossNotFinite, PluginError
from gpt2.compression.cache.attention import is_enabled
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.cache.size import held_bytes, plain_bytes
from gpt2.compression.named_caches import CacheChoice
from gpt2.evaluation.asking import decoding_greedily
from gpt2.evaluation.perplexity import Scores, baseline_factory, compare
from gpt2.models.loading import LoadedModel
from gpt2.text import sources
from gpt2.text.texts import no_tokens, start_tokens

UNCOMPRESSED = "uncompressed"
TIMED_TOKENS = 5  # of the answer; the first one's step also reads the question, so four steps are timed
PLACE = "DOCUMENT-GOES-HERE"  # stands for the document while the chat template is rendered


@dataclass(frozen=True)
class Conversation:
    """Token ids [n] each: the text before the document, the document, and the text after it up to the answer."""

    start: Tensor
    document: Tensor
    question: Tensor

    def __len__(self) -> int:
        return sum(len(part) for part in (self.start, self.document, self.question))


@dataclass
class Reading:
    """Measurements of one cache on a conversation.

    cached_bytes: of `tokens` tokens in a model that runs in 16 bits; tokens: of the conversation with the longest
    answer allowed, the same for all caches, as answers may end at different lengths. codec_bytes: of the basis, which
    all conversations share. direct: whether attention read the stored codes. scores: of the document's tokens, [1, n].
    step_ms: milliseconds of each timed step.
    """

    label: str
    tokens: int
    cached_bytes: int
    codec_bytes: int
    direct: bool
    scores: Scores
    step_ms: list[float]
    answer: str

    def record(self, baseline: Reading) -> dict:
        """The figures as results files have them, with Δ perplexity and ratio against the uncompressed cache."""
        figures = {"cache": self.label, "context_tokens": self.tokens, "direct": self.direct, "answer": self.answer}
        figures |= {"bytes": self.cached_bytes, "codec_bytes": self.codec_bytes}
        figures |= {"compression_ratio": baseline.cached_bytes / self.cached_bytes}
        figures |= {"token_ms": self.step_ms, "token_ms_median": float(np.median(self.step_ms))} if self.step_ms else {}
        return figures | compare(baseline.scores, self.scores)


def read_document(spec: str, loaded: LoadedModel, most: int) -> Tensor:
    """The last `most` tokens of a text file, or of the evaluation part of a text such as `embedded`, [n].

    Calibration and tuning never use the evaluation part. Raises PluginError if there is no such text.
    """
    text = sources.load_text(spec)
    parts = sources.PARTS if os.path.isfile(os.path.expanduser(spec)) else ("evaluation",)
    return torch.cat([text.tokens(part, loaded) for part in parts])[-most:]


def about_document(loaded: LoadedModel, document: Tensor, question: str) -> Conversation:
    """A question about a document in the model's chat template, or in plain text if the model has no template.

    Raises PluginError for a template that doesn't show the user's message exactly once.
    """
    tokenizer = loaded.tokenizer
    if not tokenizer.chat_template:
        return Conversation(start_tokens(tokenizer), document, _encode(loaded, f"\n\nQuestion: {question}\nAnswer:"))
    message = {"role": "user", "content": f"{PLACE}\n\n{question}"}
    words = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    if words.count(PLACE) != 1:
        raise PluginError(
            f"the chat template of {loaded.spec} doesn't show the user's message exactly once: use --prompt"
        )
    before, after = words.split(PLACE)
    return Conversation(_encode(loaded, before), document, _encode(loaded, after))


def to_continue(loaded: LoadedModel, prompt: str) -> Conversation:
    """A plain text to continue. Its last token is left for the decoder. Raises PluginError if it is too short."""
    start, ids = start_tokens(loaded.tokenizer), _encode(loaded, prompt)
    if prompt.strip() and not len(ids):
        raise no_tokens("the prompt")
    if len(ids) < (fewest := 2 if len(start) else 3):
        raise PluginError(f"the prompt has {len(ids)} tokens: expected at least {fewest}, so give a longer one")
    return Conversation(start, ids[:-1], ids[-1:])


def _encode(loaded: LoadedModel, words: str) -> Tensor:
    return loaded.tokenizer(words, return_tensors="pt", add_special_tokens=False).input_ids[0].long()


@torch.no_grad()
def read(
    loaded: LoadedModel,
    conversation: Conversation,
    choice: CacheChoice | None,
    *,
    max_new_tokens: int,
    chunk: int = 1024,
    progress=iter,
) -> Reading:
    """Fill a fresh cache with the document and decode an answer, greedily.

    choice: None is the uncompressed cache of transformers. chunk: tokens fed at a time. progress: wraps the iterable of
    chunks, such as tqdm. A model with compressed attention enabled reads the cache as it is stored, if it can. Raises
    PluginError for a document without a token that is predicted from one before it.
    """
    if len(conversation.document) < (fewest := 1 if len(conversation.start) else 2):
        raise PluginError(
            f"the document has {len(conversation.document)} tokens: expected at least {fewest}, as perplexity is of "
            "tokens behind another one: give a longer one, or more --document-tokens"
        )
    cache = choice.make() if choice else baseline_factory(loaded)()
    scores = _fill(loaded, cache, conversation, chunk, progress, choice.label if choice else UNCOMPRESSED)
    new, step_ms = _answer(loaded, cache, conversation, max_new_tokens)
    answer = loaded.tokenizer.decode(new, skip_special_tokens=True).strip()
    tokens = len(conversation) + max_new_tokens - 1  # the last new token is never fed
    if choice is None:
        size = plain_bytes(loaded.geometry, tokens)
        return Reading(UNCOMPRESSED, tokens, size, 0, False, scores, step_ms, answer)
    size, direct = held_bytes(choice.make, loaded.geometry, tokens), cache.readable and is_enabled(loaded.model)
    return Reading(choice.label, tokens, size, cache.codec_bytes(), direct, scores, step_ms, answer)


def _fill(loaded: LoadedModel, cache: Cache, conversation: Conversation, chunk: int, progress, name: str) -> Scores:
    """Feed start and document; scores of the document's tokens, except a first token without a token before it.

    Raises LossNotFinite, with the cache's name, where a loss is NaN or infinite.
    """
    ids = torch.cat((conversation.start, conversation.document)).to(loaded.device)
    nll, chunk = [], loaded.chunk_of(len(ids), chunk)
    for at in progress(range(0, len(ids), chunk)):
        labels = ids[at + 1 : at + chunk + 1]
        logits = loaded.model(ids[None, at : at + chunk], past_key_values=cache, use_cache=True).logits[0]
        nll.append(torch.nn.functional.cross_entropy(logits[: len(labels)].float(), labels, reduction="none").cpu())
    scored = torch.cat(nll)[max(len(conversation.start) - 1, 0) :].double().numpy()[None]
    if not np.isfinite(scored).all():
        raise LossNotFinite(f"the loss with cache {name!r} is NaN or infinite: try --dtype float32, or more bits", name)
    return Scores(scored)


def _answer(
    loaded: LoadedModel, cache: Cache, conversation: Conversation, max_new_tokens: int
) -> tuple[Tensor, list[float]]:
    """New tokens [n] after the question, and milliseconds of the first steps.

    After the timed steps a compressed cache keeps its reconstruction, which makes the rest faster and changes no token.
    """
    ids = torch.cat((conversation.start, conversation.document, conversation.question)).to(loaded.device)
    clock, asked = _Clock(), len(ids)
    ids = _generate(loaded, cache, ids, min(TIMED_TOKENS, max_new_tokens), clock)
    if len(ids) - asked == TIMED_TOKENS < max_new_tokens and not _ended(loaded, ids):
        if isinstance(cache, CompressedDynamicCache):
            cache.keep_reconstructed()
        ids = _generate(loaded, cache, ids, max_new_tokens - TIMED_TOKENS)
    return ids[asked:], clock.steps_ms()


def _ended(loaded: LoadedModel, ids: Tensor) -> bool:
    """Whether the last token is one that ends an answer: `generate` wouldn't see it in a prompt."""
    ends = loaded.model.generation_config.eos_token_id
    return ids[-1].item() in (ends if isinstance(ends, list) else [ends])


def _generate(loaded: LoadedModel, cache: Cache, ids: Tensor, most: int, clock: _Clock | None = None) -> Tensor:
    with decoding_greedily(loaded.model):
        return loaded.model.generate(
            ids[None], attention_mask=torch.ones_like(ids)[None], past_key_values=cache, use_cache=True,
            max_new_tokens=most, streamer=clock,
        )[0]  # fmt: skip


class _Clock(BaseStreamer):
    """A streamer that records when `generate` emits the prompt and each token, which waits for the GPU."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def steps_ms(self) -> list[float]:
        """Milliseconds of the steps that read one token each: from the first new token to the second, and so on."""
        return [1000 * (b - a) for a, b in zip(self.times[1:], self.times[2:], strict=False)]
