"""`generate()` with a cache of ours: token-identical to DynamicCache when nothing is lossy, and sound when it is."""

from __future__ import annotations

import functools

import pytest
import torch
from generation import MODES, NEW, SAME_TOKENS, generate, model_of, prompt, with_dynamic_cache
from sampling import covering
from tiny import FAMILIES, tiny_model
from torch import Tensor
from transformers import DynamicCache

from gpt2.common.errors import PluginError
from gpt2.compression.codecs import QUANTIZERS, Compressor, Transform
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.models.probe import probe_geometry

every_family = pytest.mark.parametrize("family", FAMILIES)
every_mode = pytest.mark.parametrize("mode", MODES)
families_and_modes = pytest.mark.parametrize(("family", "mode"), covering(FAMILIES, MODES, times=3))


def identity(model) -> CompressedDynamicCache:
    return identity_cache(model.config.get_text_config().num_hidden_layers)


def quantized(model, name: str = "int4", **how) -> CompressedDynamicCache:
    compressors = [Compressor(QUANTIZERS[name])] * model.config.get_text_config().num_hidden_layers
    return CompressedDynamicCache(compressors, compressors, **how)


@every_family
def test_tiny_models_can_tell_caches_apart(family):
    """A model that repeats one token would pass every comparison below."""
    answer = with_dynamic_cache(family, "greedy")[0, -NEW:]
    assert len(answer.unique()) >= 4


@every_family
def test_a_lossy_cache_changes_the_tokens(family):
    """So the cache is what attention reads, and the comparisons below can fail."""
    model = model_of(family)
    shape = probe_geometry(model, family)
    E = torch.linalg.qr(torch.randn(shape.num_kv_heads, shape.head_dim, shape.head_dim)).Q[..., :2]
    lossy = Compressor(QUANTIZERS["int4"], Transform(E, E.mT, torch.zeros(shape.num_kv_heads, shape.head_dim)))
    cache = CompressedDynamicCache([lossy] * shape.num_layers, [lossy] * shape.num_layers, sink_tokens=0)
    assert not torch.equal(MODES["greedy"](model, cache), with_dynamic_cache(family, "greedy"))


@families_and_modes
def test_identity_cache_gives_the_same_tokens(family, mode):
    model = model_of(family)
    expected = with_dynamic_cache(family, mode)
    assert torch.equal(MODES[mode](model, identity(model)), expected)


@families_and_modes
def test_quantized_cache_runs(family, mode):
    """Right lengths in every mode; and the same tokens by another way, where transformers promises them."""
    model = model_of(family)
    expected = with_dynamic_cache(family, mode)
    cache = quantized(model)
    tokens = MODES[mode](model, cache)
    assert tokens.shape == expected.shape
    # The last token is returned and was never fed; assisted decoding may have fed it, and crops what was refused
    assert cache.get_seq_length() in (tokens.shape[1] - 1, tokens.shape[1])
    assert {layer.get_seq_length() for layer in cache.layers} == {cache.get_seq_length()}
    if mode in SAME_TOKENS:
        assert torch.equal(tokens, SAME_TOKENS[mode](model, quantized(model)))


@every_mode
def test_int8_sinks_and_recent_tokens_run(mode):
    """Every part of the storage in use at once: sinks, blocks and an exact tail."""
    model = model_of("llama")
    tokens = MODES[mode](model, quantized(model, "int8", sink_tokens=2, recent_tokens=5))
    assert tokens.shape == with_dynamic_cache("llama", mode).shape


@functools.cache
def in_dtype(dtype: torch.dtype):
    return tiny_model("llama").to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["greedy", "sampling", "beams", "assisted", "left-padded", "multi-turn"])
def test_16_bit_models(mode, dtype):
    model = in_dtype(dtype)
    expected = MODES[mode](model, DynamicCache(config=model.config))
    assert torch.equal(MODES[mode](model, identity(model)), expected)
    assert MODES[mode](model, quantized(model)).shape == expected.shape


@pytest.mark.parametrize(("family", "mode"), [("llama", "assisted"), ("phi", "prompt-lookup")])
def test_speculation_accepts_and_refuses(family, mode, monkeypatch):
    """Otherwise these modes would be greedy decoding under another name and `crop` would never run."""
    model = model_of(family)
    cache = identity(model)
    removed, crop = [], cache.crop
    monkeypatch.setattr(cache, "crop", lambda n: (removed.append(-n), crop(n)))
    MODES[mode](model, cache)
    assert max(removed) > 0, "a guess was refused"
    assert len(removed) < NEW, "a guess was accepted"


@every_family
def test_use_cache_false_is_refused(family):
    """It feeds prompt and answer again at every step: the tokens would be wrong without a sign of it."""
    model = model_of(family)
    for cache in (identity(model), quantized(model), quantized(model, sink_tokens=0)):
        with pytest.raises(PluginError, match="use_cache=True"):
            generate(model, cache, prompt(), use_cache=False)


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"do_sample": True},
        {"ids": prompt(1)},
        {"ids": prompt(batch=2)},
        {"ids": prompt(), "attention_mask": torch.tensor([[0] * 4 + [1] * 8])},
    ],
    ids=["beams", "sampling", "one-token", "batch", "left-padded"],
)
def test_use_cache_false_is_refused_in_other_modes(how):
    model = model_of("llama")
    with pytest.raises(PluginError, match="use_cache=True"):
        generate(model, quantized(model), **{"ids": prompt()} | how, use_cache=False)


def test_another_batch_size_is_refused():
    model = model_of("llama")
    cache = identity(model)
    generate(model, cache, prompt())
    with pytest.raises(PluginError, match="batch of 1, got 3"):
        generate(model, cache, prompt(40), num_beams=3)
    with pytest.raises(PluginError, match="batch of 1, got 2"):
        model(prompt(3, batch=2), past_key_values=cache)


def test_a_positive_crop_is_refused():
    model = model_of("llama")
    cache = identity(model)
    model(prompt(), past_key_values=cache)
    with pytest.raises(PluginError, match="negative"):
        cache.crop(3)
    assert cache.get_seq_length() == 12


def test_a_cache_filled_in_inference_mode_goes_on_without_it():
    """`generate` runs in no_grad: a prompt that was read under inference_mode comes before it in real programs."""
    model = model_of("llama")

    def tokens(cache) -> Tensor:
        with torch.inference_mode():
            model(prompt(), past_key_values=cache)
        return generate(model, cache, prompt().repeat(1, 2))

    assert torch.equal(tokens(identity(model)), tokens(DynamicCache(config=model.config)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_use_cache_false_is_refused_on_16_bit_models(dtype):
    """Where the same token, read again beside more tokens, may come out a rounding apart."""
    model = in_dtype(dtype)
    for name, length in (("none", 3), ("int8", 70), ("int4", 12)):
        with pytest.raises(PluginError, match="use_cache=True"):
            generate(model, quantized(model, name), prompt(length), use_cache=False)


@pytest.mark.parametrize(("family", "length"), covering(FAMILIES, [1, 12]))
def test_text_that_repeats_is_not_taken_for_use_cache_false(family, length):
    """One token more than is held, beginning with the same text at its new place: a user may well say it twice."""
    model = model_of(family)
    ids = prompt(length)

    def tokens(cache) -> Tensor:
        model(ids, past_key_values=cache)
        return generate(model, cache, torch.cat((ids, ids, prompt(1, seed=1)), dim=1))

    assert torch.equal(tokens(identity(model)), tokens(DynamicCache(config=model.config)))


def test_values_with_a_large_mean_are_not_taken_for_use_cache_false():
    """A bias on V makes unrelated tokens look alike by norm."""
    model = tiny_model("qwen2")
    model.model.layers[0].self_attn.v_proj.bias.fill_(10.0)

    def tokens(cache) -> Tensor:
        model(prompt(8), past_key_values=cache)
        return generate(model, cache, torch.cat((prompt(8), prompt(9, seed=1)), dim=1))

    assert torch.equal(tokens(identity(model)), tokens(DynamicCache(config=model.config)))


@pytest.mark.parametrize(("family", "how"), covering(FAMILIES, [{}, {"num_beams": 2}, {"do_sample": True}]))
def test_a_prompt_that_was_read_to_its_end_is_refused(family, how):
    """`generate` would feed all of it once more, at the positions where it lies already, and answer to both."""
    model, ids = model_of(family), prompt(batch=2)
    for cache in (identity(model), quantized(model), quantized(model, "int8_channel")):
        model(ids, past_key_values=cache)
        cache.batch_repeat_interleave(how.get("num_beams", 1))
        with pytest.raises(PluginError, match=r"crop\(-1\)"):
            generate(model, cache, ids, **how)
        cache.crop(-1)
        assert generate(model, cache, ids, **how).shape == (2, 12 + NEW)


def test_chunks_of_padding_are_not_taken_for_a_prompt_fed_again():
    """They are all at one position."""
    model = model_of("llama")
    ids, mask = prompt(24, batch=2), torch.ones(2, 24, dtype=torch.long)
    mask[0, :20] = mask[1, :15] = 0
    how = {"attention_mask": mask, "prefill_chunk_size": 5}
    expected = generate(model, DynamicCache(config=model.config), ids.masked_fill(mask == 0, 0), **how)
    assert torch.equal(generate(model, identity(model), ids.masked_fill(mask == 0, 0), **how), expected)


def test_one_row_that_repeats_is_not_taken_for_a_prompt_fed_again():
    """Of many rows, where all but one are padding so far."""
    model = model_of("llama")
    ids, mask = prompt(30, batch=24), torch.ones(24, 30, dtype=torch.long)
    mask[1:, :20] = 0
    how = {"attention_mask": mask, "prefill_chunk_size": 5}
    expected = generate(model, DynamicCache(config=model.config), ids.masked_fill(mask == 0, 0), **how)
    assert torch.equal(generate(model, identity(model), ids.masked_fill(mask == 0, 0), **how), expected)


@pytest.mark.parametrize(
    ("family", "name", "first"),
    covering(["llama", "gpt2"], ["none", "int8", "int8_channel", "low rank"], [True, False], times=2),
)
def test_autocast_is_switched_on_the_way(family, name, first):
    """All is held in the wider dtype, as `torch.cat` has it; a sealed cache is tried in test_attention."""
    model = model_of(family)
    T = Transform(*[torch.eye(12)[None]] * 2, torch.zeros(1, 12)).truncate(9)
    codec = Compressor(QUANTIZERS["none"], T) if name == "low rank" else Compressor(QUANTIZERS[name])

    @torch.no_grad()
    def steps(cache) -> Tensor:
        out = []
        for i in range(4):
            with torch.autocast("cpu", torch.bfloat16, enabled=first == (i % 2 == 0)):
                out.append(model(prompt(70 if i == 0 else 3, seed=i), past_key_values=cache).logits.float())
        return torch.cat(out, dim=1)

    cache = CompressedDynamicCache([codec] * 3, [codec] * 3, recent_tokens=2)
    found, expected = steps(cache), steps(DynamicCache(config=model.config))
    assert torch.equal(found, expected) == (name == "none") and found.isfinite().all()
    for store in (store for layer in cache.layers for store in layer.stores.values()):
        assert {store.sinks.dtype, store.tail.dtype, store.read().dtype} == {torch.float32}


def test_a_cache_says_that_it_has_begun():
    """A prefix model lets the first tokens see all of themselves, and no others."""
    from gpt2.experiments.miniatures import tiny_family

    model = tiny_family("hrm_text")

    @torch.no_grad()
    def turns(cache) -> Tensor:
        out = []
        for n, more in ((12, 12), (16, 4)):
            types = torch.ones(1, n, dtype=torch.long)
            out.append(model(prompt(more, seed=n), token_type_ids=types, past_key_values=cache).logits)
        return torch.cat(out, dim=1)

    theirs = DynamicCache(config=model.config)
    ours = identity_cache(len(theirs.layers))
    assert not ours.is_initialized
    assert torch.equal(turns(ours), turns(theirs))
    assert ours.is_initialized
    ours.reset()
    assert not ours.is_initialized
