"""Replace a model's attention function temporarily, to observe its arguments or time it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CAPTURE_ATTENTION = "kv_plugin_capture"  # names with "flash", "sdpa" or "/" are special to transformers


@contextmanager
def wrapped_attention(model, wrap: Callable[[Callable], Callable]):
    """Replace the model's attention function f by `wrap(f)` while the block runs.

    Yields True; or False, with nothing changed, if the model's attention function can't be replaced.
    """
    if not getattr(type(model), "_can_set_attn_implementation", lambda: False)():
        yield False
        return
    previous = model.config._attn_implementation
    # Eager attention isn't in the registry: every modeling file defines its own
    eager = getattr(sys.modules[type(model).__module__], "eager_attention_forward", None)
    # Flash attention looks up its kernel by the name in the config, which is ours meanwhile
    usual = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    own = usual if "flash" in str(previous) else previous
    AttentionInterface.register(CAPTURE_ATTENTION, wrap(ALL_ATTENTION_FUNCTIONS.get(own, eager)))
    AttentionMaskInterface.register(CAPTURE_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS[own])
    model.set_attn_implementation(CAPTURE_ATTENTION)
    try:
        yield True
    finally:
        model.set_attn_implementation(previous)
