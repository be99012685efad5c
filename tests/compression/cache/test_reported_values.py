"""What users of compressed caches have reported of values, tokens and positions, each tried once."""

import pytest
import torch
from direct import named_cache as cache_of
from generation import assistant_of, generate, model_of, prompt
from reported import bloom, enabled, logits, lost
from sampling import covering, sampled
from tiny import GQA, tiny_model
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

from gpt2.compression.attention import enable_compressed_attention
from gpt2.compression.cache import direct_attention, token_store
from gpt2.compression.codecs import QUANTIZERS, Compressor, integer
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.kv_policies import create_cache_from_policy
from gpt2.compression.presets import create_cache_from_preset, get_preset_info
from gpt2.models import support
from gpt2.models.probe import fingerprint, geometry_of, probe_geometry

PROMPT = prompt(60)


def ours_and_plain(model, name: str, *parts: Tensor, **how) -> tuple[Tensor, Tensor]:
    """Logits with a cache of ours, and with transformers' own."""
    return logits(model, cache_of(name, model, **how), *parts), logits(model, cache_of("plain", model), *parts)


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
    assert not said(caplog)


WARNED = ["layer 0, K:", "layer 0, V:"]


@pytest.mark.parametrize(("name", "size", "dtype", "warned"), [
    ("mixed", 1e5, torch.float32, WARNED), ("int4_channel", 1e6, torch.bfloat16, WARNED),
    ("int8", 1e3, torch.float32, []), ("int4_channel", 6e4, torch.float16, []),
])  # fmt: skip
def test_values_beyond_what_a_codec_can_say_are_warned_of_once(name, size, dtype, warned, caplog):
    stored_singly(name, torch.full((1, 2, 192, 12), -size, dtype=dtype))
    assert [record.getMessage()[:11] for record in caplog.records] == warned


def test_single_tokens_on_a_gpu_are_looked_at_later(monkeypatch, caplog):
    """Looking at each would make every layer wait for the GPU. A block of tokens is looked at together, after it is
    stored: values that were cut off then read as the largest number that can be stored."""
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
    how = {"inputs_embeds": model.get_input_embeddings()(ids[:, :1]), "max_new_tokens": 5, "do_sample": False}
    found, expected = (model.generate(past_key_values=cache_of(each, model), **how) for each in (name, "plain"))
    assert found.shape == expected.shape and torch.equal(found[:, :4], expected[:, :4]), "within the sinks"


@pytest.mark.parametrize(
    ("name", "repeats", "sinks"), covering(["kv8", "int8_channel", "int8"], [80, 64, 5], [4, 0], times=2)
)
def test_a_text_that_begins_with_one_token_many_times(name, repeats, sinks):
    """Where keys have no positions it looks like padding, and is read as it is nevertheless."""
    ids = torch.cat((torch.full((1, repeats), 5), prompt(100)), dim=1)
    assert lost(*ours_and_plain(bloom(), name, *ids.split([40, repeats + 60], dim=1), sink_tokens=sinks)) < 0.03


def test_direct_attention_reads_a_text_that_begins_with_one_token_many_times():
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
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    after = prompt(80, batch=2, seed=9)
    again, where = torch.cat((mask[:, :kept], torch.ones_like(after)), dim=1), kept + torch.arange(80).expand(2, -1)
    found = []
    for cache in (cache_of(name, model), cache_of("plain", model)):
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        cache.crop(kept - 150)
        for x in (slice(0, 1), slice(1, 80)):
            found.append(model(after[:, x], again[:, : kept + x.stop], where[:, x], past_key_values=cache).logits)
    assert lost(torch.cat(found[:2], dim=1), torch.cat(found[2:], dim=1)) < 0.08


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


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [4.0] * 6,
            "original_max_position_embeddings": 40}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


def said(caplog) -> list[str]:
    """What this package has said; transformers says things of its own, once in a process."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("gpt2")]


def test_phi3_keeps_a_cache_of_a_long_prompt_and_drops_that_of_a_growing_text(tmp_path, caplog):
    """Near the length at which it is dropped a cache says so once, and each way in says it of the model."""
    shape = GQA | {"num_hidden_layers": 2, "original_max_position_embeddings": 40, "rope_parameters": LONGROPE}
    phi3 = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi3", **shape)).eval()
    cache, how = identity_cache(2), {"return_dict_in_generate": True}
    assert not cache
    out = generate(phi3, cache, PROMPT, max_new_tokens=5, **how)
    assert out.past_key_values is cache and cache.get_seq_length() == 64 and cache

    caplog.clear()
    cache = identity_cache(probe_geometry(phi3, "tiny"))
    generate(phi3, cache, PROMPT[:, :20], max_new_tokens=4)
    assert not said(caplog)
    out = generate(phi3, cache, PROMPT[:, :30], max_new_tokens=30, **how)
    assert out.past_key_values is not cache and cache.get_seq_length() == 40
    assert [text[:27] for text in said(caplog)] == ["this cache holds 30 tokens,"]

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


def test_other_positions_are_another_model_with_a_cache_of_the_same_shape():
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 512}
    plain, scaled = tiny_model("llama"), tiny_model("llama", rope_parameters=yarn)
    assert fingerprint(plain) != fingerprint(scaled)
    assert fingerprint(plain) == fingerprint(tiny_model("llama", max_position_embeddings=1024))
    config = tiny_model("llama", rope_parameters=DYNAMIC).config
    assert str(geometry_of(config, "tiny")[0]) == "3 layers: full_attention, K 2 x 12, V 2 x 12"
    assert config.rope_parameters["rope_type"] == "dynamic"
