"""Attention over the compressed cache, under the names that people import.

    enable_compressed_attention(model)              # when="auto" reads codes where that was measured to be faster
    model.generate(..., past_key_values=cache)      # any cache of ours; others work as before
    disable_compressed_attention(model)

What lies behind them is `gpt2.compression.cache.attention`.
"""

from gpt2.compression.cache.attention import disable_compressed_attention, enable_compressed_attention, is_enabled

__all__ = ["disable_compressed_attention", "enable_compressed_attention", "is_enabled"]
