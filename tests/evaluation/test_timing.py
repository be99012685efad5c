"""Timing: one loop for every cache, turns that alternate, figures that add up."""

import pytest
import torch
from tiny import tiny_loaded
from transformers import DynamicCache

from gpt2.compression.cache.size import cache_bytes
from gpt2.compression.codecs import IdentityCompressor
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.evaluation import instruments, timing
from gpt2.evaluation.perplexity import BASELINE, baseline_factory


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch):
    """Before each measurement it takes longer than the tiny model."""
    monkeypatch.setattr("gc.collect", lambda: 0)


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_a_run_makes_the_tokens_that_generate_makes(family):
    loaded = tiny_loaded(family)
    prompt = timing.random_tokens(loaded, 2, 20, seed=0)
    expected = loaded.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=7, do_sample=False, eos_token_id=None
    )
    for make in (baseline_factory(loaded), lambda: identity_cache(3)):
        cache = make()
        run = timing.run_once(loaded.model, cache, prompt, steps=6)
        assert torch.equal(run.tokens, expected[:, 20:]), "1 of the prefill and 6 of the steps"
        assert cache.get_seq_length() == 26 and run.held_bytes == cache_bytes(cache)
        assert run.prefill_s > 0 and run.decode_s > 0


def test_caches_take_turns_in_alternating_order_and_are_always_fresh(llama, caches):
    made, held, seen = [], [], []

    def recorded(name, make):
        return lambda: (made.append(name), held.append(make()))[1] or held[-1]

    caches = caches | {"identity": lambda: identity_cache(3)}
    recording = {name: recorded(name, make) for name, make in caches.items()}
    timing.measure_cell(
        llama, recording, 20, 2, decode_tokens=3, repeats=3, progress=lambda turns: seen.extend(turns) or turns
    )
    there = [BASELINE, "int4", "identity"]
    back = there[::-1]
    assert made == [*there, *there, *back, *there, *back], "warm-up, instruments, three repeats"
    assert len(seen) == 12 and len({id(cache) for cache in held}) == 15
    assert [cache.get_seq_length() for cache in held] == 3 * [16 + 2] + 12 * [20 + 3]


def test_figures_are_medians_quartiles_and_paired_ratios(llama, caches, monkeypatch):
    """Times are scripted: the second repeat is slow for both caches, which a ratio of medians would get wrong."""
    prefill = {BASELINE: [1.0, 10.0, 2.0], "int4": [3.0, 20.0, 4.0]}
    decode = {BASELINE: [0.4, 4.0, 0.8], "int4": [0.8, 4.0, 3.2]}
    turns = {name: iter(zip(prefill[name], decode[name], strict=True)) for name in prefill}
    real, warm = timing.run_once, timing.WARM_STEPS

    def scripted(model, cache, prompt, steps):
        run = real(model, cache, prompt, steps)
        if steps == warm:
            return run
        a, b = next(turns["int4" if isinstance(cache, CompressedDynamicCache) else BASELINE])
        return timing.Run(a, b, run.tokens, run.held_bytes)

    monkeypatch.setattr(timing, "run_once", scripted)
    inside = timing.Inside(instruments.Memory(start=10, peak=70), {"rest": 1.0}, 5.0)
    monkeypatch.setattr(timing, "look_inside", lambda *args: inside)
    baseline, int4 = timing.measure_cell(llama, caches, 24, 2, decode_tokens=4, repeats=3)
    assert (baseline["cache"], baseline["context_tokens"], baseline["batch_size"]) == (BASELINE, 24, 2)
    assert int4["ttft_ms"] == [3000, 20000, 4000] and int4["ttft_ms_median"] == 4000
    assert int4["ttft_ms_quartiles"] == [3500, 12000]
    assert baseline["token_ms"] == [100, 1000, 200] and baseline["token_ms_median"] == 200
    assert baseline["tokens_per_s_median"] == 10, "two sequences, 200 ms a step"
    assert (int4["peak_memory_bytes"], int4["peak_memory_over_start_bytes"]) == (70, 60)
    assert int4["share_of_step"] == {"rest": 1.0} and int4["instrumented_token_ms"] == 5
    ratio = int4["ratio_to_baseline"]
    assert ratio["ttft_median"] == 2 and ratio["ttft_quartiles"] == [2, 2.5]
    assert ratio["token_time_median"] == 2 and ratio["token_time_quartiles"] == [1.5, 3]
    assert ratio["tokens_per_s_median"] == 0.5
    assert ratio["cache_bytes"] == int4["cache_bytes"] / baseline["cache_bytes"]
    assert "ratio_to_baseline" not in baseline


def test_bytes_of_the_baseline_are_what_the_geometry_says(llama, caches):
    baseline, int4 = timing.measure_cell(llama, caches, 300, 2, decode_tokens=2, repeats=1)
    assert baseline["cache_bytes"] == 2 * 302 * llama.geometry.bytes_per_token(4)
    assert int4["cache_bytes"] < baseline["cache_bytes"] and int4["ratio_to_baseline"]["cache_bytes"] < 1
    a, b, c = (timing.random_tokens(llama, 3, 50, seed) for seed in (0, 0, 1))
    assert a.shape == (3, 50) and torch.equal(a, b) and not torch.equal(a, c) and (a < 97).all()


def test_a_prefill_makes_logits_of_its_last_token_only(monkeypatch):
    """And where a model can't leave out the others, what it says about the last one counts."""
    shapes_seen, llama = [], tiny_loaded("llama")
    llama.model.lm_head.register_forward_hook(lambda m, a, out: shapes_seen.append(tuple(out.shape)))
    prompt = timing.random_tokens(llama, 2, 20, 0)
    short = timing.run_once(llama.model, DynamicCache(), prompt, 2)
    assert shapes_seen == 3 * [(2, 1, 97)]
    forward = llama.model.forward
    monkeypatch.setattr(llama.model, "forward", lambda ids, **how: forward(ids, **how))
    whole = timing.run_once(llama.model, DynamicCache(), prompt, 2)
    assert shapes_seen[3:] == [(2, 20, 97), (2, 1, 97), (2, 1, 97)] and torch.equal(short.tokens, whole.tokens)


class Exploding(DynamicCache):
    def __init__(self, error: Exception | None = None):
        super().__init__()
        self.error = error or torch.OutOfMemoryError("no room")

    def update(self, keys, *args, **kwargs):
        if keys.shape[0] > 1:
            raise self.error
        return super().update(keys, *args, **kwargs)


@pytest.mark.parametrize("culprit", [BASELINE, "int4"])
def test_a_cache_without_room_is_recorded_and_the_others_go_on(culprit, llama, caches):
    rows = timing.measure_cell(llama, caches | {culprit: Exploding}, 20, 2, decode_tokens=2, repeats=1)
    bad, good = sorted(rows, key=lambda row: row["cache"] != culprit)
    assert bad == {"cache": culprit, "context_tokens": 20, "batch_size": 2, "out_of_memory": True}
    assert good["token_ms_median"] > 0 and "ratio_to_baseline" not in good
    with pytest.raises(RuntimeError, match="something else"):
        timing.measure_cell(llama, {BASELINE: lambda: Exploding(RuntimeError("something else"))}, 20, 2)


class Parked(CompressedDynamicCache):
    """On a device that isn't there: moving takes two ticks of the clock there, one back."""

    def __init__(self, ticks):
        super().__init__([IdentityCompressor()], [IdentityCompressor()])
        self.ticks = ticks

    def offload(self):
        self.ticks.append(2)
        return 300

    def prefetch(self):
        self.ticks.append(1)
        return 300


def test_parking_is_timed_in_both_directions_after_a_warm_up(llama, monkeypatch):
    ticks, waited = [], []
    monkeypatch.setattr(timing, "cuda_devices", lambda model: ["cuda:0"])
    monkeypatch.setattr(timing, "synchronizer", lambda model: lambda: waited.append(1))
    monkeypatch.setattr(timing, "clock", lambda: sum(ticks))
    found = timing.park(llama.model, Parked(ticks))
    assert found == {"moved_bytes": 300, "offload_ms": 2000, "prefetch_ms": 1000}
    assert ticks == [2, 1, 2, 1] and len(waited) == 8, "before and after every move"
    assert timing.park(llama.model, DynamicCache()) is None


def test_on_a_cpu_nothing_is_parked(llama, caches, caplog):
    rows = timing.measure_cell(llama, caches, 20, 1, decode_tokens=2, repeats=1)
    assert not any("parking" in row for row in rows) and not caplog.records
