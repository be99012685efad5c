"""Answers that a model generates greedily with a cache, in batches, and the file in which they are kept.

All tokens of the prompts but the last are read into the cache first, as in `evaluation.asking`, so that already the
first token of an answer depends on what is stored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicLayer

from gpt2.common import files, provenance
from gpt2.common.errors import PluginError
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.cache.mixed_layers import map_states
from gpt2.evaluation.asking import greedy
from gpt2.evaluation.humaneval.prompts import cut
from gpt2.evaluation.perplexity import CacheFactory
from gpt2.evaluation.row_caches import RowsCache
from gpt2.models.loading import LoadedModel

FIRST_TOKENS = 16  # of an answer, whose log-probability is recorded
LOOKED_AT = 16  # latest tokens in which a stop is searched; every stop is shorter in characters
PHASE = 32  # tokens generated before rows that have ended leave their batch


@dataclass(frozen=True)
class Completion:
    """An answer without its stop. tokens: generated ones, the stop's included. finished: False if cut at the limit.

    first_logprob_nats: sum over the first FIRST_TOKENS tokens of the log-probability that the model gave them. commit:
    of the code that generated it, None outside git.
    """

    text: str
    tokens: int
    finished: bool
    first_logprob_nats: float
    prompt_tokens: int
    commit: str | None


class Kept:
    """A JSONL file of completions, each with a key that says what made it; rewritten whole at every change.

    A rerun takes from it what has the same key, so that an interrupted run goes on with the problem where it stopped.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lines = self._read()

    def _read(self) -> dict[tuple[str, str], dict]:
        found = {}
        try:
            for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else ():
                record = json.loads(line)
                self._completion(record)
                found[record["key"], record["task_id"]] = record
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PluginError(f"{self.path}: expected completions of an earlier run ({error}): remove it") from error
        return found

    def get(self, key: str, task_id: str) -> Completion | None:
        record = self.lines.get((key, task_id))
        return None if record is None else self._completion(record)

    def add(self, cache: str, keys: Mapping[str, str], made: Sequence[Completion]) -> None:
        """Keep completions of a cache. keys: their task_ids and keys."""
        for (task_id, key), completion in zip(keys.items(), made, strict=True):
            self.lines[key, task_id] = {"cache": cache, "task_id": task_id, "key": key, **asdict(completion)}
        self.lines = self._read() | self.lines  # another run may have added its own meanwhile
        with files.atomic(self.path) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in self.lines.values()), encoding="utf-8")

    @staticmethod
    def _completion(record: dict) -> Completion:
        return Completion(**{name: record[name] for name in Completion.__dataclass_fields__})


class _Stop(StoppingCriteria):
    """Ends a row where its latest tokens have one of some stops; `ended` has each row's number of tokens then."""

    def __init__(self, tokenizer, asked: int, stops: Sequence[str], rows: int):
        self.tokenizer, self.asked, self.stops = tokenizer, asked, stops
        self.ended: list[int | None] = [None] * rows

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        new = input_ids[:, self.asked :]
        for row, tail in enumerate(self.tokenizer.batch_decode(new[:, -LOOKED_AT:])):
            if self.ended[row] is None and any(stop in tail for stop in self.stops):
                self.ended[row] = new.shape[1]
        return torch.tensor([end is not None for end in self.ended], device=input_ids.device)


class _FirstLogProbs(LogitsProcessor):
    """Changes nothing; notes the log-probability of the token that greedy decoding takes, [B] for each first token."""

    def __init__(self):
        self.taken: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(self.taken) < FIRST_TOKENS:
            self.taken.append(torch.log_softmax(scores.float(), dim=-1).amax(-1).cpu())
        return scores


@torch.no_grad()
def complete(
    loaded: LoadedModel, make: CacheFactory, prompts: Sequence[Tensor], stops: Sequence[str], max_new_tokens: int,
    prefill_chunk: int | None = None, apart: bool = False,
) -> list[Completion]:  # fmt: skip
    """Continue prompts [T] each, as one batch with left padding and a fresh cache, or a cache per row if `apart`.

    Raises PluginError for a cache that gives no finite logits.
    """
    ids, mask = padded(loaded, prompts)
    cache = RowsCache(make, (mask == 0).sum(-1).tolist()) if apart else make()
    if isinstance(cache, CompressedDynamicCache):
        cache.keep_reconstructed()  # the same values, each block reconstructed once instead of at every token
    _read(loaded, cache, ids, mask, prefill_chunk)
    answers, first = _generate(loaded, cache, ids, mask, stops, max_new_tokens)
    if not np.isfinite(first).all():
        raise PluginError("the model's logits are NaN or infinite with this cache: try --dtype float32, or more bits")
    commit = provenance.git_commit()
    return [
        Completion(cut(loaded.tokenizer.decode(tokens, skip_special_tokens=True), stops), len(tokens), finished,
                   float(own[: len(tokens)].sum()), len(prompt), commit)
        for (tokens, finished), own, prompt in zip(answers, first, prompts, strict=True)
    ]  # fmt: skip


def _generate(
    loaded: LoadedModel, cache: Cache, ids: Tensor, mask: Tensor, stops: Sequence[str], max_new_tokens: int
) -> tuple[list[tuple[Tensor, bool]], np.ndarray]:
    """Each row's tokens [n] and whether it has ended, and log-probabilities [B, FIRST_TOKENS] of its first tokens.

    A row that has ended leaves the batch after its phase, so that one long answer doesn't cost as many as there are
    rows. Before, `generate` fills it up with tokens that are no part of its answer.
    """
    asked, logprobs = ids.shape[1], _FirstLogProbs()
    answers: list[tuple[Tensor, bool]] = [(ids[0, :0], False)] * len(ids)
    rows = torch.arange(len(ids), device=ids.device)
    for made in range(0, max_new_tokens, PHASE):
        stop = _Stop(loaded.tokenizer, asked, stops, len(rows))
        new = greedy(
            loaded, cache, ids, min(PHASE, max_new_tokens - made), mask,
            stopping_criteria=StoppingCriteriaList([stop]),
            logits_processor=LogitsProcessorList([] if made else [logprobs]),
        )  # fmt: skip
        ids, mask = torch.cat((ids, new), dim=1), torch.cat((mask, torch.ones_like(new)), dim=1)
        for at, row in enumerate(rows.tolist()):
            length, ended = _length(loaded, ids[at, asked:], stop.ended[at])
            answers[row] = ids[at, asked : asked + length], ended
        left = torch.tensor([not answers[row][1] for row in rows.tolist()], device=ids.device).nonzero()[:, 0]
        if not len(left):
            break
        if len(left) < len(rows):
            select_rows(cache, left)
            rows, ids, mask = rows[left], ids[left], mask[left]
    return answers, torch.stack(logprobs.taken, dim=1).double().numpy()


def select_rows(cache: Cache, rows: Tensor) -> None:
    """Keep the rows [n] of a cache, ours or transformers' own, whose selection leaves out recurrent states."""
    if isinstance(cache, CompressedDynamicCache):
        cache.batch_select_indices(rows)
        return
    if isinstance(cache, RowsCache):
        cache.select(rows)
        return
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer):  # the others keep no K and V
            layer.batch_select_indices(rows)
        map_states(layer, lambda state: state[rows.to(state.device)])


def padded(loaded: LoadedModel, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts [T] each as ids and mask [B, longest T], padded on the left."""
    longest, padding = max(map(len, prompts)), loaded.tokenizer.pad_token_id or 0
    missing = [longest - len(prompt) for prompt in prompts]
    rows = zip(prompts, missing, strict=True)
    ids = torch.stack([torch.nn.functional.pad(prompt, (n, 0), value=padding) for prompt, n in rows])
    mask = torch.stack([(torch.arange(longest) >= n).long() for n in missing])
    return ids.to(loaded.device), mask.to(loaded.device)


def _read(loaded: LoadedModel, cache: Cache, ids: Tensor, mask: Tensor, chunk: int | None) -> None:
    """Read all tokens but the last into a cache, `chunk` at a time, or all at once."""
    positions, end = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1), ids.shape[1] - 1
    alone = {} if bool(mask.all()) else {"position_ids": positions}  # some models take no position_ids
    step = max(end, 1)  # a prompt of one token leaves nothing to read
    if chunk:
        step = min(step, loaded.chunk_of(ids.shape[1], chunk))
    for start in range(0, end, step):
        part = slice(start, min(start + step, end))
        where = {name: value[:, part] for name, value in alone.items()}
        # base_model computes no logits, which would take much memory for a long prompt
        loaded.model.base_model(
            input_ids=ids[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache, use_cache=True, **where
        )


def _length(loaded: LoadedModel, tokens: Tensor, stopped: int | None) -> tuple[int, bool]:
    """How many tokens [n] of a row are its own, and whether it ended by a stop or by an end token."""
    ends = loaded.model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends, device=tokens.device).flatten()
    lengths = (torch.isin(tokens, ends).nonzero()[:1, 0] + 1).tolist() + ([] if stopped is None else [stopped])
    return (min(lengths), True) if lengths else (len(tokens), False)
