"""Models that `torch.compile` has compiled: the cache is beside their graphs, and logits stay what they are."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model, windows

from gpt2.compression.attention import enable_compressed_attention
from gpt2.compression.codecs import QUANTIZERS, Compressor
from gpt2.compression.compressed_cache import CompressedDynamicCache


@pytest.mark.parametrize("direct", [False, True], ids=["reconstruction", "direct"])
def test_a_compiled_model(direct):
    """Kernels can't be traced: they read where tensors lie."""
    model = tiny_model("llama", num_hidden_layers=2)
    k, v = Compressor(QUANTIZERS["mixed"].at(4.0)), Compressor(QUANTIZERS["int8"])
    if direct:
        enable_compressed_attention(model)

    @torch.no_grad()
    def run(model):
        cache = CompressedDynamicCache([k] * 2, [v] * 2)
        out = [model(x, past_key_values=cache).logits for x in windows(1, 72).split([70, 1, 1], dim=1)]
        cache.crop(-3)
        return torch.cat([*out, model(windows(1, 2), past_key_values=cache).logits], dim=1)

    expected = run(model)
    try:
        found = run(torch.compile(model, backend="eager"))
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(found, expected)
