"""What users of compressed caches have reported, each tried once."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import transformers
from direct import named_cache as cache_of
from generation import assistant_of, generate, model_of, prompt
from sampling import covering, sampled
from tiny import tiny_model
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, EncoderDecoderCache

from gpt2.common.errors import PluginError
from gpt2.compression.attention import disable_compressed_attention, enable_compressed_attention
from gpt2.compression.cache import attention, direct_attention, token_store
from gpt2.compression.cache.attention import is_enabled
from gpt2.compression.codecs import QUANTIZERS, Compressor, integer
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.kv_policies import create_cache_from_policy
from gpt2.compression.presets import create_cache_from_preset, get_preset_info
from gpt2.experiments.miniatures import tiny_family
from gpt2.models import support
from gpt2.models.probe import fingerprint, geometry_of, probe_geometry

PROMPT = prompt(60)


def enabled(model, direct: bool = True):
    return enable_compressed_attention(model) if direct else model


def logits(model, cache, *parts: Tensor) -> Tensor:
    return torch.cat([model(x, past_key_values=cache).logits for x in parts], dim=1)


def ours_and_plain(model, name: str, *parts: Tensor, **how) -> tuple[Tensor, Tensor]:
    """Logits with a cache of ours, and with transformers' own."""
    return logits(model, cache_of(name, model, **how), *parts), logits(model, cache_of("plain", model), *parts)


def lost(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


def bloom():
    """A model whose keys have no positions."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("bloom", vocab_size=97, hidden_size=48, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(10)
    return model


# --- a cache that is used again


@pytest.mark.parametrize(("name", "steps"), [("identity", 1), ("kv8", 20), ("kv4", 1)])
def test_the_same_prompt_again_or_a_shorter_one_is_rejected(name, steps):
    """Also after a run that Ctrl-C ended between steps: some tokens of an answer are held."""
    model = model_of("llama")
    cache = cache_of(name, model)
    generate(model, cache, PROMPT, max_new_tokens=steps + 1)
    with pytest.raises(PluginError, match="a prompt of 60 tokens was given to a cache that holds it and"):
        generate(model, cache, PROMPT)
    with pytest.raises(PluginError, match=f"the cache holds {60 + steps} tokens and the model is fed none"):
        generate(model, cache, PROMPT[:, :30])


@pytest.mark.parametrize("family", sampled(["llama", "qwen2", "gpt_neox", "gpt2"], 2))
def test_what_follows_a_conversation_is_not_taken_for_it(family):
    """Texts whose lengths are those of a prompt that is given again."""
    model = model_of(family)
    cache = identity_cache(3)
    answer = generate(model, cache, PROMPT)
    for extra in (PROMPT[:, :40], PROMPT[:, 20:]):
        longer = torch.cat((answer, extra), dim=1)
        expected = generate(model, DynamicCache(config=model.config), longer)
        assert torch.equal(generate(model, copy.deepcopy(cache), longer), expected)


def test_a_text_said_twice_is_rejected_where_keys_have_no_positions():
    model, cache = bloom(), identity_cache(2)
    logits(model, cache, PROMPT)
    with pytest.raises(PluginError, match="keys have no positions .*give both in one call"):
        logits(model, cache, PROMPT)


@pytest.mark.parametrize("how", [{"num_return_sequences": 3, "do_sample": True}, {"num_beams": 3}])
def test_several_answers_from_a_used_cache_need_its_rows_repeated(how):
    model = model_of("llama")
    cache = cache_of("kv8", model)
    logits(model, cache, PROMPT[:, :-1])
    with pytest.raises(PluginError, match="batch_repeat_interleave before beam search and num_return_sequences"):
        generate(model, cache, PROMPT, **how)
    cache.batch_repeat_interleave(3)
    assert len(generate(model, cache, PROMPT, **how)) in (1, 3)


def test_the_last_token_alone_needs_the_mask_of_the_whole_conversation():
    model = model_of("llama")
    expected = generate(model, cache_of("plain", model), PROMPT)[:, 60:]
    cache = cache_of("identity", model)
    logits(model, cache, PROMPT[:, :-1])
    with pytest.raises(PluginError, match="give generate the whole conversation"):
        generate(model, cache, PROMPT[:, -1:])
    found = generate(model, cache, PROMPT[:, -1:], attention_mask=torch.ones_like(PROMPT))
    assert torch.equal(found[:, 1:], expected)
    with pytest.raises(PluginError, match="the prompt is empty"):
        logits(model, cache_of("kv8", model), PROMPT[:, :0])


def test_encoder_decoders_need_two_caches():
    config = AutoConfig.for_model("t5", vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                                  decoder_start_token_id=0, pad_token_id=0)  # fmt: skip
    model, how = transformers.T5ForConditionalGeneration(config).eval(), {"max_new_tokens": 4, "do_sample": False}
    with pytest.raises(PluginError, match="EncoderDecoderCache"):
        model.generate(PROMPT, past_key_values=identity_cache(2), **how)
    both = EncoderDecoderCache(identity_cache(2), DynamicCache())
    assert torch.equal(model.generate(PROMPT, past_key_values=both, **how), model.generate(PROMPT, **how))


# --- what other tools do with a cache

NEW = prompt(5, seed=1)
OF_NEW_TOKENS = torch.ones_like(NEW)
WRONG_MASK = "attention_mask has 5 columns for 65 tokens, 60 in the cache and 5 new"
REJECTED = {
    "K is replaced": (lambda model, cache: setattr(cache.layers[0], "keys", torch.ones(1, 2, 9, 12)), "would be lost"),
    "V is replaced": (lambda model, cache: setattr(cache.layers[0], "values", torch.ones(1, 2, 9, 12)), "be lost"),
    # PEFT asks caches that it doesn't know for this, and then gives the model one of its own
    "prefix tuning": (lambda model, cache: cache.max_cache_len, "prefix tuning"),
    # transformers takes it for that of the first tokens held, and hides all others and the new ones
    "a mask of new tokens": (lambda model, cache: model(NEW, OF_NEW_TOKENS, past_key_values=cache), WRONG_MASK),
    "a mask of new tokens, ids by name": (
        lambda model, cache: model(input_ids=NEW, attention_mask=OF_NEW_TOKENS, past_key_values=cache), WRONG_MASK,
    ),
    "a mask of new embeddings": (
        lambda model, cache: model(
            inputs_embeds=model.model.embed_tokens(NEW), attention_mask=OF_NEW_TOKENS, past_key_values=cache
        ), WRONG_MASK,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REJECTED.values(), ids=REJECTED)
def test_what_would_be_ignored_or_misread_is_rejected(call, message):
    model = enabled(tiny_model("llama"))
    cache = cache_of("kv8", model)
    logits(model, cache, PROMPT)
    with pytest.raises(PluginError, match=message):
        call(model, cache)
    assert cache.get_seq_length() == 60 and not hasattr(cache, "max_cache_len")
    assert logits(model, cache, NEW).isfinite().all()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_cache_goes_back_to_transformers_own(family):
    """As it iterates: K, V and the window of each layer."""
    model = model_of(family)
    cache = cache_of("identity", model)
    logits(model, cache, PROMPT)
    for own, its in zip(cache, DynamicCache(ddp_cache_data=cache), strict=True):
        assert torch.equal(own[0][:, :, -its[0].shape[2] :], its[0])
        assert own[2] == its[2]


@pytest.mark.parametrize("name", ["identity", "kv8"])
def test_rows_are_selected_by_a_list(name):
    model, ids = model_of("llama"), prompt(70, batch=3)
    found = []
    for rows in ([0, 2], torch.tensor([0, 2]), torch.tensor([True, False, True])):
        cache = cache_of(name, model)
        logits(model, cache, ids)
        cache.batch_select_indices(rows)
        found.append(logits(model, cache, ids[:2, :4]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("direct", [False, True], ids=["reconstructed", "direct"])
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


# --- copies and wrappers of a model with compressed attention


def reads_codes(model) -> bool:
    """Whether a decode step of the model attends over what its cache stores."""
    calls, attend = [], direct_attention.attend
    cache = identity_cache(3)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(direct_attention, "attend", lambda *args, **how: calls.append(1) or attend(*args, **how))
        logits(model, cache, PROMPT)
        calls.clear()
        logits(model, cache, PROMPT[:, :1])
    return len(calls) == 3


def test_a_copy_is_enabled_by_itself():
    model = enabled(tiny_model("llama"))
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    enable_compressed_attention(model, when="auto")
    assert all(getattr(other, attention._STATE).when == "always" for other in copies)
    disable_compressed_attention(model)
    assert not is_enabled(model) and not reads_codes(model)
    for other in copies:
        assert is_enabled(other) and reads_codes(other)
        disable_compressed_attention(other)
        assert not is_enabled(other) and not other._forward_hooks and not reads_codes(other)


@pytest.mark.parametrize("wrap", [
    torch.nn.DataParallel, lambda model: torch.compile(model, backend="eager"),
    lambda model: type("Adapted", (torch.nn.Module,), {"get_base_model": lambda self: model})(),
], ids=["DataParallel", "compile", "adapters"])  # fmt: skip
def test_wrappers_are_seen_through(wrap):
    model = tiny_model("llama")
    wrapped = wrap(model)
    assert enable_compressed_attention(wrapped) is wrapped
    assert is_enabled(wrapped) and is_enabled(model) and reads_codes(model)
    disable_compressed_attention(wrapped)
    assert not is_enabled(model)


# --- gradients, weights, conversions


@pytest.mark.parametrize(("direct", "family"), covering([False, True], ["llama", "gemma3_text"]))
def test_gradients_reach_keys_and_values(family, direct):
    """Those of DynamicCache, from a cache that loses nothing; the same direction, from one that rounds."""
    gradients = {}
    for name in ("plain", "identity", "kv8"):
        model = tiny_model(family).train().requires_grad_(True)
        cache = cache_of(name, model)
        enabled(model, direct)(PROMPT, past_key_values=cache, labels=PROMPT).loss.backward()
        attention = model.model.layers[0].self_attn
        gradients[name] = torch.cat([part.weight.grad.flatten() for part in (attention.k_proj, attention.v_proj)])
    torch.testing.assert_close(gradients["identity"], gradients["plain"], rtol=1e-3, atol=1e-5)
    assert torch.cosine_similarity(gradients["kv8"], gradients["plain"], dim=0) > 0.9


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "inkling_text"])
def test_attention_weights_are_given_where_they_are_asked_for(family):
    """Inkling adds a bias of positions to its scores."""
    model = tiny_family(family) if family == "inkling_text" else tiny_model(family)
    cache, plain = cache_of("identity", model), cache_of("plain", model)
    parts = PROMPT[:, :41].split([40, 1], dim=1)
    enable_compressed_attention(model)
    found = [model(x, past_key_values=cache, output_attentions=True) for x in parts]
    disable_compressed_attention(model)
    model.set_attn_implementation("eager")
    for x, out in zip(parts, found, strict=True):
        expected = model(x, past_key_values=plain, output_attentions=True)
        torch.testing.assert_close(out.logits, expected.logits, rtol=1e-3, atol=1e-3)
        for own, its in zip(out.attentions, expected.attentions, strict=True):
            torch.testing.assert_close(own, its, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("weights", [False, True])
def test_modules_that_are_not_causal_see_what_follows(weights):
    """They get no mask: the first tokens attend to all of themselves, also over what a compressed cache holds."""
    model, ids = tiny_model("llama"), PROMPT[:, :12]
    causal = model(ids).logits
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    expected = logits(model, cache_of("plain", model), ids)
    assert (expected - causal).abs().max() > 1e-2 * causal.abs().max()
    found = enabled(model)(ids, past_key_values=cache_of("identity", model), output_attentions=weights)
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)
    if weights:
        assert all((own[:, :, 0, 1:] > 0).all() for own in found.attentions)


CONVERSIONS = [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)]


@pytest.mark.parametrize(
    ("dtypes", "name", "direct"), covering(CONVERSIONS, ["identity", "kv8"], [False, True], times=2), ids=str
)
def test_a_model_converted_after_its_cache_was_filled(dtypes, name, direct):
    """transformers' own cache fails where the model becomes narrower; one that was filled in one dtype tells."""
    more = prompt(80, seed=1)
    expected = model_of("llama")(torch.cat((PROMPT, more), dim=1)).logits[:, 60:]
    model = enabled(tiny_model("llama").to(dtypes[0]), direct)
    cache = cache_of(name, model)
    logits(model, cache, PROMPT)
    found = logits(model.to(dtypes[1]), cache, *more.split([1, 70, 9], dim=1))
    assert found.dtype == dtypes[1] and lost(found.float(), expected) < 0.25


# --- numbers that are large, or none


def stored_singly(quantizer: str, x: Tensor) -> CompressedDynamicCache:
    """A cache of one layer with K and V as x [1, H, n, d], a token at a time from the 60th on."""
    compressor = Compressor(QUANTIZERS[quantizer])
    cache = CompressedDynamicCache([compressor], [compressor], sink_tokens=0)
    for part in x.split([60, *[1] * (x.shape[2] - 60)], dim=2):
        cache.layers[0].store(part, part)
    return cache


@pytest.mark.parametrize(
    ("name", "dtype", "first"),
    covering(["int8", "int4", "int8_channel", "int4_channel"], [torch.float32, torch.bfloat16], [0, 100]),
    ids=str,
)
def test_values_beyond_float16_are_stored_and_read_directly(name, dtype, first, caplog):
    x = torch.randn(1, 2, 192, 12, generator=torch.Generator().manual_seed(0))
    x[:, :, first:, 3:5] -= 1e5
    x[:, :, first:, 7] += 1.5e5
    x = x.to(dtype)
    cache = stored_singly(name, x)
    k, v = cache.layers[0].read()
    steps = 2 ** QUANTIZERS[name].bits - 1
    spread = x.float().amax((2, 3)) - x.float().amin((2, 3))
    assert ((v - x).float().abs().amax((2, 3)) <= spread * (0.6 / steps + torch.finfo(dtype).eps)).all()
    query = torch.randn(1, 2, 1, 12, generator=torch.Generator().manual_seed(1)).to(dtype) * 1e-5
    found = direct_attention.attend(*cache.layers[0].stores.values(), query, None, 0.3).float()
    expected = scaled_dot_product_attention(query.float(), k.float(), v.float(), scale=0.3)
    assert (found - expected).abs().max() <= 4e-3 * expected.abs().max()
    assert not caplog.records


WARNED = ["layer 0, K:", "layer 0, V:"]


@pytest.mark.parametrize(("name", "size", "dtype"), [
    ("mixed", 1e5, torch.float32), ("int4_channel", 1e6, torch.bfloat16), ("int8", 1e3, torch.float32),
    ("int4_channel", 6e4, torch.float16),
])  # fmt: skip
def test_values_beyond_what_a_codec_can_say_are_warned_of_once(name, size, dtype, caplog):
    stored_singly(name, torch.full((1, 2, 192, 12), -size, dtype=dtype))
    assert [record.getMessage()[:11] for record in caplog.records] == (WARNED if size >= 1e5 else [])


def test_single_tokens_on_a_gpu_are_looked_at_later(monkeypatch, caplog):
    """There, looking at each would have every layer wait; what was cut off is told by what it reads as."""
    monkeypatch.setattr(integer, "beyond_half", lambda z: False)
    monkeypatch.setattr(token_store, "waits", lambda z: True)
    stored_singly("int8", torch.cat((torch.ones(1, 1, 62, 12), torch.full((1, 1, 2, 12), -1e5)), dim=2))
    assert [record.getMessage()[:11] for record in caplog.records] == WARNED


@pytest.mark.parametrize(("name", "direct"), covering(["kv8", "kv4"], [False, True]))
def test_what_is_no_number_stays_in_its_row(name, direct):
    """Other rows are what they are without it; its own doesn't hide it behind numbers."""
    model = enabled(tiny_model("llama"), direct)
    x = model.get_input_embeddings()(prompt(150, batch=3)).clone()
    found = []
    for value in (0.5, torch.nan):
        x[1, 70], cache = value, cache_of(name, model)
        first = model(inputs_embeds=x, past_key_values=cache).logits
        found.append(torch.cat((first, logits(model, cache, prompt(1, batch=3))), dim=1))
    torch.testing.assert_close(found[1][[0, 2]], found[0][[0, 2]])
    assert found[1][1, 70:].isnan().all()


# --- tokens that repeat, or look as if they did


@pytest.mark.parametrize(
    ("family", "name", "direct"), covering(["llama", "gpt2", "qwen2", "mistral"], ["kv8", "int8"], [False, True])
)
def test_a_prompt_of_one_token(family, name, direct):
    """As where a model begins from its first token alone, by ids or by inputs_embeds."""
    model = enabled(tiny_model(family), direct)
    ids = prompt(70, seed=3)
    assert lost(*ours_and_plain(model, name, *ids.split([1, 1, 68], dim=1))) < 0.06
    embedded = model.get_input_embeddings()(ids[:, :1])
    caches = cache_of(name, model), cache_of("plain", model)
    found, expected = (
        model.generate(inputs_embeds=embedded, past_key_values=cache, max_new_tokens=5, do_sample=False)
        for cache in caches
    )
    assert found.shape == expected.shape and torch.equal(found[:, :4], expected[:, :4]), "within the sinks"


@pytest.mark.parametrize(
    ("name", "repeats", "sinks"), covering(["kv8", "int8_channel", "int8"], [80, 64, 5], [4, 0], times=2)
)
def test_a_text_that_begins_with_one_token_many_times(name, repeats, sinks):
    """Where keys have no positions it looks like padding, and is read as it is nevertheless."""
    ids = torch.cat((torch.full((1, repeats), 5), prompt(100)), dim=1)
    assert lost(*ours_and_plain(bloom(), name, *ids.split([40, repeats + 60], dim=1), sink_tokens=sinks)) < 0.03


def test_it_is_read_directly_too():
    cache = cache_of("int8_channel", tiny_model("llama"))
    k = torch.randn(1, 2, 150, 12, generator=torch.Generator().manual_seed(0))
    k[:, :, :80] = k[:, :, :1]
    cache.update(k, k, 0)
    layer, q = cache.layers[0], torch.randn(1, 4, 1, 12, generator=torch.Generator().manual_seed(1))
    read = layer.read()[0]
    assert layer.stores["K"].own_sinks and lost(read, k) < 0.01
    found = direct_attention.attend(*layer.stores.values(), q, None, 12**-0.5)
    expected = scaled_dot_product_attention(q, *[read.repeat_interleave(2, dim=1)] * 2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bias", [300.0, 3000.0])
def test_a_key_bias_as_large_as_that_of_qwen2_is_no_padding(bias):
    """It makes the keys of all tokens alike, measured by their largest number."""
    model = tiny_model("qwen2")
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias[11] = bias  # of the slowest rotation
    cache, plain = cache_of("kv8", model), cache_of("plain", model)
    for one in (cache, plain):
        logits(model, one, prompt(160))
    assert not cache.layers[0].stores["K"].own_sinks
    assert lost(cache.layers[0].values, plain.layers[0].values) < 0.01


@pytest.mark.parametrize(
    ("name", "kept", "direct"), covering(["int8", "int8_channel", "kv8"], [0, 10, 22, 70], [False, True])
)
def test_other_tokens_after_a_crop_of_padded_rows(name, kept, direct):
    """The first tokens of a row, kept exact, go with the tokens that are cut off."""
    model, ids = enabled(tiny_model("llama"), direct), prompt(150, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :20] = ids[0, :20] = 0
    after, again = prompt(80, batch=2, seed=9), torch.cat((mask[:, :kept], torch.ones(2, 80, dtype=torch.long)), dim=1)
    where, found = kept + torch.arange(80).expand(2, -1), []
    for cache in (cache_of(name, model), cache_of("plain", model)):
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        cache.crop(kept - 150)
        parts = (
            model(after[:, x], again[:, : kept + x.stop], where[:, x], past_key_values=cache).logits
            for x in (slice(0, 1), slice(1, 80))
        )
        found.append(torch.cat(list(parts), dim=1))
    assert lost(*found) < 0.08


@pytest.mark.parametrize("length", sampled([1, 3, 2], 2))
def test_guesses_that_are_taken_back_behind_a_short_padded_prompt(length):
    """They were among the first tokens of the row. The same tokens as without guesses."""
    model, mask = model_of("llama"), (torch.arange(12) >= 12 - length).long()[None]
    ids = prompt(12).masked_fill(mask == 0, 0)
    assisted, alone = (
        generate(model, cache_of("int4", model), ids, attention_mask=mask, **how)
        for how in ({"assistant_model": assistant_of(model)}, {})
    )
    assert torch.equal(assisted, alone)


# --- positions that change with the length of a text


ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [4.0] * 6,
        "original_max_position_embeddings": 40}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


def said(caplog) -> list[str]:
    """What this package has said; transformers says things of its own, once in a process."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("gpt2")]


@pytest.fixture
def phi3():
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "phi3", vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=None, original_max_position_embeddings=40,
        max_position_embeddings=512, rope_parameters=ROPE,
    )).eval()  # fmt: skip


def test_a_long_prompt_of_phi3_keeps_the_cache_it_is_given(phi3):
    cache = identity_cache(2)
    assert not cache
    out = generate(phi3, cache, PROMPT, max_new_tokens=5, return_dict_in_generate=True)
    assert out.past_key_values is cache and cache.get_seq_length() == 64 and cache


def test_a_cache_near_the_length_at_which_phi3_drops_it_says_so_once(phi3, caplog):
    cache = identity_cache(probe_geometry(phi3, "tiny"))
    generate(phi3, cache, PROMPT[:, :20], max_new_tokens=4)
    assert not said(caplog)
    out = generate(phi3, cache, PROMPT[:, :30], max_new_tokens=30, return_dict_in_generate=True)
    assert out.past_key_values is not cache and cache.get_seq_length() == 40
    assert [text[:27] for text in said(caplog)] == ["this cache holds 30 tokens,"]


def test_each_way_in_warns_that_phi3_will_drop_a_cache(phi3, tmp_path, caplog):
    phi3.config.save_pretrained(tmp_path)
    for way in (lambda: create_cache_from_preset(get_preset_info(str(tmp_path), "kv8")),
                lambda: create_cache_from_policy(phi3.config, "default"),
                lambda: enable_compressed_attention(phi3)):  # fmt: skip
        caplog.clear()
        way()
        assert ["past 40 tokens, transformers drops the cache" in text for text in said(caplog)] == [True]


@pytest.mark.parametrize(("family", "how", "warning"), [
    ("llama", {"rope_parameters": DYNAMIC}, "fast-"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, None), ("gemma3_text", {}, None),
])  # fmt: skip
def test_positions_that_change_with_length_are_warned_of(family, how, warning, caplog):
    support.warn_of_positions(tiny_model(family, **how).config)
    assert [warning in text for text in said(caplog)] == [True] * (warning is not None)


def test_a_config_with_dynamic_positions_tells_the_shape_of_its_cache():
    config = tiny_model("llama", rope_parameters=DYNAMIC).config
    assert str(geometry_of(config, "tiny")[0]) == "3 layers: full_attention, K 2 x 12, V 2 x 12"
    assert config.rope_parameters["rope_type"] == "dynamic"


def test_scaled_positions_are_another_model():
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 512}
    plain, scaled = tiny_model("llama"), tiny_model("llama", rope_parameters=yarn)
    assert fingerprint(plain) != fingerprint(scaled)
    assert fingerprint(plain) == fingerprint(tiny_model("llama", max_position_embeddings=1024))
