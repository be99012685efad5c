"""Set before anything is imported: tests never reach for the network, and tiny tensors gain nothing from threads."""

import json
import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from deprecations import DEPRECATIONS  # noqa: E402

# SQLite and atomic writes wait for the disk: 26 ms where memory takes 0.2 ms. In memory, where it has ample room
if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 2 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")

# A shell that starts the tests in the background has Ctrl-C ignored, and all that they start would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
# Two threads on a shared machine spend their time waiting for each other: 20 times slower for tensors this small
torch.set_num_threads(1)


# Files of ten seconds and more, the longest first: with `--no-loadscope-reorder` they are begun in this order, so that
# no process is left with a long one at the end. First those that don't need the kernels for CPUs, which are being built
LONG = """
    scripts/test_kills.py tuning/test_codec_search.py common/test_trial_queue.py evaluation/test_real_model.py
    kernels/test_kernels.py scripts/test_scripts.py cache/test_attention.py cache/test_direct_attention.py
    codecs/test_numerics.py codecs/test_numerics_calibrated.py cache/test_generation.py cache/test_windows.py
    runs/test_replay.py evaluation/test_tasks.py experiments/test_scaling.py experiments/test_architectures.py
    cache/test_layer_kinds.py cache/test_endurance.py cache/test_operations.py codecs/test_multi_head.py
    evaluation/test_stability.py scripts/test_gpu_check.py cache/test_cache_machine.py tuning/test_ratio_presets.py
    experiments/test_codec_variations.py models/test_shapes.py experiments/test_cost_model.py
    evaluation/test_bytes_by_context.py models/test_devices.py
    evaluation/test_largest_batch.py cache/test_compiled.py
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: at for at, name in enumerate(LONG.split())}
    items.sort(key=lambda item: rank.get("/".join(item.path.parts[-2:]), len(rank)))


def pytest_configure(config: pytest.Config) -> None:
    """Where several processes run tests: build the kernels for CPUs meanwhile, before one waits for another's build."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        multiprocessing.get_context("fork").Process(target=build_kernels, daemon=True).start()


def build_kernels() -> None:
    from gpt2.compression.kernels import cpu

    cpu.loaded()


@pytest.fixture(autouse=True)
def no_deprecated_calls():
    DEPRECATIONS.said.clear()
    yield
    DEPRECATIONS.check()


@pytest.fixture(autouse=True)
def same_working_folder():
    """A test that leaves another working folder changes relative paths in all that follow it in this process."""
    before = os.getcwd()
    yield
    after = os.getcwd()
    os.chdir(before)
    assert after == before, f"the test left the working folder {after}: change it with monkeypatch.chdir"


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
    from tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def tiny_flags(tmp_path, monkeypatch, model_folder):
    """Flags of a script that runs on the tiny model, in an empty working folder that holds only a text."""
    from tiny import word_text

    from gpt2.common import files

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "RESULTS", tmp_path / "results")
    (tmp_path / "words.txt").write_text(word_text(3000))
    return ["--model", str(model_folder), "--text", "words.txt"]


@pytest.fixture(scope="session")
def prose() -> str:
    """Words in lower case, without names and numbers."""
    return "".join(np.random.default_rng(0).choice(list("abcdefghij   "), size=5000))


@pytest.fixture(scope="session")
def reader_folder(tmp_path_factory):
    """The tiny Llama that reads characters, saved as `tiny`."""
    from tiny import char_tokenizer, save_tiny

    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", tokenizer=char_tokenizer())


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
