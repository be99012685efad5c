"""What each layer loses alone, measured on a tiny model, and the plans that follow from such figures."""

import itertools
import json

import pytest
import torch
from tiny import windows

from gpt2.common.errors import BadArtefact, LossNotFinite
from gpt2.compression.settings import Setting
from gpt2.evaluation import perplexity
from gpt2.evaluation.perplexity import BASELINE
from gpt2.models.geometry import Geometry
from gpt2.report import tables
from gpt2.report.plots.tuning import layer_losses
from gpt2.tuning import layer_sensitivity

INT4, INT8 = Setting("identity", 12, 4), Setting("identity", 12, 8)


def test_ablation_touches_one_layer_and_resumes(llama, tmp_path):
    path = tmp_path / "a.json"

    def ablate(key: int = 1, progress=iter) -> list[dict]:
        how = {"path": path, "key": {"a": key}, "sink_tokens": 2, "progress": progress}
        return layer_sensitivity.ablate(llama, windows(2, 48), None, "kv", (INT8, INT4), **how)

    def until_the_third(layers):
        yield from itertools.islice(layers, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ablate(progress=until_the_third)
    record = json.loads(path.read_text())
    assert len(record["rows"]) == 8, "two layers, two sides, two settings"
    assert record["wall_s"] is not None
    record["rows"] = [row | {"measured": "before"} for row in record["rows"]]
    path.write_text(json.dumps(record))
    rows = ablate()
    assert [row.get("measured") for row in rows] == ["before"] * 8 + [None] * 4
    assert json.loads(path.read_text())["wall_s"] is None, "only the time of the last part is known"
    kl = {(row["side"], row["layer"], row["bits"]): row["kl_nats"] for row in rows}
    assert all(kl[side, layer, 8] < kl[side, layer, 4] for side in "kv" for layer in range(3))
    assert not any("measured" in row for row in ablate(key=2)), "another key: measured again"
    for content in ('{"rows": 3}', "[" * 10**5):
        path.write_text(content)
        with pytest.raises(BadArtefact, match="not a layer ablation"):
            ablate()
        assert path.read_text() == content


def test_a_layer_without_a_finite_loss_is_left_out_and_the_others_are_kept(llama, tmp_path, monkeypatch):
    """As half precision has with few bits in one layer."""

    def ablate(lost: int) -> list[dict]:
        layers = itertools.count()

        def score(loaded, segments, caches, failed, **how):
            if next(layers) < lost:
                (name,) = caches.keys() - {BASELINE}
                failed[name] = LossNotFinite("the loss is NaN or infinite", name)
            return perplexity.score(loaded, segments, caches, failed=failed, **how)

        monkeypatch.setattr(layer_sensitivity, "score", score)
        how = {"path": tmp_path / f"{lost}.json", "key": {}, "sink_tokens": 2}
        return layer_sensitivity.ablate(llama, windows(2, 80), None, "k", (INT4,), **how)

    found = ablate(1)
    assert [row["kl_nats"] is None for row in found] == [True, False, False]
    assert "NaN or infinite" in found[0]["note"] and json.loads((tmp_path / "1.json").read_text())["rows"] == found
    assert [plan["k"] for plan in layer_sensitivity.plans(found, llama.geometry, budget=0.9)][-1] == [None, INT4, INT4]
    record = {"rows": found, "text": "words"}
    assert "1 without a finite loss" in tables.quality.layer_ablation(record, []).note
    assert layer_losses(found, "layers").axes[0].lines[0].get_xdata().tolist() == [1, 2]
    with pytest.raises(LossNotFinite, match="and so with every other layer"):
        ablate(3)


def rows(losses: dict[int, tuple[float, float]]) -> list[dict]:
    """Layer to KL at 8 and at 4 bits."""
    return [
        {"side": "v", "layer": layer, "codec": "identity", "rank": 12, "bits": bits, "kl_nats": kl, "ppl_delta": kl,
         "bytes_per_token": bits * 3.0}
        for layer, pair in losses.items() for bits, kl in zip((8, 4), pair, strict=True)
    ]  # fmt: skip


def bits_of(losses: dict, budget: float, **how) -> list[list[int]]:
    """Bits of each layer's V in each plan for a budget; 16 where it isn't compressed."""
    found = layer_sensitivity.plans(rows(losses), Geometry.uniform(len(losses), 2, 12), budget=budget, **how)
    assert all(plan["k"] == [None] * len(losses) for plan in found), "of which there are no rows"
    return [[setting.bits if setting else 16 for setting in plan["v"]] for plan in found]


def test_sensitive_layers_keep_more():
    found = bits_of({0: (0.001, 0.2), 1: (0.001, 0.004), 2: (0.05, 0.4)}, budget=0.01)
    assert [8, 4, 16] in found, "8 bits where 4 hurt, 4 where they don't, none where even 8 hurt"
    assert bits_of({0: (1e-6, 2e-6), 1: (1e-6, 3e-6)}, budget=0.5) == [[4, 4]], "the smallest plan"
    assert bits_of({0: (1.0, 2.0)}, budget=0.001) == []


def test_plans_are_the_lower_hull_of_all_assignments():
    """Against all 3^4 assignments: no other loses less with no more bytes, for any of the plans."""
    generator = torch.Generator().manual_seed(0)
    losses = {layer: tuple(sorted((torch.rand(2, generator=generator) * 0.02).tolist())) for layer in range(4)}

    def cost(bits) -> tuple[float, float]:
        kl = sum(0 if b == 16 else losses[layer][0 if b == 8 else 1] for layer, b in enumerate(bits))
        return kl, sum(3.0 * b for b in bits)

    every = [cost(bits) for bits in itertools.product((16, 8, 4), repeat=4)]
    found = bits_of(losses, budget=0.02, count=20)
    assert len(found) >= 2 and cost(found[0])[0] < 0.0198, "also with less loss than the budget allows"
    for kl, size in map(cost, found):
        assert 0.0198 / 4 <= kl <= 2 * 0.0199
        assert not [other for other in every if other[0] < kl - 1e-12 and other[1] <= size]
