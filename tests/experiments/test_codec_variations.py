"""The simulation of codecs: its default is the product, every row takes the bits it says, and what is new is right."""

import itertools
import json
from functools import partial

import pytest
import torch
from pictures import is_drawn
from sampling import sampled
from script_runs import run
from tiny import windows

from gpt2.common.errors import PluginError
from gpt2.compression.calibration.fisher import collect_fisher
from gpt2.compression.calibration.multi_head_fit import fit_multi_head
from gpt2.compression.codecs import BASES, Compressor, mixed
from gpt2.compression.codecs.mixed import BLOCK, Mixed, width_bytes
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.evaluation.perplexity import BASELINE, baseline_factory, score
from gpt2.experiments import codec_simulation
from gpt2.experiments.codec_simulation import Replaced, Variation, ball, coded, errors, nearest_e8, nearest_in_ball
from gpt2.experiments.codec_variations import PRODUCT, QUESTIONS, fit, gather, measure, simulations
from gpt2.report import regions

SINKS = 4
# Rows, each once: of most questions those on both ends, of two questions all, which are computed in ways of their own
WHOLE = ("metric", "widths")
SOME = {
    rows[label]: f"{question}: {label}"
    for question, rows in QUESTIONS.items()
    for label in (rows if question in WHOLE else sampled(rows, 2))
}


@pytest.fixture(scope="module")
def texts():
    """For calibration and for evaluation."""
    return windows(2, 256), windows(2, 128, seed=1)


@pytest.fixture(scope="module")
def gathered(llama, texts):
    return gather(llama, texts[0], SINKS)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_errors_and_widths_are_the_products():
    z = gaussian(1, 2, 4 * BLOCK, 20) * torch.logspace(1, -2, 20) + 0.3
    y = mixed.in_blocks(z)
    error = errors(y, PRODUCT, torch.ones(y.shape[:-1]))
    torch.testing.assert_close(error, mixed.errors(z), rtol=1e-4, atol=1e-6)
    assert torch.equal(PRODUCT.costs(), 8 * torch.tensor(mixed.COSTS, dtype=torch.float32))
    choice = mixed.cheapest(error, 400)
    assert torch.equal(mixed.cheapest(error, 8 * 400, PRODUCT.costs()), choice)
    quantizer = Mixed((400 + width_bytes(20)) * 8 / BLOCK / 20 + 1e-9)
    stored = mixed.in_blocks(quantizer.dequantize(quantizer.quantize(z), 20))
    found = codec_simulation.read_back(*(part.flatten(0, 2) for part in (y, choice)), PRODUCT, torch.ones(8, 20))
    torch.testing.assert_close(found.view_as(stored), stored)
    assert PRODUCT.overhead(20) == 8 * width_bytes(20)


def test_the_basis_is_the_products(llama, texts, gathered):
    codec = fit_multi_head(collect_fisher(llama, texts[0], None, SINKS, {"joint": BASES["joint"]})["joint"])
    fitted = fit(gathered, PRODUCT)
    torch.testing.assert_close(fitted.spread.square(), torch.stack(codec.spectrum), rtol=1e-3, atol=1e-6)
    for layer, transform in enumerate(fitted.transforms):
        torch.testing.assert_close(transform.mean, codec.mean[layer], rtol=1e-4, atol=1e-6)
        metrics = [E @ E.mT for E in (transform.E, codec.E[layer])]
        torch.testing.assert_close(*metrics, rtol=1e-3, atol=1e-3 * float(metrics[0].abs().max()))


def test_a_real_cache_reads_what_is_simulated(llama, texts, gathered):
    """Fed block by block: only then does it hold whole blocks at every step."""
    made = simulations(llama, texts[1], gathered, PRODUCT, [3])[3]
    w = made.fitted.spread.shape[-1]
    compressors = [
        Compressor(Mixed((limit / 8 + width_bytes(w)) * 8 / BLOCK / w + 1e-9), transform)
        for limit, transform in zip(made.plan.limits, made.fitted.transforms, strict=True)
    ]
    real = {"real": partial(CompressedDynamicCache, compressors, compressors, sink_tokens=SINKS)}
    caches = {BASELINE: baseline_factory(llama)}
    real = score(llama, texts[1], caches | real, chunk=BLOCK)["real"]
    whole = score(llama, texts[1], caches | {"": partial(Replaced, made.replace)}, chunk=128, batch_size=1)[""]
    assert whole.kl.mean() == pytest.approx(real.kl.mean(), rel=0.01) and whole.kl.mean() > 0.01


@pytest.fixture
def recounted(llama, texts, gathered, monkeypatch):
    """Simulates a row at 3 bits: what it believes to take, and what its choices take by the sizes that it promises."""

    def recount(row) -> tuple[float, float]:
        made, seen = simulations(llama, texts[1], gathered, row, [3])[3], []
        v, choose = made.fitted.variation, made.choose

        def watched(layer, y, spread):
            choice = choose(layer, y, spread)
            seen.append((layer, torch.tensor(v.menu)[choice], y))
            return choice

        monkeypatch.setattr(made, "choose", watched)
        llama.model(texts[1], past_key_values=Replaced(made.replace), use_cache=True)
        metadata = {"bytes": 8 + 8, "half": 16 + 16, "nibbles": 4 + 4, "scale": 8}[v.metadata]
        total = coordinates = 0
        for layer, widths, y in seen:
            used = (y.shape[-1] * widths + metadata * (widths > 0)).sum(-1)  # [B, G, n]
            if v.widths == "block":
                limit = made.plan.limits[layer]
                assert (used <= limit).all(), "a block is over its bytes"
                used = torch.full_like(used, limit)
            index = {8: 3, 4: 2}[len(v.menu)] * widths.shape[-1]
            total += int((used + {"fixed": 0, "block": index}.get(v.widths, index + 16)).sum())
            coordinates += y.numel()
        return made.bits, total / coordinates

    return recount


@pytest.mark.parametrize("row", SOME, ids=SOME.values())
def test_every_row_takes_the_bits_that_were_asked_for(row, recounted):
    believed, counted = recounted(row)
    assert believed == pytest.approx(counted, rel=1e-9)
    if row.widths != "calibration":  # whose price says nothing about another text's bits
        assert counted == pytest.approx(3, abs=0.03), "within a hundredth, on so small a model"


def test_records_stand_beside_the_product(llama, texts, gathered):
    known, asked = {}, {"plain PCA": QUESTIONS["metric"]["plain PCA"], "ours": PRODUCT}
    rows = measure(llama, texts[1], gathered, asked, [4, 2], known)
    assert rows == measure(llama, texts[1], gathered, asked, [4, 2], dict(known)), "what is known isn't measured again"
    assert len(rows) == 4 and sum(row["product"] for row in rows) == 2
    for row in rows:
        ours = next(r for r in rows if r["product"] and r["bits"] == row["bits"])
        if row is not ours:
            low, high = row["kl_change_interval"]
            assert row["kl_change"] == pytest.approx(row["kl_nats"] / ours["kl_nats"] - 1)
            assert low < row["kl_change"] < high
    plain = [row for row in rows if row["label"] == "plain PCA"]
    assert all(row["kl_change_interval"][0] > 0 for row in plain), "loses, beyond what chance explains"


def test_all_but_the_sinks_is_replaced(llama, texts, gathered):
    made = simulations(llama, texts[1], gathered, PRODUCT, [2])[2]
    k, v = gaussian(1, 2, 128, 12), gaussian(1, 2, 128, 12, seed=1)
    for x, read in zip((k, v), made.replace(0, k, v), strict=True):
        same = (x == read).all(-1)
        assert same[:, :, :SINKS].all() and not same[:, :, SINKS:].any()


def test_texts_are_of_whole_blocks(llama, gathered):
    for length in (100, 64):
        with pytest.raises(PluginError, match=f"--seq-len {length}: give a multiple of 128"):
            gather(llama, windows(1, length), SINKS)
        with pytest.raises(PluginError, match=f"--eval-seq-len {length}: give a multiple of 128"):
            measure(llama, windows(1, length), gathered, QUESTIONS["block"], [3], {})


def test_a_basis_keeps_to_its_parts(gathered):
    for parts, nonzero in (("head", 12), ("side", 24), ("pair", 24), ("joint", 48)):
        E = fit(gathered, Variation(parts=parts)).transforms[0].E[0]
        assert ((E != 0).sum(0) == nonzero).all()
        mixes_k_and_v = bool((E[:24, 24:] != 0).any())
        assert mixes_k_and_v == (parts in ("pair", "joint"))


def test_the_nearest_point_of_e8_and_its_index_into_the_ball():
    """Against all points of squared norm 4 at most: 1 + 240 + 2160."""
    whole = torch.tensor(list(itertools.product((-2, -1, 0, 1, 2), repeat=8)), dtype=torch.float32)
    half = torch.tensor(list(itertools.product((-1.5, -0.5, 0.5, 1.5), repeat=8)))
    lattice = torch.cat([x[(x.square().sum(-1) <= 4) & (x.sum(-1).remainder(2) == 0)] for x in (whole, half)])
    assert len(lattice) == 2401
    x = 0.3 * gaussian(300, 8)  # so near to zero that the nearest point is among them
    expected = torch.cdist(x, lattice).min(-1).values
    torch.testing.assert_close((x - nearest_e8(x)).norm(dim=-1), expected, rtol=1e-4, atol=1e-4)
    assert [ball(bits) for bits in (1, 2)] == [2, 10], "241 of 256 and 56,881 of 65,536 points"
    for radius in (2, 10, 44):
        points = nearest_in_ball(2 * gaussian(2000, 8), radius)
        assert (points.square().sum(-1) <= radius + 1e-4).all()
        torch.testing.assert_close(nearest_e8(points), points)


def test_levels_of_a_gaussian_and_a_lattice_lose_less_in_the_same_bits():
    assert codec_simulation.gaussian_levels(1).tolist() == pytest.approx([-0.7979, 0.7979], abs=1e-3)
    assert codec_simulation.gaussian_levels(2).tolist() == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], abs=1e-3)
    y = gaussian(500, BLOCK)
    for bits, gain in ((2, 0.85), (3, 0.85), (4, 1)):
        own, ours = (coded(y, bits, v, torch.ones(500))[0].sum() for v in (Variation(levels="lattice"), PRODUCT))
        assert own <= gain * ours


def test_metadata_is_what_fits_its_bits():
    """Steps and middles that a block can have: as many as its bits can tell apart, at most."""
    y = 3 * gaussian(5000, BLOCK) * gaussian(5000, 1, seed=1).exp()
    made = {name: codec_simulation.GRIDS[name](y.amin(-1), y.amax(-1), 1 / 7, 3, torch.ones(5000))
            for name in ("half", "nibbles", "scale")}  # fmt: skip
    assert all(torch.equal(part, part.half().float()) for part in made["half"])
    for name, steps, offsets in (("nibbles", 16, 16), ("scale", 256, 1)):
        step, middle = made[name]
        assert len(step.unique()) <= steps
        assert len((middle / step).mul(2).round().unique()) <= offsets, "a sixteenth of 8 levels is half a step"
    # Rotating channels of a width and back loses nothing else
    y, choice = gaussian(2, 30, BLOCK), torch.tensor([7, 1, 0]).repeat(2, 10)
    back = codec_simulation.read_back(y, choice, Variation(rotated=True), torch.ones(2, 30))
    wide = choice == 7
    assert (y - back)[wide].abs().max() < 0.01 and (back[choice == 0] == 0).all()


def test_the_script_writes_a_table_and_a_figure(tiny_flags, tmp_path, capsys):
    small = "--samples 3 --seq-len 128 --eval-tokens 512 --eval-seq-len 256 --bits 4,2 --rows levels,rotation"
    assert run("benchmarks/codec_variations", *tiny_flags, *small.split(), "--output", "explore_codecs_tiny.json") == 0
    assert is_drawn(tmp_path / "explore_codecs_tiny.png")
    record = json.loads((tmp_path / "explore_codecs_tiny.json").read_text())
    assert len(record["rows"]) == 2 * (2 + 2) and record["segments"] == [2, 256]
    assert record["calibration_tokens"] == 3 * 128 and record["rows"][0]["tokens"] == 2 * 255, "measured on other text"
    table = regions.fill("<!-- results: explore_codecs_tiny rotation -->\n<!-- end -->", tmp_path)
    assert "| rotation: **none** |" in table and "levels" not in table
    assert "| changed | KL at 4 bits | KL at 2 bits | Δ perplexity at 2 bits |" in table
    with pytest.raises(PluginError, match="no rows of question lattice"):
        regions.fill("<!-- results: explore_codecs_tiny lattice -->\n<!-- end -->", tmp_path)
    assert "Hadamard among channels of equal width" in capsys.readouterr().out
