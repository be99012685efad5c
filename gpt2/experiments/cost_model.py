"""The cost of calibrating a model of a given shape, counted from its config, layer by layer: nothing is measured.

A multiplication and an addition count one FLOP each. Sequences of T tokens; a layer has Q query heads, and caches H
heads of d channels on each of its sides, K and V. A multi-head codec has bases, each for G groups of w channels. Sums
are over layers, each with its own sizes. Each function's docstring has its formula.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from gpt2.common.errors import PluginError
from gpt2.compression.calibration.fisher import SAMPLED_BLOCKS
from gpt2.compression.codecs import MultiHead, multi_head_bases
from gpt2.compression.codecs.mixed import BLOCK
from gpt2.models.geometry import (
    FULL,
    HYBRID,
    HYBRID_SLIDING,
    LINEAR,
    NOTHING,
    SLIDING,
    Geometry,
    LayerGeometry,
    config_field,
)
from gpt2.models.probe import lay_out

FLOAT64, HALF = 8, 2  # bytes
COUNTED = (FULL, SLIDING, HYBRID, HYBRID_SLIDING, LINEAR, NOTHING)  # kinds of layers
EXPERTS, CHOSEN = ("n_routed_experts", "num_local_experts", "num_experts"), "num_experts_per_tok"


@dataclass(frozen=True)
class Layer:
    """The sizes that a layer's costs are counted from.

    cached: what it caches. weights: those that a token meets: of a mixture of experts, the chosen ones. query_heads,
    key_width, value_width: of the heads that attention multiplies, 0 where there is no attention. latent: whether these
    aren't the heads that are cached.
    """

    cached: LayerGeometry
    weights: float
    query_heads: int = 0
    key_width: int = 0
    value_width: int = 0
    latent: bool = False

    def pairs(self, tokens: int) -> float:
        """Pairs of a query and a token that it reads: T² / 2, and W T − W² / 2 where a window of W ends before."""
        seen = min(self.cached.window or tokens, tokens)
        return seen * tokens - seen**2 / 2

    def product_flops(self, tokens: int) -> float:
        """A product of queries with keys and one of weights with values: 2 Q (d of K + d of V) pairs."""
        return 2 * self.query_heads * (self.key_width + self.value_width) * self.pairs(tokens)

    def state_flops(self, tokens: int) -> float:
        """Three products with a recurrent state of S numbers for each token: 6 S T."""
        return 6 * (self.cached.state_bytes // HALF) * tokens

    def own_queries(self) -> int:
        """Query heads that read K as it is cached."""
        return 0 if self.latent else self.query_heads


@dataclass(frozen=True)
class Dimensions:
    """The sizes that a model's costs are counted from.

    weights: number of all weights, with embeddings. llama_like: whether layers are full or sliding attention and a
    gated MLP with a norm before each, of which activations are counted.
    """

    layers: tuple[Layer, ...]
    hidden: int
    intermediate: int
    vocabulary: int
    weights: int
    llama_like: bool = True

    @property
    def geometry(self) -> Geometry:
        return Geometry(tuple(layer.cached for layer in self.layers))

    def multi_head_shapes(self) -> dict[str, Geometry]:
        """Name of each multi-head codec that the layers can have to its bases, as `MultiHead.shape` gives them."""
        return {name: basis.shape(self.geometry) for name, basis in fitting_bases(self.geometry).items()}

    def squares(self) -> int:
        """Numbers of a matrix for every head that is cached: Σ H d²."""
        return _numbers(self.geometry, 2)

    def base_squares(self) -> int:
        """Numbers of a matrix for every multi-head basis: Σ G w²."""
        return sum(_base_numbers(shape, 2) for shape in self.multi_head_shapes().values())


def fitting_bases(geometry: Geometry) -> dict[str, MultiHead]:
    """The multi-head bases that layers can have, by name."""
    return {name: basis for name, basis in multi_head_bases().items() if not basis.misfit(geometry)}


def _numbers(geometry: Geometry, power: int) -> int:
    """Σ H d^power over K and V of all layers."""
    return sum(shape.heads * shape.width**power for _, _, shape in geometry.sides())


def _base_numbers(shape: Geometry, power: int) -> int:
    """Σ G w^power over the bases of a multi-head codec."""
    return sum(layer.k.heads * layer.k.width**power for layer in shape.layers if layer.k)


_DIMENSIONS: dict[str, Dimensions] = {}


def dimensions(config: PretrainedConfig, name: str) -> Dimensions:
    """Dimensions of a model from its config, without loading weights. Norms and biases count as weights of layers.

    Raises PluginError for layers whose costs aren't counted.
    """
    key = config.to_json_string(use_diff=False)
    if key not in _DIMENSIONS:  # a model of 80 layers takes seconds to lay out
        _DIMENSIONS[key] = _counted(config, name)
    return _DIMENSIONS[key]


def _counted(config: PretrainedConfig, name: str) -> Dimensions:
    model, geometry = lay_out(config, name)
    text = config.get_text_config(decoder=True)
    unknown = next((layer.kind for layer in geometry.layers if layer.kind not in COUNTED), None)
    if unknown or config_field(text, "num_kv_shared_layers"):
        what = f"layers of kind {unknown}" if unknown else "attention over an earlier layer's K and V"
        raise PluginError(f"{name}: costs on paper don't count {what}: leave it out, or use "
                          "scripts/benchmarks/cache_bytes.py for its bytes")  # fmt: skip
    modules = _layers_of(model, geometry.num_layers, name)
    latent = config_field(text, "kv_lora_rank")
    layers = tuple(
        _layer(text, own, _met(module, text, name), bool(latent and own.k and own.k.width == latent))
        for own, module in zip(geometry.layers, modules, strict=True)
    )
    like = all(_llama_like(own, module) for own, module in zip(layers, modules, strict=True))
    intermediate = getattr(text, "intermediate_size", 4 * text.hidden_size)
    return Dimensions(layers, text.hidden_size, intermediate, text.vocab_size, _all_weights(model), like)


def _llama_like(own: Layer, module: nn.Module) -> bool:
    norms = [field for field, _ in module.named_parameters() if "norm" in field and field.endswith("weight")]
    dense = own.weights == _all_weights(module)
    return own.cached.kind in (FULL, SLIDING) and not own.latent and dense and len(norms) == 2


def _layers_of(model: nn.Module, count: int, name: str) -> nn.ModuleList:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise PluginError(f"{name}: costs on paper need a model with a list of {count} layers, and it has none: leave it "
                      "out")  # fmt: skip


def _layer(text: PretrainedConfig, own: LayerGeometry, weights: float, latent: bool) -> Layer:
    if not own.attends:
        return Layer(own, weights)
    widths = own.k.width, own.v.width
    if latent:
        widths = text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim
    return Layer(own, weights, config_field(text, "num_attention_heads"), *widths, latent)


def _all_weights(module: nn.Module) -> int:
    return sum(weights.numel() for weights in module.parameters())


def _met(layer: nn.Module, text: PretrainedConfig, name: str) -> float:
    """Weights of a layer that a token meets: of routed experts, as many as are chosen for it."""
    routed = sum(w.numel() for field, w in layer.named_parameters() if re.search(r"(^|\.)experts\.", field))
    if not routed:
        return _all_weights(layer)
    count, chosen = next(filter(None, (config_field(text, field) for field in EXPERTS)), 0), config_field(text, CHOSEN)
    if not count or not chosen:
        raise PluginError(f"{name}: costs on paper need the numbers of experts and of those chosen, as config fields "
                          f"{EXPERTS[0]} and {CHOSEN}: leave it out")  # fmt: skip
    return _all_weights(layer) - routed + routed * chosen / count


# --- arithmetic


def forward_flops(dims: Dimensions, tokens: int, *, logits: bool = False) -> float:
    """One sequence of T tokens: Σ (2 · weights met · T + 2 Q (d of K + d of V) pairs + 6 S T), and for logits
    2 · vocabulary · hidden · T. Pairs are T² / 2 without windows.
    """
    body = sum(2 * own.weights * tokens + own.product_flops(tokens) + own.state_flops(tokens) for own in dims.layers)
    return float(body + logits * 2 * dims.vocabulary * dims.hidden * tokens)


def backward_flops(dims: Dimensions, tokens: int) -> float:
    """The backward pass of one sequence: as `forward_flops` with logits, but 5/2 times the products of attention.

    Weights get no gradients, so it costs one forward pass instead of two; attention takes five products instead of two,
    and a state twice as many.
    """
    more = sum(1.5 * own.product_flops(tokens) + own.state_flops(tokens) for own in dims.layers)
    return forward_flops(dims, tokens, logits=True) + more


def moments_flops(dims: Dimensions, tokens: int) -> float:
    """Second moments of the first pass, products of K, V and queries with themselves: 2 T Σ (H d² + Q d²).

    Queries count where they read K as it is cached.
    """
    queries = sum(own.own_queries() * own.key_width**2 for own in dims.layers)
    return 2.0 * tokens * (dims.squares() + queries)


def gradient_moments_flops(dims: Dimensions, tokens: int) -> float:
    """Second moments of the gradient pass: 2 T Σ H d² for heads, and 4 T Σ G w² for every multi-head codec."""
    return 2.0 * tokens * (dims.squares() + 2 * dims.base_squares())


def first_pass_flops(dims: Dimensions, tokens: int) -> float:
    """All of `statistics.collect` for one sequence: a forward pass without logits, and moments."""
    return forward_flops(dims, tokens) + moments_flops(dims, tokens)


def gradient_pass_flops(dims: Dimensions, tokens: int, *, checkpointing: bool = False) -> float:
    """All of `fisher.collect_fisher` for one sequence: a forward pass with logits, a backward pass, and moments.

    checkpointing: adds another forward pass of the layers.
    """
    again = forward_flops(dims, tokens) if checkpointing else 0
    forward = forward_flops(dims, tokens, logits=True)
    return forward + again + backward_flops(dims, tokens) + gradient_moments_flops(dims, tokens)


def bases(dims: Dimensions) -> dict[int, int]:
    """Width of a basis to the number of bases of that width that a Fisher calibration fits, multi-head or per head."""
    shapes = [layer.k for bases in dims.multi_head_shapes().values() for layer in bases.layers if layer.k]
    counts: dict[int, int] = {}
    for shape in [*shapes, *(shape for _, _, shape in dims.geometry.sides())]:
        counts[shape.width] = counts.get(shape.width, 0) + shape.heads
    return counts


# --- memory


def statistics_bytes(dims: Dimensions) -> int:
    """Bytes of the result of `collect` in float64: counts, 8 · 2 L, and moments and a metric of K and V, 8 Σ (H d + 2 H
    d²). Layers whose K and V attention doesn't read as they are cached have no metric.
    """
    seen = Geometry(tuple(own.cached for own in dims.layers if not own.latent))
    numbers = _numbers(dims.geometry, 1) + dims.squares() + _numbers(seen, 2)
    return FLOAT64 * (2 * len(dims.layers) + numbers)


def gradient_statistics_bytes(dims: Dimensions) -> dict[str, int]:
    """Bytes that `collect_fisher` adds, by part.

    heads: 8 Σ H d². Each multi-head codec, by its name: scatter and metric, 16 Σ G w², with mean and count. blocks: the
    sample that quantization is measured on, 2 · 48 · 64 · Σ G w for each codec.
    """
    entries = dims.multi_head_shapes()
    moments = {
        name: FLOAT64 * (shape.num_layers + _base_numbers(shape, 1) + 2 * _base_numbers(shape, 2))
        for name, shape in entries.items()
    }
    vectors = sum(_base_numbers(shape, 1) for shape in entries.values())
    return {"heads": FLOAT64 * dims.squares(), **moments, "blocks": HALF * SAMPLED_BLOCKS * BLOCK * vectors}


def logits_bytes(dims: Dimensions, tokens: int) -> int:
    """Bytes of one float32 copy of a sequence's logits: 4 · T · vocabulary. The gradient pass holds three or four."""
    return 4 * tokens * dims.vocabulary


def activation_bytes(dims: Dimensions, tokens: int, *, checkpointing: bool = False, element: int = HALF) -> int | None:
    """Bytes that a Llama-like model's layers keep for the backward pass, `element` to a number; None of other models.

    For each token and layer: inputs of both norms in float32, 8 (hidden + 1); queries, attention output, K and V,
    2 (Q + H) d · element; a float32 sum per query head, 4 Q; three activations of the MLP, 3 · intermediate · element.
    For each token once: the last norm's input, 4 (hidden + 1), and the cosines and sines of RoPE, 2 d · element.
    checkpointing: only the inputs of all layers, and everything of one layer at a time.
    """
    if not dims.llama_like:
        return None

    def kept(own: Layer) -> int:
        attention = own.query_heads * (own.key_width + own.value_width) + own.cached.k.size + own.cached.v.size
        mlp = 3 * dims.intermediate
        return 8 * (dims.hidden + 1) + (attention + mlp) * element + 4 * own.query_heads

    each = [kept(own) for own in dims.layers]
    once = 4 * (dims.hidden + 1) + 2 * dims.layers[0].key_width * element
    layers = len(each) * dims.hidden * element + max(each) if checkpointing else sum(each)
    return tokens * (layers + once)
