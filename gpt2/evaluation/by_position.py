"""What compression costs by position: in text that the model writes itself, and along a long context.

Errors of a cache may add up: a model that reads its own compressed past drifts away from what it would have said. Two
measurements show it. Continuations are sampled with the uncompressed cache and fed through each compressed one, so that
at every position both predict the next token of the same text; and greedy decoding with each cache is compared with the
uncompressed cache's up to the first token that differs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from gpt2.evaluation.asking import greedy
from gpt2.evaluation.perplexity import BASELINE, CacheFactory, Scores
from gpt2.evaluation.statistics import mean_interval
from gpt2.models.loading import LoadedModel
from gpt2.text import self_text

NO_TOKEN = 2**31 - 1  # an id that no vocabulary has
PART = "long generation"  # names the streams of random numbers; no part of a text has this name


def continuations(loaded: LoadedModel, prompts: Tensor, tokens: int, seed: int = 0) -> Tensor:
    """Prompts [n, P] continued by `tokens` tokens, sampled at temperature 1 with the uncompressed cache: [n, P + T].

    Raises PluginError for a context longer than the model's.
    """
    loaded.require_context(prompts.shape[1], "--prompt-tokens", after=tokens, after_flag="--new-tokens")
    streams = self_text.uniforms(PART, tokens + 1, len(prompts), seed)
    # One at a time, as a batch rounds differently: the first continuation must be the same however many there are
    pairs = zip(streams.split(1), prompts.split(1), strict=True)
    return torch.cat([self_text.sample(loaded, stream, prompts=prompt) for stream, prompt in pairs])


def by_position(baseline: Scores, other: Scores, bins: int, first: int = 0, seed: int = 0) -> list[dict]:
    """Loss of one cache in bins of positions, as results files have it; the scores must have KL.

    first: index of the first prediction that counts, such as the last token of a prompt. `position` is the number of
    predictions before a bin, counted from `first`. `kl_nats_by_segment` are the means that the interval is made of,
    which needs two segments; Δ perplexity is over all tokens of the bin.
    """
    kl, agree, worse = other.kl[:, first:], other.agree[:, first:], (other.nll - baseline.nll)[:, first:]
    edges = np.linspace(0, kl.shape[1], min(bins, kl.shape[1]) + 1).round().astype(int).tolist()
    rows = []
    for start, end in zip(edges, edges[1:], strict=False):
        each = kl[:, start:end].mean(1)
        rows.append({
            "position": start,
            "tokens": (end - start) * len(kl),
            "kl_nats": float(each.mean()),
            "kl_nats_interval": list(mean_interval(each, seed)) if len(each) > 1 else None,
            "kl_nats_by_segment": each.tolist(),
            "top1_agreement": float(agree[:, start:end].mean()),
            "ppl_delta": math.expm1(worse[:, start:end].mean()),
        })  # fmt: skip
    return rows


@torch.no_grad()
def divergence(
    loaded: LoadedModel, prompts: Tensor, caches: Mapping[str, CacheFactory], tokens: int, progress=iter
) -> dict[str, list[int]]:
    """For each cache but the baseline and each prompt [n, P], how many greedy tokens are those of the baseline.

    It is `tokens` where nothing differs. Decoding doesn't stop at an end token, after which a model goes on as in
    training. progress: wraps the iterable of prompts, such as tqdm. Raises PluginError for a context longer than the
    model's.
    """
    loaded.require_context(prompts.shape[1], "--prompt-tokens", after=tokens, after_flag="--greedy-tokens")
    same: dict[str, list[int]] = {name: [] for name in caches if name != BASELINE}
    for prompt in progress(prompts):
        ids = prompt[None].to(loaded.device)

        def decoded(name: str, ids: Tensor = ids) -> Tensor:
            return greedy(loaded, caches[name](), ids, tokens, eos_token_id=NO_TOKEN)[0]

        reference = decoded(BASELINE)
        for name, counts in same.items():
            differs = (decoded(name) != reference).nonzero()
            counts.append(int(differs[0]) if len(differs) else tokens)
    return same
