"""Batches with left padding: each row keeps the quality that it has alone."""

import pytest
import torch
from direct import SETTINGS
from generation import generate, model_of, prompt
from sampling import covering
from tiny import tiny_loaded, tiny_model
from transformers import DynamicCache

from gpt2.compression.attention import disable_compressed_attention, enable_compressed_attention
from gpt2.compression.cache.padding import PaddingFinder
from gpt2.compression.calibration.stand_in import stand_in
from gpt2.compression.codecs import multi_head_bases
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.settings import Setting, build, compressors_for
from gpt2.models.geometry import Geometry

LENGTHS = (150, 20, 149, 87)  # tokens of the rows: no padding, much, one slot, less than a block


def batch(lengths=LENGTHS, longest=150):
    """Tokens and mask of rows that end together."""
    ids = torch.cat([prompt(longest, seed=row) for row in range(len(lengths))])
    mask = torch.stack([(torch.arange(longest) >= longest - n).long() for n in lengths])
    return ids.masked_fill(mask == 0, 0), mask


def positions(mask):
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)


def cache_of(model, name: str, **how):
    geometry = Geometry.uniform(3, 2, 12)
    if name in multi_head_bases():
        made = stand_in(tiny_loaded("llama"))
        return CompressedDynamicCache(*compressors_for("kv", 4.0, None, made, codec=name, quantizer="mixed"), **how)
    setting: Setting | None = SETTINGS[name]
    return CompressedDynamicCache(*build({"k": [setting] * 3, "v": [setting] * 3}, geometry), **how)


def stored(model, cache, chunk: int = 150):
    ids, mask = batch()
    for start in range(0, ids.shape[1], chunk):
        part = slice(start, start + chunk)
        model(ids[:, part], attention_mask=mask[:, : part.stop], position_ids=positions(mask)[:, part],
              past_key_values=cache, use_cache=True)  # fmt: skip
    return cache


@pytest.mark.parametrize(
    ("name", "sinks", "chunk"),
    covering(["int4", "int4_channel", "joint", "framed"], [0, 4, 66], [150, 64, 7], times=2),
)
def test_each_row_has_sinks_of_its_own(name, sinks, chunk):
    """However the prompt is fed; a row of one padding slot is known from the others."""
    model = model_of("llama")
    cache, exact = stored(model, cache_of(model, name, sink_tokens=sinks), chunk), DynamicCache(config=model.config)
    ids, mask = batch()
    model(ids, attention_mask=mask, position_ids=positions(mask), past_key_values=exact)
    k, v = cache.layers[0].read()
    for row, length in enumerate(LENGTHS):
        own = slice(150 - length, min(150 - length + sinks, 150))
        torch.testing.assert_close(k[row, :, own], exact.layers[0].keys[row, :, own], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(v[row, :, own], exact.layers[0].values[row, :, own], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["int4", "int4_channel", "joint"])
def test_a_padded_row_loses_what_it_loses_alone(name):
    """Of the first layer, whose keys don't depend on what others lost."""
    model = model_of("llama")
    cache = stored(model, cache_of(model, name))
    ids, mask = batch()
    for row, length in enumerate(LENGTHS):
        alone, exact = cache_of(model, name), DynamicCache(config=model.config)
        for one in (alone, exact):
            model(ids[row : row + 1, 150 - length :], past_key_values=one)

        def error(k, row=0, exact=exact, length=length):
            return (k[row, :, -length:] - exact.layers[0].keys[0]).norm() / exact.layers[0].keys.norm()

        own, its = error(cache.layers[0].read()[0], row), error(alone.layers[0].read()[0])
        assert own < 1.35 * its + 0.02, "other blocks, and so other steps, but no more than that"


OPERATIONS = {
    "as it is": lambda cache: None,
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([1, 0, 3, 2])),
    "repeated": lambda cache: cache.batch_repeat_interleave(2),
    "cropped": lambda cache: cache.crop(-9),
}


@pytest.mark.parametrize(("name", "operation"), covering(["int4", "int4_channel", "identity", "framed"], OPERATIONS))
def test_direct_attention_reads_the_rows_own_sinks(name, operation):
    model = tiny_model("llama")
    rows = {}
    for direct in (False, True):
        cache = stored(model, cache_of(model, name))
        OPERATIONS[operation](cache)
        if direct:
            enable_compressed_attention(model)
        count, length = len(cache.layers[0].keys), cache.get_seq_length()
        ids = torch.full((count, 3), 7)
        mask = torch.ones(count, length + 3, dtype=torch.long)
        mask[:, : length // 4] = 0
        rows[direct] = model(ids, attention_mask=mask, past_key_values=cache).logits
    disable_compressed_attention(model)
    torch.testing.assert_close(rows[True], rows[False], rtol=1e-3, atol=1e-3)


def test_a_conversation_of_padded_rows_goes_on_and_starts_again():
    model, cache = model_of("llama"), None
    ids, mask = batch((60, 40), 60)
    cache = cache_of(model, "identity")
    for _ in range(2):
        found = generate(model, cache, ids, attention_mask=mask)
        assert torch.equal(found, generate(model, DynamicCache(config=model.config), ids, attention_mask=mask))
        cache.reset()


@pytest.mark.parametrize("chunk", [12, 4, 1])
def test_padding_is_found_by_keys_that_repeat(chunk):
    """One token that two rows begin with says nothing."""
    g = torch.Generator().manual_seed(0)
    for runs, found in (([0, 0], None), ([3, 0], [3, 0]), ([3, 1], [3, 1]), ([1, 1], None), ([9, 5], [9, 5])):
        keys, pad = torch.randn(2, 2, 12, 8, generator=g), torch.randn(1, 2, 1, 8, generator=g)
        for row, run in enumerate(runs):
            keys[row, :, :run] = pad
        finder = PaddingFinder()
        for part in keys.split(chunk, dim=2):
            finder.see(part)
        assert (finder.rows is None) == (found is None) and (found is None or finder.rows.tolist() == found)
