"""What `torch.compile` has compiled: the cache is beside the graphs, and what comes out is what it was."""

from __future__ import annotations

import pytest
import torch
from sampling import ALL
from tiny import tiny_model, windows

from gpt2.compression.attention import enable_compressed_attention
from gpt2.compression.codecs import QUANTIZERS, Compressor
from gpt2.compression.compressed_cache import CompressedDynamicCache


@pytest.fixture(autouse=True)
def forget():
    yield
    torch._dynamo.reset()


def cache() -> CompressedDynamicCache:
    """Of two quantizers whose kernels can't be traced: they read where tensors lie."""
    return CompressedDynamicCache([Compressor(QUANTIZERS["mixed"].at(4.0))], [Compressor(QUANTIZERS["int8"])])


def test_a_function_that_reads_reconstructions():
    pieces = torch.randn(1, 2, 72, 16, generator=torch.Generator().manual_seed(0)).split([70, 1, 1], dim=2)

    def run(cache):
        return [torch.cat(cache.update(2 * x, x + 1, 0)).sum(dim=2) for x in pieces]

    for found, expected in zip(torch.compile(run, backend="eager")(cache()), run(cache()), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.skipif(not ALL, reason="traces all of a model's code: TEST_ALL=1")
def test_a_model_that_attends_over_what_is_stored():
    model = enable_compressed_attention(tiny_model("llama", num_hidden_layers=1))

    @torch.no_grad()
    def run(model):
        held = cache()
        out = [model(x, past_key_values=held).logits for x in windows(1, 72).split([70, 2], dim=1)]
        return torch.cat(out, dim=1)

    torch.testing.assert_close(run(torch.compile(model, backend="eager")), run(model))
