"""Latency, throughput and memory of caches in one model, side by side in one process.

A cell is a context length and a batch size. In it every cache is filled by one prefill and decoded from, greedily and
by the same loop, with a fresh cache each time. Caches take turns, in an order that turns round with every repeat, so
that whatever slows the machine for a while slows them all; ratios pair the runs of one repeat.
"""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from gpt2.common.errors import is_out_of_memory
from gpt2.compression.cache.size import cache_bytes
from gpt2.evaluation.instruments import Memory, Stopwatch, cuda_devices, peak_memory, synchronizer, watched
from gpt2.evaluation.perplexity import BASELINE, CacheFactory
from gpt2.evaluation.statistics import spread
from gpt2.models.loading import LoadedModel

WARM_TOKENS, WARM_STEPS = 16, 2
clock = time.perf_counter


@dataclass(frozen=True)
class Run:
    """One cache, filled and decoded from once. decode_s is of all steps; tokens [B, 1 + steps] came out."""

    prefill_s: float
    decode_s: float
    tokens: Tensor
    held_bytes: int

    @property
    def token_ms(self) -> float:
        """Milliseconds per step: each gives one token to every sequence of the batch."""
        return 1000 * self.decode_s / (self.tokens.shape[1] - 1)


@dataclass(frozen=True)
class Inside:
    """What the instruments saw: memory of a prefill and a few steps; of the steps after, their time by part."""

    memory: Memory
    share: dict[str, float]
    token_ms: float


def measure_cell(
    loaded: LoadedModel,
    caches: Mapping[str, CacheFactory],
    context_tokens: int,
    batch_size: int,
    *,
    decode_tokens: int = 16,
    repeats: int = 3,
    seed: int = 0,
    progress=iter,
) -> list[dict]:
    """Measure caches, by name, at one context length and batch size; one results record per cache.

    Contexts are random tokens: what they say changes no time. decode_tokens: steps per run, from a cache that holds
    `context_tokens` at first. With a cache called "baseline" among them the others get ratios to it, paired by repeat.
    progress: wraps the iterable of runs, such as tqdm. A cache that doesn't fit in memory is recorded as such.
    """
    prompt = random_tokens(loaded, batch_size, context_tokens, seed)
    measured = {name: _Measured() for name in caches}
    for make in caches.values():
        run_once(loaded.model, make(), prompt[:1, :WARM_TOKENS], WARM_STEPS)
    # Turn 0 is the instruments', and warms up what depends on shapes
    turns = [(n, name) for n in range(repeats + 1) for name in (list(caches)[::-1] if n % 2 else caches)]
    for turn, name in progress(turns):
        if not measured[name].too_large:
            measured[name].take(turn, loaded.model, caches[name], prompt, decode_tokens)
    baseline = measured.get(BASELINE)
    cell = {"context_tokens": context_tokens, "batch_size": batch_size}
    return [
        {"cache": name, **cell, **own.record(baseline if name != BASELINE else None)} for name, own in measured.items()
    ]


@dataclass
class _Measured:
    """What is known of one cache in one cell."""

    inside: Inside | None = None
    runs: list[Run] = field(default_factory=list)
    too_large: bool = False

    def take(self, turn: int, model: PreTrainedModel, make: CacheFactory, prompt: Tensor, steps: int) -> None:
        """One run with a fresh cache: with instruments in turn 0, timed in the others."""
        try:
            if turn:
                self.runs.append(run_once(model, make(), prompt, steps))
            else:
                self.inside = look_inside(model, make(), prompt, steps)
        except Exception as error:  # which of many exceptions it is depends on the device
            if not is_out_of_memory(error):
                raise
            self.too_large = True
        if self.too_large and torch.cuda.is_available():  # only here is the error gone, and the tensors it held on to
            torch.cuda.empty_cache()

    def record(self, baseline: _Measured | None) -> dict:
        """Figures as results files have them, with ratios to the baseline's runs where there are any."""
        if self.too_large:
            return {"out_of_memory": True}
        figures = _figures(self.runs, self.inside)
        if baseline and not baseline.too_large:
            figures["ratio_to_baseline"] = _ratios(self.runs, baseline.runs)
        return figures


@torch.no_grad()
def run_once(model: PreTrainedModel, cache: Cache, prompt: Tensor, steps: int) -> Run:
    """Fill an empty cache with a prompt [B, T] and decode `steps` more tokens, on the clock."""
    wait, last_only = synchronizer(model), _last_logits_only(model)
    with _no_garbage_collection():
        wait()
        start = clock()
        tokens = [_next(model, cache, prompt, **last_only)]
        wait()
        filled = clock()
        tokens += _decode(model, cache, tokens[-1], steps)
        wait()
        end = clock()
    return Run(filled - start, end - filled, torch.cat(tokens, dim=1), cache_bytes(cache))


@torch.no_grad()
def look_inside(model: PreTrainedModel, cache: Cache, prompt: Tensor, steps: int) -> Inside:
    """The same with instruments: memory until the prompt's length is held, then where the time of steps goes.

    The last tokens of the prompt are left to steps that aren't watched: they warm up, and take a step's memory.
    """
    with peak_memory(cuda_devices(model)) as memory:
        most = prompt[:, : max(prompt.shape[1] - WARM_STEPS, 1)]
        token = _next(model, cache, most, **_last_logits_only(model))
        token = _decode(model, cache, token, WARM_STEPS)[-1]
    watch = Stopwatch(synchronizer(model))
    with watched(model, watch):
        _decode(model, cache, token, steps)
    return Inside(memory, watch.shares(), 1000 * sum(watch.seconds.values()) / steps)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """It would come by chance, in one cache's time or another's, and take longer than a step of a small model."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _last_logits_only(model: PreTrainedModel) -> dict:
    """How generation calls a prefill too: logits of a whole prompt could take more memory than all the rest."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _next(model: PreTrainedModel, cache: Cache, tokens: Tensor, **settings) -> Tensor:
    """Read tokens [B, n] in one forward pass; the likeliest token after them, [B, 1]."""
    return model(tokens, past_key_values=cache, use_cache=True, **settings).logits[:, -1:].argmax(-1)


def _decode(model: PreTrainedModel, cache: Cache, token: Tensor, steps: int) -> list[Tensor]:
    """Greedy steps from a token [B, 1]; nothing waits for a GPU in between, as nothing here needs to see a token."""
    tokens = []
    for _ in range(steps):
        token = _next(model, cache, token)
        tokens.append(token)
    return tokens


def random_tokens(loaded: LoadedModel, batch_size: int, count: int, seed: int) -> Tensor:
    """Random token ids [batch_size, count], on the model's device."""
    vocabulary = loaded.model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (batch_size, count), generator=generator).to(loaded.device)


def _figures(runs: Sequence[Run], inside: Inside) -> dict:
    prefill, token = [1000 * run.prefill_s for run in runs], [run.token_ms for run in runs]
    batch = len(runs[0].tokens)
    return {
        "ttft_ms": prefill,
        "token_ms": token,
        **spread("ttft_ms", prefill),
        **spread("token_ms", token),
        **spread("tokens_per_s", [1000 * batch / ms for ms in token]),
        "cache_bytes": runs[-1].held_bytes,
        "peak_memory_bytes": inside.memory.peak,
        "peak_memory_over_start_bytes": inside.memory.peak - inside.memory.start,
        "instrumented_token_ms": inside.token_ms,
        "share_of_step": inside.share,
    }


def _ratios(runs: Sequence[Run], baseline: Sequence[Run]) -> dict:
    """Own figure over the baseline's, run by run: what slowed both at the time cancels out."""
    pairs = list(zip(runs, baseline, strict=True))
    return {
        **spread("ttft", [own.prefill_s / other.prefill_s for own, other in pairs]),
        **spread("token_time", [own.token_ms / other.token_ms for own, other in pairs]),
        **spread("tokens_per_s", [other.token_ms / own.token_ms for own, other in pairs]),
        "cache_bytes": runs[-1].held_bytes / baseline[-1].held_bytes,
    }
