"""A second streaming pass over a model, forward and backward: how much the loss feels an error of K and V.

The Fisher information E[ggᵀ] takes labels that the model draws itself: no text decides what is right (Kunstner et al.
2019 on why the text's own labels won't do). Beside it are gathered what a joint basis of K and V needs: their moments
with rotary positions taken off K, and a bounded sample of whole blocks to measure quantization on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from gpt2.compression import rotary
from gpt2.compression.capture import Moments, Statistics, Tap, refuse_non_finite, wrapped_attention
from gpt2.compression.codecs.joint import beside, heads_per_group, side_by_side
from gpt2.compression.codecs.mixed import BLOCK
from gpt2.compression.rotary import Rotary
from gpt2.errors import PluginError
from gpt2.models import Geometry, LoadedModel

RESERVOIR_BLOCKS = 48  # of 64 tokens per layer
# What is kept of the Fisher metric between different heads, where a few thousand tokens estimate it with much noise.
# From none to all of it nothing measured tells apart (results/runs/explore_codecs_*): half of it bounds the noise
CROSS_HEAD_SHARE = 0.5


@dataclass
class JointStatistics:
    """What a measured codec is fitted to, per entry and group of heads.

    Of a joint codec an entry is a layer's [K without positions | V], and rotary has its rotation. Of a grouped codec
    entry 2l is K of layer l as it is cached, 2l + 1 its V, and rotary is empty. moments: with "heads" meaning groups,
    and metrics["fisher"]. reservoir: vectors of whole blocks of neighbouring tokens, [entries, G, blocks · 64, w]
    float16.
    """

    moments: Moments
    rotary: list[Rotary]
    reservoir: Tensor


def collect_fisher(
    loaded: LoadedModel, windows: Sequence[Tensor], statistics: Statistics, sink_tokens: int, *, seed: int = 0,
    checkpointing: bool = False, progress: Callable[[Iterable], Iterable] = iter,
) -> tuple[JointStatistics, JointStatistics]:  # fmt: skip
    """Put the Fisher metric of K and V into `statistics`; gather what a joint basis needs, and what a grouped one does.

    seed: of the labels drawn and of the sample kept. checkpointing: recompute activations layer by layer in the
    backward pass, for models whose activations don't fit in memory; the result is the same. Raises PluginError for a
    model that gradients can't be taken through.
    """
    turns = detect_rotary(loaded, windows[0], sink_tokens)
    taken = _Gathered(loaded.geometry, turns, sink_tokens, len(windows), seed)
    generator = torch.Generator(loaded.device).manual_seed(seed)
    tap = _checkpointed if checkpointing else _through_the_cache
    with torch.enable_grad(), _without_parameter_gradients(loaded.model), tap(loaded.model, taken.watch) as run:
        for window in progress(windows):
            logits = run(window[None].to(loaded.device))[0]
            labels = _drawn(logits.detach().float().softmax(-1), generator)
            nn.functional.cross_entropy(logits.float(), labels, reduction="sum").backward()
            taken.next_window()
    return taken.finish(statistics)


def _drawn(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """A label of each row, [T]."""
    if not torch.isfinite(probabilities).all():
        raise PluginError("NaN or infinite logits, nothing was written. Try --dtype float32 or bfloat16")
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def detect_rotary(loaded: LoadedModel, window: Tensor, sink_tokens: int) -> list[Rotary]:
    """Per layer, the rotation that explains its keys best; none where positions aren't rotary."""
    choices = rotary.candidates(loaded.model, loaded.geometry.head_dim)
    found: dict[int, Rotary] = {}

    def record(layer: int, k: Tensor, v: Tensor) -> None:
        found[layer] = rotary.fitting(k[0, :, sink_tokens:].cpu(), sink_tokens, choices)

    with torch.no_grad():
        cache = Tap(record)
        loaded.model.base_model(input_ids=window[None].to(loaded.device), past_key_values=cache, use_cache=True)
    return [found[layer] for layer in range(loaded.geometry.num_layers)]


class _Gathered:
    """Statistics of K, V and their gradients, layer by layer as the backward pass comes to them."""

    def __init__(self, geometry: Geometry, turns: list[Rotary], sink_tokens: int, windows: int, seed: int):
        L, H, d = geometry.num_layers, geometry.num_kv_heads, geometry.head_dim
        groups = H // heads_per_group(H, d)
        self.turns, self.sink_tokens = turns, sink_tokens
        self.joint = _Gathering(Geometry(L, groups, 2 * H * d // groups))
        self.grouped = _Gathering(Geometry(2 * L, groups, H * d // groups))
        self.fisher = {side: torch.zeros(L, H, d, d, dtype=torch.float64) for side in ("k", "v")}
        self.generator = torch.Generator().manual_seed(seed)
        self.per_window = -(-RESERVOIR_BLOCKS // windows)
        self.waiting: dict[int, dict[str, Tensor]] = {}

    def watch(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Ask for the gradients of one layer's k, v [1, H, T, d]; statistics are taken when both have come."""
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
        s = self.sink_tokens
        k, v, gk, gv = (x[:, :, s:].float() for x in (k, v, gradients["k"], gradients["v"]))
        for side, g in (("k", gk), ("v", gv)):
            self.fisher[side][layer] += _products(g[0], layer)
        for entry, x, g in ((2 * layer, k, gk), (2 * layer + 1, v, gv)):
            self.grouped.add(entry, layer, *(beside(part, self.grouped.groups) for part in (x, g)))
        turn = self.turns[layer].turn
        joined = (side_by_side(turn(a, s, -1), b, self.joint.groups) for a, b in ((k, v), (gk, gv)))
        self.joint.add(layer, layer, *joined)

    def next_window(self) -> None:
        """Keep a few blocks of the window that ended, the same of every layer."""
        if len(self.joint.window) < len(self.turns):
            raise PluginError(
                "no gradients reached K and V of every layer, so there is no Fisher metric for this model: "
                "use --metric pca or attention"
            )
        available = self.joint.window[0].shape[1] // BLOCK
        chosen = torch.randperm(available, generator=self.generator)[: self.per_window].sort().values
        for gathering in (self.joint, self.grouped):
            gathering.keep(chosen)

    def finish(self, statistics: Statistics) -> tuple[JointStatistics, JointStatistics]:
        tokens = self.joint.moments.count[:, None, None, None].clamp_min(1)
        for side, total in self.fisher.items():
            getattr(statistics, side).metrics["fisher"] = total / tokens
        d = self.fisher["k"].shape[-1]
        return self.joint.statistics(self.turns, d), self.grouped.statistics([], d)


class _Gathering:
    """What one measured codec is fitted to, as it comes."""

    def __init__(self, shape: Geometry):
        L, self.groups, w = shape.num_layers, shape.num_kv_heads, shape.head_dim
        self.moments = Moments.zeros(shape)
        self.fisher = torch.zeros(L, self.groups, w, w, dtype=torch.float64)
        self.reservoir = torch.zeros(L, self.groups, 0, w, dtype=torch.float16)
        self.window: dict[int, Tensor] = {}

    def add(self, entry: int, layer: int, x: Tensor, g: Tensor) -> None:
        """Vectors of one window, x [1, G, T, w], and their gradients."""
        self.moments.update(entry, x)
        self.fisher[entry] += _products(g[0], layer)
        self.window[entry] = x[0].half().cpu()

    def keep(self, chosen: Tensor) -> None:
        """Blocks of the window that ended, by number."""
        x = torch.stack([self.window.pop(entry) for entry in range(len(self.fisher))])  # [L, G, T, w]
        available = x.shape[2] // BLOCK
        blocks = x[:, :, : available * BLOCK].unflatten(2, (available, BLOCK))[:, :, chosen].flatten(2, 3)
        self.reservoir = torch.cat((self.reservoir, blocks), dim=2)[:, :, : RESERVOIR_BLOCKS * BLOCK]

    def statistics(self, turns: list[Rotary], head_dim: int) -> JointStatistics:
        tokens = self.moments.count[:, None, None, None].clamp_min(1)
        self.moments.metrics["fisher"] = self.fisher / tokens * self._shares(head_dim)
        return JointStatistics(self.moments, turns, self.reservoir)

    def _shares(self, d: int) -> Tensor:
        """1 within the channels of one head's K or V, CROSS_HEAD_SHARE between them, [w, w]."""
        within = torch.block_diag(*[torch.ones(d, d, dtype=torch.float64)] * (self.fisher.shape[-1] // d))
        return CROSS_HEAD_SHARE + (1 - CROSS_HEAD_SHARE) * within


def _products(g: Tensor, layer: int) -> Tensor:
    """Σ ggᵀ of g [G, T, w] in float64 on the CPU."""
    products = (g.mT @ g).double().cpu()
    refuse_non_finite(products, layer)
    return products


@contextmanager
def _without_parameter_gradients(model: nn.Module):
    """Gradients with respect to the embedded tokens only: enough to reach K and V, and none is kept for weights."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.detach().requires_grad_())
    model.requires_grad_(False)
    try:
        yield
    finally:
        hook.remove()
        for p in wanted:
            p.requires_grad_(True)


@contextmanager
def _through_the_cache(model: nn.Module, watch: Callable[[int, Tensor, Tensor], None]):
    """Yields a function from tokens [1, T] to logits, under which `watch` sees each layer's K and V."""
    yield lambda tokens: model(tokens, past_key_values=Tap(watch), use_cache=True).logits


@contextmanager
def _checkpointed(model: nn.Module, watch: Callable[[int, Tensor, Tensor], None]):
    """As `_through_the_cache`, with activations recomputed: then there is no cache, and attention itself is watched."""

    def tap(attention):
        def attend(module, query, key, value, *args, **kwargs):
            # Hooks of the way forward fire; what is recomputed is watched again and never gets gradients
            watch(module.layer_idx, key, value)
            return attention(module, query, key, value, *args, **kwargs)

        return attend

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not model.supports_gradient_checkpointing:
        raise PluginError(f"{type(model).__name__} has no gradient checkpointing: leave --gradient-checkpointing out")
    with ExitStack() as stack:
        if not stack.enter_context(wrapped_attention(model, tap)):
            raise PluginError(
                f"{type(model).__name__} has its attention hard-wired: leave --gradient-checkpointing out"
            )
        for layer in layers:
            stack.enter_context(_recomputing(layer))
        yield lambda tokens: model(tokens, use_cache=False).logits


@contextmanager
def _recomputing(layer: GradientCheckpointingLayer):
    """Let a layer keep its input alone and recompute the rest: for training only, so its forward is told otherwise."""

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
