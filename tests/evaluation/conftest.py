"""What tests of evaluation share: tiny models that read characters, and a folder to run scripts in."""

from __future__ import annotations

import pytest
import torch
from pictures import small_pictures  # noqa: F401
from script_runs import INT4_PRESET, listing
from tiny import char_tokenizer, tiny_loaded

from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.named_caches import from_preset
from gpt2.compression.settings import compressors_for
from gpt2.evaluation import needle
from gpt2.evaluation.needle_prompts import Needles
from gpt2.evaluation.perplexity import BASELINE, baseline_factory
from gpt2.models.geometry import Geometry


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch):
    """Before each measurement of speed it takes longer than the tiny models."""
    monkeypatch.setattr("gc.collect", lambda: 0)


@pytest.fixture(scope="session")
def x():
    """K or V of 2 heads, 300 tokens and 64 channels."""
    return torch.randn(1, 2, 300, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def asked_for(monkeypatch) -> set[tuple[int, int | None]]:
    """Needles are asked for one token, as generating takes most of the time; what was asked for, and the chunks."""
    ask, given = needle.ask, set()

    def ask_for_one(loaded, make, prompt, max_new_tokens, prefill_chunk) -> dict:
        given.add((max_new_tokens, prefill_chunk))
        return ask(loaded, make, prompt, 1, prefill_chunk)

    monkeypatch.setattr(needle, "ask", ask_for_one)
    return given


@pytest.fixture
def rejects(capsys, tmp_path):
    """Checks that a script ends with exit code 2 and one clear line for each of some flags, and writes nothing."""

    def check(call, cases) -> None:
        """call: runs the script with more flags. cases: such flags, and what the script says to them."""
        before = listing(tmp_path)
        for flags, message in cases:
            assert call(*flags) == 2, flags
            assert message in (said := capsys.readouterr().err) and "Traceback" not in said, said
        assert listing(tmp_path) == before

    return check


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
