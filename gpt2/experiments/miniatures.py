"""A small random model of any decoder family of transformers, from its default config with every size cut down."""

from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from gpt2.models.support import refuse_unsupported

MOST_PARAMETERS = 20_000_000  # a larger miniature isn't built: some size in its config was not recognized
THE_MODEL = "the model"  # its name in error messages, so that the same reason reads the same for every family

_SIZES = {
    64: "hidden_size d_model n_embd embedding_size embedding_dim emb_dim word_embed_proj_dim attention_hidden_size "
    "intermediate_size moe_intermediate_size shared_expert_intermediate_size intermediate_size_mlp ffn_dim n_inner "
    "encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dim_ff dff d_inner feed_forward_size dense_intermediate_size "
    "nemo_conv_channels",
    16: "head_dim swa_head_dim dim_head kv_channels attention_head_dim v_head_dim",
    8: "rotary_dim sliding_window sliding_window_size window_size local_attention attention_chunk_size",
    4: "num_attention_heads swa_num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads "
    "decoder_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts",
    2: "num_key_value_heads swa_num_key_value_heads num_kv_heads encoder_layers decoder_layers num_blocks "
    "num_experts_per_tok moe_topk moe_top_k moe_k",
    1: "n_group topk_group",
    128: "vocab_size vocab_size_per_layer_input shape_vocab_size pronunciation_vocab_size",
    512: "max_position_embeddings n_positions n_ctx max_seq_len",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
NEEDED = ("head_dim", "num_key_value_heads", "n_routed_experts")  # set even if they are None by default
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}  # without an end token generation has a known length
OTHER_TOKEN = 120  # any other special token; prompts don't have it
# Switches that aren't part of an architecture, set in every config that has them
SWITCHES = {"use_cache": True, "is_decoder": True, "tie_word_embeddings": False}
LEFT_ALONE = ("id2label", "label2id", "rope_parameters")
# Fields that their names don't determine: sizes that depend on each other, and defaults unlike any checkpoint
OVERRIDES: dict[str, dict] = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dots1": {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "reformer": {"axial_pos_embds": False},
    "xlnet": {"d_head": 16},
    "xmod": {"default_language": "en_XX"},
}


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
        default = CONFIG_MAPPING[family]()
    except Exception as error:
        raise NotTried(f"transformers makes no default config of it: {one_line(error)}") from error
    text = default.get_text_config(decoder=True)
    text.use_cache = getattr(text, "use_cache", True) or SWITCHES["use_cache"]
    refuse_unsupported(default, THE_MODEL)  # before shrinking, so that sizes of recurrent layers needn't be known
    try:
        return type(default).from_dict(_merged(shrunk(default.to_dict()), OVERRIDES.get(family, {})))
    except Exception as error:
        raise NotTried(f"no config this small: {one_line(error)}") from error


def shrunk(fields: dict) -> dict:
    """Config fields in miniature: sizes by their names, and a layer of each kind that lists of layers name."""
    count = next((fields[name] for name in LAYER_COUNTS if isinstance(fields.get(name), int)), 0)
    kept = _kept_layers(fields, count)
    small = {}
    for name, value in fields.items():
        if name in LEFT_ALONE:
            small[name] = value
        elif name == "per_layer_config":
            small[name] = {
                kept.index(int(layer)): _in_proportion(changes, fields)
                for layer, changes in value.items()
                if int(layer) in kept
            }
        elif isinstance(value, dict):
            small[name] = shrunk(value)
        elif isinstance(value, list | tuple) and _is_index(value, count):
            small[name] = [kept.index(layer) for layer in value if layer in kept]
        elif isinstance(value, list | tuple) and count and len(value) == count:
            small[name] = [value[layer] for layer in kept]
        else:
            small[name] = _small(name, value, len(kept))
    return small


def _merged(fields: dict, changes: dict) -> dict:
    """Fields with changes; those of nested configs are merged field by field."""
    nested = {name: _merged(fields[name], x) for name, x in changes.items() if isinstance(fields.get(name), dict)}
    return fields | changes | nested


def _small(name: str, value, layers: int):
    """A single field in miniature."""
    if name in SWITCHES:
        return SWITCHES[name]
    if name in TOKENS or (name.endswith(("_token_id", "_token_index")) and value is not None):
        return TOKENS.get(name, OTHER_TOKEN)
    if name in LAYER_COUNTS and value:
        return layers
    if (type(value) is int and name in SIZES) or (value is None and name in NEEDED):
        return SIZES[name] if value is None else min(value, SIZES[name])
    return value


def _in_proportion(changes: dict, fields: dict) -> dict:
    """Changes of a single layer in miniature, in proportion to the fields: twice the head_dim stays twice."""
    return {
        name: SIZES[name] * value // fields[name] if name in SIZES and fields.get(name) else value
        for name, value in changes.items()
    }


def _is_index(value: list | tuple, count: int) -> bool:
    """Whether a list holds numbers of layers below `count` in ascending order, such as [0, 1, 3]."""
    numbers = len(value) > 1 and all(type(x) is int and 0 <= x < count for x in value)
    return numbers and list(value) == sorted(set(value))


def _kept_layers(fields: dict, count: int) -> list[int]:
    """Numbers of the first two layers and of the first layer of every kind."""
    kept = set(range(min(count, 2)))
    for value in fields.values():
        if not isinstance(value, list | tuple):
            continue
        if _is_index(value, count):
            kept.add(value[0])
        elif count and len(value) == count:
            kept |= {list(value).index(kind) for kind in value}
    return sorted(kept | {int(layer) for layer in list(fields.get("per_layer_config") or ())[:1]})


def one_line(error: Exception) -> str:
    """Type and message of an error in one line of limited length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'…' * (len(text) > 160)}"
