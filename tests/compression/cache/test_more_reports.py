"""More of what users of such caches report, each tried once: tokens that repeat, padding, conversions, other tools."""

import gc
import weakref

import pytest
import torch
from direct import named_cache as cache_of
from generation import assistant_of, generate, model_of, prompt
from sampling import covering, sampled
from tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from gpt2.common.errors import PluginError
from gpt2.compression.attention import enable_compressed_attention
from gpt2.compression.cache import direct_attention

PROMPT = prompt(60)
every_way = pytest.mark.parametrize("direct", [False, True], ids=["reconstructed", "direct"])


def enabled(model, direct: bool):
    return enable_compressed_attention(model) if direct else model


def lost(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


def alibi():
    torch.manual_seed(0)
    config = AutoConfig.for_model("bloom", vocab_size=97, hidden_size=48, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(10)
    return model


# --- tokens that repeat, or look as if they did


@pytest.mark.parametrize(
    ("family", "name", "direct"), covering(["llama", "gpt2", "qwen2", "mistral"], ["kv8", "int8"], [False, True])
)
def test_a_prompt_of_one_token(family, name, direct):
    """As where a model begins from its first token alone, by ids or by inputs_embeds."""
    model = enabled(tiny_model(family), direct)
    ids = prompt(70, seed=3)
    found, expected = (
        torch.cat([model(x, past_key_values=cache).logits for x in ids.split([1, 1, 68], dim=1)], dim=1)
        for cache in (cache_of(name, model), cache_of("plain", model))
    )
    assert lost(found, expected) < 0.06
    embedded = model.get_input_embeddings()(ids[:, :1])
    how = {"max_new_tokens": 5, "do_sample": False}
    caches = cache_of(name, model), cache_of("plain", model)
    found, expected = (model.generate(inputs_embeds=embedded, past_key_values=cache, **how) for cache in caches)
    assert found.shape == expected.shape and torch.equal(found[:, :4], expected[:, :4]), "within the sinks"


@pytest.mark.parametrize(
    ("name", "repeats", "sinks"), covering(["kv8", "int8_channel", "int8"], [80, 64, 5], [4, 0], times=2)
)
def test_a_text_that_begins_with_one_token_many_times(name, repeats, sinks):
    """Where keys have no positions it looks like padding, and is read as it is nevertheless."""
    model = alibi()
    ids = torch.cat((torch.full((1, repeats), 5), prompt(100)), dim=1)
    found, expected = (
        torch.cat([model(x, past_key_values=cache).logits for x in ids.split([40, repeats + 60], dim=1)], dim=1)
        for cache in (cache_of(name, model, sink_tokens=sinks), cache_of("plain", model))
    )
    assert lost(found, expected) < 0.03


def test_it_is_read_directly_too():
    model = tiny_model("llama")
    stored = cache_of("int8_channel", model)
    k = torch.randn(1, 2, 150, 12, generator=torch.Generator().manual_seed(0))
    k[:, :, :80] = k[:, :, :1]
    for index in range(3):
        stored.update(k, k, index)
    read = stored.layers[0].read()[0]
    assert stored.layers[0].stores["K"].own_sinks and lost(read, k) < 0.01
    layer, q = stored.layers[0], torch.randn(1, 4, 1, 12, generator=torch.Generator().manual_seed(1))
    found = direct_attention.attend(layer.stores["K"], layer.stores["V"], q, None, 12**-0.5)
    grouped = read.repeat_interleave(2, dim=1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, grouped, grouped)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bias", [300.0, 3000.0])
def test_a_key_bias_as_large_as_that_of_qwen2_is_no_padding(bias):
    """It makes the keys of all tokens alike, measured by their largest number."""
    model = tiny_model("qwen2")
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias[11] = bias  # of the slowest rotation
    cache, plain = cache_of("kv8", model), cache_of("plain", model)
    for one in (cache, plain):
        model(prompt(160), past_key_values=one)
    assert not cache.layers[0].stores["K"].own_sinks
    assert lost(cache.layers[0].values, plain.layers[0].values) < 0.01


# --- cutting off


@pytest.mark.parametrize(
    ("name", "kept", "direct"), covering(["int8", "int8_channel", "kv8"], [0, 10, 22, 70], [False, True])
)
def test_other_tokens_after_a_crop_of_padded_rows(name, kept, direct):
    """The first tokens of a row, kept exact, go with the tokens that are cut off."""
    model, ids = enabled(tiny_model("llama"), direct), prompt(150, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :20] = ids[0, :20] = 0
    after, again = prompt(80, batch=2, seed=9), torch.cat((mask[:, :kept], torch.ones(2, 80, dtype=torch.long)), dim=1)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    found = []
    for cache in (cache_of(name, model), cache_of("plain", model)):
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        cache.crop(kept - 150)
        where = kept + torch.arange(80).expand(2, -1)
        parts = [slice(0, 1), slice(1, 80)]
        found.append(torch.cat([
            model(after[:, x], attention_mask=again[:, : kept + x.stop], position_ids=where[:, x],
                  past_key_values=cache).logits for x in parts
        ], dim=1))  # fmt: skip
    assert lost(*found) < 0.08


@pytest.mark.parametrize("length", sampled([1, 3, 2], 2))
def test_guesses_that_are_taken_back_behind_a_short_padded_prompt(length):
    """They were among the first tokens of the row. The same tokens as without guesses."""
    model = model_of("llama")
    ids = prompt(12)
    mask = (torch.arange(12) >= 12 - length).long()[None]
    ids = ids.masked_fill(mask == 0, 0)
    assisted, alone = (
        generate(model, cache_of("int4", model), ids, attention_mask=mask, **how)
        for how in ({"assistant_model": assistant_of(model)}, {})
    )
    assert torch.equal(assisted, alone)


# --- conversions


CONVERSIONS = [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)]


@pytest.mark.parametrize(
    ("dtypes", "name", "direct"), covering(CONVERSIONS, ["identity", "kv8"], [False, True], times=2), ids=str
)
def test_a_model_converted_after_its_cache_was_filled(dtypes, name, direct):
    """transformers' own cache fails where the model becomes narrower; one that was filled in one dtype tells."""
    expected = model_of("llama")(torch.cat((PROMPT, prompt(80, seed=1)), dim=1)).logits[:, 60:]
    model = enabled(tiny_model("llama").to(dtypes[0]), direct)
    cache = cache_of(name, model)
    model(PROMPT, past_key_values=cache)
    model.to(dtypes[1])
    parts = prompt(80, seed=1).split([1, 70, 9], dim=1)
    found = torch.cat([model(x, past_key_values=cache).logits for x in parts], dim=1)
    assert found.dtype == dtypes[1] and lost(found.float(), expected) < 0.25


def test_a_cache_goes_back_to_transformers_own():
    """As it iterates: K, V and the window of each layer."""
    for family in ("llama", "mistral"):
        model = model_of(family)
        cache = cache_of("identity", model)
        model(PROMPT, past_key_values=cache)
        plain = DynamicCache(ddp_cache_data=cache)
        for own, its in zip(cache, plain, strict=True):
            assert torch.equal(own[0][:, :, -its[0].shape[2] :], its[0])
            assert own[2] == its[2]


# --- other tools, and arguments that don't fit


def test_what_is_written_to_k_and_v_would_be_lost():
    """As tools do that drop tokens of a cache, or quantize it in place."""
    model = model_of("llama")
    cache = cache_of("kv8", model)
    model(PROMPT, past_key_values=cache)
    for side in ("keys", "values"):
        with pytest.raises(PluginError, match="would be lost"):
            setattr(cache.layers[0], side, getattr(cache.layers[0], side)[:, :, :10])
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("name", ["identity", "kv8"])
def test_rows_are_selected_by_a_list(name):
    model, ids = model_of("llama"), prompt(70, batch=3)
    found = []
    for rows in ([0, 2], torch.tensor([0, 2]), torch.tensor([True, False, True])):
        cache = cache_of(name, model)
        model(ids, past_key_values=cache)
        cache.batch_select_indices(rows)
        found.append(model(ids[:2, :4], past_key_values=cache).logits)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("how", [{"num_return_sequences": 3, "do_sample": True}, {"num_beams": 3}])
def test_several_answers_from_a_used_cache(how):
    model, cache = model_of("llama"), cache_of("kv8", model_of("llama"))
    model(PROMPT[:, :-1], past_key_values=cache)
    with pytest.raises(PluginError, match="batch_repeat_interleave before beam search and num_return_sequences"):
        generate(model, cache, PROMPT, **how)
    cache.batch_repeat_interleave(3)
    assert len(generate(model, cache, PROMPT, **how)) in (1, 3)


def test_the_last_token_alone():
    """With the mask of the whole conversation it goes on; without, there is a reason."""
    model = model_of("llama")
    expected = generate(model, cache_of("plain", model), PROMPT)[:, 60:]
    cache = cache_of("identity", model)
    model(PROMPT[:, :-1], past_key_values=cache)
    with pytest.raises(PluginError, match="give generate the whole conversation"):
        generate(model, cache, PROMPT[:, -1:])
    found = generate(model, cache, PROMPT[:, -1:], attention_mask=torch.ones_like(PROMPT))
    assert torch.equal(found[:, 1:], expected)
    with pytest.raises(PluginError, match="the prompt is empty"):
        model(PROMPT[:, :0], past_key_values=cache_of("kv8", model))


@pytest.mark.parametrize("by", ["position", "name", "embeddings"])
def test_a_mask_of_the_new_tokens_alone(by):
    """transformers takes it for that of the first tokens held, and hides all others and the new ones."""
    model, cache = enabled(tiny_model("llama"), True), cache_of("kv8", model_of("llama"))
    model(PROMPT, past_key_values=cache)
    how = {"past_key_values": cache, "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    ids = prompt(5, seed=1)
    with pytest.raises(PluginError, match="attention_mask has 5 columns for 65 tokens, 60 in the cache and 5 new"):
        if by == "position":
            model(ids, **how)
        else:
            model(**({"input_ids": ids} if by == "name" else {"inputs_embeds": model.model.embed_tokens(ids)}), **how)
    assert cache.get_seq_length() == 60
    assert model(ids, past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize(("name", "direct"), covering(["kv8", "kv4"], [False, True]))
def test_what_is_no_number_stays_in_its_row(name, direct):
    """Other rows are what they are without it; its own doesn't hide it behind numbers."""
    model = enabled(tiny_model("llama"), direct)
    x = model.get_input_embeddings()(prompt(150, batch=3)).clone()
    logits = {}
    for value in (0.5, torch.nan):
        x[1, 70], cache = value, cache_of(name, model)
        parts = [model(inputs_embeds=x, past_key_values=cache), model(prompt(1, batch=3), past_key_values=cache)]
        logits[value] = torch.cat([out.logits for out in parts], dim=1)
    expected, found = logits.values()
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])
    assert found[1, 70:].isnan().all()


@every_way
def test_a_cache_is_freed_with_its_last_name(direct):
    """Not with the next search for cycles, which on a GPU may come too late."""
    model = enabled(tiny_model("llama"), direct)
    cache = cache_of("kv8", model)
    generate(model, cache, PROMPT)
    stores = (store for layer in cache.layers for store in layer.stores.values())
    freed = [weakref.ref(x) for x in (cache, *cache.layers, *stores)]
    gc.collect()
    gc.disable()
    try:
        del cache
        assert not any(ref() for ref in freed)
    finally:
        gc.enable()
