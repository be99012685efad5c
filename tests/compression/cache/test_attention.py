"""Attention over what is stored: the same logits as reconstruction, whatever the model asks of its attention."""

from unittest import mock

import pytest
import torch
from direct import SETTINGS, both, cache_of, close, joint_cache_of, streamed
from sampling import covering, sampled
from tiny import FAMILIES, tiny_model, windows
from transformers import DynamicCache

from gpt2.common.errors import UnsupportedModel
from gpt2.compression.attention import disable_compressed_attention, enable_compressed_attention, is_enabled
from gpt2.compression.cache import attention, attention_math, direct_attention
from gpt2.compression.cache.layers import StoredKV
from gpt2.compression.cache.token_store import TokenStore
from gpt2.evaluation.instruments import Stopwatch, watched
from gpt2.experiments.miniatures import tiny_family


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture
def enabled(llama):
    """The tiny Llama with compressed attention."""
    yield enable_compressed_attention(llama)
    disable_compressed_attention(llama)


@pytest.fixture
def attended(monkeypatch) -> list[int]:
    """How many queries each call of attention over codes had."""
    calls, attend = [], direct_attention.attend
    monkeypatch.setattr(
        direct_attention, "attend", lambda *args, **how: calls.append(args[2].shape[2]) or attend(*args, **how)
    )
    return calls


def model_of(family: str, **overrides):
    """Of any family: one that `tiny` doesn't know has the shape of its Llama."""
    with mock.patch.dict(FAMILIES, {family: FAMILIES.get(family, FAMILIES["llama"])}):
        return tiny_model(family, **overrides)


def same_logits(model, k: str, v: str, run, **layout) -> bool:
    """Whether attention over codes gives what reconstruction does."""
    return close(*both(model, lambda: cache_of(model, SETTINGS[k], SETTINGS[v], **layout), run))


# --- the same as reconstruction


@pytest.mark.parametrize(
    ("family", "k", "v", "sinks", "kernels"),
    covering(FAMILIES, SETTINGS, [None, "int8", "mixed", "identity", "low rank"], [4, 0, 70], [True, False]),
    indirect=["kernels"],
)
def test_every_family_and_pair_of_codecs(family, k, v, sinks, kernels):
    """Windows, more query heads than KV heads, learned positions, a head_dim of its own."""
    model = tiny_model(family)
    assert same_logits(model, k, v or k, streamed(model, padding=5), sink_tokens=sinks)


SHARED = [
    ("llama", {}, 5, 4), ("mistral", {"sliding_window": 130}, 0, 4), ("llama", {}, 70, 70), ("phi", {}, 5, 0),
    ("gemma2", {"attn_logit_softcapping": 2.0, "head_dim": 16, "sliding_window": 150, "attn_implementation": "eager"},
     0, 4), ("mistral", {}, 5, 0),
]  # fmt: skip


@pytest.mark.parametrize(("case", "kernels"), covering(sampled(SHARED, 4), [True, False]), indirect=["kernels"])
def test_codes_that_k_and_v_share(case, kernels, attended):
    """A query for every block of keys, in windows that forget, with rows of their own positions."""
    family, shape, padding, sinks = case
    model = model_of(family, **shape)
    run = streamed(model, (150, 7, 1, 60, 30, 1), padding=padding)
    assert close(*both(model, lambda: joint_cache_of(model, "framed", sink_tokens=sinks), run))
    assert attended[-3:] == [1] * 3, "and it is read directly"


def test_direct_attention_is_what_runs(llama, attended):
    """Short chunks read codes in every layer; long ones share a reconstruction. Also of a model without its head."""
    both(llama, lambda: cache_of(llama, SETTINGS["int4"], SETTINGS["int4"]), streamed(llama))
    assert attended[-9:] == [7] * 3 + [1] * 6
    make = lambda: cache_of(llama, SETTINGS["int8"], None)  # noqa: E731
    both(llama, make, lambda cache: llama.base_model(windows(1, 5), past_key_values=cache))
    assert attended[-3:] == [5] * 3


@pytest.mark.parametrize(("chunks", "family"), covering([(70, 1, 1, 3), (3, 1), (130, 64)], ["gemma2", "gpt_oss"]))
def test_softcap_and_sink_logits(family, chunks, kernels):
    """Against the family's own eager attention, which is the only one that knows them."""
    own = {
        "gemma2": {"attn_logit_softcapping": 2.0}, "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},
    }[family]  # fmt: skip
    model = model_of(family, head_dim=16, sliding_window=16, attn_implementation="eager", **own)
    for layer in model.model.layers if family == "gpt_oss" else ():
        layer.self_attn.sinks.normal_()
    assert same_logits(model, "int8", "mixed", streamed(model, chunks, padding=2))


@pytest.mark.parametrize(
    ("name", "dtype", "kernels"),
    covering(sampled(SETTINGS, 4), [torch.bfloat16, torch.float16], [True, False, False]),
    indirect=["kernels"],
    ids=str,
)
def test_sixteen_bit_models(dtype, name, kernels):
    model = tiny_model("llama").to(dtype)
    make = lambda: cache_of(model, SETTINGS[name], SETTINGS[name])  # noqa: E731
    exact = streamed(tiny_model("llama"))(make())
    reconstructed, stored = (x.float() for x in both(model, make, streamed(model)))
    rounding = (reconstructed - exact).abs().mean()
    assert (stored - exact).abs().mean() <= 1.2 * rounding, "no further from float32 than reconstruction is"


@pytest.mark.parametrize(
    ("name", "family", "on", "kernels"),
    covering(sampled(["identity", "int8", "mixed", "int8_channel", "low rank"], 3), ["llama", "gpt2", "gemma3_text"],
             [(True, False), (True, True), (False, True)], [True, False]), indirect=["kernels"],
)  # fmt: skip
def test_autocast(family, name, on, kernels):
    """In it all the way, or in every second step: no further from float32 than reconstruction is.

    All is held in the wider dtype.
    """
    model, caches = tiny_model(family), []
    ids = windows(1, 90).split([70, 1, 1, 10, 8], dim=1)

    def make():
        caches.append(cache_of(model, SETTINGS[name], SETTINGS[name], recent_tokens=2))
        return caches[-1]

    @torch.no_grad()
    def run(cache, autocast=on):
        out = []
        for i, x in enumerate(ids):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast[i % 2]):
                out.append(model(x, past_key_values=cache).logits.float())
        return torch.cat(out, dim=1)

    exact = run(make(), (False, False))
    reconstructed, stored = both(model, make, run)
    dtypes = {store.sinks.dtype for cache in caches[1:] for store in cache.layers[0].stores.values()}
    assert on[0] == on[1] or dtypes == {torch.float32}
    assert name != "identity" or torch.equal(reconstructed, run(DynamicCache(config=model.config)))
    assert (stored - exact).abs().mean() <= 1.2 * (reconstructed - exact).abs().mean()


def test_models_in_training_in_float64_and_without_a_head():
    model = tiny_model("llama").double()
    assert same_logits(model, "int8", "mixed", streamed(model))
    model = enable_compressed_attention(tiny_model("gpt2").train())  # with dropout, which a trial run must not have
    assert model.training and is_enabled(model)
    decoder = enable_compressed_attention(tiny_model("llama").model)
    cache = cache_of(decoder, SETTINGS["int8"], SETTINGS["int4"])
    assert decoder(windows(1, 9), past_key_values=cache).last_hidden_state.isfinite().all()


def test_gradients_reach_queries():
    """Kernels have no backward pass, so what needs one is reconstructed, also where K and V have no gradients."""
    model = enable_compressed_attention(tiny_model("llama"))
    weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    model(windows(1, 8), past_key_values=cache_of(model, SETTINGS["int8"], None)).logits.sum().backward()
    assert weight.grad.isfinite().all() and weight.grad.abs().sum() > 0


@pytest.mark.parametrize("mask", [None, "allowed", "added", "of one query"])
def test_queries_of_a_long_prompt_go_in_parts(mask, monkeypatch):
    g = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(2, heads, n, 8, generator=g) for heads, n in ((2, 30), (2, 30), (4, 20)))
    allowed = torch.rand(2, 1, 1 if mask == "of one query" else 20, 30, generator=g) > 0.3
    given = {None: None, "added": torch.where(allowed, 0.5, -1e9)}.get(mask, allowed)
    how = {"softcap": 5.0, "sinks": torch.randn(4, generator=g)}
    whole = attention_math.attend_reconstructed(k, v, q, given, 0.3, **how)
    monkeypatch.setattr(attention_math, "AT_ONCE", 2 * 4 * 30 * 7)
    torch.testing.assert_close(attention_math.attend_reconstructed(k, v, q, given, 0.3, **how), whole)


# --- switching it on and off


def test_it_can_be_undone_and_leaves_other_caches_alone(llama):
    ids, before = windows(2, 20), llama.config._attn_implementation
    expected = llama(ids).logits, llama.generate(ids, max_new_tokens=5, past_key_values=DynamicCache())
    for _ in range(2):
        assert enable_compressed_attention(llama) is llama
    assert is_enabled(llama) and llama.config._attn_implementation == attention.NAME
    found = llama(ids).logits, llama.generate(ids, max_new_tokens=5, past_key_values=DynamicCache())
    assert torch.allclose(found[0], expected[0], atol=1e-5) and torch.equal(found[1], expected[1])
    llama.set_attn_implementation("eager")  # another, set meanwhile, gets reconstructions
    assert llama(ids, past_key_values=cache_of(llama, SETTINGS["int8"], None)).logits.isfinite().all()
    for _ in range(2):
        assert disable_compressed_attention(llama) is llama
    assert not is_enabled(llama) and llama.config._attn_implementation == before
    assert not llama._forward_hooks and not llama._forward_pre_hooks


def test_a_cache_is_sealed_only_while_such_a_model_runs(enabled):
    cache = cache_of(enabled, SETTINGS["int8"], None)
    enabled(windows(1, 10), past_key_values=cache)
    k, v = cache.update(torch.zeros(1, 2, 1, 12), torch.zeros(1, 2, 1, 12), 0)
    assert k.shape == v.shape == (1, 2, 11, 12)
    tiny_model("llama")(windows(1, 10), past_key_values=cache_of(enabled, SETTINGS["int8"], None))
    with pytest.raises(IndexError):
        enabled(torch.tensor([[10**6]]), past_key_values=cache)
    assert not any(layer.reader for layer in cache.layers), "also after an error"
    for use in (lambda x: x.shape, lambda x: x + 1, lambda x: x[0], lambda x: torch.cat([x])):
        with pytest.raises((AttributeError, TypeError)):
            use(StoredKV(cache.layers[0]))  # what a model gets while it is sealed


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_a_model_with_attention_of_its_own_is_rejected_and_left_as_it_was(family):
    model, ids = tiny_family(family), windows(1, 8)
    before, expected = model.config._attn_implementation, model(ids).logits
    with pytest.raises(UnsupportedModel, match="can't use compressed attention: .*by reconstruction"):
        enable_compressed_attention(model)
    assert not is_enabled(model) and model.config._attn_implementation == before
    assert torch.equal(model(ids).logits, expected) and not model._forward_hooks


def test_a_model_whose_logits_change_is_rejected(llama, monkeypatch):
    monkeypatch.setattr(direct_attention, "attend", lambda k, v, query, *args, **how: torch.zeros_like(query))
    with pytest.raises(UnsupportedModel, match="replacing its attention changes its logits by"):
        enable_compressed_attention(llama)
    assert not is_enabled(llama)


def test_interrupted_and_disabled_a_cache_is_open_again(enabled, monkeypatch):
    """Ctrl-C passes by the hook that ends reading."""
    cache = cache_of(enabled, SETTINGS["int8"], None)
    enabled(windows(1, 10), past_key_values=cache)

    def interrupt(*args, **how):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(direct_attention, "attend", interrupt)
        with pytest.raises(KeyboardInterrupt):
            enabled(windows(1, 1), past_key_values=cache)
    disable_compressed_attention(enabled)
    cache.crop(-1)
    assert enabled(windows(1, 1), past_key_values=cache).logits.isfinite().all()


def test_instruments_watch_what_runs_without_them(enabled, monkeypatch):
    """A stopwatch around attention must not make the cache reconstruct its history."""
    cache = cache_of(enabled, SETTINGS["int8"], SETTINGS["int4"])
    enabled(windows(1, 90), past_key_values=cache)
    watch = Stopwatch(lambda: None)
    monkeypatch.setattr(TokenStore, "read", None)
    with watched(enabled, watch):
        enabled(windows(1, 1), past_key_values=cache)
    assert watch.seconds["expand"] == 0 < watch.seconds["attention"]
