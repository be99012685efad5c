"""Compact fits of multi-head bases: eight bits in memory and in files, and files of before in half precision."""

import zipfile
from dataclasses import replace

import pytest
import torch
from calibrations import TEXT, identical
from sampling import covering
from tiny import tiny_loaded
from torch import Tensor

from gpt2.common import tensor_file
from gpt2.compression.calibration.bit_allocation import BitAllocation
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.file import load_calibration, save_calibration
from gpt2.compression.calibration.fit import Calibration
from gpt2.compression.calibration.multi_head_fit import MultiHeadFit
from gpt2.compression.calibration.stand_in import multi_head_stand_in
from gpt2.compression.codecs import multi_head_bases
from gpt2.compression.codecs.formats import BLOCK, PLANE, WIDTHS
from gpt2.compression.codecs.mixed import COSTS
from gpt2.models.geometry import Geometry

GEOMETRY = Geometry.uniform(3, 4, 32)
BASES = multi_head_bases()


def fit_of(name: str) -> MultiHeadFit:
    """A basis for `GEOMETRY`: a rotation and some noise, whose columns have lengths near 0.1 to 10."""
    fit, generator = multi_head_stand_in(BASES[name], GEOMETRY), torch.Generator().manual_seed(0)

    def noise(E: Tensor) -> Tensor:
        return (E + 0.02 * torch.randn(E.shape, generator=generator)) * torch.logspace(-1, 1, E.shape[-1])

    means = [torch.randn(mean.shape, generator=generator) for mean in fit.mean]
    return replace(fit, E=[noise(E) for E in fit.E], mean=means)


@pytest.fixture(scope="module")
def llama_fit() -> Calibration:
    return calibrate(tiny_loaded("llama"), TEXT, rank=6, samples=3, seq_len=100, codec="joint")


def test_a_compact_file_is_deflated_and_pytorch_reads_it(llama_fit, tmp_path):
    """Within what a reader inflates; a file of zeros, which it would take for an attack, is left as it is."""
    record = tensor_file.read(save_calibration(llama_fit, tmp_path / "plain.pt"))
    packed = tensor_file.write(tmp_path / "packed.pt", record, compress=True)
    assert packed.stat().st_size < 0.97 * (tmp_path / "plain.pt").stat().st_size
    assert identical(tensor_file.read(packed), record) and identical(torch.load(packed, weights_only=True), record)
    again = tensor_file.write(tmp_path / "again.pt", record, compress=True)
    assert again.read_bytes() == packed.read_bytes(), "the time of writing isn't in it"
    zeros = {"meta": torch.zeros(10_000)}
    assert identical(tensor_file.read(tensor_file.write(tmp_path / "zeros.pt", zeros, compress=True)), zeros)
    with zipfile.ZipFile(save_calibration(llama_fit.compact("joint"), tmp_path / "compact.pt")) as archive:
        assert {part.compress_type for part in archive.infolist()} == {zipfile.ZIP_DEFLATED}


def test_a_layer_that_the_loss_does_not_feel_takes_no_bits_from_others():
    """As behind an output projection of zeros, with which blocks are added to a model."""
    bits = {}
    for felt in (True, False):
        loaded = tiny_loaded("llama")
        with torch.no_grad():
            for weight in loaded.model.parameters():
                weight *= 0.3 if weight.ndim > 1 else 1
            if not felt:
                loaded.model.model.layers[1].self_attn.o_proj.weight.zero_()
        found = calibrate(loaded, TEXT, rank=6, samples=3, seq_len=132, codec="framed").multi_head
        framed, grouped = (found[name].allocation.bits_of_each(4.0) for name in ("framed", "grouped"))
        bits["framed", felt] = [sum(framed[i::3]) for i in range(3)]
        bits["grouped", felt] = [sum(grouped[2 * i : 2 * i + 2]) for i in range(3)]
    for name in ("framed", "grouped"):
        felt, not_felt = bits[name, True], bits[name, False]
        assert not_felt[1] < 0.5 < felt[1]
        assert not_felt[0] > felt[0] and not_felt[2] > felt[2], "others have its bits"


@pytest.mark.parametrize("name", BASES)
def test_a_compact_basis_is_rounded_and_its_decoder_is_the_inverse_of_the_rounded_encoder(name):
    """To eight bits of each column's largest. Rounding costs nothing by itself: without quantizer error coordinates
    give K and V back, and the other way."""
    fit = fit_of(name)
    compact = fit.compact()
    for E, rounded in zip(fit.E, compact.E, strict=True):
        step = E.abs().amax(-2) / 127
        assert 0.1 < float(((E - rounded).abs().amax(-2) / step).amax()) <= 0.5 + 1e-4
    stored = compact.record(GEOMETRY)
    assert stored["E"].dtype == torch.int8 and (stored["E"].abs().amax(-2) == 127).all()
    for errors, rounded in zip(fit.allocation.errors, compact.allocation.errors, strict=True):
        assert torch.equal(rounded, errors.bfloat16().float()) and not torch.equal(rounded, errors)
    generator = torch.Generator().manual_seed(1)
    for side in "kv":
        transform, exact = compact.transform(1, side), fit.transform(1, side)
        assert not torch.equal(transform.E, exact.E)
        shape = BASES[name].shape(GEOMETRY).layers[BASES[name].basis_index(1, side)].k
        z = torch.randn(2, shape.heads, 40, shape.width, generator=generator)
        heads = GEOMETRY.layers[1].k.heads * (2 if transform.joint else 1)
        x = transform.inverse(z, GEOMETRY.layers[1].k.width, start=64)
        assert x.shape == (2, heads, 40, 32)
        assert torch.allclose(transform.forward(x, start=64), z, atol=1e-3)
        x = torch.randn(2, heads, 40, 32, generator=generator)
        assert torch.allclose(transform.inverse(transform.forward(x, start=64), 32, start=64), x, atol=1e-3)
        # The decoder of the basis before it was rounded would lose far more
        mixed = replace(transform, D=exact.D)
        assert float((mixed.inverse(mixed.forward(x, start=64), 32, start=64) - x).abs().amax()) > 0.02


def test_widths_of_a_compact_fit_are_those_of_its_rounded_errors(llama_fit):
    """Not those that the whole fit had computed before."""
    fit = replace(llama_fit.multi_head["joint"])
    bits, weights = 3.0, (0.5,) + (1.0,) * (len(fit.E) - 1)
    for own in (fit.allocation, fit.allocation.weighted(weights)):
        own.widths(bits)
    compact = fit.compact()
    for own in (compact.allocation, compact.allocation.weighted(weights)):
        fresh = BitAllocation(compact.allocation.errors, own.prices, own.demand, own.weights)
        assert own.errors is compact.allocation.errors
        assert all(map(torch.equal, own.widths(bits), fresh.widths(bits)))


@pytest.mark.parametrize("suffix", tensor_file.SUFFIXES)
def test_a_compact_file_in_half_precision_is_read_and_written_as_it_is(llama_fit, suffix, tmp_path):
    """As it was written before there were eight bits."""
    record = tensor_file.read(save_calibration(llama_fit.compact("joint"), tmp_path / "c.pt"))
    own = record["joint"]
    E = own["E"] * own["scale"]
    scale = E.abs().amax((-1, -2), keepdim=True).log2().ceil().exp2()
    old = own | {"E": (E / scale).half(), "scale": scale, "errors": own["errors"].float()}
    path = tensor_file.write(tmp_path / f"old{suffix}", record | {"joint": old})
    back = load_calibration(path)
    assert back.statistics is None
    for layer in range(back.geometry.num_layers):
        transform = back.transform("k", layer)
        assert torch.equal(transform.E, old["E"][layer].float() * old["scale"][layer])
        assert torch.allclose(transform.E @ transform.D, torch.eye(transform.rank), atol=1e-4)
        assert torch.equal(back.multi_head["joint"].allocation.errors[layer], old["errors"][layer])
    again = tensor_file.read(save_calibration(back, tmp_path / f"again{suffix}"))
    assert identical(again, tensor_file.read(path)) and again["joint"]["E"].dtype == torch.float16


# --- bytes shared out between bases of different sizes, some of which are held for fewer tokens than others


def allocation(weights: tuple[float, ...] | None = None) -> BitAllocation:
    """Three bases and a place without one; two of them alike, the third of another size."""
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(2, 40, 48, 1, generator=generator) * 0.3 ** torch.arange(len(WIDTHS))
    other = torch.rand(1, 40, 96, 1, generator=generator) * 0.3 ** torch.arange(len(WIDTHS))
    found = BitAllocation.measured([one, None, one.clone(), other])
    return found if weights is None else found.weighted(weights)


@pytest.mark.parametrize(
    ("weights", "bits"), covering([None, (1.0, 1.0, 0.125, 1.0), (0.5, 1.0, 0.02, 1.0)], [1.5, 3.0, 5.0], times=2)
)
def test_bits_are_meant_on_average_over_what_is_held(weights, bits):
    found = allocation(weights)
    each, weights = found.bits_of_each(bits), weights or (1.0,) * 4
    assert each[1] == 0, "there is no basis"
    held = [w * (0 if own is None else own[..., 0].numel()) for w, own in zip(weights, found.errors, strict=True)]
    average = sum(own * b for own, b in zip(held, each, strict=True)) / sum(held)
    assert bits - 8 * PLANE / BLOCK / 48 < average <= bits + 1e-6
    if weights[2] < weights[0]:
        assert each[2] > each[0], "the same costs, held for fewer tokens"
    widths = found.widths(bits)
    spent = sum(
        weight * float(torch.tensor(COSTS)[own].sum(-1).amax() * len(own))
        for weight, own in zip(weights, widths, strict=True)
        if own is not None
    )
    budget = bits * BLOCK / 8 * sum(held)
    assert 0.97 * budget < spent <= budget
    low, high = found.bits_range()
    assert low < bits < high


def test_a_basis_of_less_weight_pays_that_share_of_the_price_and_weights_of_one_change_nothing():
    """Demand at a price is read off between measured ones: with weights on the grid of prices it is exact."""
    found = allocation()
    assert found.weighted((1.0,) * 4) is found
    assert found.weighted((1.0, 1.0, 0.5, 1.0)) is found.weighted((1.0, 1.0, 0.5, 1.0))
    step = float(found.prices[1] / found.prices[0])
    weighted = found.weighted((1.0, 1.0, 1 / step**4, 1.0))
    before, after = found.demand_at_one_price, weighted.demand_at_one_price
    torch.testing.assert_close(after[4:, 1], before[:-4, 1], rtol=1e-3, atol=1e-3)
    assert torch.equal(after[:, 0], before[:, 0])
