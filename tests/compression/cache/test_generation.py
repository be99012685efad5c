"""`generate()` with a cache of ours: token-identical to DynamicCache when nothing is lossy, and sound when it is."""

from __future__ import annotations

import functools

import pytest
import torch
from direct import both
from generation import MODES, NEW, SAME_TOKENS, generate, model_of, prompt, with_dynamic_cache
from sampling import covering, sampled
from tiny import FAMILIES, tiny_model
from torch import Tensor
from transformers import DynamicCache

from gpt2.common.errors import PluginError
from gpt2.compression.codecs import QUANTIZERS, Compressor, IdentityCompressor, Transform
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.experiments.miniatures import tiny_family
from gpt2.models.probe import probe_geometry

CODECS = {name: Compressor(QUANTIZERS[name]) for name in ("none", "int4", "int8", "int8_channel")}
CODECS["identity"] = IdentityCompressor()
DTYPES = torch.float32, torch.float16, torch.bfloat16


def cache_of(model, codec: str | Compressor = "identity", **how) -> CompressedDynamicCache:
    each = [CODECS.get(codec, codec)] * model.config.get_text_config().num_hidden_layers
    return CompressedDynamicCache(each, each, **how)


def same_as_dynamic(model, run) -> bool:
    """Whether a function of a cache gives the same tokens with a cache of ours and with transformers' own."""
    return torch.equal(run(cache_of(model)), run(DynamicCache(config=model.config)))


@functools.cache
def in_dtype(dtype: torch.dtype, family: str = "llama"):
    return tiny_model(family).to(dtype)


# --- the same tokens


@pytest.mark.parametrize("family", sampled(FAMILIES, 3))
def test_a_lossy_cache_changes_the_tokens(family):
    """So the cache is what attention reads. A model that repeats one token would pass every comparison below."""
    model, greedy = model_of(family), with_dynamic_cache(family, "greedy")
    assert len(greedy[0, -NEW:].unique()) >= 4
    shape = probe_geometry(model, family)
    E = torch.linalg.qr(torch.randn(shape.num_kv_heads, shape.head_dim, shape.head_dim)).Q[..., :2]
    lossy = Compressor(QUANTIZERS["int4"], Transform(E, E.mT, torch.zeros(shape.num_kv_heads, shape.head_dim)))
    assert not torch.equal(MODES["greedy"](model, cache_of(model, lossy, sink_tokens=0)), greedy)


@pytest.mark.parametrize(
    ("family", "mode", "layout"), covering(FAMILIES, MODES, [{}, {"sink_tokens": 2, "recent_tokens": 5}])
)
def test_every_mode_with_exact_and_with_quantized_caches(family, mode, layout):
    """Exact: the same tokens, by reconstruction and where attention reads what is stored.

    Quantized: right lengths; and the same tokens by another way, where transformers promises them.
    """
    model, expected = model_of(family), with_dynamic_cache(family, mode)
    for found in both(model, lambda: cache_of(model), functools.partial(MODES[mode], model)):
        assert torch.equal(found, expected)
    cache = cache_of(model, "int4", **layout)
    tokens = MODES[mode](model, cache)
    assert tokens.shape == expected.shape
    # The last token is returned and was never fed; assisted decoding may have fed it, and crops what was rejected
    assert cache.get_seq_length() in (tokens.shape[1] - 1, tokens.shape[1])
    assert {layer.get_seq_length() for layer in cache.layers} == {cache.get_seq_length()}
    if mode in SAME_TOKENS and not layout:
        assert torch.equal(tokens, SAME_TOKENS[mode](model, cache_of(model, "int4")))


@pytest.mark.parametrize(("mode", "dtype"), sampled([(m, t) for m in MODES for t in DTYPES[1:]], 4), ids=str)
def test_an_exact_cache_gives_a_16_bit_model_the_same_tokens(mode, dtype):
    model = in_dtype(dtype)
    assert torch.equal(MODES[mode](model, cache_of(model)), MODES[mode](model, DynamicCache(config=model.config)))


@pytest.mark.parametrize(("family", "mode"), [("llama", "assisted"), ("phi", "prompt-lookup")])
def test_speculation_accepts_and_rejects_guesses(family, mode, monkeypatch):
    """Otherwise these modes would be greedy decoding under another name and `crop` would never run."""
    model = model_of(family)
    cache = cache_of(model)
    removed, crop = [], cache.crop
    monkeypatch.setattr(cache, "crop", lambda n: (removed.append(-n), crop(n)))
    MODES[mode](model, cache)
    assert max(removed) > 0 and len(removed) < NEW


def test_a_prefix_model_is_told_that_the_cache_has_begun():
    """It lets the first tokens see all of themselves, and no others."""
    model, types = tiny_family("hrm_text"), torch.ones(1, 16, dtype=torch.long)
    theirs = DynamicCache(config=model.config)
    caches = identity_cache(len(theirs.layers)), theirs
    for held, n in ((0, 12), (12, 4)):
        ids, own_types = prompt(n, seed=held), types[:, : held + n]
        assert torch.equal(*(model(ids, token_type_ids=own_types, past_key_values=each).logits for each in caches))


# --- a prompt that is fed again


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


@pytest.mark.parametrize(
    ("family", "how", "name", "dtype"), covering(FAMILIES, PROMPTS, CODECS, [*DTYPES, *DTYPES[::-1]])
)
def test_use_cache_false_is_rejected(family, how, name, dtype):
    """It feeds prompt and answer again at every step: the tokens would be wrong without a sign of it.

    In 16 bits the same token, read again beside more tokens, may come out a rounding apart.
    """
    model = in_dtype(dtype, family)
    with pytest.raises(PluginError, match="use_cache=True"):
        generate(model, cache_of(model, name), **PROMPTS[how], use_cache=False)


@pytest.mark.parametrize(
    ("family", "how", "name"),
    covering(sampled(FAMILIES, 4), [{}, {"num_beams": 2}, {"do_sample": True}], ["identity", "int4", "int8_channel"]),
)
def test_a_prompt_that_was_read_to_its_end_is_rejected(family, how, name):
    """`generate` would feed all of it once more, at the positions where it lies already, and answer to both."""
    model, ids = model_of(family), prompt(batch=2)
    cache = cache_of(model, name)
    model(ids, past_key_values=cache)
    cache.batch_repeat_interleave(how.get("num_beams", 1))
    with pytest.raises(PluginError, match=r"crop\(-1\)"):
        generate(model, cache, ids, **how)
    cache.crop(-1)
    assert generate(model, cache, ids, **how).shape == (2, 12 + NEW)


@pytest.mark.parametrize(("family", "length"), [*covering(sampled(FAMILIES, 4), [1, 12]), ("biased", 8)])
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
    ("batch", "length", "padding"), [(2, 24, {0: 20, 1: 15}), (24, 30, dict.fromkeys(range(1, 24), 20))]
)
def test_chunks_of_padding_are_not_taken_for_a_prompt_fed_again(batch, length, padding):
    """They are all at one position; and of many rows one may repeat, where all others are padding so far."""
    model = model_of("llama")
    ids, mask = prompt(length, batch=batch), torch.ones(batch, length, dtype=torch.long)
    for row, count in padding.items():
        ids[row, :count] = mask[row, :count] = 0
    assert same_as_dynamic(model, lambda cache: generate(model, cache, ids, attention_mask=mask, prefill_chunk_size=5))
