"""Searches over grids and over codecs of a tiny model, for tests of what they measure."""

from __future__ import annotations

from tiny import windows

from gpt2 import cli
from gpt2.tuning.codec_search import CodecSearch
from gpt2.tuning.grid_search import GridSearch
from gpt2.tuning.search_space import Space


def search_of(loaded, kind=GridSearch, **changes):
    """A search of a kind over two short windows of each text."""
    parts = {"loaded": loaded, "calibration": None, "tuning": windows(2, 48), "seed": 0, "bar": cli.bar}
    parts |= {"evaluation": windows(2, 48, seed=1), "chunk": 16, "batch_size": 2}
    own = {"target": "kv", "codec": "identity", "sink_tokens": 4}
    if kind is CodecSearch:
        own = {"space": Space(("joint+mixed",), 20, (20,)), "budget": 0.05}
    return kind(**parts | own | changes)
