"""Compressed attention switched on and off: the model attends over the codes, without reconstructing the history.

    enable_compressed_attention(model)
    model.generate(..., past_key_values=cache)      # any compressed cache; other caches work as before
    disable_compressed_attention(model)

While the model runs, compressed caches return a StoredKV in place of K and V, and the attention function reads the
stores from it. A model that uses K or V before attention can't work like that, so enabling tries the model out first.
With when="auto" a layer reconstructs its history where that was measured to be the faster way (`crossover`).
"""

from __future__ import annotations

import inspect
import logging
import threading
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gpt2.common.errors import PluginError, UnsupportedModel, brief
from gpt2.compression.cache import attention_math, crossover, direct_attention
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.cache.layers import StoredKV, as_new
from gpt2.compression.cache.token_store import without_autocast
from gpt2.compression.kernels import cpu
from gpt2.models.probe import probe_geometry
from gpt2.models.support import warn_of_positions

log = logging.getLogger(__name__)
NAME = "compressed_cache"  # names with "flash", "sdpa" or "flex" mean something to transformers
MOST_QUERIES = 64  # per KV head; for more, as in a prompt, reconstructing the history once is faster than reading codes
PROBE_TOKENS, PROBE_STEPS = 12, 2
SAME = 1e-3  # largest accepted change of a logit in the trial run, relative to the largest logit, in float32
ALWAYS, AUTO = "always", "auto"
WHEN = {ALWAYS: "codes are read at every decode step", AUTO: "codes are read where that was measured to be faster"}
STATE = "_compressed_attention"  # attribute of a model and its modules that holds their Reader
# Held while a model is switched: a second thread would take our attention for the model's own. Reentrant, because
# enabling disables again where a model is rejected
_SWITCHING = threading.RLock()


@dataclass
class Reader:
    """State of a model with compressed attention: its attention before, its hooks, and whether it is still enabled.

    when: one of WHEN. told: whether the user knows that reading codes is the slower way; True keeps the trial quiet.
    """

    config: PretrainedConfig
    previous: dict[str, str]
    hooks: list
    enabled: bool = True
    when: str = ALWAYS
    told: bool = True

    @property
    def active(self) -> bool:
        """False after `disable`, and while another attention function is set that isn't a wrapper of ours.

        Asked at the beginning of a forward pass: in every layer it would take a good part of a short step.
        """
        name = self.config._attn_implementation
        return self.enabled and (name == NAME or _wraps_ours(name))


def enable_compressed_attention(model: PreTrainedModel, when: str = ALWAYS) -> PreTrainedModel:
    """Let a model's attention read compressed caches as they are stored; returns the model.

    when: "always" reads codes at every decode step. "auto" chooses in each layer, by the number of tokens that it
    holds: below a crossover the layer reconstructs its history, as without this call. The crossover is measured at the
    first step of its kind on this machine, which takes about a second, and kept in the user's cache folder. "always"
    measures nothing, but where a known crossover makes reading codes the slower way, one line in the log says so. A
    call for an enabled model only changes `when`.

    Wrappers are seen through: torch.compile's, DataParallel, DistributedDataParallel and PEFT's.

    Logits are those of the same cache by reconstruction, up to rounding. For other caches the model uses PyTorch's
    attention. Raises UnsupportedModel, and leaves the model as it was, where its attention can't be replaced or a trial
    run with an exact cache gives other logits, and PluginError for another `when`.

    Any number of threads may then run the model, each with caches of its own. Enabling and disabling affects all
    threads: don't do it while one of them runs the model.
    """
    if when not in WHEN:
        choices = " or ".join(f"{name!r} ({meaning})" for name, meaning in WHEN.items())
        raise PluginError(f"when={brief(when)}: expected {choices}")
    with _SWITCHING:
        own = unwrapped(model)
        if not is_enabled(own):
            _enable(own)
        reader = getattr(own, STATE)
        reader.when, reader.told = when, False
    return model


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside the wrappers of torch and PEFT."""
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        elif isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), torch.nn.Module):
            model = inner
        else:
            break
    return model


def _enable(model: PreTrainedModel) -> PreTrainedModel:
    if not getattr(type(model), "_can_set_attn_implementation", lambda: False)():
        raise _unsupported(model, "transformers can't set its attention")
    warn_of_positions(model.config)
    if model.device.type == "cpu":
        cpu.loaded()  # compile kernels now, so that the first token doesn't wait for them
    training = model.training
    model.eval()  # dropout would change the logits of the trial run
    try:
        expected = _probe(model, DynamicCache(config=model.config))
        reader = Reader(model.config, _implementations(model), _hooked(model))
        for module in _watched(model):
            setattr(module, STATE, reader)
        model.set_attn_implementation(NAME)
        _check_probe(model, expected)
    except UnsupportedModel:
        disable_compressed_attention(model)
        raise
    except Exception as error:  # of many kinds: whatever a model does with a tensor and StoredKV doesn't have
        disable_compressed_attention(model)
        raise _unsupported(model, f"a trial run failed, as where the model uses K or V itself ({error})") from error
    finally:
        model.train(training)
    return model


def disable_compressed_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Restore a model's own attention; returns the model. Compressed caches then return reconstructions again."""
    own = unwrapped(model)
    with _SWITCHING:
        if is_enabled(own):
            reader = getattr(own, STATE)
            reader.enabled = False
            for hook in reader.hooks:
                hook.remove()
            for module in _watched(own):
                vars(module).pop(STATE, None)
            own.set_attn_implementation(reader.previous)
    return model


def _implementations(model: PreTrainedModel) -> dict[str, str]:
    """Attention of the model and of each part that has its own config, as `set_attn_implementation` takes it."""
    parts = {key: getattr(model.config, key, None) for key in model.config.sub_configs}
    found = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    return {"": model.config._attn_implementation} | {key: name for key, name in found.items() if name}


def _wraps_ours(name: str) -> bool:
    return inspect.unwrap(ALL_ATTENTION_FUNCTIONS.get(name, object)) is compressed_attention


def _watched(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The model, and its decoder, which evaluations call alone."""
    return list({id(module): module for module in (model, model.base_model)}.values())


def _hooked(model: PreTrainedModel) -> list:
    """Hooks that tell compressed caches while the model runs, or its decoder alone.

    They find the reader on the module that runs: a copied or pickled model has hooks and a reader of its own.
    """
    hooks = []
    for module in _watched(model):
        hooks.append(module.register_forward_pre_hook(_begin_reading, with_kwargs=True))
        hooks.append(module.register_forward_hook(_end_reading, with_kwargs=True, always_call=True))
    return hooks


def is_enabled(model: PreTrainedModel) -> bool:
    """Whether compressed attention is enabled for a model."""
    return STATE in vars(unwrapped(model))


def compressed_attention(
    module: torch.nn.Module, query: Tensor, key, value, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, softcap: float | None = None, s_aux: Tensor | None = None, **kwargs,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The attention function that transformers calls, [B, H, Q, d] → [B, Q, H, d]; with weights if they are asked for.

    key, value: what the cache's `update` returned: a StoredKV of compressed caches, tensors of other caches.
    """
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if kwargs.get("output_attentions"):
        key, value = as_new(key.read(), (query, query)) if isinstance(key, StoredKV) else (key, value)
        mask = _whole_mask(attention_mask, kwargs.get("position_bias"), causal, query, key.shape[2])
        return _with_weights(query, key, value, mask, scaling, softcap, s_aux)
    plain = {"dropout": dropout, "scaling": scaling, "softcap": softcap, "s_aux": s_aux, **kwargs}
    if not isinstance(key, StoredKV):
        return _plain(module, query, key, value, attention_mask, **plain), None
    k, v = key.stores()
    few = query.shape[1] * query.shape[2] <= MOST_QUERIES * k.sinks.shape[1]
    learning = query.requires_grad and torch.is_grad_enabled()  # kernels have no backward pass
    special = learning or kwargs.get("position_bias") is not None or (attention_mask is None and not causal)
    readable = few and k.compressor.readable and v.compressor.readable
    if special or not readable or not _reads_codes(module, query, key, plain):
        return _reconstructed(module, query, key, attention_mask, **plain), None
    return _direct(query, key, attention_mask, scaling, softcap=softcap, s_aux=s_aux), None


def _direct(
    query: Tensor, key: StoredKV, mask: Tensor | None, scaling: float | None, *, softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention over what is stored, read directly, [B, Q, H, d]."""
    (k, v), scaling = key.stores(), query.shape[-1] ** -0.5 if scaling is None else scaling
    with without_autocast(query):
        out = direct_attention.attend(k, v, query.to(k.sinks.dtype), mask, scaling, softcap=softcap, sinks=s_aux)
    return out.to(query.dtype).transpose(1, 2).contiguous()


def _reconstructed(module, query: Tensor, key: StoredKV, mask: Tensor | None, **plain) -> Tensor:
    """Attention over a reconstruction of what is stored, [B, Q, H, d]."""
    return _plain(module, query, *as_new(key.read(), (query, query)), mask, **plain)


def _reads_codes(module, query: Tensor, key: StoredKV, plain: dict) -> bool:
    """Whether a step reads codes: always, or where that pays. Where it is done and doesn't pay, says so once."""
    reader, known = key.reader, crossover.KNOWN
    if reader.when == AUTO:
        how = {name: plain[name] for name in ("scaling", "softcap", "s_aux")}
        direct, reconstructed = partial(_direct, mask=None, **how), partial(_reconstructed, module, mask=None, **how)
        found = known.measured(crossover.kind(key, query), lambda: crossover.measure(key, query, direct, reconstructed))
        return found.pays(len(key.stores()[0]))
    if reader.told or not known.some_slower:
        return True
    found = crossover.found(key, query)
    if found is not None and not found.pays(tokens := len(key.stores()[0])):
        reader.told = True
        log.warning(
            "reading codes directly is the slower way on this machine at %s tokens: it is %s. "
            "enable_compressed_attention(model, when='auto') takes the faster way at each step", f"{tokens:,}", found,
        )  # fmt: skip
    return True


def _with_weights(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over K and V as they are stored, and its weights [B, H, Q, T] in the query's dtype."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    p = attention_math.weights(key, query, mask, scaling, softcap=softcap, sinks=sinks).to(query.dtype)
    return attention_math.weighted_values(p, value).transpose(1, 2).contiguous(), p


def _whole_mask(mask: Tensor | None, bias: Tensor | None, causal: bool, query: Tensor, tokens: int) -> Tensor | None:
    """A mask with the model's position bias [B, H, Q, T] in it (Inkling), as `attention_math.weights` takes it."""
    if mask is None and causal:
        mask = attention_math.causal(query.shape[2], tokens, query.device)
    elif mask is None:
        mask = torch.ones(query.shape[2], tokens, dtype=torch.bool, device=query.device)
    if bias is None or mask is None:
        return mask if bias is None else bias
    mask = mask[..., :tokens]
    return torch.where(mask, bias, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask


def _plain(
    module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, softcap: float | None,
    s_aux: Tensor | None, scaling: float | None, **kwargs,
) -> Tensor:  # fmt: skip
    """Attention over tensors K and V: PyTorch's own, except for soft capping and sink logits, which it doesn't have."""
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)[0]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    dropout = kwargs.get("dropout", 0.0) if module.training else 0.0
    out = attention_math.attend_reconstructed(
        key, value, query, mask, scaling, softcap=softcap, sinks=s_aux, dropout=dropout
    )
    return out.transpose(1, 2).contiguous()


def _begin_reading(module, args, kwargs) -> None:
    _check_mask(args, kwargs)
    reader = getattr(module, STATE, None)
    _set_reader(kwargs, reader if reader is not None and reader.active else None)


def _end_reading(module, args, kwargs, output) -> None:
    _set_reader(kwargs, None)


def _check_mask(args: tuple, kwargs: dict) -> None:
    """Reject a mask of the new tokens alone: transformers would hide the new tokens, and whatever it takes them for."""
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    new = next((x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None)
    if not isinstance(cache, CompressedDynamicCache) or getattr(mask, "ndim", 0) != 2 or new is None:
        return
    tokens = cache.get_seq_length() + new.shape[1]
    if mask.shape[1] < tokens:
        raise PluginError(
            f"attention_mask has {mask.shape[1]} columns for {tokens} tokens, {tokens - new.shape[1]} in the cache and "
            f"{new.shape[1]} new: it must be that of the whole conversation, or None where nothing is padding"
        )


def _set_reader(kwargs: dict, reader: Reader | None) -> None:
    cache = kwargs.get("past_key_values")
    if isinstance(cache, CompressedDynamicCache):
        for layer in cache.compressed:
            layer.reader = reader if cache.direct else None


@torch.no_grad()
def _probe(model: PreTrainedModel, cache) -> Tensor:
    """Logits of a short prompt and a few decode steps with a cache: [1, tokens, vocabulary] float32."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(3, 3 + PROBE_TOKENS + PROBE_STEPS) * 7 % vocabulary
    parts = ids[None].to(model.device).split([PROBE_TOKENS, *[1] * PROBE_STEPS], dim=1)
    outputs = (model(x, past_key_values=cache, use_cache=True) for x in parts)
    return torch.cat([getattr(out, "logits", out[0]).float() for out in outputs], dim=1)


def _check_probe(model: PreTrainedModel, expected: Tensor) -> None:
    cache = identity_cache(probe_geometry(model, type(model).__name__))
    found = _probe(model, cache)
    change = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    # Sums in another order round differently in float16 and bfloat16
    tolerance = max(SAME, 8 * torch.finfo(model.dtype).eps)
    if not change <= tolerance:
        raise _unsupported(model, f"replacing its attention changes its logits by {change:.1e} of the largest")
    if cache.get_seq_length() != PROBE_TOKENS + PROBE_STEPS:
        raise _unsupported(model, "it doesn't use the cache that it is given")


def _unsupported(model: PreTrainedModel, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{type(model).__name__} can't use compressed attention: {reason}. Compressed caches work with it by "
        "reconstruction: leave out --direct, or in Python the call of enable_compressed_attention"
    )


# At import, so that a pickled model finds its attention in another process
AttentionInterface.register(NAME, torch.compiler.disable(compressed_attention))
AttentionMaskInterface.register(NAME, sdpa_mask)
