"""Latency, throughput and memory of caches in one model, side by side in one process.

A cell is a context length and a batch size. In each cell every cache is filled by one prefill, or with noise where
decoding alone is measured, and then decoded from by the same greedy loop, with a fresh cache for each run. Caches take
turns, in an order that is reversed with every repeat, so that a temporary slowdown of the machine affects them all;
ratios pair the runs of one repeat.
"""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from gpt2.common.errors import is_out_of_memory
from gpt2.compression.cache.attention import AUTO, enable_compressed_attention
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.cache.size import cache_bytes
from gpt2.evaluation.instruments import SAMPLING, Memory, Stopwatch, cuda_devices, peak_memory, synchronizer, watched
from gpt2.evaluation.noise import fill as fill_with_noise
from gpt2.evaluation.perplexity import BASELINE, CacheFactory
from gpt2.evaluation.statistics import spread
from gpt2.models.loading import LoadedModel

Fill = Callable[..., None]  # puts tokens into an empty cache: fill(cache, context=number of tokens)

WARM_TOKENS, WARM_STEPS = 16, 2
clock = time.perf_counter


@dataclass(frozen=True)
class Run:
    """One cache, filled and decoded from once.

    prefill_s: None where it was filled with noise. decode_s: seconds of all steps. tokens: [B, 1 + steps], generated.
    """

    prefill_s: float | None
    decode_s: float
    tokens: Tensor
    held_bytes: int

    @property
    def token_ms(self) -> float:
        """Milliseconds per step: each gives one token to every sequence of the batch."""
        return 1000 * self.decode_s / (self.tokens.shape[1] - 1)


@dataclass(frozen=True)
class Inside:
    """What instruments measured: memory of a prefill and a few steps, then shares of time by part of further steps."""

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
    noise: bool = False,
    progress=iter,
) -> list[dict]:
    """Measure caches, by name, at one context length and batch size; one results record per cache.

    Contexts are random tokens, whose values change no time. decode_tokens: steps per run, from a cache that holds
    `context_tokens` at first. noise: fill caches with noise, which takes a small part of a prefill's time. If one of
    the caches is called "baseline", the others get ratios to it, paired by repeat. progress: wraps the iterable of
    runs, such as tqdm. A cache that doesn't fit in memory gets a record with `out_of_memory` instead of figures.
    """
    prompt = random_tokens(loaded, batch_size, context_tokens, seed)
    measured = {name: _Measured() for name in caches}
    for make in caches.values():
        run_once(loaded.model, make(), prompt[:1, :WARM_TOKENS], WARM_STEPS)
    # Turn 0 is for the instruments, and warms up what depends on shapes
    fill = partial(fill_with_noise, loaded=loaded, batch=batch_size, seed=seed)
    turns = [(n, name) for n in range(repeats + 1) for name in (list(caches)[::-1] if n % 2 else caches)]
    for turn, name in progress(turns):
        if not measured[name].too_large:
            measured[name].take(turn, loaded.model, caches[name], prompt, decode_tokens, fill if noise else None)
    baseline = measured.get(BASELINE)
    cell = {"context_tokens": context_tokens, "batch_size": batch_size}
    return [
        {"cache": name, **cell, **own.record(baseline if name != BASELINE else None)} for name, own in measured.items()
    ]


def find_crossovers(
    loaded: LoadedModel, caches: Mapping[str, CacheFactory], batch_sizes: Sequence[int], *, busy: bool = False
) -> None:
    """Measure from how many tokens on reading codes pays (`cache.crossover`), where this machine doesn't know it yet.

    Compressed attention is enabled afterwards, and reads codes at every step. busy: whether other work is running; then
    nothing is measured, as a wrong crossover would be kept for good, and a note says so.
    """
    enable_compressed_attention(loaded.model, when=AUTO)
    if busy:
        print("note: from how many tokens on codes are read faster isn't measured now, as other work is running")
    for batch in () if busy else batch_sizes:
        prompt = random_tokens(loaded, batch, WARM_TOKENS, seed=0)
        for make in caches.values():
            run_once(loaded.model, make(), prompt, steps=1)
    enable_compressed_attention(loaded.model)


@dataclass
class _Measured:
    """Measurements of one cache in one cell."""

    inside: Inside | None = None
    parking: dict | None = None
    runs: list[Run] = field(default_factory=list)
    too_large: bool = False

    def take(
        self, turn: int, model: PreTrainedModel, make: CacheFactory, prompt: Tensor, steps: int, fill: Fill | None
    ) -> None:
        """One run with a fresh cache: with instruments in turn 0, timed in the others."""
        try:
            if turn:
                self.runs.append(run_once(model, make(), prompt, steps, fill))
            else:
                cache = make()
                self.inside = look_inside(model, cache, prompt, steps, fill)
                self.parking = park(model, cache)
        except Exception as error:  # out of memory has another type on each device
            if not is_out_of_memory(error):
                raise
            self.too_large = True
        if self.too_large and torch.cuda.is_available():  # only now is the error gone, whose traceback held tensors
            torch.cuda.empty_cache()

    def record(self, baseline: _Measured | None) -> dict:
        """Figures as results files have them, with ratios to the baseline's runs if there are any."""
        if self.too_large:
            return {"out_of_memory": True}
        figures = _figures(self.runs, self.inside) | ({"parking": self.parking} if self.parking else {})
        if baseline and not baseline.too_large:
            figures["ratio_to_baseline"] = _ratios(self.runs, baseline.runs)
        return figures


@torch.no_grad()
def run_once(model: PreTrainedModel, cache: Cache, prompt: Tensor, steps: int, fill: Fill | None = None) -> Run:
    """Time filling an empty cache with a prompt [B, T] and decoding `steps` more tokens.

    fill: fills the cache in the prompt's place, of which the last token is decoded first.
    """
    wait, last_only = synchronizer(model), _last_logits_only(model)
    with _no_garbage_collection():
        wait()
        start = clock()
        tokens = [_next(model, cache, prompt, **last_only)] if fill is None else [prompt[:, -1:]]
        if fill:
            fill(cache, context=prompt.shape[1])
        wait()
        filled = clock()
        tokens += _decode(model, cache, tokens[-1], steps)
        wait()
        end = clock()
    return Run(None if fill else filled - start, end - filled, torch.cat(tokens, dim=1), cache_bytes(cache))


@torch.no_grad()
def look_inside(model: PreTrainedModel, cache: Cache, prompt: Tensor, steps: int, fill: Fill | None = None) -> Inside:
    """The same with instruments: peak memory of prefill and warm-up steps, then where the time of `steps` steps goes.

    The prefill leaves out the last tokens of the prompt, so that the cache holds the prompt's length after warming up.
    """
    most = prompt[:, : max(prompt.shape[1] - WARM_STEPS, 1)]
    if fill:  # before memory is watched: it may take more than decoding does
        fill(cache, context=most.shape[1])
    with peak_memory(cuda_devices(model)) as memory:
        token = most[:, -1:] if fill else _next(model, cache, most, **_last_logits_only(model))
        token = _decode(model, cache, token, WARM_STEPS)[-1]
    watch = Stopwatch(synchronizer(model))
    with watched(model, watch):
        _decode(model, cache, token, steps, watch.timed(SAMPLING)(_most_likely))
    return Inside(memory, watch.shares(), 1000 * sum(watch.seconds.values()) / steps)


def park(model: PreTrainedModel, cache: Cache) -> dict | None:
    """Bytes that parking a filled cache moves to the CPU's memory, and milliseconds of the way there and back.

    The second of two rounds is timed: the first allocates pinned memory. None for caches that can't be parked as a
    whole, and for a model on the CPU, where nothing moves.
    """
    if not cuda_devices(model) or not isinstance(cache, CompressedDynamicCache):
        return None
    wait = synchronizer(model)
    for _ in range(2):
        found = {}
        for name, move in (("offload", cache.offload), ("prefetch", cache.prefetch)):
            wait()
            start = clock()
            found["moved_bytes"] = move()
            wait()
            found[f"{name}_ms"] = 1000 * (clock() - start)
    return found


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Python's garbage collection would fall into a random run and may take longer than a step of a small model."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _last_logits_only(model: PreTrainedModel) -> dict:
    """Arguments that keep the logits of the last token only, as generation does: a prompt's may take gigabytes."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _most_likely(logits: Tensor) -> Tensor:
    """The most likely next token, [B, 1], of logits [B, n, vocabulary]."""
    return logits[:, -1:].argmax(-1)


def _next(model: PreTrainedModel, cache: Cache, tokens: Tensor, pick: Callable = _most_likely, **settings) -> Tensor:
    """One forward pass over tokens [B, n]; returns the next token, [B, 1]."""
    return pick(model(tokens, past_key_values=cache, use_cache=True, **settings).logits)


def _decode(
    model: PreTrainedModel, cache: Cache, token: Tensor, steps: int, pick: Callable = _most_likely
) -> list[Tensor]:
    """Greedy steps from a token [B, 1], without waiting for a GPU in between; returns the tokens."""
    tokens = []
    for _ in range(steps):
        token = _next(model, cache, token, pick)
        tokens.append(token)
    return tokens


def random_tokens(loaded: LoadedModel, batch_size: int, count: int, seed: int) -> Tensor:
    """Random token ids [batch_size, count], on the model's device."""
    vocabulary = loaded.model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (batch_size, count), generator=generator).to(loaded.device)


def _figures(runs: Sequence[Run], inside: Inside) -> dict:
    prefill, token = [1000 * run.prefill_s for run in runs if run.prefill_s], [run.token_ms for run in runs]
    batch = len(runs[0].tokens)
    return {
        **({"ttft_ms": prefill} | spread("ttft_ms", prefill) if prefill else {}),
        "token_ms": token,
        **spread("token_ms", token),
        **spread("tokens_per_s", [1000 * batch / ms for ms in token]),
        "cache_bytes": runs[-1].held_bytes,
        "peak_memory_bytes": inside.memory.peak,
        "peak_memory_over_start_bytes": inside.memory.peak - inside.memory.start,
        "instrumented_token_ms": inside.token_ms,
        "share_of_step": inside.share,
    }


def _ratios(runs: Sequence[Run], baseline: Sequence[Run]) -> dict:
    """Ratios to the baseline, run by run, so that a slowdown of the machine cancels out."""
    pairs = list(zip(runs, baseline, strict=True))
    return {
        **(spread("ttft", [own.prefill_s / other.prefill_s for own, other in pairs]) if runs[0].prefill_s else {}),
        **spread("token_time", [own.token_ms / other.token_ms for own, other in pairs]),
        **spread("tokens_per_s", [other.token_ms / own.token_ms for own, other in pairs]),
        "cache_bytes": runs[-1].held_bytes / baseline[-1].held_bytes,
    }
