"""Batches with left padding: each row keeps the quality that it has alone."""

import functools
import pickle

import pytest
import torch
from direct import SETTINGS, both, named_cache
from direct import cache_of as setting_cache_of
from generation import generate, model_of, prompt
from sampling import covering
from stores import transform
from tiny import tiny_loaded
from transformers import DynamicCache

from gpt2.common.errors import PluginError
from gpt2.compression.cache.padding import PaddingFinder
from gpt2.compression.calibration.stand_in import stand_in
from gpt2.compression.codecs import QUANTIZERS, Compressor, multi_head_bases
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.settings import compressors_for

PAD = 5  # not the tiny model's own, whose K and V are 0
LENGTHS = (150, 20, 149, 87)  # tokens of the rows: no padding, much, one slot, less than a block


def batch(lengths=LENGTHS, longest=150):
    """Tokens and mask of rows that end together."""
    ids = torch.cat([prompt(longest, seed=row) for row in range(len(lengths))])
    mask = torch.stack([(torch.arange(longest) >= longest - n).long() for n in lengths])
    return ids.masked_fill(mask == 0, 0), mask


@functools.cache
def calibration():
    return stand_in(tiny_loaded("llama"))


def cache_of(name: str, **how):
    if name not in multi_head_bases():
        return setting_cache_of(model_of("llama"), SETTINGS[name], SETTINGS[name], **how)
    compressors = compressors_for("kv", 4.0, None, calibration(), codec=name, quantizer="mixed")
    return CompressedDynamicCache(*compressors, **how)


def stored(cache, chunk: int = 150):
    """The cache with the batch, fed in chunks."""
    ids, mask = batch()
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    for start in range(0, ids.shape[1], chunk):
        part = slice(start, start + chunk)
        model_of("llama")(ids[:, part], mask[:, : part.stop], positions[:, part], past_key_values=cache)
    return cache


@functools.cache
def exact() -> tuple:
    """K and V of the first layer, whose keys don't depend on what others lost, as they are without loss."""
    layer = stored(DynamicCache()).layers[0]
    return layer.keys, layer.values


@pytest.mark.parametrize(
    ("name", "sinks", "chunk"), covering(["int4", "int4_channel", "joint", "framed"], [0, 4, 66], [150, 64, 7])
)
def test_each_row_has_sinks_of_its_own(name, sinks, chunk):
    """However the prompt is fed; a row of one padding slot is known from the others."""
    cache = stored(cache_of(name, sink_tokens=sinks), chunk)
    for found, expected in zip(cache.layers[0].read(), exact(), strict=True):
        for row, length in enumerate(LENGTHS):
            own = slice(150 - length, min(150 - length + sinks, 150))
            torch.testing.assert_close(found[row, :, own], expected[row, :, own], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "chunk", "saved"), covering(["int4", "int4_channel", "joint", "framed"], [150, 64, 7], [False, True])
)
def test_a_first_token_that_also_pads_is_stored_as_it_is(name, chunk, saved):
    """transformers gives padding the first token's position: in the first layer K and V of both are the same."""
    lengths = (150, 20, 149, 87, 129)  # the last begins where a block ends
    ids, mask = batch(lengths)
    ids[range(len(lengths)), [150 - length for length in lengths]] = PAD
    ids[mask == 0] = PAD
    positions, exact, cache = (mask.cumsum(-1) - 1).clamp_min(0), DynamicCache(), cache_of(name)
    for start in range(0, 150, chunk):
        part = slice(start, start + chunk)
        for each in (exact, cache):
            model_of("llama")(ids[:, part], mask[:, : part.stop], positions[:, part], past_key_values=each)
    assert cache.padding.tolist() == [151 - length for length in lengths], "one slot more than there is"
    if saved:
        cache = pickle.loads(pickle.dumps(cache))
    for layer, expected in zip(cache.layers, exact.layers, strict=True):
        for found, right in zip(layer.read(), (expected.keys, expected.values), strict=True):
            for row, length in enumerate(lengths):
                torch.testing.assert_close(
                    found[row, :, 150 - length], right[row, :, 150 - length], rtol=1e-4, atol=1e-4
                )


@pytest.mark.parametrize("name", ["int4", "int4_channel", "joint"])
def test_a_padded_row_loses_what_it_loses_alone(name):
    k, (ids, _) = stored(cache_of(name)).layers[0].read()[0], batch()
    for row, length in enumerate(LENGTHS):
        alone = cache_of(name)
        model_of("llama")(ids[row : row + 1, -length:], past_key_values=alone)
        right = exact()[0][row, :, -length:]
        own, its = ((x - right).norm() / right.norm() for x in (k[row, :, -length:], alone.layers[0].read()[0][0]))
        assert own < 1.35 * its + 0.02, "other blocks, and so other steps, but no more than that"


OPERATIONS = {
    "as it is": lambda cache: None,
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([1, 0, 3, 2])),
    "repeated": lambda cache: cache.batch_repeat_interleave(2),
    "cropped": lambda cache: cache.crop(-9),
}


@pytest.mark.parametrize(("name", "operation"), covering(["int4", "int4_channel", "identity", "framed"], OPERATIONS))
def test_direct_attention_reads_the_rows_own_sinks(name, operation):
    model = model_of("llama")

    def make():
        cache = stored(cache_of(name))
        OPERATIONS[operation](cache)
        return cache

    def run(cache):
        count, length = cache.rows, cache.get_seq_length()
        mask = torch.ones(count, length + 3, dtype=torch.long)
        mask[:, : length // 4] = 0
        return model(torch.full((count, 3), 7), attention_mask=mask, past_key_values=cache).logits

    reconstructed, direct = both(model, make, run)
    torch.testing.assert_close(direct, reconstructed, rtol=1e-3, atol=1e-3)


def test_a_conversation_of_padded_rows_goes_on_and_starts_again():
    model, cache = model_of("llama"), cache_of("identity")
    ids, mask = batch((60, 40), 60)
    for _ in range(2):
        found = generate(model, cache, ids, attention_mask=mask)
        assert torch.equal(found, generate(model, DynamicCache(config=model.config), ids, attention_mask=mask))
        cache.reset()


@pytest.mark.parametrize(("rows", "others"), [(1, 4), (2, 4), (4, 1)])
def test_a_batch_that_is_rejected_does_not_count_as_padding(rows, others):
    """Rows of one slot could still be padding; of another number of rows they would be broadcast, or fail."""
    int4 = [Compressor(QUANTIZERS["int4"])]
    cache, same = CompressedDynamicCache(int4, int4), CompressedDynamicCache(int4, int4)
    first, more = (torch.randn(2, rows, 2, n, 12) for n in (1, 90))
    cache.update(*first, 0), same.update(*first, 0)
    with pytest.raises(PluginError, match=f"holds a batch of {rows}, got {others} sequences"):
        cache.update(*first[:, :1].expand(2, others, -1, -1, -1), 0)
    torch.testing.assert_close(cache.update(*more, 0), same.update(*more, 0))


def test_what_is_rejected_tells_nothing_of_padding():
    """A cache of another model's compressors: its first batch had no padding, the next has."""
    model, right = model_of("llama"), model_of("llama", num_key_value_heads=4)
    each = [Compressor(QUANTIZERS["int8"], transform(12, groups=4, width=12))] * 3
    fresh, used, other = (CompressedDynamicCache(each, each) for _ in range(3))
    ids, mask = batch((29, 40), 40)
    padded = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    with pytest.raises(PluginError, match="calibrated for 4 groups"):
        model(prompt(20, batch=2, seed=5), past_key_values=used)
    logits = [right(ids, **padded, past_key_values=cache).logits for cache in (fresh, used)]
    assert used.padding.tolist() == fresh.padding.tolist() == [11, 0]
    assert torch.equal(*logits)
    with pytest.raises(PluginError, match="calibrated for 4 groups"):
        model(ids, **padded, past_key_values=other)
    assert other.padding is None


def test_a_prompt_of_one_token_that_is_fed_again_is_no_padding():
    model = model_of("llama")
    cache = named_cache("kv8", model)
    with pytest.raises(PluginError, match="use_cache=False"):
        generate(model, cache, prompt(1), use_cache=False)
    assert cache.padding is None


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


def test_padding_stays_known_when_the_rows_that_told_it_are_gone():
    """That one slot of a row is padding, and not its first token, is known only from a row with more of it."""
    keys_exact = setting_cache_of(model_of("llama"), None, SETTINGS["int4"])
    for cache in (cache_of("int4"), keys_exact):
        stored(cache).batch_select_indices(torch.tensor([0, 2]))
        assert cache.padding.tolist() == [0, 1]


def test_a_crop_before_the_end_of_the_sinks_leaves_room_for_other_tokens():
    """Direct attention looks for a row's sinks as far as tokens are."""
    cache = stored(cache_of("int4", sink_tokens=66))
    cache.crop(-100)
    ends = {store.own_sinks.end for layer in cache.layers for store in layer.stores.values()}
    assert max(ends) <= 50 + 66


def test_what_was_filled_in_inference_mode_goes_on_outside():
    ids, mask = batch()
    cache, model = cache_of("int4"), model_of("llama")
    with torch.inference_mode():
        model(ids[:, :132], attention_mask=mask[:, :132], past_key_values=cache)  # two sinks of a row
    with torch.no_grad():
        model(ids[:, 132:], attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 150
