"""Which decoder families of transformers a compressed cache works with, found by trying each in miniature.

A family is a `model_type` that transformers maps to a causal language model. A small random model of it runs with our
cache and with transformers' own, which decides its mode:

    direct-capable    works, and its attention can be replaced by one that reads the codes of a cache
    reconstruct-only  works, but only with the K and V that the cache reconstructs for the model's own attention
    refused           rejected by `gpt2.models.support`, with the reason
    not tried         transformers can't make a model of the default config, or can't run it with its own cache
    failed            transformers runs it and this toolkit doesn't: a bug, with its message
"""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import contextmanager

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, DynamicCache, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gpt2.common.errors import UnsupportedModel
from gpt2.compression.cache.attention import disable_compressed_attention, enable_compressed_attention
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.codecs import Compressor, quantizer_for_bits
from gpt2.experiments.miniatures import SWITCHES, THE_MODEL, NotTried, one_line, tiny_family
from gpt2.models.attention_function import wrapped_attention
from gpt2.models.loading import LoadedModel, wrap
from gpt2.models.support import SUPPORTED

MODES = DIRECT, RECONSTRUCT, REFUSED, NOT_TRIED, FAILED = (
    "direct-capable", "reconstruct-only", "refused", "not tried", "failed",
)  # fmt: skip
WORKING = (DIRECT, RECONSTRUCT)
PROMPT, NEW = 150, 5  # tokens; the prompt is longer than a sliding window
SAME = 1e-4  # tolerated change of a logit, relative to the largest: sums of other lengths round differently


def families() -> list[str]:
    """Every `model_type` that the installed transformers maps to a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def settings() -> dict:
    """The settings of `examine`, for results files."""
    return {"prompt_tokens": PROMPT, "new_tokens": NEW, "same_logits_within": SAME, "config_switches": SWITCHES}


def examine(family: str) -> dict:
    """Try a family; returns a results record with its mode and the reason if it isn't direct-capable."""
    row = {"model_type": family, "config_class": CONFIG_MAPPING[family].__name__}
    row |= {"model_class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]}
    try:
        with _quiet():
            model = tiny_family(family)
            loaded = _wrapped(model)
            logits, tokens = reference(model)
            row |= described(loaded) | compared(loaded, logits, tokens)
            reason = why_attention_stays(model, logits) or why_codes_are_not_read(model)
        mode = RECONSTRUCT if reason else DIRECT
    except NotTried as error:
        mode, reason = NOT_TRIED, str(error)
    except UnsupportedModel as error:
        text = str(error).removesuffix(f"; {SUPPORTED}").partition(" [(")[0]  # without the shapes of the miniature
        mode, reason = REFUSED, text.partition("can't be compressed: ")[2] or text.removeprefix(f"{THE_MODEL}: ")
    except Exception as error:  # any error is a finding
        mode, reason = FAILED, one_line(error)
    return row | {"mode": mode, "reason": reason}


def _wrapped(model: PreTrainedModel) -> LoadedModel:
    """The model as scripts have it. If that fails and transformers' own cache fails too, NotTried is raised."""
    try:
        return wrap(model, None, THE_MODEL)
    except UnsupportedModel:
        raise
    except Exception:
        reference(model)
        raise


def reference(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits and generated tokens with transformers' own cache; raises NotTried if it doesn't run."""
    try:
        return streamed(model, DynamicCache(config=model.config)), generated(model, DynamicCache(config=model.config))
    except Exception as error:
        raise NotTried(f"transformers doesn't run it with its own cache: {one_line(error)}") from error


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
    """The miniature's geometry, its kinds of layers, and whether some of them slide."""
    layers = loaded.geometry.layers
    kinds = dict(Counter(layer.kind for layer in layers))
    return {"geometry": loaded.geometry.record(), "layers": kinds, "sliding_layers": any(x.window for x in layers)}


def compared(loaded: LoadedModel, logits: Tensor, tokens: Tensor) -> dict:
    """Compare our caches with transformers' own.

    Raises RuntimeError if the identity cache changes logits or tokens, or if a lossy cache changes nothing, which means
    that the model doesn't read the cache it was given.
    """
    model, geometry = loaded.model, loaded.geometry
    int4 = [Compressor(quantizer_for_bits(4))] * geometry.num_layers

    def lossy_cache() -> CompressedDynamicCache:
        return CompressedDynamicCache(int4, int4, geometry=geometry)

    exact = _change(streamed(model, identity_cache(geometry)), logits)
    lossy = _change(streamed(model, lossy_cache()), logits)
    if not exact <= SAME:
        raise RuntimeError(f"a cache that loses nothing changes logits by {exact:.1e} of the largest")
    if not 0 < lossy < float("inf"):
        raise RuntimeError(f"4 bits change logits by {lossy} of the largest")
    for cache in (identity_cache(geometry), lossy_cache()):
        found = generated(model, cache)
        if cache.get_seq_length() != PROMPT + NEW - 1:  # the last token was never fed
            raise RuntimeError(f"the cache holds {cache.get_seq_length()} tokens after {PROMPT + NEW - 1} were fed")
        if cache.is_exact and not torch.equal(found, tokens):
            raise RuntimeError("a cache that loses nothing changes tokens")
    return {"identity_logit_change": exact, "int4_logit_change": lossy, "tokens_generated_alike": NEW}


def why_attention_stays(model: PreTrainedModel, logits: Tensor) -> str | None:
    """Why the attention of a model can't be replaced; None if it can.

    It is replaced for a test in which the cache returns sealed K and V that only the new attention can open, so that
    model code which uses them before attention fails.
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
    except Exception as error:  # a sealed tensor supports no operation
        return f"it looks at K and V before attention does ({one_line(error)})"
    if not opened:
        return "it has attention of its own beside the one that can be replaced"
    return None if _change(found, logits) <= SAME else "another attention function changes its logits"


def why_codes_are_not_read(model: PreTrainedModel) -> str | None:
    """Why compressed attention rejects a model whose attention can be replaced; None if it doesn't.

    Such attention may be given more than ours knows, as sink logits of each query.
    """
    try:
        enable_compressed_attention(model)
    except UnsupportedModel as error:
        return str(error).partition("can't use compressed attention: ")[2].partition(". ")[0]
    disable_compressed_attention(model)
    return None


class _Sealed:
    """A tensor wrapped so that no operation works on it."""

    __slots__ = ("content",)

    def __init__(self, content: Tensor):
        self.content = content


class _SealingCache(DynamicCache):
    """transformers' own cache, except that the K and V it returns are sealed."""

    def update(self, *args, **kwargs):
        return tuple(_Sealed(x) for x in super().update(*args, **kwargs))


def _change(found: Tensor, expected: Tensor) -> float:
    """Largest change of a logit relative to the largest logit; NaN if a logit isn't finite."""
    return float((found - expected).abs().max() / expected.abs().max())


@contextmanager
def _quiet():
    """Silence warnings of transformers that are meant for real models."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
