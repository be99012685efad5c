"""Series of costs to measure: calibration and evaluation on a model, caches on one layer of any shape.

Sizes are small enough for a laptop. Exponents carry over to larger models, seconds don't. Tokens, keys and values are
random, as they change neither time nor bytes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PretrainedConfig

from gpt2.compression.cache import direct_attention
from gpt2.compression.cache.layers import StoredKV
from gpt2.compression.cache.size import fill, noise
from gpt2.compression.calibration.fisher import collect_fisher
from gpt2.compression.calibration.statistics import MultiHeadStatistics, Statistics, Tap, collect
from gpt2.compression.codecs.base import SIDES
from gpt2.compression.codecs.metric import Fisher
from gpt2.compression.codecs.moments import Moments
from gpt2.compression.named_caches import CacheChoice, from_preset
from gpt2.evaluation.instruments import synchronizer
from gpt2.evaluation.perplexity import BASELINE, baseline_factory, score
from gpt2.evaluation.statistics import spread
from gpt2.evaluation.timing import random_tokens, run_once
from gpt2.experiments import cost_model
from gpt2.experiments.cost_model import Dimensions
from gpt2.experiments.power_law import BYTES, Point, Series
from gpt2.experiments.predictions import SIXTEEN, narrow
from gpt2.models import random_weights
from gpt2.models.geometry import Geometry
from gpt2.models.loading import LoadedModel

SINK_TOKENS = 4
APPENDED = 64  # tokens in one measurement: every codec completes one block in them
CUT_VOCABULARY = 512  # of models cut to one layer
FITTING = "calibrate: fit one basis"
clock = time.perf_counter
Configs = Mapping[str, PretrainedConfig]


@dataclass(frozen=True)
class Sizes:
    """Sizes of all series. layer_cuts: numbers of layers, in equal steps up to all of them. widths: of bases."""

    samples: tuple[int, ...] = (1, 2, 3, 4)
    sample_tokens: int = 128
    seq_lens: tuple[int, ...] = (96, 192, 384, 768)
    layer_cuts: int = 5
    widths: tuple[int, ...] = (64, 128, 256, 384, 512)
    contexts: tuple[int, ...] = (4096, 8192, 16384, 32768)
    model_contexts: tuple[int, ...] = (256, 512, 1024, 2048)
    segments: tuple[int, ...] = (1, 2, 3, 4)
    segment_tokens: int = 128
    segment_lengths: tuple[int, ...] = (128, 256, 512, 1024)
    caches: tuple[int, ...] = (1, 2, 3, 4)
    decoded: int = 8


# The smallest sizes, with which all series take about a minute
QUICK = Sizes(
    sample_tokens=72, seq_lens=(72, 96, 128, 160), layer_cuts=4,
    contexts=(128, 256, 512, 1024), model_contexts=(64, 96, 128, 192), segment_tokens=64,
    segment_lengths=(64, 128, 192, 256), decoded=2,
)  # fmt: skip


def all_series(
    loaded: LoadedModel, timed_shapes: Configs, cache_shapes: Configs, presets: Sequence[str], sizes: Sizes
) -> Iterator[Series]:
    """All series, one after another, as each keeps its models and caches in memory.

    timed_shapes: configs of which one layer is calibrated. cache_shapes: configs of which one layer's cache is filled,
    for each of `presets`.
    """
    yield from calibration(loaded, sizes)
    yield over_models(timed_shapes, loaded.device, sizes)
    yield fitting(sizes)
    yield from memory(loaded, timed_shapes, sizes)
    for name, config in cache_shapes.items():
        yield from caches(name, config, presets, sizes)
    yield from evaluation(loaded, presets, sizes)


def seconds(wait: Callable[[], None], work: Callable[[], object]) -> float:
    """Seconds of some work, until the device has finished it. wait: waits for the device."""
    wait()
    start = clock()
    work()
    wait()
    return clock() - start


# --- calibration


def first_pass(loaded: LoadedModel, segments: Tensor) -> object:
    """Statistics of K and V, as calibration collects them."""
    return collect(loaded, segments, SINK_TOKENS)


def gradient_pass(loaded: LoadedModel, segments: Tensor) -> object:
    """The Fisher statistics of calibration, which need a backward pass."""
    return _with_gradients(loaded, segments)[1]


def _with_gradients(loaded: LoadedModel, segments: Tensor) -> tuple[list[Moments], dict[str, MultiHeadStatistics]]:
    """What the gradient pass leaves: metrics of single heads, and statistics of the bases that the layers can have."""
    moments, bases = [Moments.zeros(loaded.geometry, side) for side in SIDES], cost_model.fitting_bases(loaded.geometry)
    return moments, collect_fisher(loaded, segments, Statistics(*moments), SINK_TOKENS, bases)


def first_flops(dims: Dimensions, samples: int, tokens: int) -> float:
    return samples * cost_model.first_pass_flops(dims, tokens)


def gradient_flops(dims: Dimensions, samples: int, tokens: int) -> float:
    """Including the pass over the first sample that detects the rotary embedding of keys."""
    return samples * cost_model.gradient_pass_flops(dims, tokens) + cost_model.forward_flops(dims, tokens)


PASSES = {"calibrate: first pass": (first_pass, first_flops), "calibrate: gradients": (gradient_pass, gradient_flops)}


@torch.no_grad()
def pass_ratios(loaded: LoadedModel, sizes: Sizes, repeats: int) -> list[dict]:
    """Ratio of each calibration pass to forward passes over the same samples, measured in pairs, and as counted."""
    dims = cost_model.dimensions(loaded.model.config, loaded.spec)
    samples, tokens, wait = sizes.samples[1], max(sizes.segment_lengths) // 4, synchronizer(loaded.model)
    segments = random_tokens(loaded, samples, tokens, seed=0)

    def forward() -> None:
        for segment in segments:
            loaded.model.base_model(input_ids=segment[None], use_cache=True)

    forward()
    found = []
    for step, (work, flops) in PASSES.items():
        ratios = []
        for _ in range(repeats):
            own = seconds(wait, partial(work, loaded, segments))
            ratios.append(own / seconds(wait, forward))
        counted = flops(dims, samples, tokens) / (samples * cost_model.forward_flops(dims, tokens))
        found.append(
            {"step": step, "samples": samples, "tokens": tokens, "counted": counted, **spread("ratio", ratios)}
        )
    return found


def _pass_point(step: str, loaded: LoadedModel, samples: int, tokens: int, x: float | None = None) -> Point:
    """One calibration pass over random samples. x: None stands for the predicted FLOPs."""
    work, flops = PASSES[step]
    predicted = flops(cost_model.dimensions(loaded.model.config, loaded.spec), samples, tokens)
    segments = random_tokens(loaded, samples, tokens, seed=0)
    run = partial(seconds, synchronizer(loaded.model), partial(work, loaded, segments))
    return Point(predicted if x is None else x, predicted, run)


def calibration(loaded: LoadedModel, sizes: Sizes) -> Iterator[Series]:
    """Both passes against the number of samples, their length, and the number of layers."""
    tokens, cuts = sizes.sample_tokens, list(_cuts(loaded, sizes.layer_cuts))
    for step in PASSES:
        yield Series(step, "samples", loaded.slug, [_pass_point(step, loaded, n, tokens, n) for n in sizes.samples])
        yield Series(
            step, "tokens of a sample", loaded.slug, [_pass_point(step, loaded, 1, n, n) for n in sizes.seq_lens]
        )
        points = [_pass_point(step, cut, 1, tokens, cut.geometry.num_layers) for cut in cuts]
        yield Series(step, "layers", loaded.slug, points)


def _cuts(loaded: LoadedModel, count: int) -> Iterator[LoadedModel]:
    """Models of the same shape with growing numbers of layers and random weights."""
    L = loaded.geometry.num_layers
    for layers in dict.fromkeys(-(-L * n // count) for n in range(1, count + 1)):
        config = random_weights.changed(loaded.model.config, layers)
        yield random_weights.from_config(config, loaded.spec, loaded.device, loaded.model.dtype)


def over_models(configs: Configs, device: torch.device, sizes: Sizes) -> Series:
    """The gradient pass of each shape's layers up to the first that attends, against its counted FLOPs."""
    step = "calibrate: gradients"
    points = []
    for name, config in configs.items():
        first = cost_model.dimensions(config, name).geometry.attention[0]
        config = random_weights.changed(config, first + 1, vocab_size=CUT_VOCABULARY, pad_token_id=None)
        points.append(_pass_point(step, random_weights.from_config(config, name, device), 1, sizes.sample_tokens))
    return Series(step, "FLOPs counted", f"one layer each of {len(configs)} models", points)


def fitting(sizes: Sizes) -> Series:
    """Fitting one multi-head basis against its width, on the CPU in float64."""

    def point(width: int) -> Point:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 1, 2 * width, width, generator=generator)
        moments = Moments.zeros(Geometry.uniform(1, 1, width))
        moments.update(0, x)
        moments.metrics["fisher"] = [moments.scatter[0] / (2 * width)]
        return Point(width, width**3, partial(seconds, lambda: None, partial(Fisher().fit, moments, 0)))

    return Series(FITTING, "its width", "any model", [point(width) for width in sizes.widths])


# --- memory


def memory(loaded: LoadedModel, configs: Configs, sizes: Sizes) -> Iterator[Series]:
    """Bytes of the statistics of both passes over shapes, and of activations over the length of a sample."""
    one, other = [], []
    for name, config in configs.items():
        dims = cost_model.dimensions(config, name)
        first, second = (partial(measured, config, name) for measured in (_first_bytes, _gradient_bytes))
        one.append(Point(dims.squares() / 2, cost_model.statistics_bytes(dims), first))
        added = cost_model.gradient_statistics_bytes(dims)
        added["blocks"] //= cost_model.SAMPLED_BLOCKS  # the measured segment has only one block
        other.append(Point(dims.base_squares(), sum(added.values()), second))
    names = f"caches of {len(configs)} shapes"
    yield Series("calibrate: statistics of heads", "layers · heads · d²", names, one, BYTES)
    yield Series("calibrate: statistics of bases", "layers · groups · w²", names, other, BYTES)
    dims, element = cost_model.dimensions(loaded.model.config, loaded.spec), loaded.model.dtype.itemsize
    if not dims.llama_like:
        return
    points = [
        Point(n, cost_model.activation_bytes(dims, n, element=element), partial(saved_bytes, loaded, n))
        for n in sizes.seq_lens
    ]
    yield Series("calibrate: activations kept", "tokens of a sample", loaded.slug, points, BYTES)


def _first_bytes(config: PretrainedConfig, name: str) -> float:
    """Bytes of the statistics of the first pass, for a cache of this shape."""
    loaded = narrow(config, name)
    found = first_pass(loaded, random_tokens(loaded, 1, SINK_TOKENS + 1, seed=0))
    return float(sum(moments_bytes(side) for side in (found.k, found.v)))


def _gradient_bytes(config: PretrainedConfig, name: str) -> float:
    """Bytes of the statistics that the gradient pass adds, after one sample of one block."""
    loaded = narrow(config, name)
    moments, found = _with_gradients(loaded, random_tokens(loaded, 1, SINK_TOKENS + cost_model.BLOCK, seed=0))
    return float(sum(_nbytes(m.metrics["fisher"]) for m in moments) + sum(map(measured_bytes, found.values())))


def moments_bytes(moments: Moments) -> int:
    """Bytes of all statistics of some moments."""
    parts = (moments.mean, moments.scatter, *moments.metrics.values())
    return moments.count.nbytes + sum(map(_nbytes, parts))


def _nbytes(parts: Sequence[Tensor | None]) -> int:
    return sum(part.nbytes for part in parts if part is not None)


def measured_bytes(statistics: MultiHeadStatistics) -> int:
    """Bytes of the statistics and sample blocks of a multi-head basis."""
    return moments_bytes(statistics.moments) + _nbytes(statistics.blocks)


def saved_bytes(loaded: LoadedModel, tokens: int) -> float:
    """Bytes that a forward pass of the layers keeps for the backward pass, without weights."""
    weights = {p.untyped_storage().data_ptr() for p in loaded.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address is used twice

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return x

    embedded = loaded.model.get_input_embeddings()(random_tokens(loaded, 1, tokens, seed=0)).requires_grad_()
    with torch.enable_grad(), saved_tensors_hooks(pack, lambda x: x):
        loaded.model.base_model(inputs_embeds=embedded, past_key_values=Tap(lambda *_: None), use_cache=True)
    return float(sum(storage.nbytes() for storage in kept.values()))


# --- caches


def caches(name: str, config: PretrainedConfig, presets: Sequence[str], sizes: Sizes) -> Iterator[Series]:
    """One layer's cache of a shape: compressing a prompt, appending tokens, and a decode step's attention."""
    own = _one_of(cost_model.dimensions(config, name))
    k, v = own.cached.k, own.cached.v
    loaded = replace(random_weights.outline_of(config, name), geometry=Geometry((own.cached,)))
    on = f"one layer of {name}"
    choices = [from_preset(preset, loaded) for preset in presets]
    prompts = {n: (noise(k.heads, n, k.width), noise(v.heads, n, v.width)) for n in sizes.contexts}
    read = {n: max(own.cached.held(n), 1) for n in prompts}  # tokens that a decode step reads
    query = noise(max(own.own_queries(), k.heads), 1, k.width)
    timer = partial(seconds, lambda: None)
    for choice in choices:
        points = [Point(n, n, partial(timer, partial(_filled, choice, x))) for n, x in prompts.items()]
        yield Series(f"compress a prompt, {choice.label}", "its tokens", on, points)
        held = {n: _filled(choice, x) for n, x in prompts.items()}
        points = [Point(n, 1, partial(_append_s, layer, prompts[n])) for n, layer in held.items()]
        yield Series(f"append {APPENDED} tokens, {choice.label}", "tokens held", on, points)
        ways = {"attention by reconstruction": _reconstructed}
        if choice.make().readable and not own.latent:
            ways["attention over codes"] = _direct
        for way, step in ways.items():
            points = [Point(n, read[n], partial(timer, partial(step, layer, query))) for n, layer in held.items()]
            yield Series(f"decode: {way}, {choice.label}", "tokens held", on, points)
    points = [Point(n, n, partial(timer, partial(_attend, query, *x))) for n, x in prompts.items()]
    yield Series(f"decode: attention, {SIXTEEN}", "tokens held", on, points)


def _one_of(dims: Dimensions) -> cost_model.Layer:
    """The layer that stands for a model: the first of full attention, else the first that attends."""
    attending = [own for own in dims.layers if own.cached.attends]
    return next((own for own in attending if own.cached.window is None), attending[0])


def _filled(choice: CacheChoice, kv: tuple[Tensor, Tensor]):
    """The layer of a cache of one layer, with K and V [1, H, T, d] each of a prompt."""
    return fill(choice.make(), [kv]).layers[0]


def _append_s(layer, kv: tuple[Tensor, Tensor]) -> float:
    """Seconds to append APPENDED tokens one by one, as generation does, to a copy of the layer."""
    layer = copy.deepcopy(layer)
    new = list(zip(*(x[:, :, :APPENDED].split(1, dim=2) for x in kv), strict=True))

    def append() -> None:
        for k, v in new:
            layer.store(k, v)

    return seconds(lambda: None, append)


def _attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, keys, values, enable_gqa=query.shape[1] != keys.shape[1])


def _reconstructed(layer, query: Tensor) -> Tensor:
    return _attend(query, *layer.read())


def _direct(layer, query: Tensor) -> Tensor:
    return direct_attention.attend(*StoredKV(layer).stores(), query, None, query.shape[-1] ** -0.5)


# --- evaluation


def evaluation(loaded: LoadedModel, presets: Sequence[str], sizes: Sizes) -> Iterator[Series]:
    """Perplexity, a tuner's trials and the prompt of a needle test, with the first of `presets`."""
    dims = cost_model.dimensions(loaded.model.config, loaded.spec)
    choice, wait = from_preset(presets[0], loaded), synchronizer(loaded.model)

    def scored(x: float, segments: int, tokens: int, count: int = 1) -> Point:
        makes = {BASELINE: baseline_factory(loaded)} | {str(i): choice.make for i in range(count)}
        ids = random_tokens(loaded, segments, tokens, seed=0)
        predicted = (1 + count) * segments * cost_model.forward_flops(dims, tokens, logits=True)
        return Point(x, predicted, partial(seconds, wait, partial(score, loaded, ids, makes, batch_size=1)))

    tokens, step = sizes.segment_tokens, f"perplexity, {choice.label}"
    yield Series(step, "segments", loaded.slug, [scored(n, n, tokens) for n in sizes.segments])
    yield Series(step, "tokens of a segment", loaded.slug, [scored(n, 1, n) for n in sizes.segment_lengths])
    points = [scored(n, 1, tokens, n) for n in sizes.caches]
    yield Series(f"tune, {choice.label}", "caches tried", loaded.slug, points)

    def asked(tokens: int) -> Point:
        ids = random_tokens(loaded, 1, tokens, seed=0)
        work = partial(run_once, loaded.model, prompt=ids, steps=sizes.decoded)
        return Point(tokens, cost_model.forward_flops(dims, tokens), lambda: work(cache=choice.make()).prefill_s)

    points = [asked(n) for n in sizes.model_contexts]
    yield Series(f"needle: read a prompt, {choice.label}", "its tokens", loaded.slug, points)
