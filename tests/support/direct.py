"""Logits of a model by reconstruction and by compressed attention, for tests that compare the two."""

from __future__ import annotations

import torch
from tiny import windows
from transformers import DynamicCache

from gpt2.compression.attention import disable_compressed_attention, enable_compressed_attention, is_enabled
from gpt2.compression.calibration.stand_in import multi_head_stand_in
from gpt2.compression.codecs import BASES, QUANTIZERS, Compressor
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.presets import create_cache_from_preset
from gpt2.compression.presets.any_model import preset_for_any_model
from gpt2.compression.settings import Setting, build
from gpt2.models.geometry import Geometry
from gpt2.models.probe import probe_geometry

SETTINGS = {
    "identity": None,
    "int8": Setting(bits=8),
    "int4": Setting(bits=4),
    "int8_channel": Setting(bits=8, quantizer="int8_channel"),
    "int4_channel": Setting("hadamard", bits=4, quantizer="int4_channel"),
    "mixed": Setting("hadamard", bits=4.0, quantizer="mixed"),
    "mixed, no basis": Setting(bits=4.0, quantizer="mixed"),
    "low rank": Setting("ln_nullspace"),
    "low rank, int8": Setting("ln_nullspace", bits=8),
}
# Mean change against the largest logit. Sums in another order tip a code over here and there, which moves the logits
# behind it; whatever is wrong moves all of them
SAME = 3e-4


def cache_of(model, k: Setting | None, v: Setting | None, **how) -> CompressedDynamicCache:
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    L = config.num_hidden_layers
    return CompressedDynamicCache(*build({"k": [k] * L, "v": [v] * L}, Geometry.uniform(L, 1, head_dim)), **how)


def named_cache(name: str, model, **how):
    """A preset's cache or one of `SETTINGS`; `plain` is transformers' own, `identity` ours without loss."""
    geometry = probe_geometry(model, "tiny")
    if name == "plain":
        return DynamicCache(config=model.config)
    if name == "identity":
        return identity_cache(geometry)
    if name in SETTINGS:
        settings = {side: [SETTINGS[name]] * len(geometry.layers) for side in ("k", "v")}
        return CompressedDynamicCache(*build(settings, geometry), geometry=geometry, **how)
    return create_cache_from_preset(preset_for_any_model(name, "tiny", geometry), **how)


def joint_cache_of(model, codec: str, bits: float = 4.0, **how) -> CompressedDynamicCache:
    """A cache whose layers hold K and V in one store each, in a basis made up of noise; windows as the model has."""
    geometry = probe_geometry(model, "tiny")
    fit = multi_head_stand_in(BASES[codec], geometry)
    each = [Compressor(QUANTIZERS["mixed"].at(bits), fit.transform(layer)) for layer in range(geometry.num_layers)]
    return CompressedDynamicCache(each, each, geometry=geometry, **how)


def both(model, make, run):
    """What `run(cache)` gives by reconstruction, and by attention over what is stored."""
    assert not is_enabled(model)
    reconstructed = run(make())
    enable_compressed_attention(model)
    try:
        return reconstructed, run(make())
    finally:
        disable_compressed_attention(model)


def streamed(model, pieces=(90, 7, 1, 1, 41), padding=0, batch=2):
    """A function that feeds a batch in pieces, with left padding in its first row, and gives the logits that count."""
    ids = windows(batch, sum(pieces))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)

    @torch.no_grad()
    def run(cache):
        out, T = [], 0
        for n in pieces:
            more = {"position_ids": positions[:, T : T + n]} if model.config.model_type != "opt" else {}
            step = model(ids[:, T : T + n], attention_mask=mask[:, : T + n], past_key_values=cache, **more)
            out.append(step.logits)
            T += n
        return torch.cat(out, dim=1)[mask.bool()]

    return run


def close(a, b) -> bool:
    return bool((a - b).abs().mean() <= SAME * a.abs().max())
