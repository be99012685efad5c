"""The cost of calibrating a dense model of a given shape, counted from its config: nothing is measured.

A multiplication and an addition count one FLOP each. L layers, H KV heads of d channels, Q query heads, sequences of T
tokens; a multi-head codec has N bases, each for G groups of w channels. Attention is causal, so half of its T² scores
count. Each function's docstring has its formula.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from gpt2.common.errors import PluginError
from gpt2.compression.calibration.fisher import SAMPLED_BLOCKS
from gpt2.compression.codecs import multi_head_bases
from gpt2.compression.codecs.mixed import BLOCK
from gpt2.models.geometry import Geometry
from gpt2.models.probe import geometry_of

FLOAT64, HALF = 8, 2  # bytes


@dataclass(frozen=True)
class Dimensions:
    """The sizes that costs are counted from.

    layer_weights: number of weights of one layer. weights: number of all weights, with embeddings.
    """

    geometry: Geometry
    query_heads: int
    hidden: int
    intermediate: int
    vocabulary: int
    layer_weights: int
    weights: int

    def multi_head_shapes(self) -> dict[str, Geometry]:
        """Name of each multi-head codec to N, G and w, as num_layers, num_kv_heads and head_dim of a Geometry."""
        return {name: basis.shape(self.geometry) for name, basis in multi_head_bases().items()}


def uniform_geometry(config: PretrainedConfig, name: str) -> Geometry:
    """The layers of a model in which they are alike but for windows. Raises PluginError for others."""
    geometry, _ = geometry_of(config, name)
    if not geometry.without_windows().alike:
        raise PluginError(f"{name}: costs on paper are for models whose layers are all attention of one shape, "
                          f"and this one has {geometry}: use scripts/benchmarks/cache_bytes.py")  # fmt: skip
    return geometry


def dimensions(config: PretrainedConfig, name: str) -> Dimensions:
    """Dimensions of a model from its config, without loading weights. Norms and biases count as weights of layers."""
    geometry = uniform_geometry(config, name)
    weights = weights_of(config, name)
    text = config.get_text_config(decoder=True)
    embeddings = text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2)
    return Dimensions(
        geometry, text.num_attention_heads, text.hidden_size, getattr(text, "intermediate_size", 4 * text.hidden_size),
        text.vocab_size, (weights - embeddings) // geometry.num_layers, weights,
    )  # fmt: skip


def weights_of(config: PretrainedConfig, name: str) -> int:
    """Number of a model's weights."""
    _, nbytes = geometry_of(config, name)
    dtype = getattr(config, "dtype", None)
    return nbytes // getattr(dtype, "itemsize", HALF)


# --- arithmetic


def forward_flops(dims: Dimensions, tokens: int, *, logits: bool = False) -> float:
    """One sequence of T tokens: L (2 · layer_weights · T + 2 Q d T²), and 2 · vocabulary · hidden · T for logits."""
    scores = 2 * dims.query_heads * dims.geometry.head_dim * tokens**2
    body = dims.geometry.num_layers * (2 * dims.layer_weights * tokens + scores)
    return float(body + logits * 2 * dims.vocabulary * dims.hidden * tokens)


def backward_flops(dims: Dimensions, tokens: int) -> float:
    """The backward pass of one sequence: L (2 · layer_weights · T + 5 Q d T²) + 2 · vocabulary · hidden · T.

    Weights get no gradients, so it costs one forward pass instead of two; attention takes five products instead of two.
    """
    scores = 5 * dims.query_heads * dims.geometry.head_dim * tokens**2
    body = dims.geometry.num_layers * (2 * dims.layer_weights * tokens + scores)
    return float(body + 2 * dims.vocabulary * dims.hidden * tokens)


def moments_flops(dims: Dimensions, tokens: int) -> float:
    """Second moments of the first pass, products of K, V and queries with themselves: 2 L d² (2 H + Q) T."""
    g = dims.geometry
    return 2.0 * g.num_layers * g.head_dim**2 * (2 * g.num_kv_heads + dims.query_heads) * tokens


def gradient_moments_flops(dims: Dimensions, tokens: int) -> float:
    """Second moments of the gradient pass: 4 L H d² T for heads, and 4 N G w² T for every multi-head codec."""
    g = dims.geometry
    products = [e.num_layers * e.num_kv_heads * e.head_dim**2 for e in dims.multi_head_shapes().values()]
    return 4.0 * tokens * (g.num_layers * g.num_kv_heads * g.head_dim**2 + sum(products))


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
    g = dims.geometry
    fitted = [(e.head_dim, e.num_layers * e.num_kv_heads) for e in dims.multi_head_shapes().values()]
    counts: dict[int, int] = {}
    for width, count in [*fitted, (g.head_dim, 2 * g.num_layers * g.num_kv_heads)]:
        counts[width] = counts.get(width, 0) + count
    return counts


# --- memory


def statistics_bytes(dims: Dimensions) -> int:
    """Bytes of the result of `collect` in float64: moments and a metric of K and V, 8 (2 L + 2 L H d + 4 L H d²)."""
    g = dims.geometry
    heads = g.num_layers * g.num_kv_heads
    return FLOAT64 * (2 * g.num_layers + heads * (2 * g.head_dim + 4 * g.head_dim**2))


def gradient_statistics_bytes(dims: Dimensions) -> dict[str, int]:
    """Bytes that `collect_fisher` adds, by part.

    heads: 16 L H d². Each multi-head codec, by its name: scatter and metric, 16 N G w², with mean and count. blocks:
    the sample that quantization is measured on, 2 · 48 · 64 · N G w for each codec.
    """
    g, entries = dims.geometry, dims.multi_head_shapes()
    moments = {
        name: FLOAT64 * e.num_layers * (1 + e.num_kv_heads * (e.head_dim + 2 * e.head_dim**2))
        for name, e in entries.items()
    }
    vectors = sum(e.num_layers * e.num_kv_heads * e.head_dim for e in entries.values())
    return {
        "heads": FLOAT64 * 2 * g.num_layers * g.num_kv_heads * g.head_dim**2,
        **moments,
        "blocks": HALF * SAMPLED_BLOCKS * BLOCK * vectors,
    }


def logits_bytes(dims: Dimensions, tokens: int) -> int:
    """Bytes of one float32 copy of a sequence's logits: 4 · T · vocabulary. The gradient pass holds three or four."""
    return 4 * tokens * dims.vocabulary


def activation_bytes(dims: Dimensions, tokens: int, *, checkpointing: bool = False, element: int = HALF) -> int:
    """Bytes that a Llama-like model's layers keep for the backward pass, with `element` bytes per number.

    For each token and layer: inputs of both norms in float32, 8 (hidden + 1); queries, attention output, K and V,
    2 (Q + H) d · element; a float32 sum per query head, 4 Q; three activations of the MLP, 3 · intermediate · element.
    For each token once: the last norm's input, 4 (hidden + 1), and the cosines and sines of RoPE, 2 d · element.
    checkpointing: only the inputs of all layers, and everything of one layer at a time.
    """
    g = dims.geometry
    attention = 2 * (dims.query_heads + g.num_kv_heads) * g.head_dim * element + 4 * dims.query_heads
    layer = 8 * (dims.hidden + 1) + attention + 3 * dims.intermediate * element
    once = 4 * (dims.hidden + 1) + 2 * g.head_dim * element
    layers = g.num_layers * dims.hidden * element + layer if checkpointing else g.num_layers * layer
    return tokens * (layers + once)
