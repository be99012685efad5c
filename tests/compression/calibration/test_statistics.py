"""Capture: statistics that are right to the last digit, from a model that is left as it was."""

import pytest
import torch
from calibrations import TEXT
from tiny import tiny_loaded, windows

from gpt2.common.errors import PluginError
from gpt2.compression.calibration import reuse
from gpt2.compression.calibration.statistics import collect
from gpt2.compression.codecs.moments import Moments
from gpt2.models.geometry import Geometry


def test_moments_reject_what_is_not_finite():
    x, moments = torch.zeros(1, 2, 5, 6), Moments.zeros(Geometry.uniform(2, 2, 6))
    for value in (float("nan"), float("inf"), -float("inf"), 1e30):
        x[0, 1, 3, 2] = value
        with pytest.raises(PluginError, match="layer 1: NaN or infinite"):
            moments.update(1, x)
        assert not moments.count.any() and not any(own.any() for own in moments.scatter), "and are left as they were"


def test_windows_that_are_all_sinks(llama):
    """They add nothing, and all windows can't be such ones."""
    for sinks in (20, 50):
        with pytest.raises(PluginError, match=f"longer than the {sinks} sink tokens"):
            collect(llama, windows(2, 20), sinks)
    short, long = windows(1, 4)[0], windows(1, 20)[0]
    found = collect(llama, [short, long], 4)
    assert all(map(torch.equal, found.k.mean, collect(llama, [long], 4).k.mean))


@pytest.mark.parametrize("projection", ["k_proj", "v_proj", "q_proj"])
def test_nan_activations_are_rejected_by_layer_and_nothing_is_written(projection, space):
    broken, made_from = tiny_loaded("llama"), {"rank": 9, "samples": 3, "seq_len": 48, "seed": 0, "sink_tokens": 4}
    attention, layer = broken.model.config._attn_implementation, 2 if projection == "q_proj" else 1
    # After the last layer's queries comes no K or V that would show them
    getattr(broken.model.model.layers[layer].self_attn, projection).weight[0, 0] = float("nan")
    with pytest.raises(PluginError, match=f"^layer {layer}: NaN or infinite activations.*--dtype float32"):
        reuse.obtain_calibration(broken, TEXT, given=None, output=space / "c.pt", **made_from)
    assert not list(space.rglob("*.*"))
    assert broken.model.config._attn_implementation == attention


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_collect_leaves_the_attention_as_it_was(llama, implementation):
    llama.model.set_attn_implementation(implementation)
    tokens = windows(1, 20)
    before = llama.model(tokens).logits
    queries = torch.stack(collect(llama, tokens, 4).k.metrics["attention"])
    assert llama.model.config._attn_implementation == implementation
    assert torch.equal(llama.model(tokens).logits, before)

    def interrupted():
        yield tokens[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(llama, interrupted(), 4)
    assert llama.model.config._attn_implementation == implementation
    llama.model.set_attn_implementation("sdpa")
    assert torch.allclose(torch.stack(collect(llama, tokens, 4).k.metrics["attention"]), queries, rtol=1e-4, atol=1e-4)
