"""Measured codecs: bytes shared out at one price, their files, the script; and one more that only a test knows."""

import pytest
import torch
from script_runs import run
from test_fisher import close, direct
from test_joint import TEXT, D, H, L, preset_of, reads_like_the_reference, vectors
from test_mixed import PRICES, least
from tiny import tiny_loaded, tiny_model, windows, word_text, word_tokenizer
from torch import Tensor

from gpt2.common import files
from gpt2.common.errors import BadArtefact, PluginError
from gpt2.compression.calibration import calibrate as calibrate_module
from gpt2.compression.calibration import reuse, stand_in
from gpt2.compression.calibration.bit_allocation import BitAllocation
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.file import load_calibration, save_calibration
from gpt2.compression.calibration.fisher import collect_fisher
from gpt2.compression.calibration.fit import Calibration
from gpt2.compression.calibration.multi_head_fit import MultiHeadFit, fit_multi_head
from gpt2.compression.codecs import BASES, QUANTIZERS, JointTransform, MultiHead
from gpt2.compression.codecs.mixed import BLOCK, PLANE, WIDTHS, Mixed, MixedFixed, errors, width_bytes
from gpt2.compression.codecs.moments import Moments
from gpt2.compression.codecs.multi_head import side_by_side
from gpt2.compression.codecs.rope import NONE
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.presets import create_cache_from_preset
from gpt2.compression.settings import compressors_for
from gpt2.models.geometry import Geometry
from gpt2.tuning import search_space
from gpt2.tuning.ratio_presets import make_ratio_preset


@pytest.fixture(scope="module")
def llama():
    return tiny_loaded("llama")


@pytest.fixture(scope="module")
def made(llama) -> Calibration:
    return calibrate(llama, TEXT, rank=9, codec="joint", samples=4, seq_len=200)


@pytest.fixture(scope="module")
def codec(made) -> MultiHeadFit:
    return made.fit_of("joint")


@pytest.fixture
def preset(made, tmp_path) -> dict:
    return preset_of(made, tmp_path / "c.pt")


# --- one price


def synthetic(demand: Tensor, errors: Tensor | None = None, w: int = 48) -> MultiHeadFit:
    """A codec with a given demand [N, L], at prices from 1 down."""
    nothing = torch.zeros(0)
    N, layers = demand.shape
    E = torch.eye(w).expand(layers, 1, w, w)
    errors = torch.zeros(layers, 1, w, len(WIDTHS)) if errors is None else errors
    allocation = BitAllocation(errors, torch.arange(N) + 1.0, demand)
    return MultiHeadFit(BASES["joint"], nothing, E, nothing, [NONE] * layers, allocation)


@pytest.mark.parametrize("bits", [1.5, 2, 3.25, 4, 6])
def test_layers_average_to_the_budget(codec, bits):
    w = 2 * H * D
    found = torch.tensor(codec.allocation.bits_of_each(bits), dtype=torch.float64)
    assert bits - 8 * PLANE / BLOCK / w < found.mean() <= bits + 1e-6, "less than a plane of each layer is left"
    assert found.unique().numel() == L, "not the same for all"
    for own in found.tolist():
        stored = BLOCK * w * own / 8
        held = Mixed(own).block_bytes(w) + width_bytes(w)
        assert held == pytest.approx(stored, abs=1e-3), "what a block really takes"


def test_what_a_layer_gets_is_what_it_buys_at_one_price(codec):
    """Between the same two neighbouring prices for every layer."""
    w = 2 * H * D
    for bits in (2, 4):
        spent = torch.tensor([own * BLOCK * w / 8 - width_bytes(w) for own in codec.allocation.bits_of_each(bits)])
        inside = (codec.allocation.demand[1:] <= spent + PLANE) & (spent <= codec.allocation.demand[:-1] + 1e-3)
        assert inside.all(1).any()


def test_a_layer_whose_errors_weigh_more_gets_more():
    """Four times the error at every width is worth a bit more of each coordinate, as theory has it."""
    z = (
        torch.randn(2, 1, 1, 40 * BLOCK, 48, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 2.0])[:, None, None, None, None]
    )
    allocation = BitAllocation.measured([errors(own)[0] for own in z])
    assert (allocation.prices.diff() > 0).all() and (allocation.demand.diff(dim=0) <= 0).all()
    one, other = allocation.bits_of_each(4.0)
    assert other - one == pytest.approx(1, abs=0.15)


def test_a_layer_that_hardly_matters_may_get_less_than_any_preset():
    """Its budget isn't one that a user could ask for, and the cache is made all the same."""
    demand = torch.tensor([[3000.0, 10.0], [1500.0, 0.0], [0.0, 0.0]])
    codec = synthetic(demand)
    rich, poor = codec.allocation.bits_of_each(2.0)
    assert poor < 0.25 < rich
    z = torch.randn(1, 1, BLOCK, 48)
    quantizer = codec.quantizer(QUANTIZERS["mixed"].at(2.0), 1)
    assert not quantizer.dequantize(quantizer.quantize(z), 48).any(), "nothing is left but the mean"


def test_bits_out_of_reach_name_the_range(codec):
    low, high = codec.allocation.bits_range()
    assert 0 < low < 1 and 6 < high < 10.5
    for bits in (low - 0.01, high + 0.1):
        with pytest.raises(PluginError, match=rf"bits {bits:g}: this codec takes {low:.2f} to {high:.2f} bits"):
            codec.allocation.bits_of_each(bits)
    for bits in (low + 1e-6, high - 1e-6):
        codec.allocation.bits_of_each(bits)


@pytest.mark.parametrize("bits", [1, 2.5, 4, 7])
def test_fixed_widths_meet_the_budget_and_are_the_best(codec, bits):
    widths = torch.stack(codec.allocation.widths(bits))
    assert widths.shape == (L, 1, 2 * H * D)
    budget, spent = bits * BLOCK / 8 * widths.numel(), int(PRICES[widths].sum())
    assert budget - max(PRICES) < spent <= budget
    error = torch.stack(tuple(codec.allocation.errors)).flatten(0, 2)
    total = float(error.double().gather(-1, widths.flatten()[:, None]).sum())
    assert total <= least(error, spent) * (1 + 1e-6) + 1e-12
    assert len(widths.float().mean((1, 2)).unique()) > 1, "layers share one budget"


@pytest.mark.parametrize("quantizer", ["mixed", "mixed_fixed"])
@pytest.mark.parametrize("bits", [2.5, 4])
def test_the_cache_takes_the_bytes_that_were_asked_for(made, quantizer, bits):
    """Everything counted, over all layers: the bits of a setting are those of the memory that it takes."""
    k, v = compressors_for("kv", bits, L, made, codec="joint", quantizer=quantizer)
    cache = CompressedDynamicCache(k, v, sink_tokens=0)
    x = vectors(H, 10 * BLOCK, dtype=torch.float32)
    for layer in cache.layers:
        layer.store(x, x)
    stored = 8 * cache.nbytes() / (2 * L * x.numel())
    assert bits - 0.2 < stored <= bits * 1.0001


def test_other_quantizers_are_the_same_in_every_layer(codec):
    assert codec.quantizer(QUANTIZERS["int8"], 1) is QUANTIZERS["int8"]
    fixed = codec.quantizer(QUANTIZERS["mixed_fixed"].at(3), 2)
    assert isinstance(fixed, MixedFixed) and torch.equal(fixed.widths, codec.allocation.widths(3)[2])


def test_errors_are_those_of_the_reservoir(llama):
    batches = windows(3, 200)
    gradients = collect_fisher(llama, batches, None, 4, {"joint": BASES["joint"]})["joint"]
    codec = fit_multi_head(gradients)
    for layer in range(L):
        z = (gradients.blocks[layer].float() - codec.mean[layer][:, None]) @ codec.E[layer]
        error = codec.allocation.errors[layer][0, :, 0]
        torch.testing.assert_close(error, z[0].square().mean(0) * BLOCK, rtol=1e-4, atol=1e-5)
    assert torch.stack(codec.spectrum).mean() == pytest.approx(1, rel=1e-4), "one unit for the whole model"


def test_the_way_back_of_large_bases_with_several_threads():
    """Batches of matrices this large fail in PyTorch 2.13 with MKL and more than one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        codec = stand_in.multi_head_stand_in(BASES["joint"], Geometry.uniform(8, 3, 64))
        codec.E = torch.randn(8, 1, 384, 384)
        assert (codec.E.double() @ torch.stack(codec.D).double() - torch.eye(384)).abs().max() < 1e-2
    finally:
        torch.set_num_threads(before)


# --- files


def same_codec(a: MultiHeadFit, b: MultiHeadFit) -> bool:
    geometry = Geometry.uniform(L, H, D)
    left, right = a.record(geometry), b.record(geometry)
    lists = all(map(torch.equal, left.pop("frequencies"), right.pop("frequencies")))
    plain = all(left.pop(name) == right.pop(name) for name in ("layouts", "widths"))
    return lists and plain and all(torch.equal(left[name], right[name]) for name in left)


def test_what_is_loaded_is_what_was_saved(made, tmp_path):
    back = load_calibration(save_calibration(made, tmp_path / "c.pt"))
    assert same_codec(back.multi_head["joint"], made.multi_head["joint"]) and back.meta == made.meta
    for side in ("k", "v"):
        own, read = (getattr(c.statistics, side).metrics for c in (made, back))
        assert own.keys() == read.keys() == {"attention", "fisher"}
        assert all(all(map(torch.equal, own[name], read[name])) for name in own)
    for codec in ("attention", "fisher", "pca", "joint"):
        assert torch.equal(back.transform("v", 1, codec=codec).E, made.transform("v", 1, codec=codec).E)


def test_the_files_own_basis_is_that_of_single_heads(made):
    """What a joint calibration shows as energy, and gives where another codec isn't named."""
    assert made.bases["k"]["E"][0].shape == (H, D, D) and made.energies()["v"][0].shape == (H, D)
    assert torch.equal(made.transform("k", 0, 9, "fisher").E, made.bases["k"]["E"][0][..., :9])
    assert made.transform("k", 0).joint


def test_a_compact_file_is_small_and_reads_the_same(llama, made, preset, tmp_path):
    whole, path = tmp_path / "c.pt", save_calibration(made.compact("joint"), tmp_path / "small.pt")
    assert path.stat().st_size < whole.stat().st_size / 2
    assert torch.load(path, weights_only=True)["joint"]["E"].dtype == torch.float16
    back = load_calibration(path)
    assert back.meta == made.compact("joint").meta and back.statistics is None and not back.bases
    torch.testing.assert_close(back.multi_head["joint"].E, made.multi_head["joint"].E, rtol=2e-3, atol=1e-4)
    assert back.multi_head["joint"].allocation.bits_of_each(3) == made.multi_head["joint"].allocation.bits_of_each(3)
    for layer in range(L):
        transform = back.transform("k", layer).to("cpu", torch.float64)
        x = vectors(2 * H, 20)
        exact = JointTransform(transform.E, transform.E.inverse(), transform.mean, transform.rotary)
        torch.testing.assert_close(transform.inverse(exact.forward(x), D), x, rtol=1e-3, atol=1e-3)
    reads_like_the_reference(
        llama, create_cache_from_preset(preset | {"calibration_file": str(path)}, model=llama, dtype=torch.float64),
        windows(2, 150),
    )  # fmt: skip
    x = vectors(2 * H, 128, dtype=torch.float32) * 3
    lost = []
    for source in (made, back):
        k, _ = compressors_for("kv", 4, L, source, codec="joint", quantizer="mixed")
        lost.append(float((k[0].reconstruct(k[0].compress(x), D, x.dtype) - x).square().mean()))
    assert lost[1] == pytest.approx(lost[0], rel=0.05)


def test_a_compact_file_has_no_other_codec(made, tmp_path):
    back = load_calibration(save_calibration(made.compact("joint"), tmp_path / "small.pt"))
    for codec in ("pca", "fisher", "random"):
        with pytest.raises(PluginError, match=f"codec {codec}: this is a compact calibration of tiny-llama.*--compact"):
            back.transform("k", 0, codec=codec)


def refused(path, *words: str) -> None:
    with pytest.raises(BadArtefact) as error:
        load_calibration(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and all(word in message for word in words), message


def spoiled(t: Tensor) -> Tensor:
    t = t.clone()
    t.view(-1)[3] = float("inf")
    return t


TENSORS = ("mean", "E", "spectrum", "errors", "prices", "demand")
DAMAGE = {f"{name} gone": (name, lambda t: None) for name in TENSORS}
DAMAGE |= {f"{name} infinite": (name, spoiled) for name in TENSORS}
DAMAGE |= {f"{name} of another shape": (name, lambda t: t[..., :-1] if t.ndim > 1 else t[:1]) for name in TENSORS}
DAMAGE |= {f"{name} a list": (name, lambda t: t[0].tolist()) for name in TENSORS}
DAMAGE |= {f"{name} gone": (name, lambda x: None) for name in ("layouts", "frequencies", "widths")}
DAMAGE |= {f"{name} too few": (name, lambda x: x[1:]) for name in ("layouts", "frequencies", "widths")}
DAMAGE |= {
    "another layout": ("layouts", lambda x: ["diagonal", *x[1:]]),
    "a layout that can't be hashed": ("layouts", lambda x: [[], *x[1:]]),
    "frequencies of too many channels": ("frequencies", lambda x: [torch.ones(D), *x[1:]]),
    "frequencies infinite": ("frequencies", lambda x: [spoiled(x[0]), *x[1:]]),
    "frequencies of no tensor": ("frequencies", lambda x: [3, *x[1:]]),
    "a basis of other channels": ("E", lambda t: t[:, :, :40, :40]),
    "other widths": ("widths", lambda x: [0, 1, *x[2:]]),
}


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(("name", "change"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(made, tmp_path, name, change, compact):
    path = save_calibration(made.compact("joint") if compact else made, tmp_path / "c.pt")
    record = torch.load(path, weights_only=True)
    record["joint"][name] = change(record["joint"][name])
    torch.save(record, path)
    place = "'joint'" if (name, change) == DAMAGE["prices of another shape"] else f"'joint.{name}"
    refused(path, place, "expected", "make the file again")


def test_a_basis_that_has_no_way_back_is_refused(made, tmp_path):
    path = save_calibration(made, tmp_path / "c.pt")
    record = torch.load(path, weights_only=True)
    record["joint"]["E"][1, 0, :, 3] = 0
    torch.save(record, path)
    back = load_calibration(path)
    with pytest.raises(BadArtefact, match="basis .* no inverse: make the calibration again"):
        back.transform("k", 1)


@pytest.mark.parametrize("value", [None, 3, [1]])
def test_a_joint_part_that_is_none_is_named(made, tmp_path, value):
    path = save_calibration(made, tmp_path / "c.pt")
    torch.save(torch.load(path, weights_only=True) | {"joint": value}, path)
    refused(path, "'joint'", "expected a dict")


def test_a_joint_file_without_its_codec_is_named(made, tmp_path):
    path = save_calibration(made, tmp_path / "c.pt")
    record = torch.load(path, weights_only=True)
    del record["joint"]
    torch.save(record, path)
    refused(path, "'joint'", "expected a dict, found nothing")


@pytest.mark.parametrize(
    ("change", "words"),
    [(3, ["'statistics.metrics'", "found 3"]), ({"k": [1]}, ["'statistics.metrics.k'", "found list"]),
     ({"k": {"fisher": torch.zeros(2)}}, ["'statistics.metrics.k.fisher'", "[3, 2, 12, 12]"])],
)  # fmt: skip
def test_damaged_metrics_are_named(made, tmp_path, change, words):
    path = save_calibration(made, tmp_path / "c.pt")
    record = torch.load(path, weights_only=True)
    record["statistics"]["metrics"] = change
    torch.save(record, path)
    refused(path, *words)


def test_an_older_file_has_neither_metrics_nor_a_joint_codec(llama, tmp_path):
    made = calibrate(llama, TEXT, rank=9, samples=2, seq_len=48)
    path = save_calibration(made, tmp_path / "c.pt")
    record = torch.load(path, weights_only=True)
    del record["statistics"]["metrics"], record["meta"]["metric"]
    torch.save(record, path)
    back = load_calibration(path)
    assert torch.equal(back.transform("k", 0).E, made.transform("k", 0).E) and "joint" not in back.multi_head
    with pytest.raises(PluginError, match="codec attention needs statistics that this calibration doesn't have"):
        back.transform("k", 0, codec="attention")


def test_a_calibration_without_gradients_is_not_used_again_for_a_metric(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "RESULTS", tmp_path / "checkout")
    asked = {"given": None, "rank": 9, "samples": 2, "seq_len": 80, "seed": 0, "sink_tokens": 4}
    _, plain = reuse.obtain_calibration(llama, TEXT, **asked)
    gradients, fisher = reuse.obtain_calibration(llama, TEXT, metric="fisher", **asked)
    assert fisher != plain and "joint" in gradients.multi_head
    assert reuse.obtain_calibration(llama, TEXT, metric="fisher", **asked)[1] == fisher
    assert reuse.obtain_calibration(llama, TEXT, **asked)[1] in (plain, fisher), "either has what pca needs"


# --- the script


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("flags", "codec", "joint"),
    [([], "pca", False), (["--metric", "attention"], "attention", False), (["--metric", "fisher"], "fisher", True),
     (["--codec", "joint"], "joint", True), (["--codec", "joint", "--compact"], "joint", True),
     (["--codec", "joint", "--gradient-checkpointing"], "joint", True),
     (["--metric", "fisher", "--codec", "pca"], "pca", True), (["--metric", "fisher", "--compact"], "joint", True)],
)  # fmt: skip
def test_the_script_gathers_what_is_asked_for(flags, codec, joint, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text(word_text(3000))
    common = ["--model", folder, "--text", "words.txt", "--samples", 2, "--seq-len", 80, "--output", "c.pt"]
    assert run("calibrate_kv_lowrank", *common, *flags) == 0
    made = load_calibration(tmp_path / "c.pt")
    assert made.meta["codec"] == codec and ("joint" in made.multi_head) == joint
    assert (made.statistics is None) == ("--compact" in flags)
    assert "need no gradients" not in capsys.readouterr().out


def test_a_compact_file_needs_gradients(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text(word_text(3000))
    common = ["--model", folder, "--text", "words.txt", "--samples", 2, "--seq-len", 80, "--output", "c.pt"]
    assert run("calibrate_kv_lowrank", *common, "--compact") == 2
    assert (
        "one multi-head codec, which needs gradients: give --codec joint or grouped" in capsys.readouterr().err
        and not (tmp_path / "c.pt").exists()
    )


# --- one more codec: a class and a line in the registry, here for as long as a test runs


class OneHead(MultiHead):
    """K and V apart, a basis for each head, keys without positions."""

    name = preset_prefix = "third"
    unrotated = True

    def heads_per_group(self, num_kv_heads: int, head_dim: int) -> int:
        return 1


class AsCached(MultiHead):
    """K and V together, keys with their positions."""

    name = preset_prefix = "third"
    joint = True


THIRD = {"apart, turned": OneHead(), "together, as cached": AsCached()}
SMALL = {"rank": 9, "samples": 4, "seq_len": 200}


@pytest.fixture(params=THIRD.values(), ids=THIRD)
def third(request, monkeypatch) -> MultiHead:
    monkeypatch.setitem(BASES, "third", request.param)
    return request.param


def test_a_whole_calibration_has_every_registered_codec(llama, third, made, tmp_path):
    whole = calibrate(llama, TEXT, codec="fisher", **SMALL)
    assert list(whole.multi_head) == ["joint", "grouped", "third"]
    assert same_codec(whole.multi_head["joint"], made.multi_head["joint"]), "which know nothing of each other"
    back = load_calibration(save_calibration(whole, tmp_path / "c.pt"))
    assert all(same_codec(back.multi_head[name], codec) for name, codec in whole.multi_head.items())
    assert back.multi_head["third"].basis is third


def test_a_compact_calibration_gathers_and_fits_one_codec(llama, third, monkeypatch, tmp_path):
    expected = calibrate(llama, TEXT, codec="third", **SMALL).compact("third")
    fitted, fit = [], fit_multi_head
    monkeypatch.setattr(calibrate_module, "fit_multi_head", lambda own: (fitted.append(own.basis.name), fit(own))[1])
    monkeypatch.setattr(calibrate_module, "collect", None)  # no first pass
    shapes, zeros = [], Moments.zeros
    monkeypatch.setattr(Moments, "zeros", lambda shape: (shapes.append(shape), zeros(shape))[1])
    made = calibrate(llama, TEXT, codec="third", compact=True, **SMALL)
    assert fitted == ["third"] and shapes == [third.shape(llama.geometry)]
    assert made.meta == expected.meta and made.statistics is None and not made.bases
    path = save_calibration(made, tmp_path / "small.pt")
    assert torch.load(path, weights_only=True).keys() == {"format", "meta", "third"}
    assert same_codec(made.multi_head["third"], expected.multi_head["third"])
    torch.testing.assert_close(load_calibration(path).multi_head["third"].E, made.multi_head["third"].E, rtol=0, atol=0)


def test_its_statistics_are_of_what_it_says(llama, third):
    batches = windows(3, 100)
    gathered = collect_fisher(llama, batches, None, 4, {"third": third, "joint": BASES["joint"]})
    own, turns = gathered["third"], gathered["joint"].rotary
    assert own.rotary == (turns if third.unrotated else [])
    for layer, (k, v, _, _) in enumerate(direct(llama, batches)):
        if third.joint:
            entries = [side_by_side(k[None], v[None], 1)[0]]
        else:
            turned = [turns[layer].unrotate(part, 4) for part in k.split(96, dim=1)]
            entries = [torch.cat(turned, dim=1), v]
        for place, x in enumerate(entries):
            centred = x - x.mean(1, keepdim=True)
            assert close(own.moments.scatter[len(entries) * layer + place], centred.mT @ centred)


def test_coordinates_follow_positions_where_keys_keep_them(llama, third):
    codec = calibrate(llama, TEXT, codec="third", compact=True, **SMALL).multi_head["third"]
    transform = codec.transform(1, "k").to("cpu", torch.float64)
    turn = (codec.rotary or collect_fisher(llama, windows(1, 80), None, 4, {"joint": BASES["joint"]})["joint"].rotary)[
        1
    ]
    k, v = (vectors(H, 1, seed=seed).expand(-1, -1, 40, -1) for seed in (0, 1))
    keys = turn.rotate(k, 300)
    z = transform.forward(torch.cat((keys, v), dim=1) if third.joint else keys, 300)
    assert torch.allclose(z, z[:, :, :1].expand_as(z), rtol=1e-4, atol=1e-4) == third.unrotated
    assert codec.transform(1, "v").absorbable != third.joint, "values never turn"
    torch.testing.assert_close(codec.transform(1, "v").E, codec.E[1 if third.joint else 3])


def test_a_model_decodes_with_it(llama, third, tmp_path):
    made = calibrate(llama, TEXT, codec="third", compact=True, **SMALL)
    found = make_ratio_preset(llama, made, 4.0)
    assert found.name == "third-4x" and found.compression_ratio >= 4
    preset = preset_of(made, tmp_path / "small.pt")
    prompt = windows(2, 150)
    cache = create_cache_from_preset(preset, dtype=torch.float64)
    reads_like_the_reference(llama, cache, prompt, max_new_tokens=8)
    assert sorted(cache.layers[0].stores) == (["KV"] if third.joint else ["K", "V"])
    exact = create_cache_from_preset(preset | {"quantizer": None, "bits": 16}, dtype=torch.float64)
    ours = reads_like_the_reference(llama, exact, prompt, max_new_tokens=12)
    assert torch.equal(ours, llama.model.generate(prompt, max_new_tokens=12, do_sample=False))


def test_the_search_the_scripts_and_models_without_weights_know_it(llama, third, folder, tmp_path, monkeypatch):
    assert "third+mixed" in search_space.families()
    made = calibrate(llama, TEXT, codec="third", **SMALL)
    low, high = made.multi_head["third"].allocation.bits_range()
    made.multi_head["third"].allocation.bits_range = lambda: (2.5, high)
    assert low < 2.5 == search_space.bits_range(made)[0]
    made_up = stand_in.stand_in(llama).multi_head["third"]
    assert [E.shape for E in made_up.E] == [E.shape for E in made.multi_head["third"].E] and made_up.transform(
        2, "v"
    ).rank == third.shape(llama.geometry).head_dim
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text(word_text(3000))
    common = ["--model", folder, "--text", "words.txt", "--samples", 2, "--seq-len", 80]
    assert run("calibrate_kv_lowrank", *common, "--output", "c.pt", "--codec", "third", "--compact") == 0
    assert list(load_calibration(tmp_path / "c.pt").multi_head) == ["third"]
    sizes = ["--eval-tokens", 128, "--eval-seq-len", 64, "--ratios", "3"]
    assert run("make_presets", *common, *sizes, "--codec", "third", "--output", "out") == 0
    names = {path.name for path in (tmp_path / "out").rglob("*.*")}
    slug = folder.name
    assert {f"{slug}-third-3x.json", f"kv_third_{slug}.pt", f"ratio_presets_third_{slug}.json"} <= names


@pytest.mark.parametrize("codec", ["pca", "fisher"])
def test_a_compact_calibration_of_single_heads_is_refused(llama, codec):
    with pytest.raises(PluginError, match=rf"\(joint, grouped\), and codec {codec} is of single heads"):
        calibrate(llama, TEXT, codec=codec, compact=True, **SMALL)
