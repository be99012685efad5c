"""Which caches are compared, those of other packages among them: how each is made, copied and counted."""

import copy
import importlib
import itertools
import json
import sys

import pytest
import torch
from script_runs import FREE_PRESET
from tiny import char_tokenizer, tiny_loaded
from transformers import AutoConfig, cache_utils

from gpt2.common.errors import CalibrationNotFound, PluginError
from gpt2.compression.cache.size import cache_bytes, held_bytes
from gpt2.compression.compressed_cache import identity_cache
from gpt2.compression.named_caches import from_preset
from gpt2.compression.presets import preset_files
from gpt2.evaluation import kivi, lineup, other_caches, peers
from gpt2.evaluation.perplexity import BASELINE, baseline_factory

H, D, T = 2, 64, 300
PRESET = FREE_PRESET | {"rank": 16, "bits": 4, "head_dim": 16, "calibration_file": "nowhere.pt"}
needs_fp8 = pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="no fp8 in this transformers")


@pytest.fixture(scope="module")
def llama():
    return tiny_loaded("llama", char_tokenizer(), hidden_size=64)  # head_dim 16: groups of 64 and packing by 8 fit


@pytest.fixture(scope="module")
def x():
    return torch.randn(1, H, T, D, generator=torch.Generator().manual_seed(0))


def installed(family: str) -> None:
    """Skip where an optional package isn't there."""
    module, package = other_caches.PACKAGES[family]
    try:
        importlib.import_module(module)
    except ImportError:
        pytest.skip(f"{package} is not installed (requirements-peers.txt)")


def peer(family: str, **overrides):
    """A cache of transformers for two layers of [B, 2, n, 64]."""
    config = AutoConfig.for_model("llama", num_hidden_layers=2, num_attention_heads=H, hidden_size=H * D)
    if family == "fp8":
        return other_caches.SharedCache("fp8", config)
    axis = other_caches.AXES[family]
    settings = {"nbits": 4, "axis_key": axis, "axis_value": axis, "q_group_size": 64, "residual_length": 0} | overrides
    return other_caches.SharedCache(family, config, **settings)


def fed(cache, x, chunk: int):
    """What the last update of layer 0 returns for K, after x has gone into every layer."""
    for part in x.split(chunk, dim=2):
        returned = [cache.update(part, part, index)[0] for index in range(len(cache.layers))]
    return returned[0]


@pytest.mark.parametrize("family", ["quanto", "hqq"])
def test_inner_tensors_of_quantized_caches_are_counted(family, x):
    installed(family)
    for bits, residual in itertools.product((4, 2), (0, 128)):
        cache = peer(family, nbits=bits, residual_length=residual)
        fed(cache, x[:, :, :256].bfloat16(), 64)
        exact = 64 if residual else 0  # 64 at first, 128 more at once, then 64 in the residual
        numbers = H * D * (256 - exact)
        side = numbers * bits // 8 + numbers // 64 * (2 + 2) + H * D * exact * 2
        assert cache_bytes(cache) == 2 * 2 * side, (bits, residual)


@needs_fp8
def test_fp8_is_counted(x):
    cache = peer("fp8")
    fed(cache, x.bfloat16(), 64)
    assert cache_bytes(cache) == 2 * 2 * (H * D * T + 4)


def test_everybody_is_filled_alike(llama):
    """By chunks of 64, in 16 bits; a cache of ours that keeps all and transformers' own are then as large."""
    own = held_bytes(baseline_factory(llama), llama.geometry, 256, chunk=64)
    assert own == 256 * llama.geometry.bytes_per_token()
    assert held_bytes(lambda: identity_cache(3), llama.geometry, 256, chunk=64) == own
    assert held_bytes(lambda: kivi.kivi_cache(3, 4, 0), llama.geometry, 256, chunk=64) < own / 2


@pytest.mark.parametrize("family", ["quanto", "hqq", pytest.param("fp8", marks=needs_fp8)])
def test_a_copy_keeps_what_it_held(family, x):
    if family != "fp8":
        installed(family)
    cache = peer(family)
    fed(cache, x[:, :, :64], 32)
    twin = copy.deepcopy(cache)
    fed(cache, x[:, :, 64:128], 64)
    assert (cache.get_seq_length(), twin.get_seq_length()) == (128, 64)
    returned = fed(twin, x[:, :, 64:96], 32)
    assert returned.shape[2] == 96 and (returned[:, :, :64] - x[:, :, :64]).abs().max() < 1
    assert twin.get_seq_length() == 96 and cache.get_seq_length() == 128


def test_a_package_that_is_missing_gives_entries_with_errors(llama, monkeypatch):
    for module, _ in other_caches.PACKAGES.values():
        monkeypatch.setitem(sys.modules, module, None)
    found = lineup.for_quality(llama, ["quanto", "hqq", "kivi"], [])
    assert [entry.make is None for entry in found] == [True] * 8 + [False] * 6
    assert peers.reason(found[0].error) == "optimum-quanto is not installed: pip install -r requirements-peers.txt"
    with pytest.raises(PluginError, match="--peers hqq: hqq is not installed"):
        lineup.for_speed(llama, [], packages=["hqq"])


@needs_fp8
def test_a_model_that_a_backend_rejects_gives_rows():
    found = lineup.for_quality(tiny_loaded("mistral"), ["fp8", "kivi"], [])
    assert "only full attention" in peers.reason(found[0].error) and all(entry.make for entry in found[1:])


def test_built_in_presets_are_compared_unless_others_are_given(llama, tmp_path, monkeypatch):
    assert "no preset rN-vonly" in peers.reason(lineup.for_quality(llama, ["lowrank"])[0].error)
    (tmp_path / "presets").mkdir()
    for name, own in {"r12-vonly": {"rank": 12, "bits": 16, "codec": "pca"}, "int4-vonly": {}}.items():
        record = PRESET | own | {"model": llama.spec, "name": name}
        (tmp_path / "presets" / f"{name}.json").write_text(json.dumps(record))
    monkeypatch.setattr(preset_files, "BUILT_IN", (tmp_path / "presets",))
    found = lineup.for_quality(llama, ["lowrank"])
    assert [(entry.family, entry.label) for entry in found] == [("lowrank", "r12-vonly"), ("ours", "int4-vonly")]
    assert isinstance(found[0].error, CalibrationNotFound) and found[1].preset["bits"] == 4
    assert [entry.label for entry in lineup.for_quality(llama, [], [])] == []
    with pytest.raises(PluginError, match="did you mean 'int4-vonly'"):
        lineup.for_quality(llama, [], ["int5-vonly"])
    with pytest.raises(PluginError, match="two caches are called 'int4-vonly'"):
        lineup.for_quality(llama, [], ["int4-vonly", "int4-vonly"])


def test_caches_for_speed_come_by_name_with_the_baseline_first(llama):
    choices = [from_preset("kv4", llama)]
    assert list(lineup.for_speed(llama, choices)) == [BASELINE, "kv4"]
    caches = lineup.for_speed(llama, choices, identity=True, direct=True)
    assert list(caches) == [BASELINE, "identity", "identity, direct", "kv4", "kv4, direct"]
    assert [caches[name]().direct for name in ("kv4", "kv4, direct")] == [False, True]
    alone = lineup.for_speed(llama, choices, direct=True, reconstruct=False)
    assert list(alone) == [BASELINE, "kv4, direct"], "what can be read is not reconstructed as well"


def test_rows_that_read_codes_slower_than_the_baseline_are_named():
    def row(cache: str, low: float, median: float, high: float, context: int = 8000) -> dict:
        ratio = {"tokens_per_s_median": median, "tokens_per_s_quartiles": [low, high]}
        return {"cache": cache, "context_tokens": context, "batch_size": 4, "ratio_to_baseline": ratio}

    rows = [
        {"cache": BASELINE, "context_tokens": 8000, "batch_size": 4}, row("kv4", 0.4, 0.5, 0.6),
        row("int8, direct", 0.9, 0.97, 1.02), row("kv8, direct", 1.1, 1.2, 1.3),
        {"cache": "kv2, direct", "context_tokens": 8000, "batch_size": 4, "out_of_memory": True},
    ]  # fmt: skip
    assert lineup.slower_directly(rows) is None
    said = lineup.slower_directly([*rows, row("kv4, direct", 0.9, 0.931, 0.95), row("a, direct", 0.4, 0.5, 0.6, 256)])
    assert "kv4, direct 0.93x at 8,000 tokens, batch of 4; a, direct 0.50x at 256 tokens" in said
    assert "\n" not in said and "when='auto'" in said and "int8" not in said
