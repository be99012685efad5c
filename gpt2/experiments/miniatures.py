"""A small random model of any decoder family of transformers, from its default config with every size cut down."""

from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from gpt2.common.errors import UnsupportedModel
from gpt2.experiments.miniature_configs import (
    DEFAULTS,
    LAYER_COUNTS,
    LEFT_ALONE,
    NEEDED,
    OTHER_TOKEN,
    OVERRIDES,
    SIZES,
    SWITCHES,
    TOKENS,
)
from gpt2.models.geometry import ATTENTION_KINDS
from gpt2.models.support import refuse_unsupported

MOST_PARAMETERS = 20_000_000  # a larger miniature isn't built: some size in its config was not recognized
LATENT_WIDTHS = ("qk_nope_head_dim", "v_head_dim", "qk_head_dim", "head_dim")
ATTENTION = (*ATTENTION_KINDS, "chunked_attention")
ATTENTION_LAYERS = ("attn_layer_indices", "full_attn_idxs")  # lists of the numbers of those that attend
THE_MODEL = "the model"  # its name in error messages, so that the same reason reads the same for every family


class NotTried(Exception):
    """transformers can't make a model of a family or can't run it; the message is the reason."""


def tiny_family(family: str) -> PreTrainedModel:
    """A random model of a family, the same every time; its weights are so large that the cache decides the tokens.

    Raises NotTried if transformers can't make one, and UnsupportedModel if the toolkit rejects its config.
    """
    config = tiny_config(family)
    try:
        with torch.device("meta"):
            size = sum(weights.numel() for weights in AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            raise NotTried(f"the miniature has {size:,} weights")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
            for weights in model.parameters():
                if weights.dim() > 1:
                    weights.normal_(0, 0.2)
    except NotTried:
        raise
    except Exception as error:  # every modeling file has its own errors for contradictory configs
        raise NotTried(f"transformers makes no model of it: {one_line(error)}") from error
    return model


def tiny_config(family: str) -> PretrainedConfig:
    """A family's default config in miniature; raises the errors of `tiny_family`."""
    try:
        default = CONFIG_MAPPING[family](**DEFAULTS.get(family, {}))
    except Exception as error:
        raise NotTried(f"transformers makes no default config of it: {one_line(error)}") from error
    text = default.get_text_config(decoder=True)
    text.use_cache = getattr(text, "use_cache", True) or SWITCHES["use_cache"]
    try:
        refuse_unsupported(default, THE_MODEL)  # before shrinking, so that sizes of what is refused needn't be known
    except UnsupportedModel:
        raise
    except Exception as error:
        raise NotTried(f"transformers makes no cache of its config: {one_line(error)}") from error
    try:
        return type(default).from_dict(_merged(shrunk(default.to_dict()), OVERRIDES.get(family, {})))
    except Exception as error:
        raise NotTried(f"no config this small: {one_line(error)}") from error


def shrunk(fields: dict) -> dict:
    """Config fields in miniature: sizes by their names, and a layer of each kind that lists of layers name."""
    count = next((fields[name] for name in LAYER_COUNTS if isinstance(fields.get(name), int)), 0)
    kept, sizes = _kept_layers(fields, count), _sizes(fields)
    small = {}
    for name, value in fields.items():
        if name in LEFT_ALONE:
            small[name] = value
        elif name == "per_layer_config":
            small[name] = {
                kept.index(int(layer)): _in_proportion(changes, fields, sizes)
                for layer, changes in value.items()
                if int(layer) in kept
            }
        elif name == "num_kv_shared_layers" and value:
            small[name] = sum(layer >= count - value for layer in kept)
        elif isinstance(value, dict):
            small[name] = shrunk(value)
        elif isinstance(value, list | tuple) and _is_index(value, count):
            small[name] = [kept.index(layer) for layer in value if layer in kept]
        elif isinstance(value, list | tuple) and count and len(value) == count:
            small[name] = [_small(name, value[layer], 0, sizes) for layer in kept]
        else:
            small[name] = _small(name, value, len(kept), sizes)
    return small


def _sizes(fields: dict) -> dict[str, int]:
    """SIZES for a config; widths of K, V and rotary parts keep their proportions where a model has several."""
    rope, v = fields.get("qk_rope_head_dim"), fields.get("v_head_dim")
    if fields.get("kv_lora_rank") and rope:  # latent attention: as many KV heads as query heads read the latent
        widths = {x: SIZES["qk_rope_head_dim"] * fields[x] // rope for x in LATENT_WIDTHS if fields.get(x)}
        same = {"num_key_value_heads": SIZES["num_attention_heads"], "index_head_dim": SIZES["head_dim"]}
        return SIZES | widths | same | {"first_k_dense_replace": 1}
    if v and fields.get("head_dim"):
        return SIZES | {"head_dim": SIZES["v_head_dim"] * fields["head_dim"] // v}
    return SIZES


def _merged(fields: dict, changes: dict) -> dict:
    """Fields with changes; those of nested configs are merged field by field."""
    nested = {name: _merged(fields[name], x) for name, x in changes.items() if isinstance(fields.get(name), dict)}
    return fields | changes | nested


def _small(name: str, value, layers: int, sizes: dict[str, int]):
    """A single field in miniature."""
    if name in SWITCHES:
        return SWITCHES[name]
    if name in TOKENS or (name.endswith(("_token_id", "_token_index")) and value is not None):
        return TOKENS.get(name, OTHER_TOKEN)
    if name in LAYER_COUNTS and value:
        return layers
    if (type(value) is int and name in sizes) or (value is None and name in NEEDED):
        return sizes[name] if value is None else min(value, sizes[name])
    return value


def _in_proportion(changes: dict, fields: dict, sizes: dict[str, int]) -> dict:
    """Changes of a single layer in miniature, in proportion to the fields: twice the head_dim stays twice."""
    return {
        name: sizes[name] * value // fields[name] if name in sizes and fields.get(name) else value
        for name, value in changes.items()
    }


def _is_index(value: list | tuple, count: int) -> bool:
    """Whether a list holds numbers of layers below `count` in ascending order, such as [0, 1, 3]."""
    numbers = len(value) > 1 and all(type(x) is int and 0 <= x < count for x in value)
    return numbers and list(value) == sorted(set(value))


def _kept_layers(fields: dict, count: int) -> list[int]:
    """Numbers of the first two layers, of the first two that attend, and of the first layer of every kind.

    Where the last layers read K and V of earlier ones, also the first of every kind among these.
    """
    kept = set(range(min(count, 2)))
    shared = fields.get("num_kv_shared_layers") or 0
    for name, value in fields.items():
        if not isinstance(value, list | tuple):
            continue
        if _is_index(value, count):
            kept |= set(value[: 2 if name in ATTENTION_LAYERS else 1])
        elif count and len(value) == count:
            kept |= {list(value).index(kind) for kind in value}
            kept |= set([layer for layer, kind in enumerate(value) if kind in ATTENTION][:2])
            if name == "layer_types" and shared:
                kept |= {value.index(kind, count - shared) for kind in value[-shared:]}
    return sorted(kept | {int(layer) for layer in list(fields.get("per_layer_config") or ())[:1]})


def one_line(error: Exception) -> str:
    """Type and message of an error in one line of limited length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'…' * (len(text) > 160)}"
