"""Perplexity streamed through a real cache: what a model thinks of a text while it reads its own compressed memory.

A segment is fed in chunks, as generation would; the tokens of a chunk attend to what the cache gives back for all
tokens before them and for themselves. Nothing is simulated, so what the cache does wrong shows here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from gpt2.common.errors import LossNotFinite
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.evaluation.statistics import paired_bootstrap
from gpt2.models.loading import LoadedModel

BASELINE = "baseline"
CacheFactory = Callable[[], Cache]


@dataclass
class Scores:
    """Per-token measurements of one cache over segments, [segments, T − 1] each: token 0 has nothing before it.

    nll: −log p of the text's next token, in nats. kl: KL divergence of the cache's prediction from the baseline's.
    agree: whether both put the same token first. The last two only where the baseline ran beside it.
    """

    nll: np.ndarray
    kl: np.ndarray | None = None
    agree: np.ndarray | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll.mean())


@dataclass
class _Pending:
    nll: list = field(default_factory=list)
    kl: list = field(default_factory=list)
    agree: list = field(default_factory=list)


def baseline_factory(loaded: LoadedModel) -> CacheFactory:
    """The uncompressed cache of transformers, as generation would make it."""
    return lambda: DynamicCache(config=loaded.model.config)


@torch.no_grad()
def score(
    loaded: LoadedModel,
    segments: Tensor,
    caches: Mapping[str, CacheFactory],
    *,
    chunk: int = 64,
    batch_size: int = 4,
    progress=iter,
    failed: dict[str, Exception] | None = None,
) -> dict[str, Scores]:
    """Score token segments [n, T] through a fresh cache of every factory, in lockstep.

    With a cache called "baseline" among them, which then runs first, the others get KL and agreement as well.
    progress: wraps the iterable of batches, such as tqdm. Raises LossNotFinite where a loss isn't finite. failed:
    given, a cache other than the baseline that raises goes there with its error, and the others go on without it.
    """
    names = sorted(caches, key=lambda name: name != BASELINE)
    pending = {name: _Pending() for name in names}
    lost = {} if failed is None else failed
    for batch in progress(segments.split(batch_size)):
        parts = {name: _Pending() for name in names}
        live = {name: _quick(caches[name]()) for name in names if name not in lost}
        for start in range(0, batch.shape[1], chunk):
            _score_chunk(loaded, batch, start, chunk, live, parts, failed)
        for name, part in parts.items():
            for measure, values in vars(part).items():
                if values:
                    getattr(pending[name], measure).append(torch.cat(values, dim=1).cpu())
    scores = {}
    for name in names:
        with _kept_apart(name, failed):
            if name not in lost:
                scores[name] = _finish(name, pending[name])
    return scores


def _quick(cache: Cache) -> Cache:
    """A cache of ours expands each block once: every chunk reads all of them, and what it reads is the same."""
    return cache.keep_expanded() if isinstance(cache, CompressedDynamicCache) else cache


@contextmanager
def _kept_apart(name: str, failed: dict[str, Exception] | None):
    """Put what one cache raises into `failed`, where there is such a dict and it isn't the baseline."""
    try:
        yield
    except Exception as error:  # of other people's code: it may be any
        if failed is None or name == BASELINE:
            raise
        failed[name] = error.with_traceback(None)  # which would keep its caches and logits alive


def _score_chunk(
    loaded: LoadedModel, batch: Tensor, start: int, chunk: int, live: dict, parts: dict, failed: dict | None
) -> None:
    tokens = batch[:, start : start + chunk].to(loaded.device)
    labels = batch[:, start + 1 : start + chunk + 1].to(loaded.device)
    reference = None
    for name, cache in list(live.items()):
        logits = None
        with _kept_apart(name, failed):
            logits = loaded.model(tokens, past_key_values=cache, use_cache=True).logits[:, : labels.shape[1]]
        if logits is None:
            del live[name]
            continue
        log_p = torch.log_softmax(logits.float(), dim=-1)
        parts[name].nll.append(-log_p.gather(-1, labels[..., None])[..., 0])
        if name == BASELINE:
            reference = log_p
        elif reference is not None:
            kl = torch.nn.functional.kl_div(log_p, reference, reduction="none", log_target=True).sum(-1)
            parts[name].kl.append(kl)
            parts[name].agree.append(log_p.argmax(-1) == reference.argmax(-1))


def _finish(name: str, measured: _Pending) -> Scores:
    scores = Scores(*(torch.cat(values).double().numpy() if values else None for values in vars(measured).values()))
    if not np.isfinite(scores.nll).all():
        raise LossNotFinite(f"the loss with cache {name!r} is NaN or infinite: try --dtype float32, or more bits", name)
    return scores


def compare(baseline: Scores, other: Scores, seed: int = 0) -> dict:
    """The figures of one cache beside the baseline on the same tokens, as results files have them.

    `ppl_delta` is relative; its interval is a paired bootstrap at 95 %.
    """
    difference = other.nll - baseline.nll
    record = {
        "ppl": other.perplexity,
        "baseline_ppl": baseline.perplexity,
        "ppl_delta": math.expm1(difference.mean()),
        "ppl_delta_interval": list(paired_bootstrap(difference, seed)),
        "tokens": int(difference.size),
    }
    if other.kl is not None:
        record |= {"kl_nats": float(other.kl.mean()), "top1_agreement": float(other.agree.mean())}
    return record
