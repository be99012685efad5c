"""A preset of the tiny Llama, and what tests ask of presets and of caches made from them."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# The guide's eleven keys and nothing else, as older files have them
PRESET = {
    "model": "tiny-llama", "rank": 9, "target": "v", "bits": 8, "compression_ratio": 1.5, "baseline_ppl": 20.0,
    "compressed_ppl": 21, "ppl_delta": 0.05, "calibration_file": "c.pt", "head_dim": 12, "num_layers": 3,
}  # fmt: skip


def write(path: Path, preset: dict | str) -> str:
    """A preset's file, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(preset if isinstance(preset, str) else json.dumps(preset))
    return str(path)


def compressors(cache) -> dict[str, list[str]]:
    """What compresses K and V in each layer."""
    return {side: [repr(layer.stores[side].compressor) for layer in cache.layers] for side in ("K", "V")}


_opened: set[str] | None = None


def _note(event: str, args: tuple) -> None:
    if _opened is not None and event == "open" and isinstance(args[0], str):
        _opened.add(args[0])


sys.addaudithook(_note)  # it can't be removed


@contextmanager
def noting(function: Callable) -> Iterator[tuple[set[str], list]]:
    """Paths of the files that the block opens, and an entry for each call of a function."""
    global _opened
    _opened, calls = set(), []

    def count(frame, event: str, argument) -> None:
        if event == "call" and frame.f_code is function.__code__:
            calls.append(frame)

    sys.setprofile(count)
    try:
        yield _opened, calls
    finally:
        sys.setprofile(None)
        _opened = None
