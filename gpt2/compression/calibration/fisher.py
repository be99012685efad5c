"""A second pass over a model, forward and backward: how much the loss feels an error of K and V.

The Fisher information E[ggᵀ] takes labels that the model draws itself: no text decides what is right (Kunstner et al.
2019 on why the text's own labels won't do). The same pass gathers what bases are fitted to that heads share: moments of
K and V as such a basis arranges them, and a bounded sample of whole blocks to try quantization on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from gpt2.common.errors import PluginError
from gpt2.common.processes import ALONE, Processes
from gpt2.compression.calibration.statistics import MetricSums, MultiHeadStatistics, Statistics, tapped
from gpt2.compression.codecs import MultiHead, rope
from gpt2.compression.codecs.base import HALF_MAX
from gpt2.compression.codecs.formats import BLOCK
from gpt2.compression.codecs.moments import Moments, SecondMoments, Seen
from gpt2.compression.codecs.rope import Rotary
from gpt2.models.attention_function import wrapped_attention
from gpt2.models.geometry import NOTHING, Geometry, LayerGeometry
from gpt2.models.loading import LoadedModel

SAMPLED_BLOCKS = 48  # of 64 tokens, of each layer
# Share of the metric between different heads that is kept, where a few thousand tokens estimate it with much noise. No
# measurement tells shares from 0 to 1 apart (results/runs/explore_codecs_*), and half of it bounds the noise
CROSS_HEAD_SHARE = 0.5
WITHOUT_CHECKPOINTING = "calibrate with checkpointing=False (in scripts, leave --gradient-checkpointing out)"
SEED_STEP = 1_000_003  # from segment to segment, so that neighbouring seeds share no labels


def collect_fisher(
    loaded: LoadedModel, segments: Tensor, statistics: Statistics | None, sink_tokens: int,
    bases: Mapping[str, MultiHead], *, seed: int = 0, checkpointing: bool = False,
    progress: Callable[[Iterable], Iterable] = iter, processes: Processes = ALONE,
) -> dict[str, MultiHeadStatistics]:  # fmt: skip
    """Gather what each of `bases` is fitted to; put the metrics of single heads that take gradients into `statistics`.

    segments: of a text, [n, T]. statistics: of the same segments; None where single heads are not wanted. seed: of the
    labels drawn and of the blocks sampled. checkpointing: recompute activations layer by layer in the backward pass,
    for models whose activations don't fit in memory; the result is the same. processes: each runs a share of the
    segments, and all get the statistics of all; labels and sample are the same however many there are. Raises
    PluginError for a model that gradients can't be taken through.
    """
    rotary = processes.agreed(detect_rotary(loaded, segments[0], sink_tokens) if processes.first else None)
    sample = _Sample.drawn(len(segments), segments.shape[1] - sink_tokens, seed)
    gathered = {name: _Gathered(basis, loaded.geometry, rotary, sink_tokens, sample) for name, basis in bases.items()}
    heads = None if statistics is None else MetricSums(loaded.geometry, gradients=True)
    arrivals = _Arrivals(loaded.geometry, sink_tokens, [*gathered.values(), *([heads] if heads else [])])
    tap = _checkpointed if checkpointing else watched_cache
    with torch.enable_grad(), without_parameter_gradients(loaded.model), tap(loaded.model, arrivals.watch) as run:
        for number in progress(processes.share(len(segments))):
            with arrivals.of_segment(number):
                with gradients_throughout():
                    logits = run(segments[number][None].to(loaded.device))[0]
                labels = drawn_labels(logits, seed, number)
                nn.functional.cross_entropy(logits.float(), labels, reduction="sum").backward()
    if heads:
        heads.put_into(statistics, processes)
    return {name: own.statistics(processes) for name, own in gathered.items()}


def drawn_labels(logits: Tensor, seed: int, segment: int) -> Tensor:
    """A label for each row of a segment's logits [T, V], drawn by the model's own distribution, [T]."""
    probabilities = logits.detach().float().softmax(-1)
    generator = torch.Generator(logits.device).manual_seed(seed + SEED_STEP * segment)
    if not torch.isfinite(probabilities).all():
        raise PluginError("NaN or infinite logits: load the model in float32 or bfloat16 (scripts: --dtype float32)")
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def detect_rotary(loaded: LoadedModel, segment: Tensor, sink_tokens: int) -> list[Rotary]:
    """Per layer, the rotation that explains its keys best; none where positions aren't rotary, or there are no keys."""
    choices: dict[int, list[Rotary]] = {}
    found = [rope.NONE] * loaded.geometry.num_layers

    def record(layer: int, k: Tensor, v: Tensor) -> None:
        width = k.shape[-1]
        if width not in choices:  # within the pass, as frequencies may depend on how long a text is
            choices[width] = rope.candidates(loaded.model, width)
        found[layer] = rope.best_fit(k[0, :, sink_tokens:].cpu(), sink_tokens, choices[width])

    with torch.no_grad():
        cache = tapped(loaded.model, record)
        loaded.model.base_model(input_ids=segment[None].to(loaded.device), past_key_values=cache, use_cache=True)
    return found


@dataclass
class _Sample:
    """Which blocks of which segments are sampled: `per_segment` of each in turn; blocks: their numbers, [sampled]."""

    blocks: Tensor
    per_segment: int

    @classmethod
    def drawn(cls, segments: int, tokens: int, seed: int) -> _Sample:
        """The same blocks of all layers and bases. tokens: of a segment, without the sinks."""
        generator = torch.Generator().manual_seed(seed)
        available = max(tokens // BLOCK, 0)
        per_segment = min(-(-SAMPLED_BLOCKS // segments), available)
        drawn = [torch.randperm(available, generator=generator)[:per_segment].sort().values for _ in range(segments)]
        return cls(torch.cat(drawn)[:SAMPLED_BLOCKS], per_segment)

    def places(self, segment: int) -> slice:
        """Where in the sample a segment's blocks are."""
        return slice(segment * self.per_segment, (segment + 1) * self.per_segment)


class _Arrivals:
    """Pairs up gradients of K and V, layer by layer as the backward pass comes to them, and hands them to `takers`."""

    def __init__(self, geometry: Geometry, sink_tokens: int, takers: Sequence[MetricSums | _Gathered]):
        self.geometry, self.sink_tokens, self.takers = geometry, sink_tokens, takers
        self.segment = 0
        self.missing: set[int] = set()  # layers of the segment that runs
        self.waiting: dict[int, dict[str, Tensor]] = {}

    @contextmanager
    def of_segment(self, number: int):
        """Around the passes over one segment. Raises PluginError where the gradients of a layer don't come."""
        self.segment, self.missing = number, set(self.geometry.attention)
        yield
        if self.missing:
            raise PluginError(
                "no gradients reached K and V of every layer, so there is no Fisher metric for this model: "
                "take metric pca or attention (scripts: --metric pca or attention)"
            )

    def watch(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Ask for the gradients of one layer's k, v [1, H, T, d]. Raises PluginError where these aren't its own."""
        own = self.geometry.layers[layer] if layer < self.geometry.num_layers else LayerGeometry(NOTHING)
        if any(shape is None or x.shape[1::2] != (shape.heads, shape.width) for shape, x in ((own.k, k), (own.v, v))):
            raise PluginError(
                f"layer {layer}: its attention doesn't read K and V as the cache has them: {WITHOUT_CHECKPOINTING}"
            )
        kept = k.detach(), v.detach()  # a hook that held k or v itself would be held by it: never freed
        for side, x in (("k", k), ("v", v)):
            if x.requires_grad:
                x.register_hook(lambda g, side=side: self._arrived(layer, side, g, *kept))

    def _arrived(self, layer: int, side: str, gradient: Tensor, k: Tensor, v: Tensor) -> None:
        gradients = self.waiting.setdefault(layer, {})
        gradients[side] = gradient.detach()
        if len(gradients) < 2:
            return
        del self.waiting[layer]
        self.missing.discard(layer)
        k, v, gk, gv = (x[:, :, self.sink_tokens :].float() for x in (k, v, gradients["k"], gradients["v"]))
        for taker in self.takers:
            taker.add(layer, Seen(k, v, key_gradients=gk, value_gradients=gv, segment=self.segment))


class _Gathered:
    """What one basis is fitted to that heads share, as it comes."""

    def __init__(self, basis: MultiHead, geometry: Geometry, rotary: list[Rotary], sink_tokens: int, sample: _Sample):
        shape = basis.shape(geometry)
        self.basis, self.rotary, self.sink_tokens, self.sample = basis, rotary, sink_tokens, sample
        self.moments, self.metric = Moments.zeros(shape), SecondMoments.zeros(shape)
        self.blocks = [
            own.k and torch.zeros(own.k.heads, len(sample.blocks), BLOCK, own.k.width, dtype=torch.float16)
            for own in shape.layers
        ]
        self.head_widths = basis.head_widths(geometry)

    def add(self, layer: int, seen: Seen) -> None:
        """Take in one layer of a segment."""
        places = self.sample.places(seen.segment)
        felt = self.basis.metric_vectors(seen)
        xs, ws = (
            self.basis.arrange(k, v, self.rotary[layer], self.sink_tokens)
            for k, v in ((seen.keys, seen.values), (felt["k"][None], felt["v"][None]))
        )
        for index, (x, w) in enumerate(zip(xs, ws, strict=True), start=layer * self.basis.bases_per_layer):
            self.moments.update(index, x)
            self.metric.update(index, w[0])
            # Blocks begin where frames do, with copies of their first token in place of sinks, as in a cache
            lead = self.sink_tokens % self.basis.frame
            led = torch.cat((x[0, :, :1].expand(-1, lead, -1), x[0]), dim=1)
            blocks = led[:, : led.shape[1] // BLOCK * BLOCK].unflatten(1, (-1, BLOCK))
            own = blocks[:, self.sample.blocks[places]].clamp(-HALF_MAX, HALF_MAX)
            self.blocks[index][:, places] = own.half().cpu()

    def statistics(self, processes: Processes) -> MultiHeadStatistics:
        """Of all processes' segments."""
        self.moments.add_up(processes)
        self.moments.metrics[self.basis.metric] = [
            None if metric is None else metric * _shares(metric.shape[-1], head_width)
            for metric, head_width in zip(self.metric.mean(processes), self.head_widths, strict=True)
        ]
        blocks = [None if own is None else processes.total(own).flatten(1, 2) for own in self.blocks]
        return MultiHeadStatistics(self.basis, self.moments, self.rotary if self.basis.unrotated else [], blocks)


def _shares(w: int, head_width: int) -> Tensor:
    """1 within the channels of one head's K or V, CROSS_HEAD_SHARE between them, [w, w]."""
    within = torch.block_diag(*[torch.ones(head_width, head_width, dtype=torch.float64)] * (w // head_width))
    return CROSS_HEAD_SHARE + (1 - CROSS_HEAD_SHARE) * within


@contextmanager
def without_parameter_gradients(model: nn.Module):
    """While the block runs, gradients flow from the embedded tokens on, through K and V, and none is kept for weights.

    Afterwards the parameters require gradients as they did before.
    """
    wanted = [p for p in model.parameters() if p.requires_grad]
    between = model.register_forward_pre_hook(lambda *_: _cut_states(model))
    # A copy, because some models (CTRL, GIT) go on to change the embedded tokens in place, which no leaf allows
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: out.detach().requires_grad_().clone()
    )
    model.requires_grad_(False)
    try:
        yield
    finally:
        hook.remove()
        between.remove()
        _cut_states(model)
        for p in wanted:
            p.requires_grad_(True)


def _cut_states(model: nn.Module) -> None:
    """Cut the states that modules keep themselves (RecurrentGemma's) off the graph of the segment that left them."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(module, name, value.detach())


class gradients_throughout(TorchFunctionMode):
    """While the block runs, `torch.no_grad` has no effect: a model that loops over its layers (HRM) trains the last
    loops only and runs the others without gradients, but every loop has K and V of its own that the loss feels."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch._C._set_grad_enabled and not args[0]:
            return None
        return func(*args, **(kwargs or {}))


@contextmanager
def watched_cache(model: nn.Module, watch: Callable[[int, Tensor, Tensor], None]):
    """Yields a function from token ids [1, T] to logits [1, T, V].

    watch: called by every layer with its index and its new K and V, each [1, H, T, d], K as it is cached (with RoPE).
    """
    yield lambda tokens: model(tokens, past_key_values=tapped(model, watch), use_cache=True).logits


@contextmanager
def _checkpointed(model: nn.Module, watch: Callable[[int, Tensor, Tensor], None]):
    """As `watched_cache`, but activations are recomputed in the backward pass.

    Checkpointed layers run without a cache, so `watch` is called by the attention function. Raises PluginError where
    the model supports no checkpointing or its attention function can't be replaced.
    """

    def tap(attention):
        def attend(module, query, key, value, *args, **kwargs):
            # Only tensors of the forward pass get gradients; those that are recomputed are watched to no effect
            watch(module.layer_idx, key, value)
            return attention(module, query, key, value, *args, **kwargs)

        return attend

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not model.supports_gradient_checkpointing:
        raise PluginError(f"{type(model).__name__} has no gradient checkpointing: {WITHOUT_CHECKPOINTING}")
    with ExitStack() as stack:
        if not stack.enter_context(wrapped_attention(model, tap)):
            raise PluginError(f"{type(model).__name__} has its attention hard-wired: {WITHOUT_CHECKPOINTING}")
        for layer in layers:
            stack.enter_context(_recomputing(layer))
        yield lambda tokens: model(tokens, use_cache=False).logits


@contextmanager
def _recomputing(layer: GradientCheckpointingLayer):
    """Let a layer keep its input alone and recompute the rest.

    transformers does so only while a layer's `training` is set, which its forward must not see: dropout would act.
    """

    def run(forward, *args):
        def evaluated(*args):
            layer.training = False
            try:
                return forward(*args)
            finally:
                layer.training = True

        return checkpoint(evaluated, *args, use_reentrant=False)

    ours = {"training": True, "gradient_checkpointing": True, "_gradient_checkpointing_func": run}
    before = {name: value for name, value in vars(layer).items() if name in ours}
    vars(layer).update(ours)
    try:
        yield
    finally:
        for name in ours:
            del vars(layer)[name]
        vars(layer).update(before)
