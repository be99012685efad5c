"""The context length of a search: tokens at which ratios are measured and for which layers share out bits."""

import json

import optuna
import pytest
from script_runs import SMALL, SMALL_EVAL, TUNE, run
from searches import search_of
from tiny import save_tiny, tiny_loaded, word_text

from gpt2.compression.cache import size
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.presets import create_cache_from_preset, load_preset
from gpt2.compression.settings import Setting
from gpt2.text.sources import by_position
from gpt2.tuning.codec_search import CodecSearch
from gpt2.tuning.grid_search import Cell, GridSearch
from gpt2.tuning.search_space import Choice

# Two sliding layers of three, with a window that holds a whole block of codes
MIXED = {"sliding_window": 130, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
INT4 = Cell(20, 4)


@pytest.fixture(scope="module")
def mixed():
    return tiny_loaded("gemma3_text", **MIXED)


def test_the_ratio_is_that_at_the_length(mixed):
    """Of the whole cache. The more tokens, the more of it are codes of the full layer."""
    found = {}
    for length in (256, 2048, 8192):
        own = search_of(mixed, context_length=length)
        found[length] = own.ratio(INT4)
        held = size.cache_bytes(size.filled(own.factory(INT4), mixed.geometry, length))
        assert found[length] == pytest.approx(mixed.geometry.attention_bytes(length) / held)
    assert found[256] < found[2048] - 0.3 and found[2048] < found[8192] - 0.05
    assert found[2048] == search_of(mixed).ratio(INT4) == search_of(mixed).evaluate(INT4).compression_ratio


def test_bits_are_shared_out_for_the_length(mixed):
    """Sliding layers hold few of many tokens, so that bits are cheap there; a length within the window has none."""
    text = by_position("words", "words.txt", word_text(3000))
    made = calibrate(mixed, text, rank=20, codec="joint", samples=3, seq_len=100, seed=0, sink_tokens=4)
    choice = Choice("joint+mixed", Setting("joint", 20, 3, "mixed"), "kv", 4)

    def bits(length: int) -> list[float]:
        cache = search_of(mixed, CodecSearch, calibration=made, context_length=length).factory(choice)()
        return [layer.stores["KV"].compressor.quantizer.bits for layer in cache.layers]

    within, short, long = bits(128), bits(1024), bits(8192)
    assert sum(within) / 3 == pytest.approx(3, abs=0.1)
    for sliding in (0, 1):
        assert within[sliding] < short[sliding] < long[sliding], "the same 3 bits, on average over what is held"
    assert within[2] < short[2] <= long[2] + 0.1, "no longer paid with bits of the sliding layers"
    for length, each in ((1024, short), (8192, long)):
        held = [layer.held(length) for layer in mixed.geometry.layers]
        assert sum(n * b for n, b in zip(held, each, strict=True)) / sum(held) == pytest.approx(3, abs=0.1)


def test_another_length_is_another_search(mixed):
    """Where all layers are alike the usual length isn't in the key: studies from before there was a choice go on."""
    for kind in (GridSearch, CodecSearch):
        keys = [search_of(mixed, kind, **change).key("text") for change in ({}, {"context_length": 4096})]
        assert [key.pop("context_length") for key in keys] == [2048, 4096] and keys[0] == keys[1]
        alike = tiny_loaded()
        keys = [search_of(alike, kind, **change).key("text") for change in ({}, {"context_length": 4096})]
        assert "context_length" not in keys[0] and keys[1] == keys[0] | {"context_length": 4096}


FLAGS = [*SMALL, *SMALL_EVAL, "--codec", "identity", "--target", "kv", "--bits", "8", "--target-ppl-delta", "0.9"]


def tune(folder, name: str, *more) -> dict:
    """The tuner's preset of a model in a folder; all runs have one study file."""
    flags = ["--model", folder, "--text", "words.txt", *FLAGS, "--study", "s.db", "--output", f"{name}.json"]
    assert run(TUNE, *flags, *more) == 0
    return load_preset(f"{name}.json")


def studies() -> int:
    return len(optuna.get_all_study_names("sqlite:///s.db"))


@pytest.fixture
def mixed_folder(tmp_path, tiny_flags):
    return save_tiny(tmp_path / "mixed", "gemma3_text", **MIXED)


def test_the_script_measures_at_the_length_and_its_preset_says_so(mixed_folder, mixed):
    usual, long = tune(mixed_folder, "usual"), tune(mixed_folder, "long", "--context-length", 4096)
    assert [preset["context_length"] for preset in (usual, long)] == [2048, 4096]
    assert long["compression_ratio"] > usual["compression_ratio"]
    for preset in (usual, long):
        ratio = size.compression_ratio(
            lambda preset=preset: create_cache_from_preset(preset), mixed.geometry, preset["context_length"]
        )
        assert preset["compression_ratio"] == pytest.approx(ratio, abs=1e-4)
    assert studies() == 2, "one for each length"
    assert tune(mixed_folder, "again", "--context-length", 4096)["trials"] == long["trials"] and studies() == 2


def test_where_all_layers_are_alike_only_an_unusual_length_is_said(tiny_flags, tmp_path):
    folder = tiny_flags[1]
    usual, same, short = (
        tune(folder, "a"), tune(folder, "b", "--context-length", 2048), tune(folder, "c", "--context-length", 256)
    )  # fmt: skip
    assert usual.get("context_length") is same.get("context_length") is None and short["context_length"] == 256
    assert short["compression_ratio"] < usual["compression_ratio"] == same["compression_ratio"]
    record = json.loads((tmp_path / "c.json").read_text())
    assert record["trials"][0]["compression_ratio"] == pytest.approx(short["compression_ratio"], abs=1e-3)
    assert studies() == 2, "the usual length is one search, said or not"
