"""What tests of evaluation share: tiny models that read characters, and a folder to run scripts in."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pictures import small_pictures  # noqa: F401
from script_runs import INT4_PRESET, run
from tiny import char_tokenizer, tiny_loaded, tiny_model

from gpt2.common import files
from gpt2.compression.named_caches import from_preset
from gpt2.evaluation.needle_prompts import Needles
from gpt2.evaluation.perplexity import BASELINE, baseline_factory


@pytest.fixture(scope="session")
def llama():
    return tiny_loaded("llama")


@pytest.fixture(scope="session")
def caches(llama):
    return {BASELINE: baseline_factory(llama), "int4": from_preset(INT4_PRESET, llama).make}


@pytest.fixture(scope="session")
def prose() -> str:
    """Words in lower case, without names and numbers."""
    return "".join(np.random.default_rng(0).choice(list("abcdefghij   "), size=5000))


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
def reader_folder(tmp_path_factory):
    """The tiny Llama that reads characters, saved as `tiny`."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def script(tmp_path, monkeypatch, reader_folder, prose):
    """Runs a script on the tiny model in an empty folder with a text, a preset and results; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "RESULTS", tmp_path / "results")
    (tmp_path / "prose.txt").write_text(prose)
    (tmp_path / "p.json").write_text(json.dumps(INT4_PRESET))
    return lambda name, *flags: run(name, "--model", reader_folder, *flags)
