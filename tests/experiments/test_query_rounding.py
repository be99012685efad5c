"""Queries that are rounded to integers in the simulation of codecs, against products with these integers."""

import pytest
import torch
from tiny import windows

from gpt2.compression.codecs.mixed import BLOCK
from gpt2.experiments import query_rounding
from gpt2.experiments.codec_simulation import Variation
from gpt2.experiments.codec_variations import PRODUCT, gather, measure, simulations

SINKS = 4
FRAMED = Variation(frame=BLOCK)


@pytest.fixture(scope="module")
def text():
    return windows(2, 128, seed=1)


@pytest.fixture(scope="module")
def gathered(llama):
    return gather(llama, windows(2, 256), SINKS)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_scores_are_those_of_integers(llama, text, gathered):
    """q · k̂ and what rounding adds: a unit times a product of integers and codes, and the mean's part in floats."""
    row = Variation(frame=BLOCK, query_bits=8)
    made = simulations(llama, text, gathered, row, [3])[3]
    k, _ = made.replace(0, gaussian(1, 2, 128, 12), gaussian(1, 2, 128, 12, seed=1))
    rounding = getattr(k, query_rounding.ATTRIBUTE)
    q = gaussian(1, 4, 5, 12, seed=2)
    shared = k.repeat_interleave(2, dim=1)  # by two query heads each
    found = q @ shared.mT + rounding.score_changes(q)
    transform = made.fitted.transforms[0]
    for n in range(2):
        absorbed = transform.absorb_query(q.view(1, 2, 10, 12), torch.tensor([n * BLOCK]))[0, 0, 0]  # [20, w + 1]
        z, steps = rounding.z[0, 0, n], rounding.steps[0, 0, n]
        coded = steps > 0
        scaled = absorbed[:, :-1][:, coded] * steps[coded]
        unit = scaled.abs().amax(-1, keepdim=True) / 127
        expected = unit * ((scaled / unit).round() @ (z[:, coded] / steps[coded]).mT) + absorbed[:, -1:]
        own = found[0].flatten(0, 1)[:, n * BLOCK : (n + 1) * BLOCK]
        first = SINKS if n == 0 else 0
        torch.testing.assert_close(own[:, first:], expected[:, first:], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[..., :SINKS], (q @ shared.mT)[..., :SINKS]), "sinks are exact, and so are their queries"


def test_few_bits_lose_more_and_many_nothing(llama, text, gathered):
    before = llama.model.config._attn_implementation
    wanted = {"floats": FRAMED} | {str(n): Variation(frame=BLOCK, query_bits=n) for n in (20, 3)}
    rows = measure(llama, text, gathered, wanted | {"product": PRODUCT}, [4], {})
    loss = {row["label"]: row["kl_nats"] for row in rows}
    assert loss["20"] == pytest.approx(loss["floats"], rel=1e-3)
    assert loss["3"] > 1.2 * loss["floats"]
    assert llama.model.config._attn_implementation == before
