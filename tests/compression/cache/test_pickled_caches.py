"""A pickled cache is read by the version that made it, and by no other."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from gpt2.common.errors import PluginError
from gpt2.compression.cache import dynamic_cache
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.settings import compressors_for
from gpt2.models.geometry import Geometry


def held() -> CompressedDynamicCache:
    cache = CompressedDynamicCache(*compressors_for("kv", 4, Geometry.uniform(2, 2, 16), codec="hadamard"))
    for layer in range(2):
        cache.update(*torch.randn(2, 1, 2, 150, 16), layer)
    return cache


def test_only_the_same_version_goes_on(monkeypatch):
    cache = held()
    again = pickle.loads(pickle.dumps(cache))
    assert again.get_seq_length() == 150 and again.nbytes() == cache.nbytes() and "stored_by" not in vars(again)
    for ours, theirs in zip(cache.layers, again.layers, strict=True):
        assert all(map(torch.equal, ours.read(), theirs.read()))
    content, before_versions = pickle.dumps(cache), object.__new__(CompressedDynamicCache)
    with pytest.raises(PluginError, match="pickled by another version"):
        before_versions.__setstate__(vars(cache).copy())
    monkeypatch.setattr(dynamic_cache, "_version", lambda: "another")
    with pytest.raises(PluginError, match="pickled by another version"):
        pickle.loads(content)


def test_the_version_is_of_how_tokens_are_stored(monkeypatch, tmp_path):
    """Of every codec's source as well."""
    version, sources = dynamic_cache._version.__wrapped__, Path(dynamic_cache.__file__).parents[1]
    before = version()
    shutil.copytree(sources, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(dynamic_cache, "__file__", str(tmp_path / "copy" / "cache" / "dynamic_cache.py"))
    assert version() == before
    with (tmp_path / "copy" / "codecs" / "mixed.py").open("a") as codec:
        codec.write("\n")
    assert version() != before
