"""Set before anything is imported: tests never reach for the network, and tiny tensors gain nothing from threads."""

import json
import os
import signal

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from deprecations import DEPRECATIONS  # noqa: E402

# A shell that starts the tests in the background has Ctrl-C ignored, and all that they start would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
# Two threads on a shared machine spend their time waiting for each other: 20 times slower for tensors this small
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_deprecated_calls():
    DEPRECATIONS.said.clear()
    yield
    DEPRECATIONS.check()


@pytest.fixture(params=[True, False], ids=["kernels", "PyTorch"])
def kernels(request, monkeypatch):
    """With CPU kernels and without; whether there are any on this machine is another test's matter."""
    from gpt2.compression.kernels import cpu

    if not request.param:
        monkeypatch.setattr(cpu, "loaded", lambda: False)
    elif not cpu.loaded():
        pytest.skip("no compiler on this machine: PyTorch does the same")


@pytest.fixture(scope="session")
def llama():
    """The tiny Llama with a tokenizer of words, as scripts load it."""
    from tiny import tiny_loaded

    return tiny_loaded("llama")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A folder with the tiny Llama and its tokenizer of words, for scripts that load a model."""
    from tiny import tiny_model, word_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_flags(tmp_path, monkeypatch, model_folder):
    """Flags of a script that runs on the tiny model, in an empty working folder that holds only a text."""
    from tiny import word_text

    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text(word_text(3000))
    return ["--model", str(model_folder), "--text", "words.txt"]


@pytest.fixture(scope="session")
def prose() -> str:
    """Words in lower case, without names and numbers."""
    return "".join(np.random.default_rng(0).choice(list("abcdefghij   "), size=5000))


@pytest.fixture(scope="session")
def reader_folder(tmp_path_factory):
    """The tiny Llama that reads characters, saved as `tiny`."""
    from tiny import char_tokenizer, tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def script(tmp_path, monkeypatch, reader_folder, prose):
    """Runs a script on the tiny model in an empty folder with a text, a preset and results; returns its exit code."""
    from script_runs import INT4_PRESET, run

    from gpt2.common import files

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "RESULTS", tmp_path / "results")
    (tmp_path / "prose.txt").write_text(prose)
    (tmp_path / "p.json").write_text(json.dumps(INT4_PRESET))
    return lambda name, *flags: run(name, "--model", reader_folder, *flags)
