"""Capture: statistics that are right to the last digit, from a model that is left as it was."""

import gc

import pytest
import torch
from calibrations import TEXT, scatter
from tiny import tiny_loaded, windows
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gpt2.common import files
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


@torch.no_grad()
def direct_qkv(loaded, tokens: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Per layer q, k (after RoPE) and v of a llama, by another way than the one under test: hooks and a cache."""
    model, seen, hooks = loaded.model, [], []
    for layer in model.model.layers:
        hooks.append(layer.self_attn.q_proj.register_forward_hook(lambda m, a, out: seen.append(out)))
    cache = DynamicCache()
    model(tokens[None], past_key_values=cache, use_cache=True)
    for hook in hooks:
        hook.remove()
    positions = torch.arange(len(tokens))[None]
    cos, sin = model.model.rotary_emb(seen[0], positions)
    d = loaded.geometry.head_dim
    rotated = [apply_rotary_pos_emb(*2 * [q.unflatten(-1, (-1, d)).transpose(1, 2)], cos, sin)[0] for q in seen]
    return [(q[0], layer.keys[0], layer.values[0]) for q, layer in zip(rotated, cache.layers, strict=True)]


@pytest.mark.parametrize("sinks", [0, 4])
def test_collect_equals_a_direct_computation_without_the_sinks(llama, sinks):
    batches = windows(3, 20)
    found = collect(llama, batches, sinks)
    per_window = [direct_qkv(llama, tokens) for tokens in batches]
    seen = found.k.metrics["attention"]
    assert (found.k.count == 3 * (20 - sinks)).all()
    for layer in range(llama.geometry.num_layers):
        q, k, v = (torch.cat([w[layer][i][:, sinks:] for w in per_window], dim=1).double() for i in range(3))
        for moments, x in ((found.k, k), (found.v, v)):
            assert torch.allclose(moments.mean[layer], x.mean(1), rtol=1e-4, atol=1e-5)
            assert torch.allclose(moments.scatter[layer], scatter(x), rtol=1e-4, atol=1e-3)
        # Query heads 0 and 1 read KV head 0, heads 2 and 3 read KV head 1
        for head in range(2):
            mine = q[2 * head : 2 * head + 2].flatten(0, 1)
            expected = mine.mT @ mine / len(mine)
            assert torch.allclose(seen[layer][head], expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_windows_that_are_all_sinks(llama):
    """They add nothing, and all windows can't be such ones."""
    for sinks in (20, 50):
        with pytest.raises(PluginError, match=f"longer than the {sinks} sink tokens"):
            collect(llama, windows(2, 20), sinks)
    short, long = windows(1, 4)[0], windows(1, 20)[0]
    found = collect(llama, [short, long], 4)
    assert all(map(torch.equal, found.k.mean, collect(llama, [long], 4).k.mean))


@pytest.mark.parametrize("projection", ["k_proj", "v_proj", "q_proj"])
def test_nan_activations_are_rejected_by_layer_and_nothing_is_written(projection, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "RESULTS", tmp_path / "checkout")
    broken, made_from = tiny_loaded("llama"), {"rank": 9, "samples": 3, "seq_len": 48, "seed": 0, "sink_tokens": 4}
    attention, layer = broken.model.config._attn_implementation, 2 if projection == "q_proj" else 1
    # After the last layer's queries comes no K or V that would show them
    getattr(broken.model.model.layers[layer].self_attn, projection).weight[0, 0] = float("nan")
    with pytest.raises(PluginError, match=f"^layer {layer}: NaN or infinite activations.*--dtype float32"):
        reuse.obtain_calibration(broken, TEXT, given=None, output=tmp_path / "c.pt", **made_from)
    assert not list(tmp_path.rglob("*.*"))
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


def test_collect_keeps_no_activations(llama):
    alive = []

    def counted():
        for window in windows(5, 64):
            gc.collect()
            alive.append(sum(t.nbytes for t in gc.get_objects() if type(t) is torch.Tensor))
            yield window

    gc.freeze()  # what lived before isn't looked at
    try:
        found = collect(llama, counted(), 4)
    finally:
        gc.unfreeze()
    assert len(set(alive[1:])) == 1, "live bytes don't grow with the segments"
    held = [found.k.count, found.v.count]
    held += [t for side in (found.k, found.v) for t in (*side.mean, *side.scatter, *side.metrics["attention"])]
    L, H, d = (getattr(llama.geometry, name) for name in ("num_layers", "num_kv_heads", "head_dim"))
    assert sum(t.untyped_storage().nbytes() for t in held) == 8 * (2 * L + 2 * L * H * d + 4 * L * H * d * d)
    assert set(vars(found)) == {"k", "v"} and set(vars(found.k)) == {"count", "mean", "scatter", "metrics"}
