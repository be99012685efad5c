"""Timing: one loop for every cache, turns that alternate, figures that add up; instruments that leave no trace."""

from collections import Counter

import pytest
import torch
from script_runs import INT4_PRESET
from tiny import tiny_loaded
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from gpt2.compression.attention import disable_compressed_attention, enable_compressed_attention
from gpt2.compression.cache.size import cache_bytes
from gpt2.compression.cache.token_store import TokenStore
from gpt2.compression.codecs import IdentityCompressor
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.kernels import cpu
from gpt2.compression.named_caches import from_preset
from gpt2.evaluation import instruments, timing
from gpt2.evaluation.instruments import PARTS, Stopwatch, peak_memory, watched
from gpt2.evaluation.perplexity import BASELINE, baseline_factory
from gpt2.experiments.miniatures import tiny_family
from gpt2.models.loading import wrap


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


def test_caches_take_turns_in_alternating_order_and_are_always_fresh(llama, caches, caplog):
    made, held, seen = [], [], []

    def recorded(name, make):
        return lambda: (made.append(name), held.append(make()))[1] or held[-1]

    caches = caches | {"identity": lambda: identity_cache(3)}
    recording = {name: recorded(name, make) for name, make in caches.items()}
    rows = timing.measure_cell(
        llama, recording, 20, 2, decode_tokens=3, repeats=2, progress=lambda turns: seen.extend(turns) or turns
    )
    there = [BASELINE, "int4", "identity"]
    assert made == [*there, *there, *there[::-1], *there], "warm-up, instruments, two repeats"
    assert len(seen) == 9 and len({id(cache) for cache in held}) == 12
    assert [cache.get_seq_length() for cache in held] == 3 * [16 + 2] + 9 * [20 + 3]
    assert not any("parking" in row for row in rows) and not caplog.records, "on a CPU nothing is parked"


@pytest.mark.parametrize("family", ["llama", "qwen3_next", "gemma4_text"])
def test_noise_in_the_place_of_a_prompt(family, monkeypatch):
    """The model only decodes: nothing is known of the time to a first token, and all else is as with a prompt."""
    loaded, held = wrap(tiny_family(family), None, family), []
    caches = {BASELINE: baseline_factory(loaded), "exact": lambda: identity_cache(loaded.geometry)}
    made = {name: lambda make=make: held.append(make()) or held[-1] for name, make in caches.items()}
    rows = timing.measure_cell(loaded, made, 40, 2, decode_tokens=3, repeats=1, noise=True)
    assert [cache.get_seq_length() for cache in held[2:]] == [40 + 3] * 4
    for row in rows:
        assert "ttft_ms" not in row and row["token_ms_median"] > 0 and sum(row["share_of_step"].values()) > 0.99
    assert set(rows[1]["ratio_to_baseline"]) & {"ttft_median", "tokens_per_s_median"} == {"tokens_per_s_median"}


def test_figures_are_medians_quartiles_and_paired_ratios(llama, caches, monkeypatch):
    """Times are scripted: the second repeat is slow for both caches, which a ratio of medians would get wrong."""
    seconds = {BASELINE: [(1.0, 0.4), (10.0, 4.0), (2.0, 0.8)], "int4": [(3.0, 0.8), (20.0, 4.0), (4.0, 3.2)]}
    turns = {name: iter(pairs) for name, pairs in seconds.items()}
    real = timing.run_once

    def scripted(model, cache, prompt, steps, fill=None):
        run = real(model, cache, prompt, steps)
        if steps == timing.WARM_STEPS:
            return run
        own = next(turns["int4" if isinstance(cache, CompressedDynamicCache) else BASELINE])
        return timing.Run(*own, run.tokens, run.held_bytes)

    monkeypatch.setattr(timing, "run_once", scripted)
    inside = timing.Inside(instruments.Memory(start=10, peak=70), {"rest": 1.0}, 5.0)
    monkeypatch.setattr(timing, "look_inside", lambda *args: inside)
    baseline, int4 = timing.measure_cell(llama, caches, 100, 2, decode_tokens=4, repeats=3)
    assert (baseline["cache"], baseline["context_tokens"], baseline["batch_size"]) == (BASELINE, 100, 2)
    assert int4["ttft_ms"] == [3000, 20000, 4000] and int4["ttft_ms_median"] == 4000
    assert int4["ttft_ms_quartiles"] == [3500, 12000]
    assert baseline["token_ms"] == [100, 1000, 200] and baseline["token_ms_median"] == 200
    assert baseline["tokens_per_s_median"] == 10, "two sequences, 200 ms a step"
    assert (int4["peak_memory_bytes"], int4["peak_memory_over_start_bytes"]) == (70, 60)
    assert int4["share_of_step"] == {"rest": 1.0} and int4["instrumented_token_ms"] == 5
    ratio = int4["ratio_to_baseline"]
    assert ratio["ttft_median"] == 2 and ratio["ttft_quartiles"] == [2, 2.5]
    assert ratio["token_time_median"] == 2 and ratio["token_time_quartiles"] == [1.5, 3]
    assert ratio["tokens_per_s_median"] == 0.5 and "ratio_to_baseline" not in baseline
    assert ratio["cache_bytes"] == int4["cache_bytes"] / baseline["cache_bytes"] < 1
    assert baseline["cache_bytes"] == 2 * 104 * llama.geometry.bytes_per_token(4)


def test_a_prefill_makes_logits_of_its_last_token_only(monkeypatch):
    """And where a model can't leave out the others, what it says about the last one counts."""
    shapes_seen, llama = [], tiny_loaded("llama")
    a, b, c = (timing.random_tokens(llama, 3, 50, seed) for seed in (0, 0, 1))
    assert a.shape == (3, 50) and torch.equal(a, b) and not torch.equal(a, c) and (a < 97).all()
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


def test_parking_is_timed_in_both_directions_after_a_warm_up(llama, monkeypatch):
    """On a device that isn't there: moving takes two ticks of the clock there, one back."""
    ticks, waited = [], []
    cache = CompressedDynamicCache([IdentityCompressor()], [IdentityCompressor()])
    monkeypatch.setattr(cache, "offload", lambda: ticks.append(2) or 300)
    monkeypatch.setattr(cache, "prefetch", lambda: ticks.append(1) or 300)
    monkeypatch.setattr(timing, "cuda_devices", lambda model: ["cuda:0"])
    monkeypatch.setattr(timing, "synchronizer", lambda model: lambda: waited.append(1))
    monkeypatch.setattr(timing, "clock", lambda: sum(ticks))
    found = timing.park(llama.model, cache)
    assert found == {"moved_bytes": 300, "offload_ms": 2000, "prefetch_ms": 1000}
    assert ticks == [2, 1, 2, 1] and len(waited) == 8, "before and after every move"
    assert timing.park(llama.model, DynamicCache()) is None


def test_a_stopwatch_gives_each_second_to_one_part():
    now, waits = [0.0], []
    watch = Stopwatch(lambda: waits.append(now[0]), lambda: now[0])

    def do(*steps) -> None:
        """Seconds that pass, and what is called between them."""
        for step in steps:
            if callable(step):
                step()
            else:
                now[0] += step

    expand = watch.timed("expand")(lambda: do(4))
    update = watch.timed("copies")(lambda: do(1, expand, 2))
    fail = watch.timed("compress")(lambda: do(1, lambda: 1 / 0))
    do(100)  # before the watch runs
    with watch.part("rest"):
        do(8, update, update, 16)
    do(100)
    assert watch.seconds == dict.fromkeys(PARTS, 0.0) | {"expand": 8, "copies": 6, "rest": 24}
    assert watch.shares()["rest"] == 24 / 38 and sum(watch.shares().values()) == pytest.approx(1)
    assert len(waits) == 10, "the devices are waited for whenever the clock is read"
    with watch.part("rest"):
        with pytest.raises(ZeroDivisionError):
            fail()
        do(2)
    assert watch.seconds["compress"] == 1 and watch.seconds["rest"] == 26, "it goes on after an error"


def test_every_part_of_a_step_is_seen(llama, caches, monkeypatch):
    def share(name: str, steps: int = 3) -> dict[str, float]:
        inside = timing.look_inside(llama.model, caches[name](), timing.random_tokens(llama, 2, 40, 0), steps)
        assert sum(inside.share.values()) == pytest.approx(1) and inside.token_ms > 0
        return inside.share

    baseline, int4 = share(BASELINE), share("int4", 8)
    direct = {"folding", "kernels"}  # of caches whose codes are read
    assert set(int4) == set(PARTS) and int4["kernels"] == 0
    assert {part for part, own in int4.items() if own > 0} - direct == set(PARTS) - direct
    assert baseline["compress"] == baseline["expand"] == 0
    assert baseline["attention"] > 0 and baseline["copies"] > 0
    monkeypatch.setattr(type(llama.model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    assert set(share("int4")) == set(PARTS) - {"attention"}, "attention that can't be replaced stays in the rest"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_part_is_counted_as_often_as_it_runs(family):
    """Per step and layer: one update, one attention; K as it is and V in int4 are both stored and read."""
    calls, loaded = [], tiny_loaded(family)
    model = loaded.model

    class Counting(Stopwatch):
        def timed(self, name):
            return lambda fn: lambda *args, **kwargs: calls.append(name) or fn(*args, **kwargs)

    cache = from_preset(INT4_PRESET, loaded).make()
    model(torch.randint(2, 97, (1, 20)), past_key_values=cache, use_cache=True)
    with watched(model, Counting()):
        model(torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    linear = sum(isinstance(module, (torch.nn.Linear, Conv1D)) for module in model.modules())
    # Our update calls the one it overrides; the inner one takes no second
    assert Counter(calls) == {"attention": 3, "compress": 6, "expand": 6, "copies": 6, "matmuls": linear}


def test_a_step_over_codes_shows_its_kernels_and_what_goes_through_the_basis(llama, kernels):
    enable_compressed_attention(llama.model)
    try:
        prompt = timing.random_tokens(llama, 1, 90, 0)
        share = timing.look_inside(llama.model, from_preset("kv4", llama).make(), prompt, 4).share
    finally:
        disable_compressed_attention(llama.model)
    assert share["matmuls"] > 0 and share["sampling"] > 0 and share["attention"] > 0 and share["expand"] == 0
    # V's basis, the only one of kv4, is the kernel's matter, or PyTorch's
    assert (share["kernels"] > 0) == cpu.loaded() == (share["folding"] == 0)


def test_instruments_change_no_token_and_are_only_in_the_pass_that_isnt_timed(llama, caches):
    """And gone afterwards, also after an error."""
    prompt = timing.random_tokens(llama, 2, 30, 0)
    run = timing.run_once(llama.model, caches["int4"](), prompt, 5)
    replaced = [(TokenStore, "compress"), (TokenStore, "reconstruct"), (DynamicCache, "update")]
    replaced += [(CompressedDynamicCache, "update")]
    before = [getattr(*place) for place in replaced]
    with pytest.raises(KeyboardInterrupt), watched(llama.model, Stopwatch()):
        assert torch.equal(timing.run_once(llama.model, caches["int4"](), prompt, 5).tokens, run.tokens)
        assert TokenStore.compress is not before[0]
        assert llama.model.config._attn_implementation != "sdpa"
        raise KeyboardInterrupt
    assert [getattr(*place) for place in replaced] == before
    assert llama.model.config._attn_implementation == "sdpa"
    plain, seen = TokenStore.reconstruct, []

    class Spying(DynamicCache):
        def update(self, keys, *args, **kwargs):
            seen.append((keys.shape[2], TokenStore.reconstruct is plain))
            return super().update(keys, *args, **kwargs)

    timing.measure_cell(llama, {"spy": Spying}, 20, 1, decode_tokens=4, repeats=2)
    assert [(n, clean) for n, clean in seen if not clean] == llama.geometry.num_layers * 4 * [(1, False)]


def test_peak_memory_sees_what_is_gone_at_the_end_and_of_gpus_is_the_sum_of_their_own_counts(monkeypatch):
    size = 200 << 20
    with peak_memory([]) as memory:
        block = torch.ones(size // 4)
        del block
    assert 0.9 * size < memory.peak - memory.start < 2 * size
    with peak_memory([]) as after:
        pass
    assert after.peak - after.start < size / 4
    reset = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 70 + device.index)
    devices = [torch.device("cuda:0"), torch.device("cuda:1")]
    with peak_memory(devices) as memory:
        assert reset == devices
    assert (memory.start, memory.peak) == (20, 141)
    assert "summed" in instruments.memory_method(devices) and "sampled every 2 ms" in instruments.memory_method([])
