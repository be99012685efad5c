"""Profiling: one loop for every cache, figures that add up, instruments that leave no trace."""

import gc
import json
import runpy
import sys

import numpy as np
import pytest
import torch
from tiny import tiny_loaded, tiny_model, word_tokenizer, write_shape
from transformers import AutoModelForCausalLM, DynamicCache

from gpt2.common import files
from gpt2.common.errors import PluginError
from gpt2.compression.cache.size import cache_bytes
from gpt2.compression.cache.token_store import TokenStore
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.named_caches import from_preset
from gpt2.evaluation import instruments, timing
from gpt2.evaluation.instruments import PARTS, Stopwatch, peak_memory, watched
from gpt2.evaluation.perplexity import BASELINE, baseline_factory
from gpt2.models import loading, random_weights
from gpt2.report import plots, tables

PRESET = {
    "model": "tiny", "rank": 12, "target": "v", "bits": 4, "compression_ratio": None, "baseline_ppl": None,
    "compressed_ppl": None, "ppl_delta": None, "calibration_file": "", "head_dim": 12, "num_layers": 3,
    "codec": "identity", "name": "int4",
}  # fmt: skip


@pytest.fixture(scope="module")
def llama():
    return tiny_loaded("llama")


@pytest.fixture(scope="module")
def caches(llama):
    return {BASELINE: baseline_factory(llama), "int4": from_preset(PRESET, llama).make}


# --- runs and cells


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
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


class Recorded:
    """Factories that write down whose cache was made and what came of it."""

    def __init__(self, caches):
        self.made, self.held = [], []
        self.factories = {name: self.factory(name, make) for name, make in caches.items()}

    def factory(self, name, make):
        def recorded():
            self.made.append(name)
            self.held.append(make())
            return self.held[-1]

        return recorded


def test_caches_take_turns_in_alternating_order_and_are_always_fresh(llama, caches):
    recorded = Recorded(caches | {"identity": lambda: identity_cache(3)})
    seen = []
    timing.measure_cell(
        llama, recorded.factories, 20, 2, decode_tokens=3, repeats=3, progress=lambda turns: seen.extend(turns) or turns
    )
    there = [BASELINE, "int4", "identity"]
    back = there[::-1]
    assert recorded.made == [*there, *there, *back, *there, *back], "warm-up, instruments, three repeats"
    assert len(seen) == 12 and len({id(cache) for cache in recorded.held}) == 15
    assert [cache.get_seq_length() for cache in recorded.held] == 3 * [16 + 2] + 12 * [20 + 3]


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


def test_the_prompt_depends_on_the_seed_alone(llama):
    a, b, c = (timing.random_tokens(llama, 3, 50, seed) for seed in (0, 0, 1))
    assert a.shape == (3, 50) and torch.equal(a, b) and not torch.equal(a, c) and (a < 97).all()


def test_a_prefill_makes_logits_of_its_last_token_only(llama, monkeypatch):
    """And where a model can't leave out the others, what it says about the last one counts."""
    shapes_seen = []
    hook = llama.model.lm_head.register_forward_hook(lambda m, a, out: shapes_seen.append(tuple(out.shape)))
    prompt = timing.random_tokens(llama, 2, 20, 0)
    short = timing.run_once(llama.model, DynamicCache(), prompt, 2)
    assert shapes_seen == 3 * [(2, 1, 97)]
    monkeypatch.setattr(timing, "_last_logits_only", lambda model: {})
    whole = timing.run_once(llama.model, DynamicCache(), prompt, 2)
    hook.remove()
    assert shapes_seen[3:] == [(2, 20, 97), (2, 1, 97), (2, 1, 97)] and torch.equal(short.tokens, whole.tokens)


class Exploding(DynamicCache):
    def update(self, keys, *args, **kwargs):
        if keys.shape[0] > 1:
            raise torch.OutOfMemoryError("no room")
        return super().update(keys, *args, **kwargs)


@pytest.mark.parametrize("culprit", [BASELINE, "int4"])
def test_a_cache_without_room_is_recorded_and_the_others_go_on(culprit, llama, caches):
    rows = timing.measure_cell(llama, caches | {culprit: Exploding}, 20, 2, decode_tokens=2, repeats=2)
    bad, good = sorted(rows, key=lambda row: row["cache"] != culprit)
    assert bad == {"cache": culprit, "context_tokens": 20, "batch_size": 2, "out_of_memory": True}
    assert good["token_ms_median"] > 0 and "ratio_to_baseline" not in good


def test_other_errors_are_not_swallowed(llama):
    class Broken(Exploding):
        def update(self, *args, **kwargs):
            try:
                return super().update(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise RuntimeError("something else") from None

    with pytest.raises(RuntimeError, match="something else"):
        timing.measure_cell(llama, {BASELINE: Broken}, 20, 2)


# --- instruments


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
    assert watch.seconds == {"compress": 0, "expand": 8, "copies": 6, "attention": 0, "rest": 24}
    assert watch.shares()["rest"] == 24 / 38 and sum(watch.shares().values()) == pytest.approx(1)
    assert len(waits) == 10, "the devices are waited for whenever the clock is read"


def test_a_stopwatch_goes_on_after_an_error():
    clock = Clock()
    watch = Stopwatch(clock=clock)

    @watch.timed("compress")
    def fail():
        clock.work(1)
        raise ValueError

    with watch.part("rest"):
        with pytest.raises(ValueError):
            fail()
        clock.work(2)
    assert watch.seconds["compress"] == 1 and watch.seconds["rest"] == 2


def test_every_part_of_a_step_is_seen(llama, caches):
    prompt = timing.random_tokens(llama, 2, 40, 0)
    baseline, int4 = (timing.look_inside(llama.model, caches[name](), prompt, 8) for name in (BASELINE, "int4"))
    assert set(int4.share) == set(PARTS) and all(share > 0 for share in int4.share.values())
    assert baseline.share["compress"] == baseline.share["expand"] == 0
    assert baseline.share["attention"] > 0 and baseline.share["copies"] > 0
    for inside in (baseline, int4):
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
    assert calls.count("copies") == 2 * layers, "our update calls the one it overrides; the inner one takes no second"


def test_instruments_are_gone_afterwards_also_after_an_error(llama):
    before = (TokenStore.compress, TokenStore.reconstruct, DynamicCache.update, CompressedDynamicCache.update)
    with pytest.raises(KeyboardInterrupt), watched(llama.model, Stopwatch()):
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


def test_instruments_change_no_token(llama, caches):
    prompt = timing.random_tokens(llama, 2, 30, 0)
    run = timing.run_once(llama.model, caches["int4"](), prompt, 5)
    with watched(llama.model, Stopwatch()):
        again = timing.run_once(llama.model, caches["int4"](), prompt, 5)
    assert torch.equal(run.tokens, again.tokens)


def test_hard_wired_attention_stays_in_the_rest(llama, caches, monkeypatch):
    monkeypatch.setattr(type(llama.model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    inside = timing.look_inside(llama.model, caches["int4"](), timing.random_tokens(llama, 1, 20, 0), 3)
    assert set(inside.share) == set(PARTS) - {"attention"} and sum(inside.share.values()) == pytest.approx(1)


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


# --- --device all


def test_all_devices_need_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(PluginError, match=r"device 'all' is not there \(0 CUDA devices found\): use auto or cpu"):
        loading.load("never looked at", device="all")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert loading.resolve_device("all") == torch.device("cuda")
    with pytest.raises(PluginError, match="is made on one device"):
        random_weights.load("qwen2.5-7b.json", "all")


@pytest.mark.parametrize(("device", "expected"), [("all", {"model": "cpu", "lm_head": "cpu"}), ("cpu", None)])
def test_all_devices_are_left_to_the_device_map(device, expected, llama, tmp_path, monkeypatch):
    """On the CPU, with a map that has only it; a model that a map has spread must not be moved afterwards."""
    tiny_model().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    assert loading.SPREAD == {"all": "auto"}
    monkeypatch.setattr(loading, "resolve_device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(loading, "SPREAD", {"all": {"model": "cpu", "lm_head": "cpu"}})
    maps, moved, load = [], [], AutoModelForCausalLM.from_pretrained

    def spied(*args, device_map, **kwargs):
        maps.append(device_map)
        model, report = load(*args, device_map=device_map, **kwargs)
        to = model.to
        model.to = lambda *args: moved.append(args) or to(*args)
        return model, report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spied)
    loaded = loading.load(str(tmp_path), device=device)
    assert maps == [expected] and bool(moved) == (device == "cpu") and loaded.fingerprint == llama.fingerprint
    prompt = timing.random_tokens(loaded, 1, 20, 0)
    tokens = [timing.run_once(each.model, identity_cache(3), prompt, 4).tokens for each in (loaded, llama)]
    assert torch.equal(*tokens)


def test_layers_that_found_no_room_are_refused():
    model = tiny_model()
    loading.refuse_offloaded(model, "x", torch.device("cpu"))
    model.model.layers[1].to("meta")
    with pytest.raises(PluginError, match="model 'x' doesn't fit on all GPUs together"):
        loading.refuse_offloaded(model, "x", torch.device("cpu"))


# --- script, table, plot


def run(*args) -> int:
    sys_argv, sys.argv = sys.argv, ["profile_kv_performance", *map(str, args)]
    try:
        runpy.run_path(str(files.ROOT / "scripts" / "profile_kv_performance.py"), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = sys_argv
    return 0


@pytest.fixture(scope="module")
def shape_file(tmp_path_factory):
    return write_shape(tmp_path_factory.mktemp("shapes") / "tiny-shape.json")


@pytest.fixture
def space(tmp_path, monkeypatch, shape_file):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.json").write_text(json.dumps(PRESET))
    return ["--model", shape_file, "--preset", "p.json", "--device", "cpu"]


SMALL = ["--context-lengths", "16,24", "--batch-sizes", "1,2", "--decode-tokens", 2, "--repeats", 1]


def test_the_script_writes_figures_a_plot_and_a_table(space, tmp_path, capsys):
    assert run(*space, *SMALL, "--identity", "--output", "out/r.json") == 0
    said = capsys.readouterr().out
    assert said.count("tokens/s") == 4 and "compress  expand" in said and "the weights are random" in said
    record = json.loads((tmp_path / "out/r.json").read_text())
    assert (tmp_path / "out/r.png").stat().st_size > 10_000
    assert record["weights"] == "random" and record["model"] == "tiny-shape.json (random weights, 3 layers)"
    assert record["peak_memory"].startswith("resident size") and record["caches"][0]["bits"] == 4
    cells = [(row["batch_size"], row["context_tokens"], row["cache"]) for row in record["rows"]]
    assert cells == [(b, c, name) for b in (1, 2) for c in (16, 24) for name in (BASELINE, "identity", "int4")]
    table = tables.profile(record, ["2"]).markdown()
    assert table.count("\n| 2 |") == 6 and "| 1 |" not in table and "Weights are random" in table
    row = next(row for row in record["rows"] if row["batch_size"] == 2 and row["cache"] == "int4")
    assert f"| {row['ratio_to_baseline']['tokens_per_s_median']:.2f}x (" in table
    with pytest.raises(PluginError, match="no rows of batch size 3"):
        tables.profile(record, ["3"])


def test_the_script_measures_a_model_with_weights(space, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RESULTS", tmp_path / "results")
    folder = tmp_path / "tiny-llama"
    tiny_model().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    assert run("--model", folder, *space[2:], "--context-lengths", 16, "--batch-sizes", 1, "--repeats", 1) == 0
    record = json.loads((tmp_path / "results/runs/profile_tiny-llama.json").read_text())
    assert record["weights"] == "trained" and (tmp_path / "results/plots/profile_tiny-llama.png").exists()
    assert "Weights" not in tables.profile(record, []).note


BAD = [
    (["--context-lengths", "510"], "510 tokens with 16 after it is longer than the 512", "--context-lengths 496"),
    (["--context-lengths", "64,1024"], "1024 tokens with 16 after it is longer", "or less"),
    (["--context-lengths", "0"], "0 is not a positive number", "--context-lengths"),
    (["--preset", "p.json", "p.json"], "two caches are called 'int4'", "another name"),
    (["--layers", "9"], "--layers 9: tiny-shape.json has 3 layers", "error"),
    (["--output", "p.json/x.json"], "can't make the folder", "p.json"),
]


@pytest.mark.parametrize(
    ("flags", "message", "advice"), BAD, ids=lambda value: " ".join(value) if type(value) is list else ""
)
def test_bad_input_is_one_clear_line_before_any_work(flags, message, advice, space, capsys, monkeypatch):
    monkeypatch.setattr(timing, "run_once", lambda *args: pytest.fail("measured"))
    assert run(*space, "--context-lengths", 16, *flags) == 2
    err = capsys.readouterr().err
    assert message in err and advice in err and "Traceback" not in err


def row(cache="int4", context=512, batch=1, **more) -> dict:
    share = dict.fromkeys(PARTS, 0.2)
    figures = {"token_ms_median": 40.0, "tokens_per_s_median": 25.0, "tokens_per_s_quartiles": [24.0, 27.0]}
    figures |= {"cache_bytes": 1 << 20, "share_of_step": share, "ttft_ms_median": 1.0, "peak_memory_bytes": 1 << 20}
    return {"cache": cache, "context_tokens": context, "batch_size": batch, **figures, **more}


def test_the_plot_takes_one_cell_many_and_none(tmp_path):
    lost = {"cache": "baseline", "context_tokens": 1024, "batch_size": 4, "out_of_memory": True}
    names = [f"a cache with a long name, number {i}" for i in range(6)]
    many = [row(name, context, batch) for name in names for context in (512, 1024, 4096, 16384) for batch in (1, 4, 16)]
    hard_wired = row(share_of_step={"compress": 0.1, "expand": 0.2, "copies": 0.0, "rest": 0.7})
    for number, rows in enumerate(([row()], [*many, lost], [lost], [hard_wired])):
        figure = plots.profiles(rows, "title")
        kept = [r for r in rows if "share_of_step" in r]
        bars = sum(len(axis.patches) for axis in figure.axes)
        assert bars == len(PARTS) * len(kept)
        files.write_figure(tmp_path / f"{number}.png", figure)
    figure = plots.profiles([row(context=512), row(context=256, tokens_per_s_median=26.0)], "title")
    line = figure.axes[0].lines[0]
    assert np.array_equal(line.get_xdata(), [256, 512]) and np.array_equal(line.get_ydata(), [26, 25])


def test_a_cache_without_room_has_a_row_in_the_table():
    lost = {"cache": "baseline", "context_tokens": 1024, "batch_size": 4, "out_of_memory": True}
    record = {"rows": [lost, row(batch=4)], "args": {"decode_tokens": 3, "repeats": 2}, "weights": "trained"}
    record |= {"model": "m", "dtype": "float32", "device": "cpu", "peak_memory": "sampled"}
    lines = tables.profile(record, []).markdown().splitlines()
    assert lines[2] == "| 4 | 1,024 | baseline | out of memory | | | | | |"
    assert {line.count("|") for line in lines[:4]} == {10}, "every row has every column"
