"""`generate()` with a cache of ours: token-identical to DynamicCache when nothing is lossy, and sound when it is."""

from __future__ import annotations

import functools

import pytest
import torch
from direct import both
from generation import MODES, NEW, SAME_TOKENS, generate, model_of, prompt, with_dynamic_cache
from sampling import covering
from tiny import FAMILIES, tiny_model
from torch import Tensor
from transformers import DynamicCache

from gpt2.common.errors import PluginError
from gpt2.compression.codecs import QUANTIZERS, Compressor, Transform
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.experiments.miniatures import tiny_family
from gpt2.models.probe import probe_geometry


def identity(model) -> CompressedDynamicCache:
    return identity_cache(model.config.get_text_config().num_hidden_layers)


def quantized(model, name: str = "int4", **how) -> CompressedDynamicCache:
    compressors = [Compressor(QUANTIZERS[name])] * model.config.get_text_config().num_hidden_layers
    return CompressedDynamicCache(compressors, compressors, **how)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lossy_cache_changes_the_tokens(family):
    """So the cache is what attention reads. A model that repeats one token would pass every comparison below."""
    model, greedy = model_of(family), with_dynamic_cache(family, "greedy")
    assert len(greedy[0, -NEW:].unique()) >= 4
    shape = probe_geometry(model, family)
    E = torch.linalg.qr(torch.randn(shape.num_kv_heads, shape.head_dim, shape.head_dim)).Q[..., :2]
    lossy = Compressor(QUANTIZERS["int4"], Transform(E, E.mT, torch.zeros(shape.num_kv_heads, shape.head_dim)))
    cache = CompressedDynamicCache([lossy] * shape.num_layers, [lossy] * shape.num_layers, sink_tokens=0)
    assert not torch.equal(MODES["greedy"](model, cache), greedy)


@pytest.mark.parametrize(("family", "mode"), covering(FAMILIES, MODES))
def test_identity_cache_gives_the_same_tokens(family, mode):
    """By reconstruction, and where attention reads what is stored."""
    model, expected = model_of(family), with_dynamic_cache(family, mode)
    assert all(
        torch.equal(found, expected)
        for found in both(model, lambda: identity(model), functools.partial(MODES[mode], model))
    )


@pytest.mark.parametrize(
    ("family", "mode", "layout"), covering(list(FAMILIES)[::-1], MODES, [{}, {"sink_tokens": 2, "recent_tokens": 5}])
)
def test_quantized_cache_runs(family, mode, layout):
    """Right lengths in every mode; and the same tokens by another way, where transformers promises them."""
    model = model_of(family)
    expected = with_dynamic_cache(family, mode)
    cache = quantized(model, **layout)
    tokens = MODES[mode](model, cache)
    assert tokens.shape == expected.shape
    # The last token is returned and was never fed; assisted decoding may have fed it, and crops what was rejected
    assert cache.get_seq_length() in (tokens.shape[1] - 1, tokens.shape[1])
    assert {layer.get_seq_length() for layer in cache.layers} == {cache.get_seq_length()}
    if mode in SAME_TOKENS and not layout:
        assert torch.equal(tokens, SAME_TOKENS[mode](model, quantized(model)))


@functools.cache
def in_dtype(dtype: torch.dtype, family: str = "llama"):
    return tiny_model(family).to(dtype)


MODES_16 = ["greedy", "sampling", "beams", "assisted", "left-padded", "multi-turn"]


@pytest.mark.parametrize(("mode", "dtype"), covering(MODES_16, [torch.float16, torch.bfloat16]), ids=str)
def test_16_bit_models(mode, dtype):
    model = in_dtype(dtype)
    expected = MODES[mode](model, DynamicCache(config=model.config))
    assert torch.equal(MODES[mode](model, identity(model)), expected)
    assert MODES[mode](model, quantized(model)).shape == expected.shape


@pytest.mark.parametrize(("family", "mode"), [("llama", "assisted"), ("phi", "prompt-lookup")])
def test_speculation_accepts_and_rejects_guesses(family, mode, monkeypatch):
    """Otherwise these modes would be greedy decoding under another name and `crop` would never run."""
    model = model_of(family)
    cache = identity(model)
    removed, crop = [], cache.crop
    monkeypatch.setattr(cache, "crop", lambda n: (removed.append(-n), crop(n)))
    MODES[mode](model, cache)
    assert max(removed) > 0 and len(removed) < NEW


CACHES = {
    "identity": identity,
    "none": lambda model: quantized(model, "none"),
    "int4": quantized,
    "int8": lambda model: quantized(model, "int8"),
    "int8_channel": lambda model: quantized(model, "int8_channel"),
    "no sinks": lambda model: quantized(model, sink_tokens=0),
}
PROMPTS = {
    "greedy": {"ids": prompt()},
    "beams": {"ids": prompt(), "num_beams": 3},
    "sampling": {"ids": prompt(), "do_sample": True},
    "one token": {"ids": prompt(1)},
    "less than the sinks": {"ids": prompt(3)},
    "more than a block": {"ids": prompt(70)},
    "batch": {"ids": prompt(batch=2)},
    "left-padded": {"ids": prompt(), "attention_mask": torch.tensor([[0] * 4 + [1] * 8])},
}


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WITHOUT_CACHE = [
    (*pair, list(CACHES)[i % len(CACHES)], DTYPES[i // len(CACHES) % 3])
    for i, pair in enumerate(covering(FAMILIES, PROMPTS))
]


@pytest.mark.parametrize(("family", "how", "name", "dtype"), WITHOUT_CACHE)
def test_use_cache_false_is_rejected(family, how, name, dtype):
    """It feeds prompt and answer again at every step: the tokens would be wrong without a sign of it.

    In 16 bits the same token, read again beside more tokens, may come out a rounding apart.
    """
    model = in_dtype(dtype, family)
    with pytest.raises(PluginError, match="use_cache=True"):
        generate(model, CACHES[name](model), **PROMPTS[how], use_cache=False)


def test_another_batch_size_and_a_positive_crop_are_rejected():
    model = model_of("llama")
    cache = identity(model)
    model(prompt(), past_key_values=cache)
    with pytest.raises(PluginError, match="negative"):
        cache.crop(3)
    assert cache.get_seq_length() == 12
    with pytest.raises(PluginError, match="batch of 1, got 3"):
        generate(model, cache, prompt(40), num_beams=3)
    with pytest.raises(PluginError, match="batch of 1, got 2"):
        model(prompt(3, batch=2), past_key_values=cache)


def same_as_dynamic(model, run) -> bool:
    """Whether a function of a cache gives the same tokens with a cache of ours and with transformers' own."""
    return torch.equal(run(identity(model)), run(DynamicCache(config=model.config)))


def test_a_cache_filled_in_inference_mode_goes_on_without_it():
    """`generate` runs in no_grad: a prompt that was read under inference_mode comes before it in real programs."""
    model = model_of("llama")

    def tokens(cache) -> Tensor:
        with torch.inference_mode():
            model(prompt(), past_key_values=cache)
        return generate(model, cache, prompt().repeat(1, 2))

    assert same_as_dynamic(model, tokens)


@pytest.mark.parametrize(("family", "length"), [*covering(FAMILIES, [1, 12]), ("biased", 8)])
def test_what_follows_is_not_taken_for_use_cache_false(family, length):
    """One token more than is held, beginning with the same text at its new place: a user may well say it twice.

    Or other tokens, which a bias on V makes look alike by norm.
    """
    ids = prompt(length)
    more = torch.cat((ids, prompt(1, seed=1)), dim=1)
    if family == "biased":
        model, more = tiny_model("qwen2"), prompt(length + 1, seed=1)
        model.model.layers[0].self_attn.v_proj.bias.fill_(10.0)
    else:
        model = model_of(family)

    def tokens(cache) -> Tensor:
        model(ids, past_key_values=cache)
        return generate(model, cache, torch.cat((ids, more), dim=1))

    assert same_as_dynamic(model, tokens)


@pytest.mark.parametrize(
    ("family", "how", "name"),
    covering(FAMILIES, [{}, {"num_beams": 2}, {"do_sample": True}], ["identity", "int4", "int8_channel"]),
)
def test_a_prompt_that_was_read_to_its_end_is_rejected(family, how, name):
    """`generate` would feed all of it once more, at the positions where it lies already, and answer to both."""
    model, ids = model_of(family), prompt(batch=2)
    cache = CACHES[name](model)
    model(ids, past_key_values=cache)
    cache.batch_repeat_interleave(how.get("num_beams", 1))
    with pytest.raises(PluginError, match=r"crop\(-1\)"):
        generate(model, cache, ids, **how)
    cache.crop(-1)
    assert generate(model, cache, ids, **how).shape == (2, 12 + NEW)


@pytest.mark.parametrize(
    ("batch", "length", "padding"), [(2, 24, {0: 20, 1: 15}), (24, 30, dict.fromkeys(range(1, 24), 20))]
)
def test_chunks_of_padding_are_not_taken_for_a_prompt_fed_again(batch, length, padding):
    """They are all at one position; and of many rows one may repeat, where all others are padding so far."""
    model = model_of("llama")
    ids, mask = prompt(length, batch=batch), torch.ones(batch, length, dtype=torch.long)
    for row, count in padding.items():
        ids[row, :count] = mask[row, :count] = 0
    assert same_as_dynamic(model, lambda cache: generate(model, cache, ids, attention_mask=mask, prefill_chunk_size=5))


@pytest.mark.parametrize(
    ("family", "name", "first"),
    covering(["llama", "gpt2"], ["none", "int8", "int8_channel", "low rank"], [True, False]),
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
