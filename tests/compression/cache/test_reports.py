"""What users of compressed caches have reported of their use, each tried once."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import transformers
from direct import named_cache as cache_of
from generation import generate, model_of, prompt
from reported import bloom, enabled, logits, lost
from sampling import covering, sampled
from tiny import tiny_model
from transformers import AutoConfig, DynamicCache, EncoderDecoderCache

from gpt2.common.errors import PluginError
from gpt2.compression.attention import disable_compressed_attention, enable_compressed_attention
from gpt2.compression.cache import attention, direct_attention
from gpt2.compression.cache.attention import is_enabled
from gpt2.compression.compressed_cache import identity_cache
from gpt2.experiments.miniatures import tiny_family

PROMPT = prompt(60)


# --- a cache that is used again


@pytest.mark.parametrize(("name", "steps", "window"), [
    ("identity", 1, None), ("kv8", 20, None), ("kv4", 1, None), ("identity", 1, 24), ("kv8", 9, 24), ("kv4", 20, 32),
])  # fmt: skip
def test_the_same_prompt_again_or_a_shorter_one_is_rejected(name, steps, window):
    """Also after a run that Ctrl-C ended between steps: some tokens of an answer are held; and of windows alone."""
    model = tiny_model("mistral", sliding_window=window) if window else model_of("llama")
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
        expected = generate(model, DynamicCache(config=model.config), longer, max_new_tokens=5)
        assert torch.equal(generate(model, copy.deepcopy(cache), longer, max_new_tokens=5), expected)


def test_a_text_said_again_elsewhere_where_few_channels_have_positions():
    """As Pythia's and StableLM's: what follows has the lengths of a prompt given again, and its tokens."""
    model = tiny_model("gpt_neox", hidden_size=128, num_attention_heads=2, rotary_pct=0.25)
    before, said, after = prompt(4, seed=1), prompt(40, seed=2), prompt(4, seed=4)
    for name in ("identity", "kv8"):
        cache = cache_of(name, model)
        logits(model, cache, torch.cat((before, said, after), dim=1), said)
        assert cache.get_seq_length() == 88
        cache = cache_of(name, model)
        logits(model, cache, torch.cat((said, after), dim=1))
        with pytest.raises(PluginError, match="a prompt of 40 tokens was given to a cache that holds it and 4"):
            generate(model, cache, said)


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


def test_what_would_be_ignored_or_misread_is_rejected():
    """And changes nothing. PEFT asks caches that it doesn't know for `max_cache_len`, and then gives the model its own.

    transformers takes a mask of new tokens for that of the first ones held, and hides all others and the new ones.
    """
    model, new = enabled(tiny_model("llama")), prompt(5, seed=1)
    cache = cache_of("kv8", model)
    logits(model, cache, PROMPT)
    expected = logits(model, copy.deepcopy(cache), new)
    mask, of_new = torch.ones_like(new), {"attention_mask": torch.ones_like(new), "past_key_values": cache}
    wrong_mask = "attention_mask has 5 columns for 65 tokens, 60 in the cache and 5 new"
    rejected = [
        (lambda: setattr(cache.layers[0], "keys", torch.ones(1, 2, 9, 12)), "would be lost"),
        (lambda: setattr(cache.layers[0], "values", torch.ones(1, 2, 9, 12)), "would be lost"),
        (lambda: cache.max_cache_len, "prefix tuning"),
        (lambda: model(new, mask, past_key_values=cache), wrong_mask),
        (lambda: model(input_ids=new, **of_new), wrong_mask),
        (lambda: model(inputs_embeds=model.model.embed_tokens(new), **of_new), wrong_mask),
    ]
    for call, message in rejected:
        with pytest.raises(PluginError, match=message):
            call()
        assert cache.get_seq_length() == 60 and not hasattr(cache, "max_cache_len")
    assert torch.equal(logits(model, cache, new), expected)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_cache_goes_back_to_transformers_own(family):
    """As it iterates: K, V and the window of each layer."""
    model = model_of(family)
    cache = cache_of("identity", model)
    logits(model, cache, PROMPT)
    for own, its in zip(cache, DynamicCache(ddp_cache_data=cache), strict=True):
        assert torch.equal(own[0][:, :, -its[0].shape[2] :], its[0])
        assert own[2] == its[2]


@pytest.mark.parametrize("direct", [False, True], ids=["reconstructed", "direct"])
def test_a_cache_is_freed_with_its_last_name(direct):
    """Not with the next search for cycles, which on a GPU may come too late."""
    model = enabled(tiny_model("llama"), direct)
    cache = cache_of("kv8", model)
    generate(model, cache, PROMPT)
    stores = (store for layer in cache.layers for store in layer.stores.values())
    freed = [weakref.ref(x) for x in (cache, *cache.layers, *stores)]
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
    assert all(getattr(other, attention.STATE).when == "always" for other in copies)
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


def test_a_loss_over_several_calls_has_gradients_of_queries_alone():
    """What attention keeps for a backward pass isn't what the next call writes to."""
    gradients = {}
    for name in ("plain", "identity"):
        model = tiny_model("llama").requires_grad_(False)
        cache, weight = cache_of(name, model), model.model.layers[-1].self_attn.q_proj.weight.requires_grad_()
        calls = [model(x, past_key_values=cache).logits.sum() for x in PROMPT[:, :30].split(15, dim=1)]
        sum(calls).backward()
        gradients[name] = weight.grad
    torch.testing.assert_close(gradients["identity"], gradients["plain"], rtol=1e-3, atol=1e-5)


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
