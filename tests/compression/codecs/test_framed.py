"""The framed basis: keys of a block un-rotated by one position, by which the query is rotated instead."""

import pytest
import torch
from calibrations import TEXT, D, H, L, preset_of
from direct import both
from multi_head import reads_like_the_reference, vectors
from sampling import covering
from tiny import windows

from gpt2.common.errors import PluginError
from gpt2.compression.codecs import QUANTIZERS, Compressor, JointTransform
from gpt2.compression.codecs.multi_head import UnrotatedTransform
from gpt2.compression.codecs.rope import NONE, Rotary, middles
from gpt2.compression.presets import create_cache_from_preset
from gpt2.tuning.ratio_presets import compact_calibration, make_ratio_preset

ROTARY = Rotary(torch.logspace(0, -2, 4), "half")  # of 8 channels
OWN = torch.tensor([61, -3])  # positions where two rows' first tokens are


def basis(groups: int, width: int, kind: type = JointTransform, **how) -> UnrotatedTransform:
    """An orthonormal basis in float64, so that nothing but angles is rounded."""
    generator = torch.Generator().manual_seed(width)
    E = torch.linalg.qr(torch.randn(groups, width, width, generator=generator, dtype=torch.float64)).Q
    return kind(E, E.mT, torch.randn(groups, width, generator=generator, dtype=torch.float64), **how)


# --- the angle of a frame


def test_where_rows_have_positions_of_their_own_a_frame_begins_with_the_first_token():
    assert middles(6, OWN, 4).tolist() == [[[62.5] * 4 + [66.5] * 2], [[-1.5] * 4 + [2.5] * 2]]
    assert middles(6, 61, 4).tolist() == [61.5] * 3 + [65.5] * 3, "for all rows, where its number says"
    assert torch.cat((middles(7, 0, 4), middles(9, 7, 4))).equal(middles(16, 0, 4)), "however tokens are cut"


# --- queries that absorb it


@pytest.mark.parametrize(
    ("frame", "layout", "d", "groups", "own", "joint"),
    covering([16, 64, 1, None], ["half", "interleaved"], [8, 12], [1, 2, 4], [False, True], [True, False], times=2),
)
def test_a_query_for_every_frame(frame, layout, d, groups, own, joint):
    """Of K and V together, or of keys alone. Of 12 channels four have no position."""
    heads, starts = 4, OWN if own else 128
    rotary = Rotary(ROTARY.frequencies, layout) if frame else NONE
    width, kind = (1 + joint) * heads // groups * d, JointTransform if joint else UnrotatedTransform
    transform = basis(groups, width, kind, rotary=rotary, shared=frame or 64)
    assert transform.frame == frame
    k, v, q = (vectors(heads, n, d=d, seed=seed) for seed, n in enumerate((192, 192, 3)))
    x = torch.cat((k, v), dim=1) if joint else k
    z = transform.forward(x, starts)
    torch.testing.assert_close(transform.inverse(z, d, starts), x, rtol=1e-5, atol=1e-5)
    steps = torch.arange(0, 192, frame or 64)
    absorbed = transform.absorb_query(q, steps + (OWN[:, None] if own else 128))
    with_one = torch.cat((z, torch.ones_like(z[..., :1])), dim=-1)
    if frame is None:
        scores = absorbed @ with_one.mT
    else:
        assert absorbed.shape[2] == 192 // frame
        scores = (absorbed @ with_one.unflatten(2, (-1, frame)).mT).transpose(2, 3).flatten(3)
    torch.testing.assert_close(scores.reshape(2, heads, 3, 192), q @ k.mT, rtol=1e-4, atol=1e-4)
    if joint:
        p = vectors(heads, 3, d=192, seed=3)
        sums = transform.reconstruct_sum(p.reshape(2, groups, -1, 192) @ with_one, d)
        torch.testing.assert_close(sums, p @ v)


@pytest.mark.parametrize("name", ["mixed", "int4_channel", "int8_channel"])
@pytest.mark.parametrize("frame", [16, 64])
def test_any_quantizer_of_whole_blocks_takes_queries_of_frames(name, frame):
    quantizer = QUANTIZERS[name]
    z, q = vectors(2, 128, d=8, dtype=torch.float32), vectors(2, 128 // frame * 3, d=8, seed=1, dtype=torch.float32)
    encoded, q = quantizer.quantize(z), q.unflatten(2, (-1, 3))
    out = torch.empty(2, 2, 3, 128)
    quantizer.scores(q, encoded, out)
    back = quantizer.dequantize(encoded, 8)
    for t in (0, frame - 1, frame, 127):
        torch.testing.assert_close(out[..., t], (q[:, :, t // frame] @ back[:, :, t, :, None])[..., 0])


def test_quantizers_that_cut_frames_are_rejected_and_what_has_few_is_read_directly():
    transform = basis(1, 16, rotary=ROTARY, shared=64)
    with pytest.raises(PluginError, match="int8 codes 1 tokens together, but keys .* in frames of 64: use mixed"):
        Compressor(QUANTIZERS["int8"], transform)
    with pytest.raises(PluginError, match="frames of 128"):
        Compressor(QUANTIZERS["mixed"], basis(1, 16, rotary=ROTARY, shared=128))
    assert Compressor(QUANTIZERS["int8"], basis(1, 16, shared=64)).readable, "without positions there are no frames"
    for shared, rotary, readable in ((1, ROTARY, False), (16, ROTARY, True), (64, ROTARY, True), (1, NONE, True)):
        own = Compressor(QUANTIZERS["mixed"], basis(1, 16, rotary=rotary, shared=shared))
        assert own.readable == readable, (shared, rotary)


# --- from calibration to generation


def test_its_presets_by_ratio_are_read_as_they_are_stored(llama, tmp_path):
    prompt, how = windows(2, 150), {"codec": "framed", "samples": 4, "seq_len": 200, "seed": 0, "sink_tokens": 4}
    made, _ = compact_calibration(llama, TEXT, tmp_path / "f.pt", **how)
    found = make_ratio_preset(llama, made, 3.5)
    assert found.name == "kv-3.5x" and found.compression_ratio >= 3.5
    preset = preset_of(made, tmp_path / "f.pt")
    cache = create_cache_from_preset(preset, dtype=torch.float64)
    reads_like_the_reference(llama, cache, prompt, max_new_tokens=8)
    assert [sorted(layer.stores) for layer in cache.layers] == [["KV"]] * L and cache.readable
    assert cache.layers[0].stores["KV"].compressor.transform.E.shape == (1, 2 * H * D, 2 * H * D)

    def tokens(cache):
        return llama.model.generate(prompt, past_key_values=cache, max_new_tokens=6, do_sample=False)

    assert torch.equal(*both(llama.model, lambda: create_cache_from_preset(preset, model=llama), tokens))
