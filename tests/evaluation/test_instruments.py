"""Instruments: parts that add up to the whole, counted as often as they run, and no trace of them afterwards."""

import gc

import pytest
import torch
from transformers import DynamicCache

from gpt2.compression.attention import disable_compressed_attention, enable_compressed_attention
from gpt2.compression.cache.token_store import TokenStore
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.kernels import cpu
from gpt2.compression.named_caches import from_preset
from gpt2.evaluation import instruments, timing
from gpt2.evaluation.instruments import PARTS, Stopwatch, peak_memory, watched
from gpt2.evaluation.perplexity import BASELINE


class Clock:
    """Time that moves only when told to."""

    now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds


def test_a_stopwatch_gives_each_second_to_one_part():
    clock, waits = Clock(), []
    watch = Stopwatch(lambda: waits.append(clock.now), clock)

    @watch.timed("expand")
    def expand():
        clock.work(4)

    @watch.timed("copies")
    def update():
        clock.work(1)
        expand()
        clock.work(2)

    clock.work(100)  # before the watch runs
    with watch.part("rest"):
        clock.work(8)
        update()
        update()
        clock.work(16)
    clock.work(100)
    assert watch.seconds == dict.fromkeys(PARTS, 0.0) | {"expand": 8, "copies": 6, "rest": 24}
    assert watch.shares()["rest"] == 24 / 38 and sum(watch.shares().values()) == pytest.approx(1)
    assert len(waits) == 10, "the devices are waited for whenever the clock is read"

    @watch.timed("compress")
    def fail():
        clock.work(1)
        raise ValueError

    with watch.part("rest"):
        with pytest.raises(ValueError):
            fail()
        clock.work(2)
    assert watch.seconds["compress"] == 1 and watch.seconds["rest"] == 26, "it goes on after an error"


def test_every_part_of_a_step_is_seen(llama, caches, monkeypatch):
    prompt = timing.random_tokens(llama, 2, 40, 0)
    baseline, int4 = (timing.look_inside(llama.model, caches[name](), prompt, 8) for name in (BASELINE, "int4"))
    direct = {"folding", "kernels"}  # of caches whose codes are read
    assert set(int4.share) == set(PARTS)
    assert {part for part, share in int4.share.items() if share > 0} - direct == set(PARTS) - direct
    assert int4.share["kernels"] == 0
    assert baseline.share["compress"] == baseline.share["expand"] == 0
    assert baseline.share["attention"] > 0 and baseline.share["copies"] > 0
    # Of a model whose attention can't be replaced it stays in the rest
    monkeypatch.setattr(type(llama.model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    hard_wired = timing.look_inside(llama.model, caches["int4"](), prompt, 3)
    assert set(hard_wired.share) == set(PARTS) - {"attention"}
    for inside in (baseline, int4, hard_wired):
        assert sum(inside.share.values()) == pytest.approx(1) and inside.token_ms > 0


def test_a_part_is_counted_as_often_as_it_runs(llama, caches):
    """Per step and layer: one update, one attention; K as it is and V in int4 are both stored and read."""
    calls = []

    class Counting(Stopwatch):
        def timed(self, name):
            return lambda fn: lambda *args, **kwargs: calls.append(name) or fn(*args, **kwargs)

    cache, token = caches["int4"](), torch.tensor([[5]])
    llama.model(torch.randint(2, 97, (1, 20)), past_key_values=cache, use_cache=True)
    with watched(llama.model, Counting()):
        llama.model(token, past_key_values=cache, use_cache=True)
    layers = llama.geometry.num_layers
    assert calls.count("attention") == layers and calls.count("compress") == calls.count("expand") == 2 * layers
    linear = sum(isinstance(module, torch.nn.Linear) for module in llama.model.modules())
    assert calls.count("matmuls") == linear and "kernels" not in calls
    assert calls.count("copies") == 2 * layers, "our update calls the one it overrides; the inner one takes no second"


def test_a_step_over_codes_shows_its_kernels_and_what_goes_through_the_basis(llama, kernels):
    enable_compressed_attention(llama.model)
    try:
        prompt = timing.random_tokens(llama, 1, 90, 0)
        share = timing.look_inside(llama.model, from_preset("kv4", llama).make(), prompt, 4).share
    finally:
        disable_compressed_attention(llama.model)
    assert share["folding"] > 0 and share["matmuls"] > 0 and share["sampling"] > 0 and share["attention"] > 0
    assert (share["kernels"] > 0) == cpu.loaded() and share["expand"] == 0


def test_instruments_change_no_token_and_are_gone_afterwards_also_after_an_error(llama, caches):
    prompt = timing.random_tokens(llama, 2, 30, 0)
    run = timing.run_once(llama.model, caches["int4"](), prompt, 5)
    before = (TokenStore.compress, TokenStore.reconstruct, DynamicCache.update, CompressedDynamicCache.update)
    with pytest.raises(KeyboardInterrupt), watched(llama.model, Stopwatch()):
        assert torch.equal(timing.run_once(llama.model, caches["int4"](), prompt, 5).tokens, run.tokens)
        assert TokenStore.compress is not before[0]
        assert llama.model.config._attn_implementation != "sdpa"
        raise KeyboardInterrupt
    assert (TokenStore.compress, TokenStore.reconstruct, DynamicCache.update, CompressedDynamicCache.update) == before
    assert llama.model.config._attn_implementation == "sdpa"


def test_instruments_are_only_in_the_pass_that_isnt_timed(llama, caches):
    plain, seen = TokenStore.reconstruct, []

    class Spying(DynamicCache):
        def update(self, keys, *args, **kwargs):
            seen.append((keys.shape[2], TokenStore.reconstruct is plain))
            return super().update(keys, *args, **kwargs)

    timing.measure_cell(llama, {"spy": Spying}, 20, 1, decode_tokens=4, repeats=2)
    layers = llama.geometry.num_layers
    watched_steps = [(n, clean) for n, clean in seen if not clean]
    assert watched_steps == layers * 4 * [(1, False)], "only the four steps of the instruments' pass"


def test_peak_memory_sees_what_is_gone_at_the_end():
    size = 200 << 20
    with peak_memory([]) as memory:
        block = torch.ones(size // 4)
        del block
    gc.collect()
    assert 0.9 * size < memory.peak - memory.start < 2 * size
    with peak_memory([]) as after:
        pass
    assert after.peak - after.start < size / 4


def test_peak_memory_of_gpus_is_the_sum_of_their_own_counts(monkeypatch):
    reset = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 70 + device.index)
    devices = [torch.device("cuda:0"), torch.device("cuda:1")]
    with peak_memory(devices) as memory:
        assert reset == devices
    assert (memory.start, memory.peak) == (20, 141)
    assert "summed" in instruments.memory_method(devices) and "sampled every 2 ms" in instruments.memory_method([])
