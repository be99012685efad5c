"""lm-evaluation-harness through a compressed cache.

The harness scores log-likelihoods by one forward pass over context and continuation, in which no token reads a cache:
such figures say nothing about a compressed cache, and "no loss" measured that way is empty. Here the tokens are fed
chunk by chunk through a cache, as in `evaluation.perplexity`, and generation uses one too.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.evaluation.perplexity import CacheFactory
from gpt2.models.loading import LoadedModel

NAME = "hf-kv"  # in the harness's registry


def streaming(base: type) -> type:
    """A subclass of lm-eval's HFLM, or of a class with the same two methods, whose forward passes read a cache.

    Its instances need `make_cache`, a factory, `chunk`, the number of tokens fed at a time, and `loaded`, the model.
    """

    class StreamingLM(base):
        make_cache: CacheFactory
        chunk: int = 64
        loaded: LoadedModel

        @torch.no_grad()
        def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
            """Logits [batch, T, vocabulary] of token ids [batch, T], padded on the right."""
            cache, chunk = self.make_cache(), self.loaded.chunk_of(inps.shape[1], self.chunk)
            parts = inps.split(chunk, dim=1)
            return torch.cat([self.model(ids, past_key_values=cache, use_cache=True).logits for ids in parts], dim=1)

        def _model_generate(self, context: Tensor, *args, **kwargs) -> Tensor:
            # A kind of cache among the model's own settings would be one too many
            more = {"past_key_values": self.make_cache(), "cache_implementation": None}
            return super()._model_generate(context, *args, **more, **kwargs)

    return StreamingLM


def require_tasks(manager, names: Sequence[str]) -> None:
    """Raise PluginError for a name that lm-eval's TaskManager doesn't know and that is no file of a task."""
    known = manager.all_tasks
    if unknown := [name for name in names if name.partition("@")[0] not in known and not os.path.isfile(name)]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ": give a task of the harness, or one of --task-folder"
        raise PluginError(f"--tasks: no task {unknown[0]!r}{hint}")


def harness_class() -> type:
    """The class, registered in the harness as `hf-kv`. Raises PluginError if lm-eval isn't installed."""
    try:
        from lm_eval.api.registry import register_model
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise PluginError(f"lm-evaluation-harness can't be imported ({error}): pip install 'lm_eval[hf]'") from error
    global _registered
    if _registered is None:  # a name can be registered once
        _registered = register_model(NAME)(streaming(HFLM))
    return _registered


_registered: type | None = None


def harness_model(loaded: LoadedModel, make: CacheFactory, chunk: int = 64, batch_size: int = 1):
    """A model as the harness takes it, whose log-likelihoods and generations read caches that `make` gives.

    chunk: tokens fed at a time. batch_size: sequences together; a batch is padded, which caches with one scale per
    batch, such as fp8, don't leave without effect.
    """
    made = harness_class()(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
    made.make_cache, made.chunk, made.loaded = make, chunk, loaded
    return made
