"""What each layer loses alone, measured on a tiny model, and the plans that follow from such figures."""

import itertools
import json

import pytest
import torch
from tiny import windows

from gpt2.common.errors import BadArtefact
from gpt2.compression.settings import Setting
from gpt2.models.geometry import Geometry
from gpt2.tuning import layer_sensitivity

INT4, INT8 = Setting("identity", 12, 4), Setting("identity", 12, 8)


def ablate(loaded, path, *, target="kv", settings=(INT8, INT4), key=None, progress=iter):
    return layer_sensitivity.ablate(
        loaded, windows(2, 48), None, target, settings, path=path, key=key or {"a": 1}, sink_tokens=2, progress=progress
    )


def test_ablation_touches_one_layer_and_resumes(llama, tmp_path):
    path = tmp_path / "a.json"

    def until_the_third(layers):
        yield from itertools.islice(layers, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ablate(llama, path, progress=until_the_third)
    record = json.loads(path.read_text())
    assert len(record["rows"]) == 8, "two layers, two sides, two settings"
    for row in record["rows"]:
        row["measured"] = "before"
    path.write_text(json.dumps(record))
    rows = ablate(llama, path)
    assert [row.get("measured") for row in rows] == ["before"] * 8 + [None] * 4
    kl = {(r["side"], r["layer"], r["bits"]): r["kl_nats"] for r in rows}
    assert all(kl[side, layer, 8] < kl[side, layer, 4] for side in "kv" for layer in range(3))
    assert not any("measured" in row for row in ablate(llama, path, key={"a": 2})), "another key: measured again"
    for content in ('{"rows": 3}', "[" * 10**5):
        path.write_text(content)
        with pytest.raises(BadArtefact, match="not a layer ablation"):
            ablate(llama, path, target="v", settings=[INT8])
        assert path.read_text() == content


def rows(losses: dict[int, tuple[float, float]]) -> list[dict]:
    """Layer to KL at 8 and at 4 bits."""
    return [
        {"side": "v", "layer": layer, "codec": "identity", "rank": 12, "bits": bits, "kl_nats": kl, "ppl_delta": kl,
         "bytes_per_token": bits * 3.0}
        for layer, pair in losses.items() for bits, kl in zip((8, 4), pair, strict=True)
    ]  # fmt: skip


def test_sensitive_layers_keep_more():
    losses = rows({0: (0.001, 0.2), 1: (0.001, 0.004), 2: (0.05, 0.4)})
    chosen = layer_sensitivity.plans(losses, Geometry.uniform(3, 2, 12), budget=0.01)
    bits = [[s.bits if s else 16 for s in plan["v"]] for plan in chosen]
    assert [8, 4, 16] in bits, "8 bits where 4 hurt, 4 where they don't, none where even 8 hurt"
    assert all(plan["k"] == [None] * 3 for plan in chosen)
    small = rows({0: (1e-6, 2e-6), 1: (1e-6, 3e-6)})
    far_inside = layer_sensitivity.plans(small, Geometry.uniform(2, 2, 12), budget=0.5)
    assert [[s.bits for s in plan["v"]] for plan in far_inside] == [[4, 4]], "the smallest plan"
    assert layer_sensitivity.plans(rows({0: (1.0, 2.0)}), Geometry.uniform(1, 2, 12), budget=0.001) == []


def test_plans_are_the_lower_hull_of_all_assignments():
    """Against all 3^4 assignments: no other loses less with no more bytes, for any of the plans."""
    generator = torch.Generator().manual_seed(0)
    losses = {layer: tuple(sorted((torch.rand(2, generator=generator) * 0.02).tolist())) for layer in range(4)}
    geometry = Geometry.uniform(4, 2, 12)

    def cost(bits) -> tuple[float, float]:
        kl = sum(0 if b == 16 else losses[i][0 if b == 8 else 1] for i, b in enumerate(bits))
        return kl, sum(3.0 * b if b < 16 else 48.0 for b in bits)

    every = [cost(bits) for bits in itertools.product((16, 8, 4), repeat=4)]
    found = layer_sensitivity.plans(rows(losses), geometry, budget=0.02, count=20)
    assert len(found) >= 2
    for plan in found:
        kl, size = cost([s.bits if s else 16 for s in plan["v"]])
        assert 0.0198 / 4 <= kl <= 2 * 0.0199
        assert not [other for other in every if other[0] < kl - 1e-12 and other[1] <= size]
