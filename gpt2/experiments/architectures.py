"""Which decoder families of transformers a compressed cache works with, found by trying each one in miniature.

A family is a `model_type` that transformers maps to a causal language model. Its default config is shrunk to a few
layers of a few channels, a random model is made of it, and what happens decides the mode:

    direct-capable    works, and its attention can be replaced by one that would read what the cache stores
    reconstruct-only  works, with K and V as the cache reconstructs them for the model's own attention
    refused           `gpt2.models` says why
    not tried         transformers makes no model of the default config, or doesn't run it with its own cache
    failed            transformers runs it and this toolkit doesn't: a bug, with its message
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gpt2.common.errors import UnsupportedModel
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.codecs import Compressor, quantizer_for_bits
from gpt2.models.attention_function import wrapped_attention
from gpt2.models.loading import LoadedModel, wrap
from gpt2.models.support import SUPPORTED, refuse_unsupported

MODES = DIRECT, RECONSTRUCT, REFUSED, NOT_TRIED, FAILED = (
    "direct-capable", "reconstruct-only", "refused", "not tried", "failed",
)  # fmt: skip
WORKING = (DIRECT, RECONSTRUCT)
PROMPT, NEW = 14, 5  # tokens; the prompt alone is longer than a window
SAME = 1e-4  # largest change of a logit against the largest logit; sums of another length round differently
MOST_PARAMETERS = 20_000_000  # what escapes shrinking is told by its size, before memory is taken for it
THE_MODEL = "the model"  # as messages name it, so that the same reason reads the same for every family

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
NEEDED = ("head_dim", "num_key_value_heads", "n_routed_experts")  # None by default where a model computes with it
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}  # no end: generation has a known length
OTHER_TOKEN = 120  # any further special token; no prompt has it
# Switches of a config, not its architecture: so wherever a family has them
SWITCHES = {"use_cache": True, "is_decoder": True, "tie_word_embeddings": False}
LEFT_ALONE = ("id2label", "label2id", "rope_parameters")
# What no name tells: sizes that hang together, and defaults unlike any checkpoint
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
    """transformers itself makes no model of a family, or runs none; the message says why."""


def families() -> list[str]:
    """Every `model_type` that the installed transformers maps to a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def settings() -> dict:
    """What the rows of `examine` were made with, for results files."""
    return {"prompt_tokens": PROMPT, "new_tokens": NEW, "same_logits_within": SAME, "config_switches": SWITCHES}


def examine(family: str) -> dict:
    """Try a family: its mode, the reason where it isn't the best one, and what was found on the way."""
    row = {"model_type": family, "config_class": CONFIG_MAPPING[family].__name__}
    row |= {"model_class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]}
    try:
        with _quiet():
            model = tiny_family(family)
            loaded = _wrapped(model)
            logits, tokens = reference(model)
            row |= described(loaded) | compared(loaded, logits, tokens)
            reason = why_attention_stays(model, logits)
        mode = RECONSTRUCT if reason else DIRECT
    except NotTried as error:
        mode, reason = NOT_TRIED, str(error)
    except UnsupportedModel as error:
        text = str(error).removesuffix(f"; {SUPPORTED}").partition(" [(")[0]  # without the miniature's own shapes
        mode, reason = REFUSED, text.partition("can't be compressed: ")[2] or text.removeprefix(f"{THE_MODEL}: ")
    except Exception as error:  # whatever it is, it is what was looked for
        mode, reason = FAILED, _one_line(error)
    return row | {"mode": mode, "reason": reason}


def tiny_family(family: str) -> PreTrainedModel:
    """A random model of a family, always the same, with weights so large that what a cache returns decides tokens.

    Raises NotTried where transformers makes none, and UnsupportedModel where the config alone is refused.
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
    except Exception as error:  # configs contradict themselves in as many ways as there are modeling files
        raise NotTried(f"transformers makes no model of it: {_one_line(error)}") from error
    return model


def tiny_config(family: str) -> PretrainedConfig:
    """A family's default config in miniature; raises as `tiny_family`."""
    try:
        default = CONFIG_MAPPING[family]()
    except Exception as error:
        raise NotTried(f"transformers makes no default config of it: {_one_line(error)}") from error
    text = default.get_text_config(decoder=True)
    text.use_cache = getattr(text, "use_cache", True) or SWITCHES["use_cache"]
    refuse_unsupported(default, THE_MODEL)  # before shrinking: no size of a recurrent layer has to be known
    try:
        return type(default).from_dict(_merged(shrunk(default.to_dict()), OVERRIDES.get(family, {})))
    except Exception as error:
        raise NotTried(f"no config this small: {_one_line(error)}") from error


def shrunk(fields: dict) -> dict:
    """Config fields in miniature: every size by its name, and one layer for each kind that lists of layers tell."""
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
    """Fields with changes, those of a nested config one by one."""
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
    """What a layer changes: twice the model's head_dim stays twice."""
    return {
        name: SIZES[name] * value // fields[name] if name in SIZES and fields.get(name) else value
        for name, value in changes.items()
    }


def _is_index(value: list | tuple, count: int) -> bool:
    """Whether a list names some of `count` layers by number, as [0, 1, 2, …] does and [1, 1, 1, 0, …] doesn't."""
    numbers = len(value) > 1 and all(type(x) is int and 0 <= x < count for x in value)
    return numbers and list(value) == sorted(set(value))


def _kept_layers(fields: dict, count: int) -> list[int]:
    """The first layers, and the first one of every kind."""
    kept = set(range(min(count, 2)))
    for value in fields.values():
        if not isinstance(value, list | tuple):
            continue
        if _is_index(value, count):
            kept.add(value[0])
        elif count and len(value) == count:
            kept |= {list(value).index(kind) for kind in value}
    return sorted(kept | {int(layer) for layer in list(fields.get("per_layer_config") or ())[:1]})


def _wrapped(model: PreTrainedModel) -> LoadedModel:
    """The model as scripts have it. What goes wrong is held against transformers where its own cache does no better."""
    try:
        return wrap(model, None, THE_MODEL)
    except UnsupportedModel:
        raise
    except Exception:
        reference(model)
        raise


def reference(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits and generated tokens with transformers' own cache; raises NotTried where it has none to give."""
    try:
        return streamed(model, DynamicCache(config=model.config)), generated(model, DynamicCache(config=model.config))
    except Exception as error:
        raise NotTried(f"transformers doesn't run it with its own cache: {_one_line(error)}") from error


@torch.no_grad()
def streamed(model: PreTrainedModel, cache) -> Tensor:
    """Logits [1, PROMPT + NEW, vocabulary] of a prompt, then one token at a time, through a cache."""
    ids = _prompt(PROMPT + NEW)
    pieces = ids[:, :PROMPT], *ids[:, PROMPT:].split(1, dim=1)
    return torch.cat([model(input_ids=x, past_key_values=cache, use_cache=True).logits for x in pieces], dim=1)


def generated(model: PreTrainedModel, cache) -> Tensor:
    """Tokens [1, PROMPT + NEW] by greedy decoding."""
    ids = _prompt(PROMPT)
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW, "use_cache": True}
    return model.generate(ids, past_key_values=cache, **how)


def _prompt(length: int) -> Tensor:
    return torch.randint(2, 97, (1, length), generator=torch.Generator().manual_seed(0))


def described(loaded: LoadedModel) -> dict:
    """The miniature's shape, and whether transformers' own cache forgets what a window hides."""
    own = DynamicCache(config=loaded.model.config)
    return {"geometry": vars(loaded.geometry), "sliding_layers": any(layer.is_sliding for layer in own.layers)}


def compared(loaded: LoadedModel, logits: Tensor, tokens: Tensor) -> dict:
    """Our cache against transformers' own. Raises RuntimeError where a cache that loses nothing changes anything.

    And where one that does lose something changes nothing: then the model reads another cache than it was given.
    """
    model, layers = loaded.model, loaded.geometry.num_layers
    int4 = [Compressor(quantizer_for_bits(4))] * layers
    exact = _change(streamed(model, identity_cache(layers)), logits)
    lossy = _change(streamed(model, CompressedDynamicCache(int4, int4)), logits)
    if not exact <= SAME:
        raise RuntimeError(f"a cache that loses nothing changes logits by {exact:.1e} of the largest")
    if not 0 < lossy < float("inf"):
        raise RuntimeError(f"4 bits change logits by {lossy} of the largest")
    for cache in (identity_cache(layers), CompressedDynamicCache(int4, int4)):
        found = generated(model, cache)
        if cache.get_seq_length() != PROMPT + NEW - 1:  # the last token was never fed
            raise RuntimeError(f"the cache holds {cache.get_seq_length()} tokens after {PROMPT + NEW - 1} were fed")
        if cache.layers[0].stores["K"].compressor.exact and not torch.equal(found, tokens):
            raise RuntimeError("a cache that loses nothing changes tokens")
    return {"identity_logit_change": exact, "int4_logit_change": lossy, "tokens_generated_alike": NEW}


def why_attention_stays(model: PreTrainedModel, logits: Tensor) -> str | None:
    """Why the attention of a model can't be replaced, None where it can.

    It is replaced, and between cache and attention K and V are sealed: code that looks at them on the way fails.
    """
    opened = 0

    def opening(attention):
        def attend(module, query, key, value, *args, **kwargs):
            nonlocal opened
            opened += isinstance(key, _Sealed)
            key, value = (x.content if isinstance(x, _Sealed) else x for x in (key, value))
            return attention(module, query, key, value, *args, **kwargs)

        return attend

    try:
        with wrapped_attention(model, opening) as replaced:
            if not replaced:
                return "transformers can't set its attention"
            found = streamed(model, _SealingCache(config=model.config))
    except Exception as error:  # anything that a tensor can do and a sealed one can't
        return f"it looks at K and V before attention does ({_one_line(error)})"
    if not opened:
        return "it has attention of its own beside the one that can be replaced"
    return None if _change(found, logits) <= SAME else "another attention function changes its logits"


class _Sealed:
    """A tensor that nothing can be done with."""

    __slots__ = ("content",)

    def __init__(self, content: Tensor):
        self.content = content


class _SealingCache(DynamicCache):
    """transformers' own cache, but what it returns is sealed."""

    def update(self, *args, **kwargs):
        return tuple(_Sealed(x) for x in super().update(*args, **kwargs))


def _change(found: Tensor, expected: Tensor) -> float:
    """Largest change of a logit over the largest logit; not a number where one isn't finite."""
    return float((found - expected).abs().max() / expected.abs().max())


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'…' * (len(text) > 160)}"


@contextmanager
def _quiet():
    """Without the advice that transformers has for real models."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
