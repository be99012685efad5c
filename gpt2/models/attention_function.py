"""Replace a model's attention function for a while, to look at what it is given."""

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
    """Put `wrap(attention function)` in the place of the model's attention function while the block runs.

    Yields False where the model can't: its attention is hard-wired, and nothing was changed.
    """
    if not getattr(type(model), "_can_set_attn_implementation", lambda: False)():
        yield False
        return
    previous = model.config._attn_implementation
    # eager attention isn't registered: every modeling file has its own
    eager = getattr(sys.modules[type(model).__module__], "eager_attention_forward", None)
    AttentionInterface.register(CAPTURE_ATTENTION, wrap(ALL_ATTENTION_FUNCTIONS.get(previous, eager)))
    AttentionMaskInterface.register(CAPTURE_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS[previous])
    model.set_attn_implementation(CAPTURE_ATTENTION)
    try:
        yield True
    finally:
        model.set_attn_implementation(previous)
