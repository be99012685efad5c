"""Perplexity streamed through a real cache: the loss of a model that reads its own compressed K and V.

A segment is fed in chunks, as generation would feed it. The tokens of a chunk attend to what the cache returns for all
tokens before them and for themselves. Nothing is simulated, so every error of the cache shows in the loss.
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

from gpt2.common.errors import LossNotFinite, PluginError
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.evaluation.statistics import paired_bootstrap
from gpt2.models.loading import LoadedModel

BASELINE = "baseline"
CacheFactory = Callable[[], Cache]


@dataclass
class Scores:
    """Per-token measurements of one cache over segments, [segments, T − 1] each, as the first token isn't predicted.

    nll: −log p of the text's next token, in nats. kl: KL divergence of the cache's prediction from the baseline's, in
    nats. agree: whether both rank the same token first. The last two are None unless the baseline was scored beside.
    """

    nll: np.ndarray
    kl: np.ndarray | None = None
    agree: np.ndarray | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll.mean())

    def after(self, first: int) -> Scores:
        """The measurements from prediction `first` of each segment on."""
        return Scores(*(None if part is None else part[:, first:] for part in (self.nll, self.kl, self.agree)))


@dataclass
class _Pending:
    nll: list = field(default_factory=list)
    kl: list = field(default_factory=list)
    agree: list = field(default_factory=list)


def baseline_factory(loaded: LoadedModel) -> CacheFactory:
    """A factory of transformers' uncompressed cache, as generation would make it."""
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
    """Score token segments [n, T] through a fresh cache of every factory, all caches chunk by chunk.

    If one of the caches is called "baseline", it runs first, and the others also get KL and agreement. chunk: tokens
    fed at a time. progress: wraps the iterable of batches, such as tqdm. failed: if given, the error of a cache other
    than the baseline is put there, and the others continue. Raises LossNotFinite if a loss is NaN or infinite, and
    PluginError for segments of fewer than two tokens.
    """
    if segments.shape[1] < 2:
        raise PluginError(
            f"a segment has {segments.shape[1]} tokens: expected at least 2, as the first one isn't predicted"
        )
    names = sorted(caches, key=lambda name: name != BASELINE)
    pending, chunk = {name: _Pending() for name in names}, loaded.chunk_of(segments.shape[1], chunk)
    lost = {} if failed is None else failed
    for batch in progress(segments.split(batch_size)):
        parts = {name: _Pending() for name in names}
        live = {name: _keeping_reconstructions(caches[name]()) for name in names if name not in lost}
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


def _keeping_reconstructions(cache: Cache) -> Cache:
    """Let a cache of ours reconstruct each block once instead of at every chunk; the values are the same."""
    return cache.keep_reconstructed() if isinstance(cache, CompressedDynamicCache) else cache


@contextmanager
def _kept_apart(name: str, failed: dict[str, Exception] | None):
    """Put an error of one cache into `failed`, unless there is no such dict or it is the baseline's."""
    try:
        yield
    except Exception as error:  # third-party caches may raise anything
        if failed is None or name == BASELINE:
            raise
        failed[name] = error.with_traceback(None)  # a traceback would keep caches and logits in memory


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
    """Figures of one cache beside the baseline on the same tokens, as results files have them.

    `ppl_delta` is the relative change of perplexity; its interval is a paired bootstrap at 95 %.
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


def segment_sums(baseline: Scores, other: Scores) -> dict:
    """The sums over each segment that the figures of `compare` follow from, as results files have them.

    `predictions` per segment, and for each segment the sums in nats of both losses and, unless the cache is the
    baseline, of KL. With them one segment alone can be measured again and compared.
    """
    sums = {
        "predictions": other.nll.shape[1],
        "baseline_nll": baseline.nll.sum(1).tolist(),
        "nll": other.nll.sum(1).tolist(),
    }
    return sums if other.kl is None else sums | {"kl_nats": other.kl.sum(1).tolist()}
