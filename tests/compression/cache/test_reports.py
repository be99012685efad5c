"""What users of such caches report, each tried once: used caches, copies, training, wrappers, weights, sizes."""

import copy
import pickle

import pytest
import torch
import transformers
from direct import named_cache as cache_of
from generation import generate, model_of, prompt
from sampling import covering, sampled
from tiny import tiny_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, EncoderDecoderCache

from gpt2.common.errors import PluginError
from gpt2.compression.attention import disable_compressed_attention, enable_compressed_attention
from gpt2.compression.cache import direct_attention, token_store
from gpt2.compression.cache.attention import is_enabled
from gpt2.compression.codecs import QUANTIZERS, Compressor, integer
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.kv_policies import create_cache_from_policy
from gpt2.compression.presets import create_cache_from_preset, get_preset_info
from gpt2.experiments.miniatures import tiny_family
from gpt2.models import support
from gpt2.models.probe import fingerprint, geometry_of, probe_geometry

PROMPT = prompt(60)


# --- a used cache


@pytest.mark.parametrize(("name", "steps"), [("identity", 1), ("kv8", 20), ("kv4", 1)])
def test_the_same_prompt_again(name, steps):
    """Also after a run that Ctrl-C ended between steps: some tokens of an answer are held. Or a shorter prompt."""
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


def test_a_text_said_twice_where_keys_have_no_positions():
    config = AutoConfig.for_model("bloom", vocab_size=97, hidden_size=48, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    cache = identity_cache(2)
    model(PROMPT, past_key_values=cache)
    with pytest.raises(PluginError, match="keys have no positions .*give both in one call"):
        model(PROMPT, past_key_values=cache)


def test_encoder_decoders_need_two_caches():
    config = AutoConfig.for_model("t5", vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                                  decoder_start_token_id=0, pad_token_id=0)  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    with pytest.raises(PluginError, match="EncoderDecoderCache"):
        model.generate(PROMPT, past_key_values=identity_cache(2), max_new_tokens=4)
    both = EncoderDecoderCache(identity_cache(2), DynamicCache())
    how = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(PROMPT, past_key_values=both, **how), model.generate(PROMPT, **how))


# --- copies and wrappers of a model with compressed attention


def reads_codes(model) -> bool:
    """Whether a decode step of the model attends over what its cache stores."""
    calls, attend = [], direct_attention.attend
    cache = identity_cache(3)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(direct_attention, "attend", lambda *args, **how: calls.append(1) or attend(*args, **how))
        model(PROMPT, past_key_values=cache)
        calls.clear()
        model(PROMPT[:, :1], past_key_values=cache)
    return len(calls) == 3


def test_a_copy_is_enabled_by_itself():
    model = enable_compressed_attention(tiny_model("llama"))
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
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


def test_prefix_tuning_is_told_that_the_cache_would_not_be_used():
    """PEFT asks caches that it doesn't know for this, and then gives the model one of its own."""
    cache = identity_cache(2)
    assert not hasattr(cache, "max_cache_len")
    with pytest.raises(PluginError, match="prefix tuning"):
        cache.max_cache_len  # noqa: B018


# --- gradients, weights, sizes


@pytest.mark.parametrize(("direct", "family"), covering([False, True], ["llama", "gemma3_text"]))
def test_gradients_reach_keys_and_values(family, direct):
    """Those of DynamicCache, from a cache that loses nothing; the same direction, from one that rounds."""
    gradients = {}
    for name in ("plain", "identity", "kv8"):
        model = tiny_model(family).train().requires_grad_(True)
        cache = DynamicCache(config=model.config) if name == "plain" else cache_of(name, model)
        if direct:
            enable_compressed_attention(model)
        model(PROMPT, past_key_values=cache, labels=PROMPT).loss.backward()
        attention = model.model.layers[0].self_attn
        gradients[name] = torch.cat([part.weight.grad.flatten() for part in (attention.k_proj, attention.v_proj)])
    torch.testing.assert_close(gradients["identity"], gradients["plain"], rtol=1e-3, atol=1e-5)
    assert torch.cosine_similarity(gradients["kv8"], gradients["plain"], dim=0) > 0.9


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "inkling_text"])
def test_attention_weights_are_given_where_they_are_asked_for(family):
    """Inkling adds a bias of positions to its scores."""
    model = tiny_family(family) if family == "inkling_text" else tiny_model(family)
    cache, plain = cache_of("identity", model), DynamicCache(config=model.config)
    enable_compressed_attention(model)
    found = [model(x, past_key_values=cache, output_attentions=True) for x in (PROMPT[:, :40], PROMPT[:, 40:41])]
    disable_compressed_attention(model)
    model.set_attn_implementation("eager")
    for x, out in zip((PROMPT[:, :40], PROMPT[:, 40:41]), found, strict=True):
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
    expected = model(ids, past_key_values=DynamicCache(config=model.config)).logits
    assert (expected - causal).abs().max() > 1e-2 * causal.abs().max()
    enable_compressed_attention(model)
    found = model(ids, past_key_values=cache_of("identity", model), output_attentions=weights)
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)
    if weights:
        assert all((own[:, :, 0, 1:] > 0).all() for own in found.attentions)


def stored_singly(quantizer: str, x: torch.Tensor) -> CompressedDynamicCache:
    """A cache of one layer with K and V as x [1, H, n, d], a token at a time from the 60th on."""
    compressor = Compressor(QUANTIZERS[quantizer])
    cache = CompressedDynamicCache([compressor], [compressor], sink_tokens=0)
    for part in x.split([60, *[1] * (x.shape[2] - 60)], dim=2):
        cache.update(part, part, 0)
    return cache


@pytest.mark.parametrize(
    ("name", "dtype", "first"),
    covering(["int8", "int4", "int8_channel", "int4_channel"], [torch.float32, torch.bfloat16], [0, 100], times=2),
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


@pytest.mark.parametrize(("name", "size", "dtype"), [
    ("mixed", 1e5, torch.float32), ("int4_channel", 1e6, torch.bfloat16), ("int8", 1e3, torch.float32),
    ("int4_channel", 6e4, torch.float16),
])  # fmt: skip
def test_values_beyond_what_a_codec_can_say_are_warned_of_once(name, size, dtype, caplog):
    stored_singly(name, torch.full((1, 2, 192, 12), -size, dtype=dtype))
    said = [record.getMessage() for record in caplog.records]
    assert [text[:11] for text in said] == (["layer 0, K:", "layer 0, V:"] if size >= 1e5 else [])


def test_single_tokens_on_a_gpu_are_looked_at_later(monkeypatch, caplog):
    """There, looking at each would have every layer wait; what was cut off is told by what it reads as."""
    monkeypatch.setattr(integer, "beyond_half", lambda z: False)
    monkeypatch.setattr(token_store, "waits", lambda z: True)
    stored_singly("int8", torch.cat((torch.ones(1, 1, 62, 12), torch.full((1, 1, 2, 12), -1e5)), dim=2))
    assert [record.getMessage()[:11] for record in caplog.records] == ["layer 0, K:", "layer 0, V:"]


# --- positions that change


ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [4.0] * 6,
        "original_max_position_embeddings": 40}  # fmt: skip


def ours(caplog) -> list[str]:
    """What this package has said; transformers says things of its own, once in a process."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("gpt2")]


def phi3():
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "phi3", vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=None, original_max_position_embeddings=40,
        max_position_embeddings=512, rope_parameters=ROPE,
    )).eval()  # fmt: skip


def test_a_long_prompt_of_phi3_keeps_the_cache_it_is_given():
    model, cache = phi3(), identity_cache(2)
    out = generate(model, cache, PROMPT, max_new_tokens=5, return_dict_in_generate=True)
    assert out.past_key_values is cache and cache.get_seq_length() == 64
    assert bool(cache) and not identity_cache(2)


@pytest.mark.parametrize(("family", "rope", "said"), [
    ("phi3", ROPE, "drops the cache"), ("llama", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "fast-"),
    ("llama", {"rope_type": "default", "rope_theta": 1e4}, None), ("gemma3_text", None, None),
])  # fmt: skip
def test_positions_that_change_with_length_are_warned_of(caplog, family, rope, said):
    model = phi3() if family == "phi3" else tiny_model(family, **({"rope_parameters": rope} if rope else {}))
    support.warn_of_positions(model.config)
    assert [said in text for text in ours(caplog)] == [True] * (said is not None)


def test_each_way_in_warns_that_a_cache_will_be_dropped(tmp_path, caplog):
    model = phi3()
    model.config.save_pretrained(tmp_path)
    for way in (lambda: create_cache_from_preset(get_preset_info(str(tmp_path), "kv8")),
                lambda: create_cache_from_policy(model.config, "default"),
                lambda: enable_compressed_attention(model)):  # fmt: skip
        caplog.clear()
        way()
        assert ["past 40 tokens, transformers drops the cache" in text for text in ours(caplog)] == [True]


def test_a_cache_near_the_length_at_which_it_is_dropped_says_so_once(tmp_path, caplog):
    model = phi3()
    cache = identity_cache(probe_geometry(model, "tiny"))
    generate(model, cache, PROMPT[:, :20], max_new_tokens=4)
    assert not ours(caplog)
    out = generate(model, cache, PROMPT[:, :30], max_new_tokens=30, return_dict_in_generate=True)
    assert out.past_key_values is not cache and cache.get_seq_length() == 40
    assert [text[:27] for text in ours(caplog)] == ["this cache holds 30 tokens,"]


def test_a_config_with_dynamic_positions_tells_the_shape_of_its_cache():
    config = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}).config
    assert str(geometry_of(config, "tiny")[0]) == "3 layers: full_attention, K 2 x 12, V 2 x 12"
    assert config.rope_parameters["rope_type"] == "dynamic"


def test_scaled_positions_are_another_model():
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 512}
    plain, scaled = tiny_model("llama"), tiny_model("llama", rope_parameters=yarn)
    assert fingerprint(plain) != fingerprint(scaled)
    assert fingerprint(plain) == fingerprint(tiny_model("llama", max_position_embeddings=1024))
