"""Models whose layers differ in kind: an exact cache gives the tokens of transformers' own in every way to generate."""

from __future__ import annotations

import pytest
import torch
from generation import assistant_of, generate, sample
from kinds import KINDS, RECURRENT, STEPWISE, cut, feed, geometry_of, ids_of, model_of, ours, theirs
from sampling import covering
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.compression.cache.size import cache_bytes
from gpt2.compression.codecs import QUANTIZERS, Compressor
from gpt2.compression.compressed_cache import CompressedDynamicCache

NEW = 10  # generated tokens


def prompt(model) -> Tensor:
    return cut(model.config.model_type, ids_of())


def answer(model, cache, ids: Tensor | None = None, **how) -> Tensor:
    return generate(model, cache, prompt(model) if ids is None else ids, **{"max_new_tokens": NEW} | how)


def left_padded(model, cache) -> Tensor:
    ids = ids_of(batch=2)
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    return answer(model, cache, ids.masked_fill(mask == 0, 0), attention_mask=mask)


def turns(model, cache, first: int, second: int, **how) -> Tensor:
    """Two turns of so many new tokens each; `how` to generate the first answer."""
    said = answer(model, cache, ids_of(first), **how)
    return answer(model, cache, torch.cat((said, ids_of(second, seed=1)), dim=1))


def warm_beams(model, cache) -> Tensor:
    feed(model, cache, prompt(model)[:, :-1])
    cache.batch_repeat_interleave(2)
    return answer(model, cache, num_beams=2)


MODES = {
    "greedy": answer,
    "sampling": lambda model, cache: sample(model, cache, prompt(model), max_new_tokens=NEW),
    "beams": lambda model, cache: answer(model, cache, num_beams=3, num_return_sequences=2),
    "beams-batch": lambda model, cache: answer(model, cache, ids_of(batch=2), num_beams=2),
    "prompt-lookup": lambda model, cache: answer(model, cache, ids_of(70).repeat(1, 2), prompt_lookup_num_tokens=4),
    "assisted": lambda model, cache: answer(model, cache, assistant_model=assistant_of(model)),
    # Past the window while the past is recorded, and on from there
    "assisted-turns": lambda model, cache: turns(model, cache, 125, 9, assistant_model=assistant_of(model)),
    "left-padded": left_padded,
    "chunked-prefill": lambda model, cache: answer(model, cache, prefill_chunk_size=33),
    # A short answer in the window, then a turn that is longer than what the window dropped at once
    "second-turn": lambda model, cache: turns(model, cache, 120, 70),
    "warm-beams": warm_beams,
}


TAKES_BACK = ("prompt-lookup", "assisted", "assisted-turns")  # guesses that were wrong


def expected(family: str, mode: str) -> Tensor | Exception:
    """The tokens with transformers' own cache, or its error, of any kind."""
    try:
        return MODES[mode](model_of(family), theirs(family))
    except Exception as error:
        return error


@pytest.mark.parametrize("family", KINDS)
def test_logits_are_those_of_transformers(family):
    """In prompts, chunks and steps; and a lossy cache changes them, so it is what attention reads."""
    geometry = geometry_of(family)
    coarse = [Compressor(QUANTIZERS["int4"])] * geometry.num_layers
    lossy = CompressedDynamicCache(coarse, coarse, geometry=geometry, sink_tokens=0)
    sizes = [20, 10, 1, 1, 7] if family in STEPWISE else [100, 40, 1, 1, 7]
    parts = ids_of(sum(sizes)).split(sizes, dim=1)
    caches = (theirs(family), ours(family), lossy)
    wanted, exact, changed = (torch.cat([feed(model_of(family), each, x) for x in parts], dim=1) for each in caches)
    assert torch.equal(exact, wanted)
    assert (changed - wanted).abs().max() > 1e-3 * wanted.abs().max()
    assert caches[1].get_seq_length() == caches[0].get_seq_length() == sum(sizes)
    assert caches[1].nbytes() == cache_bytes(caches[1]), "states and indexers are counted"


@pytest.mark.parametrize(("family", "mode"), covering(KINDS, MODES))
def test_an_exact_cache_gives_the_same_tokens_or_the_same_refusal(family, mode):
    model, wanted = model_of(family), expected(family, mode)
    if not isinstance(wanted, Exception):
        assert family not in RECURRENT or mode not in TAKES_BACK, "recurrent states can't be put back"
        assert torch.equal(MODES[mode](model, ours(family)), wanted)
        assert len(wanted[0, -NEW:].unique()) >= 4, "a model that repeats itself would prove nothing"
    elif mode == "warm-beams":  # transformers' own cache can't repeat the states of linear layers, ours can
        assert any(layer.kind != "full_attention" for layer in geometry_of(family).layers)
        assert torch.equal(MODES[mode](model, ours(family)), answer(model, theirs(family), num_beams=2))
    else:  # older versions of transformers can't take tokens back behind a window either
        assert mode in TAKES_BACK, f"transformers itself failed: {wanted!r}"
        with pytest.raises((type(wanted), PluginError)):
            MODES[mode](model, ours(family))
