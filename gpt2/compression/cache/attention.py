"""Attention over the compressed cache: a model reads what is stored, and no step expands the history.

    enable_compressed_attention(model)
    model.generate(..., past_key_values=cache)      # any cache of ours; others work as before
    disable_compressed_attention(model)

While the model runs, our caches give their attention function the stores themselves in the place of K and V. A model
that looks at K or V on the way can't work like that; it is tried out before anything is changed for good.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gpt2.common.errors import UnsupportedModel
from gpt2.compression.cache import attention_math, direct_attention
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.cache.layers import Sealed
from gpt2.compression.cache.token_store import precisely
from gpt2.compression.kernels import cpu

NAME = "compressed_cache"  # names with "flash", "sdpa" or "flex" mean something to transformers
# Queries per KV head up to which they read the codes. More, in a prompt, share one expansion of the history
MOST_QUERIES = 64
PROBE_TOKENS, PROBE_STEPS = 12, 2
SAME = 1e-3  # largest change of a logit in the probe against the largest logit, in float32
_STATE = "_compressed_attention"
# One at a time: a second that begins meanwhile would take ours for what the model had before. Again by the same thread,
# as a refusal undoes what was done
_SWITCHING = threading.RLock()


@dataclass
class Reader:
    """What a model has that attends over stores: how it attended before, its hooks, and whether it still does."""

    config: PretrainedConfig
    previous: dict[str, str]
    hooks: list
    enabled: bool = True

    @property
    def active(self) -> bool:
        """Not after `disable`, nor while another attention is set on the model; one that says it wraps ours is ours."""
        name = self.config._attn_implementation
        return self.enabled and (name == NAME or _wraps_ours(name))

    def __deepcopy__(self, memo: dict) -> Reader:
        return self


def enable_compressed_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model attend over our caches as they are stored; returns the model.

    Logits are those of the same cache without it, to rounding. Other caches are read by PyTorch's attention. Raises
    UnsupportedModel, and leaves the model as it was, where its attention can't be replaced or a trial run with the
    exact cache gives other logits.

    Any number of threads may then run the model, each with caches of its own. To switch is for all of them: not while
    one runs it.
    """
    with _SWITCHING:
        return model if is_enabled(model) else _enable(model)


def _enable(model: PreTrainedModel) -> PreTrainedModel:
    if not getattr(type(model), "_can_set_attn_implementation", lambda: False)():
        raise _unsupported(model, "transformers can't set its attention")
    AttentionInterface.register(NAME, torch.compiler.disable(compressed_attention))
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if model.device.type == "cpu":
        cpu.loaded()  # now, so that the first token doesn't wait for a compiler
    training = model.training
    model.eval()  # dropout would look like another attention
    try:
        expected = _probe(model, DynamicCache(config=model.config))
        setattr(model, _STATE, Reader(model.config, _implementations(model), _hooked(model)))
        model.set_attn_implementation(NAME)
        _check_probe(model, expected)
    except UnsupportedModel:
        disable_compressed_attention(model)
        raise
    except Exception as error:  # anything that a tensor can do and a sealed one can't
        disable_compressed_attention(model)
        raise _unsupported(model, f"a trial run failed, as where K and V are looked at on the way ({error})") from error
    finally:
        model.train(training)
    return model


def disable_compressed_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model its own attention back; returns the model. Our caches then reconstruct, as without this."""
    with _SWITCHING:
        if is_enabled(model):
            reader = getattr(model, _STATE)
            reader.enabled = False
            for hook in reader.hooks:
                hook.remove()
            delattr(model, _STATE)
            model.set_attn_implementation(reader.previous)
    return model


def _implementations(model: PreTrainedModel) -> dict[str, str]:
    """Attention of the model and of each part with a config of its own, as `set_attn_implementation` takes them."""
    parts = {key: getattr(model.config, key, None) for key in model.config.sub_configs}
    found = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    return {"": model.config._attn_implementation} | {key: name for key, name in found.items() if name}


def _wraps_ours(name: str) -> bool:
    return inspect.unwrap(ALL_ATTENTION_FUNCTIONS.get(name, object)) is compressed_attention


def _hooked(model: PreTrainedModel) -> list:
    """Hooks that seal our caches while the model runs, and its decoder: evaluations call that without the head."""
    hooks = []
    for module in {id(m): m for m in (model, model.base_model)}.values():
        hooks.append(module.register_forward_pre_hook(partial(_seal, weakref.ref(model)), with_kwargs=True))
        hooks.append(module.register_forward_hook(_unseal, with_kwargs=True, always_call=True))
    return hooks


def is_enabled(model: PreTrainedModel) -> bool:
    """Whether `enable_compressed_attention` holds for a model."""
    return hasattr(model, _STATE)


def compressed_attention(
    module: torch.nn.Module, query: Tensor, key, value, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, softcap: float | None = None, s_aux: Tensor | None = None, **kwargs,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function that transformers calls, [B, H, Q, d] → [B, Q, H, d].

    key, value: what a cache returned, sealed by ours, tensors of any other.
    """
    plain = {"dropout": dropout, "scaling": scaling, "softcap": softcap, "s_aux": s_aux, **kwargs}
    if not isinstance(key, Sealed):
        return _plain(module, query, key, value, attention_mask, **plain), None
    k, v = key.stores()
    few = query.shape[1] * query.shape[2] <= MOST_QUERIES * k.sinks.shape[1]
    learning = query.requires_grad and torch.is_grad_enabled()  # kernels have no way back
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    special = learning or kwargs.get("position_bias") is not None or (attention_mask is None and not causal)
    if special or not (few and k.compressor.readable and v.compressor.readable):
        return _plain(module, query, *key.read(), attention_mask, **plain), None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    with precisely(query):
        out = direct_attention.attend(
            k, v, query.to(k.sinks.dtype), attention_mask, scaling, softcap=softcap, sinks=s_aux
        )
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def _plain(
    module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, softcap: float | None,
    s_aux: Tensor | None, scaling: float | None, **kwargs,
) -> Tensor:  # fmt: skip
    """Attention over expanded K and V: PyTorch's own, but for what it doesn't know."""
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)[0]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    dropout = kwargs.get("dropout", 0.0) if module.training else 0.0
    out = attention_math.attend_expanded(
        key, value, query, mask, scaling, softcap=softcap, sinks=s_aux, dropout=dropout
    )
    return out.transpose(1, 2).contiguous()


def _seal(owner: weakref.ref, module, args, kwargs) -> None:
    _set_reader(kwargs, getattr(owner(), _STATE, None))


def _unseal(module, args, kwargs, output) -> None:
    _set_reader(kwargs, None)


def _set_reader(kwargs: dict, reader: Reader | None) -> None:
    cache = kwargs.get("past_key_values")
    if isinstance(cache, CompressedDynamicCache):
        for layer in cache.layers:
            layer.reader = reader if cache.direct else None


@torch.no_grad()
def _probe(model: PreTrainedModel, cache) -> Tensor:
    """Logits of a short prompt and a few steps after it, through a cache: [1, tokens, vocabulary] float32."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(3, 3 + PROBE_TOKENS + PROBE_STEPS) * 7 % vocabulary
    pieces = ids[None].to(model.device).split([PROBE_TOKENS, *[1] * PROBE_STEPS], dim=1)
    outputs = (model(x, past_key_values=cache, use_cache=True) for x in pieces)
    return torch.cat([getattr(out, "logits", out[0]).float() for out in outputs], dim=1)


def _check_probe(model: PreTrainedModel, expected: Tensor) -> None:
    cache = identity_cache(len(DynamicCache(config=model.config).layers))
    found = _probe(model, cache)
    change = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    # float16 and bfloat16 round each sum, in whatever order it is made
    tolerance = max(SAME, 8 * torch.finfo(model.dtype).eps)
    if not change <= tolerance:
        raise _unsupported(model, f"another attention function changes its logits by {change:.1e} of the largest")
    if cache.get_seq_length() != PROBE_TOKENS + PROBE_STEPS:
        raise _unsupported(model, "it reads another cache than it was given")


def _unsupported(model: PreTrainedModel, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{type(model).__name__} can't attend over a compressed cache: {reason}. The cache works with it all the same, "
        "by reconstruction: don't call enable_compressed_attention"
    )
