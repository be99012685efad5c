"""Models that see images: their text part's cache is compressed, whatever the embeddings in it come from."""

from __future__ import annotations

import functools

import pytest
import torch
from generation import generate
from sampling import covering
from tiny import GQA
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache

from gpt2.compression.attention import disable_compressed_attention, enable_compressed_attention
from gpt2.compression.compressed_cache import identity_cache
from gpt2.compression.presets import create_cache_from_preset
from gpt2.compression.presets.any_model import preset_for_any_model
from gpt2.models.loading import LoadedModel, wrap

TEXT = GQA | {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "tie_word_embeddings": False}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 16, "patch_size": 4}  # fmt: skip
IMAGE, START = 120, 122  # tokens that stand for an image and before it
LENGTH, NEW = 150, 10  # tokens of a prompt, longer than Gemma's window, and of the answer
CONFIGS = {
    "qwen2_vl": {
        "text_config": TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3],
                                                   "rope_theta": 10000.0}},
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2,
                          "patch_size": 4},
        "image_token_id": IMAGE, "video_token_id": 121, "vision_start_token_id": START, "vision_end_token_id": 123,
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
        "image_token_index": IMAGE, "vision_feature_layer": -1,
    },
    "gemma3": {
        "text_config": TEXT | {"num_hidden_layers": 3, "sliding_window": 130, "head_dim": 16,
                               "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
        "vision_config": VISION | {"vision_use_head": False}, "mm_tokens_per_image": 4,
        "image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": 123, "tie_word_embeddings": False,
    },
}  # fmt: skip
every_family = pytest.mark.parametrize("family", CONFIGS)


@functools.cache
def loaded(family: str) -> LoadedModel:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **CONFIGS[family]))
        for name, weights in model.named_parameters():
            if weights.dim() > 1:  # small embeddings, so that what was attended to decides the next token
                weights.normal_(0, 0.02 if "embed_tokens" in name else 0.2)
    return wrap(model, None, family)


def prompt(family: str, batch: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """A text with an image in it, as a processor makes it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 97, (batch, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, 4], ids[:, 5 : 5 + (16 if family == "llava" else 4)] = START, IMAGE
    pixels = torch.randn(batch, 3, 16, 16, generator=generator)
    types = (ids == IMAGE).long()
    return {"ids": ids} | {
        "qwen2_vl": {"pixel_values": torch.randn(16 * batch, 96, generator=generator), "mm_token_type_ids": types,
                     "image_grid_thw": torch.tensor([[1, 4, 4]] * batch)},
        "llava": {"pixel_values": pixels},
        "gemma3": {"pixel_values": pixels, "token_type_ids": types},
    }[family]  # fmt: skip


def answer(family: str, cache, batch: int = 1, **how) -> Tensor:
    torch.manual_seed(0)
    return generate(loaded(family).model, cache, **prompt(family, batch), **{"max_new_tokens": NEW} | how)


def theirs(family: str) -> DynamicCache:
    return DynamicCache(config=loaded(family).model.config)


HOW = {
    "greedy": {}, "sampling": {"do_sample": True}, "beams": {"num_beams": 2, "num_return_sequences": 2},
    "batch": {"batch": 2}, "prompt-lookup": {"prompt_lookup_num_tokens": 3},
}  # fmt: skip


@pytest.mark.parametrize(("family", "how"), covering(CONFIGS, HOW))
def test_an_exact_cache_gives_the_same_tokens(family, how):
    wanted = answer(family, theirs(family), **HOW[how])
    assert torch.equal(answer(family, identity_cache(loaded(family).geometry), **HOW[how]), wanted)
    assert len(wanted[0, LENGTH:].unique()) > 3


@every_family
def test_the_image_counts_and_is_read_from_the_cache(family):
    """Behind another image, or from a lossy cache, the same text goes on otherwise."""
    model, geometry = loaded(family).model, loaded(family).geometry
    layers = {"gemma3": "2 layers: sliding_attention, window 130, K 2 x 16, V 2 x 16; 1 layer: "}
    assert str(geometry) == layers.get(family, "2 layers: ") + "full_attention, K 2 x 16, V 2 x 16", "of the text part"
    assert len(loaded(family).fingerprint) == 16

    @torch.no_grad()
    def last(cache, seed: int = 0) -> Tensor:
        asked = prompt(family, seed=seed)
        model(asked.pop("ids"), **asked, past_key_values=cache)
        return model(torch.tensor([[7]]), past_key_values=cache).logits

    kv4 = create_cache_from_preset(preset_for_any_model("kv4", family, geometry))
    exact = last(identity_cache(geometry))
    assert torch.equal(last(theirs(family)), exact)
    for other in (last(identity_cache(geometry), seed=1), last(kv4)):
        assert (other - exact).abs().max() > 1e-3 * exact.abs().max()


@every_family
def test_presets_and_compressed_attention(family):
    model, geometry = loaded(family).model, loaded(family).geometry
    preset = preset_for_any_model("kv4", family, geometry)
    made = [create_cache_from_preset(preset, model=given) for given in (None, model, loaded(family))]
    assert len({tuple(answer(family, cache)[0].tolist()) for cache in made}) == 1
    assert all(type(cache.layers[0]) is type(identity_cache(geometry).layers[0]) for cache in made)
    enable_compressed_attention(model)
    try:
        exact = answer(family, identity_cache(geometry))
        assert answer(family, create_cache_from_preset(preset)).shape == (1, LENGTH + NEW)
    finally:
        disable_compressed_attention(model)
    assert torch.equal(exact, answer(family, theirs(family)))
