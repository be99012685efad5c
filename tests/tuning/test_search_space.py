"""What the codec search may choose: families of the registry, as far as a calibration has their statistics."""

import pytest

from gpt2.common.errors import PluginError
from gpt2.compression.codecs import CODECS, needs_calibration
from gpt2.compression.settings import Setting
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
