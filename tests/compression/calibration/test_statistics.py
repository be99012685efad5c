"""Capture: statistics that are right to the last digit, from a model that is left as it was."""

import gc

import pytest
import torch
from tiny import tiny_loaded, windows, word_text
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gpt2.common import files
from gpt2.common.errors import PluginError
from gpt2.compression.calibration import reuse
from gpt2.compression.calibration.statistics import collect
from gpt2.compression.codecs.moments import Moments
from gpt2.models.geometry import Geometry
from gpt2.text.sources import by_position


@pytest.fixture(scope="module")
def llama():
    return tiny_loaded("llama")


def streamed(batches, geometry: Geometry) -> Moments:
    moments = Moments.zeros(geometry)
    for x in batches:
        moments.update(0, x)
    return moments


@pytest.mark.parametrize(("bias", "spread", "tolerance"), [(0, 1, 1e-5), (5, 2, 1e-5), (400, 1e-2, 1e-3)])
@pytest.mark.parametrize("split", [[600], [1, 599], [7] * 85 + [5], [100] * 6])
def test_moments_equal_a_direct_covariance(bias, spread, tolerance, split):
    """Float64 on all vectors at once, whatever the batches.

    With a bias of 400 the batch means are rounded as float32 rounds there, to 3e-5; Σxxᵀ in float32 would be rounded to
    8, ten times what it is to tell apart.
    """
    torch.manual_seed(0)
    mixing = torch.randn(2, 6, 6)
    x = (spread * (torch.randn(1, 2, 600, 6) @ mixing) + bias).float()
    moments = streamed(x.split(split, dim=2), Geometry.uniform(1, 2, 6))
    for head in range(2):
        exact = x[0, head].double()
        covariance = torch.cov(exact.T, correction=0)
        assert torch.allclose(moments.mean[0][head], exact.mean(0), rtol=1e-6, atol=1e-6)
        assert (moments.covariance(0)[head] - covariance).norm() < tolerance * covariance.norm()
    assert moments.count[0] == 600


def test_moments_count_every_sequence_of_a_batch():
    x = torch.randn(4, 2, 50, 6)
    together = streamed([x], Geometry.uniform(1, 2, 6))
    apart = streamed(x.split(1), Geometry.uniform(1, 2, 6))
    assert together.count[0] == apart.count[0] == 200
    assert torch.allclose(together.scatter[0], apart.scatter[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_moments_refuse_what_is_not_finite(value):
    x = torch.zeros(1, 2, 5, 6)
    x[0, 1, 3, 2] = value
    moments = Moments.zeros(Geometry.uniform(2, 2, 6))
    with pytest.raises(PluginError, match="layer 1: NaN or infinite"):
        moments.update(1, x)
    assert not moments.count.any() and not moments.scatter[1].any(), "and are left as they were"


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
            centred = x - x.mean(1, keepdim=True)
            assert torch.allclose(moments.scatter[layer], centred.mT @ centred, rtol=1e-4, atol=1e-3)
        # Query heads 0 and 1 read KV head 0, heads 2 and 3 read KV head 1
        for head in range(2):
            mine = q[2 * head : 2 * head + 2].flatten(0, 1)
            expected = mine.mT @ mine / len(mine)
            assert torch.allclose(seen[layer][head], expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_collect_is_independent_of_the_order_of_windows(llama):
    batches = windows(4, 20)
    a, b = collect(llama, batches, 4), collect(llama, batches.flip(0), 4)
    for one, other in ((a.k.scatter, b.k.scatter), (a.k.metrics["attention"], b.k.metrics["attention"])):
        assert torch.allclose(torch.stack(one), torch.stack(other), rtol=1e-6)


@pytest.mark.parametrize("sinks", [20, 50])
def test_collect_refuses_sequences_that_are_all_sinks(llama, sinks):
    with pytest.raises(PluginError, match=f"longer than the {sinks} sink tokens"):
        collect(llama, windows(2, 20), sinks)


def own_llama():
    """A model of the test's own, to break."""
    return tiny_loaded("llama")


@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
def test_nan_activations_are_refused_by_layer_and_nothing_is_written(projection, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "RESULTS", tmp_path / "checkout")
    broken = own_llama()
    getattr(broken.model.model.layers[1].self_attn, projection).weight[0, 0] = float("nan")
    output = tmp_path / "c.pt"
    with pytest.raises(PluginError, match="^layer 1: NaN or infinite activations.*--dtype float32"):
        made_from = {"samples": 3, "seq_len": 48, "seed": 0, "sink_tokens": 4}
        text = by_position("words", "words.txt", word_text(3000))
        reuse.obtain_calibration(broken, text, given=None, output=output, rank=9, **made_from)
    assert not list(tmp_path.rglob("*.*"))
    assert broken.model.config._attn_implementation == own_llama().model.config._attn_implementation


def test_nan_queries_are_refused_as_well():
    broken = own_llama()
    broken.model.model.layers[-1].self_attn.q_proj.weight[0, 0] = float("nan")  # no K or V comes after it
    with pytest.raises(PluginError, match="layer 2: NaN"):
        collect(broken, windows(1, 20), 4)


def test_a_window_without_a_vector_after_the_sinks_adds_nothing(llama):
    short, long = windows(1, 4)[0], windows(1, 20)[0]
    found = collect(llama, [short, long], 4)
    assert all(map(torch.equal, found.k.mean, collect(llama, [long], 4).k.mean))


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
    assert len(set(alive[1:])) == 1, "live bytes don't grow with the windows"
    held = [found.k.count, found.v.count]
    held += [t for side in (found.k, found.v) for t in (*side.mean, *side.scatter, *side.metrics["attention"])]
    L, H, d = (getattr(llama.geometry, name) for name in ("num_layers", "num_kv_heads", "head_dim"))
    assert sum(t.untyped_storage().nbytes() for t in held) == 8 * (2 * L + 2 * L * H * d + 4 * L * H * d * d)
    assert set(vars(found)) == {"k", "v"} and set(vars(found.k)) == {"count", "mean", "scatter", "metrics"}
