"""Ask a model questions through a cache and compare the answers with the uncompressed cache's.

All tokens of a prompt but the last are read into the cache first, so that both figures depend on what is stored:

    exact match      greedy `generate`, the same call for every cache, gives the answer
    log-probability  of the answer's tokens, fed one after another; it changes before an answer is lost

Our caches return their reconstruction already while the prompt is read, so that even a prefill in one forward pass has
the error of compression. Caches of transformers return exact tensors in that pass, so their error shows only from the
next one on; `prefill_chunk` feeds the prompt in chunks, as a server does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from gpt2.common.errors import PluginError
from gpt2.compression.cache.size import cache_bytes
from gpt2.evaluation.perplexity import BASELINE, CacheFactory
from gpt2.evaluation.statistics import mean_interval, sign_test
from gpt2.models.loading import LoadedModel

FAILS, MATCHES, LOSES = "baseline fails", "matches", "loses"


@dataclass(frozen=True)
class Reply:
    """What one cache gives to one prompt.

    text: generated greedily. logprob: of the wanted answer, in nats. cache_bytes: held behind the prompt and the
    wanted answer without its last token.
    """

    text: str
    logprob: float
    answer_tokens: int
    prompt_tokens: int
    cache_bytes: int

    def record(self) -> dict:
        """Its figures as results files have them."""
        return {
            "generated": self.text,
            "answer_logprob_nats": self.logprob,
            "answer_tokens": self.answer_tokens,
            "prompt_tokens": self.prompt_tokens,
            "cache_bytes": self.cache_bytes,
        }


@torch.no_grad()
def reply(
    loaded: LoadedModel, make: CacheFactory, ids: Tensor, answer_ids: Tensor, max_new_tokens: int,
    prefill_chunk: int | None = None,
) -> Reply:  # fmt: skip
    """Ask one prompt ids [T], whose wanted answer is answer_ids [n], with a fresh cache."""
    cache, fed = make(), ids[None].to(loaded.device)
    for chunk in fed[:, :-1].split(loaded.chunk_of(fed.shape[1], prefill_chunk or fed.shape[1]), dim=1):
        # base_model computes no logits, which would take much memory for a long prompt
        loaded.model.base_model(input_ids=chunk, past_key_values=cache, use_cache=True)
    # Both figures need the cache of the prompt alone, and not every cache can be cropped back to it
    answered = copy.deepcopy(cache)
    log_p = _answer_log_p(loaded, answered, ids, answer_ids)
    held = cache_bytes(answered)  # not before: transformers' sliding layers keep a prompt whole until the next token
    return Reply(generated_text(loaded, cache, fed, max_new_tokens), log_p, len(answer_ids), len(ids), held)


def _answer_log_p(loaded: LoadedModel, cache: Cache, ids: Tensor, answer_ids: Tensor) -> float:
    """Log-probability of the answer, in nats, from a cache that holds the prompt without its last token."""
    fed = torch.cat((ids[-1:], answer_ids[:-1]))[None].to(loaded.device)
    logits = loaded.model(fed, past_key_values=cache, use_cache=True).logits[0].float()
    wanted = answer_ids[:, None].to(logits.device)
    return float(torch.log_softmax(logits, dim=-1).gather(-1, wanted).sum())


@contextmanager
def decoding_greedily(model: PreTrainedModel) -> Iterator[None]:
    """While the block runs, `generate` is greedy, and of the settings that the model came with only token ids count.

    With others, such as beams, n-grams that mustn't be repeated or a kind of cache, it would reject a cache, return
    something else, or keep the model from repeating what a prompt says. `generate` fills settings that a call leaves
    out from the model's own, so that these have to go.
    """
    own = model.generation_config
    ids = {name: getattr(own, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids, do_sample=False)
    try:
        yield
    finally:
        model.generation_config = own


def greedy(
    loaded: LoadedModel, cache: Cache, ids: Tensor, max_new_tokens: int, mask: Tensor | None = None, **more
) -> Tensor:
    """Tokens [B, n] that the model generates greedily after ids [B, T]; its own generation settings are overridden.

    mask: of rows with left padding, [B, T]. more: further arguments of `generate`.
    """
    tokenizer = loaded.tokenizer
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with decoding_greedily(loaded.model):
        tokens = loaded.model.generate(
            ids, attention_mask=torch.ones_like(ids) if mask is None else mask, past_key_values=cache, use_cache=True,
            max_new_tokens=max_new_tokens, pad_token_id=padding or 0, **more,
        )  # fmt: skip
    return tokens[:, ids.shape[1] :]


def generated_text(loaded: LoadedModel, cache: Cache, ids: Tensor, max_new_tokens: int) -> str:
    return loaded.tokenizer.decode(greedy(loaded, cache, ids, max_new_tokens)[0], skip_special_tokens=True)


def answers(text: str, answer: str) -> bool:
    """Whether a text starts with an answer that isn't the beginning of a longer word or number."""
    text = text.strip()
    return text.startswith(answer) and not text[len(answer) : len(answer) + 1].isalnum()


def ask_all(
    caches: Mapping[str, CacheFactory], asked: Sequence[tuple[dict, object]],
    ask: Callable[[CacheFactory, object], dict], progress=iter,
) -> list[dict]:  # fmt: skip
    """Ask every cache the same prompts; returns a record per prompt and cache, as results files have them.

    asked: pairs of a prompt's keys in its record, and the prompt. progress: wraps the iterable of pairs, such as tqdm.
    Raises PluginError for a cache that gives no finite logits.
    """
    rows = []
    for keys, prompt in progress(asked):
        for name, make in caches.items():
            record = ask(make, prompt)
            if not np.isfinite(record["answer_logprob_nats"]):
                raise PluginError(f"cache {name!r} gives NaN or infinite logits: try --dtype float32, or more bits")
            rows.append({"cache": name, **keys, **record})
    return rows


def grouped(rows: Iterable[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Records with the same values of some keys, in the order of the rows; the first key is `cache`."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def averages(group: Sequence[dict]) -> dict:
    """Figures of a cell: the means over its records."""
    return {
        "trials": len(group),
        "exact_match": mean(row["exact_match"] for row in group),
        "answer_logprob_nats": mean(row["answer_logprob_nats"] for row in group),
        "answer_logprob_nats_per_token": mean(row["answer_logprob_nats"] / row["answer_tokens"] for row in group),
        "cache_bytes": mean(row["cache_bytes"] for row in group),
    }


def works_from(chance: float) -> float:
    """The exact match from which on a baseline counts as working.

    It is halfway between guessing, which is right with probability `chance`, and always being right. Below it a cell
    can't show what compression costs.
    """
    return (1 + chance) / 2


def judge(cells: Mapping[tuple, dict], threshold: Callable[[dict], float]) -> None:
    """Add to each cell whether the baseline's cell works and, unless it is that one, its change and a verdict.

    cells: by the keys of `grouped`. Cells without a baseline's are left as they are. threshold: of a cell, as
    `works_from`.
    """
    for (_, *where), cell in cells.items():
        reference = cells.get((BASELINE, *where))
        if reference is None:
            continue
        cell["baseline_works"] = works = reference["exact_match"] >= threshold(reference)
        if cell is not reference:
            matched = MATCHES if cell["exact_match"] >= reference["exact_match"] else LOSES
            cell["logprob_change_nats"] = cell["answer_logprob_nats"] - reference["answer_logprob_nats"]
            cell["verdict"] = matched if works else FAILS


def summarize(rows: Sequence[dict], cells: Sequence[dict], seed: int = 0) -> list[dict]:
    """One record per compressed cache over all prompts, paired with the baseline's, which must be among the rows.

    A cell's verdict rests on a few trials. Pairs of prompts allow an exact sign test of the prompts that only one of
    the two caches answers, and a bootstrap interval of the change of the answer's log-probability.
    """
    by_cache = {name: own for (name,), own in grouped(rows, "cache").items()}
    reference = by_cache.pop(BASELINE)
    verdicts = [(cell["cache"], cell["verdict"]) for cell in cells if "verdict" in cell]
    return [
        {
            "cache": name,
            **paired(reference, own, seed),
            "cells": sum(cache == name for cache, _ in verdicts),
            "cells_where_baseline_works": sum(cache == name and verdict != FAILS for cache, verdict in verdicts),
            "cells_matched": verdicts.count((name, MATCHES)),
        }
        for name, own in by_cache.items()
    ]


def paired(reference: Sequence[dict], own: Sequence[dict], seed: int = 0) -> dict:
    """Figures of two caches on the same prompts, in the same order."""
    right = [(a["exact_match"], b["exact_match"]) for a, b in zip(reference, own, strict=True)]
    lost, won = right.count((True, False)), right.count((False, True))
    change = np.array(
        [b["answer_logprob_nats"] - a["answer_logprob_nats"] for a, b in zip(reference, own, strict=True)]
    )
    interval = list(mean_interval(change, seed)) if len(change) > 1 else None  # one prompt gives no interval
    return {
        "prompts": len(right),
        "baseline_exact_match": mean(first for first, _ in right),
        "exact_match": mean(second for _, second in right),
        "only_baseline_right": lost,
        "only_compressed_right": won,
        "sign_test_p": sign_test(lost, won),
        "logprob_change_nats": float(change.mean()),
        "logprob_change_nats_interval": interval,
    }


def mean(values: Iterable[float]) -> float:
    """Their mean as a Python number."""
    return float(np.mean(list(values)))
