"""What tests of evaluation share: tiny models that read characters, and a folder to run scripts in."""

from __future__ import annotations

import pytest
from pictures import small_pictures  # noqa: F401
from script_runs import INT4_PRESET
from tiny import char_tokenizer, tiny_loaded

from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.named_caches import from_preset
from gpt2.compression.settings import compressors_for
from gpt2.evaluation.needle_prompts import Needles
from gpt2.evaluation.perplexity import BASELINE, baseline_factory
from gpt2.models.geometry import Geometry


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch):
    """Before each measurement of speed it takes longer than the tiny models."""
    monkeypatch.setattr("gc.collect", lambda: 0)


@pytest.fixture(scope="session")
def caches(llama):
    return {BASELINE: baseline_factory(llama), "int4": from_preset(INT4_PRESET, llama).make}


@pytest.fixture(scope="session")
def reader():
    """A tiny Llama that reads characters."""
    return tiny_loaded("llama", char_tokenizer())


@pytest.fixture(scope="session")
def haystack(reader, prose):
    return reader.tokenizer(prose[:3000], return_tensors="pt").input_ids[0]


@pytest.fixture(scope="session")
def builder(reader, haystack):
    return Needles(reader.tokenizer, haystack)


@pytest.fixture(scope="session")
def lossy():
    """Factories of caches of the tiny Llama whose K and V are quantized to so many bits."""

    def of_bits(bits: int, **how):
        compressors = compressors_for("kv", bits, Geometry.uniform(3, 2, 12))
        return lambda: CompressedDynamicCache(*compressors, **{"sink_tokens": 0} | how)

    return of_bits
