"""What the codec search may choose: families of the registry, as far as a calibration has their statistics."""

import optuna
import pytest
import torch
from searches import search_of

from gpt2.common.errors import PluginError
from gpt2.compression.codecs import CODECS, needs_calibration
from gpt2.compression.presets import create_cache_from_preset
from gpt2.compression.presets.build import new_preset
from gpt2.compression.settings import Setting
from gpt2.experiments.miniatures import tiny_family
from gpt2.models.loading import wrap
from gpt2.tuning.codec_search import CodecSearch
from gpt2.tuning.search_space import Choice, Space, default_families, families, lossy, metric_for, space_for


def test_families_come_from_the_registry():
    assert {codec for codec in CODECS if not needs_calibration(codec)} <= families().keys()
    assert {"joint+mixed", "joint+mixed_fixed", "fisher", "attention", "pca"} <= set(default_families())
    assert "random" not in default_families(), "a control"
    names = tuple(families())
    assert {point["family"] for point in Space(names, 64, (64,)).starts()} == set(names)
    assert {"int8", "int4"} <= set(lossy()) and not {"none", "mixed"} & set(lossy())
    assert metric_for(["identity"]) is None and metric_for(["pca", "joint+mixed"]) == "fisher"


def test_without_statistics_a_family_is_left_out_or_rejected_when_asked_for():
    allowed, left_out = space_for(None, 64)
    assert {"identity", "hadamard"} <= set(allowed.families) and {"pca", "joint+mixed"} <= left_out.keys()
    assert not set(allowed.families) & left_out.keys()
    with pytest.raises(PluginError, match="codec joint needs a calibration"):
        space_for(None, 64, ["joint+mixed"])
    with pytest.raises(PluginError, match="rank 65 is out of range"):
        space_for(None, 64, ranks=[65])


def test_a_choice_comes_back_from_its_record():
    choice = Choice("joint+mixed", Setting("joint", 64, 3.5, "mixed"), "kv", 4, 8)
    assert Choice.of(choice.record()) == choice and str(choice) == "KV joint, 3.5 bits mixed, 4 sinks, 8 recent"


def test_where_layers_differ_in_width_codecs_that_need_no_calibration_keep_all_of_each():
    space, uniform = (Space(("hadamard", "pca"), 16, (16, 8), mixed=mixed) for mixed in (True, False))
    for own, ranks in ((space, [None, 8]), (uniform, [16, 8])):
        trials = [optuna.trial.FixedTrial(point | {"target": "kv", "rank": 8}) for point in own.starts()]
        assert [own.suggest(trial).setting.rank for trial in trials] == ranks
    assert space.key() != uniform.key() and "mixed" not in uniform.key()


def test_a_preset_of_such_a_choice_has_the_whole_width_in_every_layer():
    loaded = wrap(tiny_family("mimo_v2_flash"), None, "mimo")
    space = Space(("hadamard",), 16, (16,), mixed=True)
    search = search_of(loaded, CodecSearch, space=space)
    choice = Choice("hadamard", Setting("hadamard", None, 4, "int4_channel"), "kv", 4)
    measured = {"baseline_ppl": 1.0, "ppl": 1.0, "ppl_delta": 0.0}
    preset = new_preset(loaded, None, "", compression_ratio=2.0, measured=measured, **search.preset_keys(choice))
    cache = create_cache_from_preset(preset)
    with torch.no_grad():
        loaded.model(torch.arange(2, 90)[None], past_key_values=cache)
    ranks = [[store.compressor.transform.rank for store in layer.stores.values()] for layer in cache.compressed]
    assert ranks == [[24, 16], [24, 16]]
