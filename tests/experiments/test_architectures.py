"""Every decoder family of the installed transformers: what happens to it, start to end; and miniatures of them."""

from __future__ import annotations

import functools
import json
import re

import pytest
import torch
import transformers
from calibrations import TEXT
from kinds import miniature
from sampling import sampled
from script_runs import run
from transformers import DynamicCache

from gpt2.common import files
from gpt2.common.errors import UnsupportedModel
from gpt2.compression.attention import enable_compressed_attention
from gpt2.compression.cache.token_store import SHORTEST_REACH
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.file import save_calibration
from gpt2.compression.codecs import Compressor, quantizer_for_bits
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.presets import create_cache_from_preset
from gpt2.compression.presets.build import new_preset
from gpt2.experiments import architectures, miniatures
from gpt2.experiments.architectures import DIRECT, FAILED, NOT_TRIED, PROMPT, RECONSTRUCT, REFUSED, WORKING
from gpt2.experiments.miniatures import tiny_family
from gpt2.models.geometry import Geometry
from gpt2.models.loading import LoadedModel

NEW = 2  # generated tokens instead of five, which change no mode


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(architectures, "NEW", NEW)


@functools.cache
def committed() -> dict[str, dict]:
    """Rows of the committed table by family; none where another transformers is installed."""
    record = json.loads((files.RESULTS / "runs" / "architectures.json").read_text(encoding="utf-8"))
    same = record["versions"]["transformers"] == transformers.__version__
    return {row["model_type"]: row for row in record["rows"]} if same else {}


def runs_start_to_end(loaded: LoadedModel, row: dict, folder) -> None:
    """Calibrate, save, make a preset, make a cache of it, generate."""
    assert loaded.geometry.record() == row["geometry"]
    rank = min(9, *(shape.width for _, _, shape in loaded.geometry.sides()))
    calibration = calibrate(loaded, TEXT, rank=rank, samples=2, seq_len=32)
    assert (calibration.statistics.k.count[loaded.geometry.attention] == 2 * (32 - 4)).all()
    assert all(own.isfinite().all() for own in calibration.kept_variance()["v"] if own is not None)
    if row["mode"] == DIRECT:
        metric = calibration.statistics.k.metrics["attention"]
        seen = [metric[layer].diagonal(dim1=-2, dim2=-1).sum(-1) > 0 for layer in loaded.geometry.attention]
        assert all(own.all() for own in seen), "queries of every layer and KV head"
    file = save_calibration(calibration, folder / "c.pt")
    nothing_measured = {"baseline_ppl": 1.0, "ppl": 1.0, "ppl_delta": 0.0}
    setting = {"target": "kv", "rank": rank, "bits": 8, "codec": "pca", "sink_tokens": 2, "recent_tokens": 3}
    preset = new_preset(loaded, calibration, str(file), compression_ratio=1.0, measured=nothing_measured, **setting)
    cache = create_cache_from_preset(preset, model=loaded)
    tokens = architectures.generated(loaded.model, cache)
    fed = PROMPT + NEW - 1  # the last token is returned and was never fed
    assert tokens.shape == (1, PROMPT + NEW)
    attending = [cache.layers[index] for index in loaded.geometry.attention]
    assert attending == cache.compressed and {layer.get_seq_length() for layer in attending} == {fed}
    for index, layer in zip(loaded.geometry.attention, attending, strict=True):
        short = (loaded.geometry.layers[index].window or fed) - 1 < SHORTEST_REACH  # kept as it is
        for store in layer.stores.values():
            assert store.compressed_tokens == (0 if short else fed - 2 - 3) and store.read().isfinite().all()
    reads_what_is_stored(row["mode"], loaded.model, lambda: create_cache_from_preset(preset, model=loaded))


def reads_what_is_stored(mode: str, model, make) -> None:
    """Attention over the cache gives the logits of reconstruction, or the model is rejected and left as it was."""
    reconstructed = architectures.streamed(model, make())
    if mode == RECONSTRUCT:
        with pytest.raises(UnsupportedModel, match="can't use compressed attention"):
            enable_compressed_attention(model)
        assert torch.equal(architectures.streamed(model, make()), reconstructed)
        return
    enable_compressed_attention(model)
    change = (architectures.streamed(model, make()) - reconstructed).abs().mean() / reconstructed.abs().max()
    assert change < 1e-3, "a code may tip over here and there; whatever is wrong moves all logits"


# One family for each kind of layer and for each way in which layers differ
LAYERS = {
    "jamba": "2 layers: linear_attention; 2 layers: full_attention, K 2 x 16, V 2 x 16",
    "recurrent_gemma": "4 layers: linear_attention; 2 layers: sliding_attention, window 130, K 2 x 16, V 2 x 16",
    "zamba2": "2 layers: linear_attention; 2 layers: hybrid, K 2 x 32, V 2 x 32",
    # The last layers read K and V of others
    "gemma4_text": "2 layers: sliding_attention, window 130, K 2 x 16, V 2 x 16; "
                   "1 layer: full_attention, K 2 x 32, V 2 x 32; 2 layers: dummy",
    "inkling_text": "2 layers: hybrid_sliding, window 130, K 2 x 16, V 2 x 16; 1 layer: hybrid, K 2 x 16, V 2 x 16",
    # And sink logits of each query, which ours doesn't know
    "inkling2_text": "2 layers: hybrid_sliding, window 130, K 2 x 16, V 2 x 16; 1 layer: hybrid, K 2 x 16, V 2 x 16",
    "deepseek_v3": "2 layers: full_attention, K 1 x 16, V 1 x 8",  # a latent and its rotary key
    "deepseek_v32": "3 layers: indexed_attention, K 1 x 16, V 1 x 8",
    "mimo_v2_flash": "1 layer: full_attention, K 2 x 24, V 2 x 16; "
                     "1 layer: sliding_attention, window 129, K 4 x 24, V 4 x 16",
    "mllama": "2 layers: full_attention, K 2 x 16, V 2 x 16; 1 layer: unused",
}  # fmt: skip
KNOWN = architectures.families()  # not all in older transformers, and not all with the same layers
LAYERS = {family: layers for family, layers in LAYERS.items() if family in KNOWN}
OTHERS = [family for family in KNOWN if family not in LAYERS]


@pytest.mark.parametrize("family", [*LAYERS, *sampled(OTHERS, 3)])
def test_every_family(family, tmp_path):
    """It works from calibration to generation or is rejected with a reason, and the committed table says the same."""
    row = architectures.examine(family)
    assert row["mode"] != FAILED, row["reason"]
    assert row["reason"] != "it is no causal language model", "transformers says that all of these are"
    assert row["mode"] == committed().get(family, row)["mode"], "run scripts/benchmarks/architectures.py"
    if row["mode"] in WORKING:
        loaded = miniature(family)
        assert not committed() or str(loaded.geometry) == LAYERS.get(family, str(loaded.geometry))
        runs_start_to_end(loaded, row, tmp_path)
    else:
        assert family not in LAYERS and row["reason"] and "geometry" not in row


def int4(geometry: Geometry) -> CompressedDynamicCache:
    return CompressedDynamicCache(*[[Compressor(quantizer_for_bits(4))] * geometry.num_layers] * 2, geometry=geometry)


def lossless(k, v, geometry: Geometry) -> CompressedDynamicCache:
    return identity_cache(geometry)


def other_tokens(model, cache, generated=architectures.generated):
    return generated(model, cache) + isinstance(cache, CompressedDynamicCache)


def broken(*args):
    raise KeyError("ours")


FAULTS = [
    ("wrap", broken, "^KeyError: 'ours'$"),
    ("identity_cache", int4, "loses nothing changes logits"),
    ("CompressedDynamicCache", lossless, "4 bits change logits by 0.0 of the largest"),
    ("generated", lambda model, cache: torch.zeros(1, PROMPT + NEW), "holds 0 tokens"),
    ("generated", other_tokens, "RuntimeError: a cache that loses nothing changes tokens"),
]


@pytest.mark.parametrize(("name", "fault", "message"), FAULTS)
def test_a_fault_of_ours_is_noticed(name, fault, message, monkeypatch):
    monkeypatch.setattr(architectures, name, fault)
    row = architectures.examine("llama")
    assert row["mode"] == FAILED and re.search(message, row["reason"])


def test_an_error_of_ours_is_not_held_against_us_where_transformers_does_no_better(monkeypatch):
    monkeypatch.setattr(architectures, "wrap", broken)
    monkeypatch.setattr(architectures, "streamed", broken)
    row = architectures.examine("llama")
    assert row["mode"] == NOT_TRIED and row["reason"].startswith("transformers doesn't run it with its own cache: Key")


def test_attention_that_is_not_replaced_is_noticed(monkeypatch):
    model = tiny_family("llama")
    logits, _ = architectures.reference(model)
    before = model.config._attn_implementation
    assert architectures.why_attention_stays(model, logits) is None
    assert architectures.why_attention_stays(model, logits + 1) == "another attention function changes its logits"
    streamed = architectures.streamed
    monkeypatch.setattr(architectures, "streamed", lambda model, cache: streamed(model, DynamicCache()))
    assert "attention of its own" in architectures.why_attention_stays(model, logits)
    assert model.config._attn_implementation == before


def test_the_script_writes_a_row_for_each_family(tmp_path, capsys):
    output = tmp_path / "out" / "a.json"
    assert run("benchmarks/architectures", "--families", "bloom,llama,mamba", "--output", output) == 0
    record = json.loads(output.read_text())
    assert [(row["model_type"], row["mode"]) for row in record["rows"]] == [
        ("bloom", RECONSTRUCT), ("llama", DIRECT), ("mamba", REFUSED),
    ]  # fmt: skip
    assert record["versions"]["transformers"] == transformers.__version__ and record["prompt_tokens"] == PROMPT
    printed = capsys.readouterr().out
    assert "works; its attention can be replaced" in printed and "refused: " in printed and "mamba" in printed
    output.unlink()
    assert run("benchmarks/architectures", "--families", "llama,lama", "--output", output) == 2
    assert "unknown lama" in capsys.readouterr().err and not output.exists()


def test_a_miniature_is_the_same_each_time_leaves_the_dice_alone_and_is_small(monkeypatch):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    a, b = miniatures.tiny_family("qwen2"), miniatures.tiny_family("qwen2")
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    monkeypatch.setattr(miniatures, "MOST_PARAMETERS", 1000)
    with pytest.raises(miniatures.NotTried, match="the miniature has 65,856 weights"):
        miniatures.tiny_family("llama")


def test_shrinking_keeps_layers_of_every_kind_those_that_attend_and_those_that_share_keys():
    fields = {
        "hidden_size": 4096, "num_hidden_layers": 6, "head_dim": 256, "num_key_value_heads": None, "vocab_size": 50,
        "layer_types": ["s", "s", "s", "f", "g", "f"], "rope": [1, 1, 1, 0, 1, 0], "moe": [0, 1, 3, 5], "flag": True,
        "sparse": [2, 5], "dims": [3, 80],
        "eos_token_id": 7, "image_token_id": 9999, "boi_token_id": None, "use_cache": False, "id2label": {"0": "a"},
        "vision": {"hidden_size": 1024, "depth": 3}, "per_layer_config": {"03": {"head_dim": 512, "x": 3}, "5": {}},
    }  # fmt: skip
    assert miniatures.shrunk(fields) == fields | {
        "hidden_size": 64, "num_hidden_layers": 5, "head_dim": 16, "num_key_value_heads": 2,
        "layer_types": ["s", "s", "s", "f", "g"], "rope": [1, 1, 1, 0, 1], "moe": [0, 1, 3], "sparse": [2],
        "eos_token_id": None,
        "image_token_id": 120, "use_cache": True, "vision": {"hidden_size": 64, "depth": 3},
        "per_layer_config": {3: {"head_dim": 32, "x": 3}},
    }  # fmt: skip
    kinds = ["linear_attention", "linear_attention", "full_attention"] * 3
    assert miniatures.shrunk({"num_hidden_layers": 9, "layer_types": kinds})["layer_types"] == kinds[:3] + kinds[5:6]
    assert miniatures.shrunk({"num_hidden_layers": 9, "full_attn_idxs": [2, 5, 8]})["full_attn_idxs"] == [2, 3]
    fields = {"num_hidden_layers": 9, "num_kv_shared_layers": 4, "layer_types": ["a", "a", "f"] * 3}
    small = {"num_hidden_layers": 5, "num_kv_shared_layers": 2, "layer_types": ["a", "a", "f", "f", "a"]}
    assert miniatures.shrunk(fields) == small
