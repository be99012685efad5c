"""Other people's caches beside ours: KIVI as it is described, bytes that are held, and rows instead of crashes."""

import copy
import importlib
import json
import runpy
import sys
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.text import Annotation, Text
from tiny import char_tokenizer, tiny_loaded, tiny_model, windows
from transformers import AutoConfig, DynamicCache, cache_utils

from gpt2.common import files
from gpt2.common.errors import CalibrationNotFound, PluginError
from gpt2.compression.cache.size import cache_bytes, held_bytes
from gpt2.compression.compressed_cache import identity_cache
from gpt2.compression.presets import preset_files
from gpt2.evaluation import kivi, lineup, needle, other_caches, peers
from gpt2.evaluation.perplexity import BASELINE, baseline_factory, compare, score
from gpt2.report import plots, regions, tables

BITS = (4, 3, 2)
H, D, T = 2, 64, 300
SHAPE = {"hidden_size": 64}  # head_dim 16: groups of 64 and packing by 8 fit


@pytest.fixture(scope="module")
def llama():
    return tiny_loaded("llama", char_tokenizer(), **SHAPE)


@pytest.fixture(scope="module")
def x():
    return torch.randn(1, H, T, D, generator=torch.Generator().manual_seed(0))


needs_fp8 = pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="no fp8 in this transformers")


def installed(family: str) -> None:
    """Skip where an optional package isn't there."""
    module, package = other_caches.PACKAGES[family]
    try:
        importlib.import_module(module)
    except ImportError:
        pytest.skip(f"{package} is not installed (requirements-peers.txt)")


def peer(family: str, **overrides):
    """A cache of transformers for two layers of [B, 2, n, 64]."""
    config = AutoConfig.for_model("llama", num_hidden_layers=2, num_attention_heads=H, hidden_size=H * D)
    if family == "fp8":
        return other_caches.SharedCache("fp8", config)
    axis = other_caches.AXES[family]
    settings = {"nbits": 4, "axis_key": axis, "axis_value": axis, "q_group_size": 64, "residual_length": 0} | overrides
    return other_caches.SharedCache(family, config, **settings)


def fed(cache, x, chunk: int):
    """What the last update of layer 0 returns for K, after x has gone into every layer."""
    for piece in x.split(chunk, dim=2):
        returned = [cache.update(piece, piece, index)[0] for index in range(len(cache.layers))]
    return returned[0]


# --- KIVI


@pytest.mark.parametrize("bits", BITS)
def test_codes_survive_packing(bits):
    codes = torch.randint(2**bits, (3, 5, 32), generator=torch.Generator().manual_seed(bits))
    packed = kivi.pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 5, 32 * bits // 8)
    assert torch.equal(kivi.unpack(packed, bits), codes)


def test_packing_leaves_no_bit_unused():
    """Eight codes of 3 bits, lowest first, are one number of 24 bits in three bytes."""
    codes = [5, 0, 7, 1, 2, 6, 3, 4]
    number = sum(code << 3 * place for place, code in enumerate(codes))
    assert kivi.pack(torch.tensor(codes), 3).tolist() == list(number.to_bytes(3, "little"))


@pytest.mark.parametrize("bits", BITS)
def test_error_is_half_a_step_of_the_own_group(bits, x):
    groups = x.unflatten(-1, (-1, 32)) * torch.logspace(-3, 3, T)[:, None, None] + 0.5
    fields = kivi.quantize(groups, bits)
    error = (kivi.dequantize(fields, bits) - groups).abs()
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    rounding = 2**-10 * torch.maximum(low.abs(), high.abs()) + 1e-4  # scale and zero are float16
    assert (error <= step / 2 + rounding).all()
    assert (error > step / 4).float().mean() > 0.2, "such an error is expected of so few bits"
    assert fields["scale"].dtype == fields["zero"].dtype == torch.float16


def test_a_constant_group_stays_as_it_is():
    groups = torch.full((2, 32), 3.25)
    assert torch.equal(kivi.dequantize(kivi.quantize(groups, 2), 2), groups)


def test_keys_are_quantized_per_channel_and_values_per_token(x):
    """What is loud spoils its own group and no other: that of its channel for K, of its token for V."""
    channel, token = x.clone(), x.clone()
    channel[..., 7] *= 1000
    token[:, :, 70] *= 1000
    k, v = (partial(kivi.KiviSide, 4, 0, block) for block in (32, 1))
    for make, data, beside in ((k, channel, (..., slice(8, 32))), (v, token, (..., slice(64, 70), slice(None)))):
        assert error_of(make(), data)[beside].max() < 0.5
        other = v if make is k else k
        assert error_of(other(), data)[beside].median() > 0.5
    assert error_of(v(), channel)[..., 32:].max() < 0.5 and error_of(k(), token)[:, :, 96:].max() < 0.5


def error_of(side: kivi.KiviSide, x):
    side.append(x)
    return (side.read() - x).abs()


@pytest.mark.parametrize("sinks", [0, 4])
def test_what_is_read_is_what_is_stored(x, sinks):
    """The new chunk too, K but for its unfinished group; and the stored doesn't depend on the chunks."""
    side = {name: kivi.KiviSide(2, sinks, block) for name, block in (("k", 32), ("v", 1))}
    for piece in x.split(50, dim=2):
        for one in side.values():
            one.append(piece)
    for name, one in side.items():
        read, rest = one.read(), (T - sinks) % 32 if name == "k" else 0
        exact = (read == x).flatten(3).all(-1)[0, 0]
        assert exact[:sinks].all() and exact[T - rest :].all() and len(one) == T
        assert not exact[sinks : T - rest].any()
        whole = kivi.KiviSide(2, sinks, one.block)
        whole.append(x)
        assert torch.equal(whole.read(), read)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sinks", [0, 4])
def test_kivi_holds_what_a_hand_counts(x, bits, sinks):
    cache = kivi.kivi_cache(2, bits, sinks)
    fed(cache, x.bfloat16(), 64)
    group = 32 * bits // 8 + 2 + 2  # codes, scale, zero
    groups = (T - sinks) // 32
    keys = H * D * (groups * group + (T - 32 * groups) * 2)
    values = H * ((T - sinks) * D // 32 * group + sinks * D * 2)
    assert cache_bytes(cache) == 2 * (keys + values)


def test_kivi_refuses_what_its_packing_does_not_fit():
    with pytest.raises(PluginError, match="head_dim 12 isn't a multiple of 8"):
        kivi.kivi_cache(1, 4).update(torch.randn(1, 1, 40, 12), torch.randn(1, 1, 40, 12), 0)


def test_generation_runs_through_kivi(llama):
    ids = windows(2, 70)
    cache = kivi.kivi_cache(3, 4, 0)
    tokens = llama.model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=6, pad_token_id=0)
    assert tokens.shape == (2, 76) and cache.get_seq_length() == 75


# --- bytes of others' caches


@pytest.mark.parametrize("family", ["quanto", "hqq"])
@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("residual", [0, 128])
def test_inner_tensors_of_quantized_caches_are_counted(family, bits, residual, x):
    installed(family)
    cache = peer(family, nbits=bits, residual_length=residual)
    fed(cache, x[:, :, :256].bfloat16(), 64)
    exact = 64 if residual else 0  # 64 at first, 128 more at once, then 64 in the residual
    numbers = H * D * (256 - exact)
    side = numbers * bits // 8 + numbers // 64 * (2 + 2) + H * D * exact * 2
    assert cache_bytes(cache) == 2 * 2 * side


@needs_fp8
def test_fp8_is_counted(x):
    cache = peer("fp8")
    fed(cache, x.bfloat16(), 64)
    assert cache_bytes(cache) == 2 * 2 * (H * D * T + 4)


def test_everybody_is_filled_alike(llama):
    """By chunks of 64, in 16 bits; a cache of ours that keeps all and transformers' own are then as large."""
    own = held_bytes(baseline_factory(llama), llama.geometry, 256, chunk=64)
    assert own == 256 * llama.geometry.bytes_per_token()
    assert held_bytes(lambda: identity_cache(3), llama.geometry, 256, chunk=64) == own
    assert held_bytes(lambda: kivi.kivi_cache(3, 4, 0), llama.geometry, 256, chunk=64) < own / 2


def test_caches_are_filled_by_chunks(llama, monkeypatch):
    sizes = []
    monkeypatch.setattr(kivi.KiviSide, "append", lambda side, x: sizes.append((x.shape[2], x.dtype)))
    held_bytes(lambda: kivi.kivi_cache(1, 4), llama.geometry, 96, chunk=32)
    assert sizes == [(32, torch.bfloat16)] * 3 * 2


@pytest.mark.parametrize("family", ["quanto", "hqq", pytest.param("fp8", marks=needs_fp8)])
def test_a_copy_keeps_what_it_held(family, x):
    if family != "fp8":
        installed(family)
    cache = peer(family)
    fed(cache, x[:, :, :64], 32)
    twin = copy.deepcopy(cache)
    fed(cache, x[:, :, 64:128], 64)
    assert (cache.get_seq_length(), twin.get_seq_length()) == (128, 64)
    returned = fed(twin, x[:, :, 64:96], 32)
    assert returned.shape[2] == 96 and (returned[:, :, :64] - x[:, :, :64]).abs().max() < 1
    assert twin.get_seq_length() == 96 and cache.get_seq_length() == 128


# --- rows instead of crashes


class Breaks(DynamicCache):
    """Fails when it is to take more than 100 tokens, on a model but not when it is weighed."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self.get_seq_length() > 100:
            raise RuntimeError("kernel\n  exploded")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class Poisons(DynamicCache):
    def update(self, *args, **kwargs):
        keys, values = super().update(*args, **kwargs)
        return keys, values * torch.nan


def test_a_package_that_is_missing_gives_rows(llama, monkeypatch):
    for module, _ in other_caches.PACKAGES.values():
        monkeypatch.setitem(sys.modules, module, None)
    found = lineup.for_quality(llama, ["quanto", "hqq", "kivi"], [])
    assert [entry.make is None for entry in found] == [True] * 8 + [False] * 6
    assert peers.reason(found[0].error) == "optimum-quanto is not installed: pip install -r requirements-peers.txt"
    rows = peers.measure(llama, windows(1, 96), [found[0], found[-1]])
    assert "not_run" in rows[1] and "ppl" not in rows[1] and rows[2]["compression_ratio_2048"] > 1.9


@needs_fp8
def test_a_model_that_a_backend_refuses_gives_rows():
    found = lineup.for_quality(tiny_loaded("mistral"), ["fp8", "kivi"], [])
    assert "only full attention" in peers.reason(found[0].error) and all(entry.make for entry in found[1:])


def test_one_cache_that_fails_does_not_stop_the_others(llama):
    segments = windows(3, 160)
    caches = {BASELINE: baseline_factory(llama), "kivi": lambda: kivi.kivi_cache(3, 2)}
    broken = {"nan": Poisons, "breaks": Breaks}
    failed = {}
    scores = score(llama, segments, broken | caches, chunk=32, batch_size=2, failed=failed)
    assert list(scores) == [BASELINE, "kivi"] and set(failed) == set(broken)
    alone = score(llama, segments, caches, chunk=32, batch_size=2)
    for name in caches:
        assert np.array_equal(scores[name].nll, alone[name].nll)
    assert "NaN" in peers.reason(failed["nan"]) and peers.reason(failed["breaks"]) == "RuntimeError: kernel exploded"


@pytest.mark.parametrize("failed", [None, {}])
def test_without_a_baseline_there_is_nothing_to_measure(llama, failed):
    with pytest.raises(RuntimeError, match="exploded"):
        score(llama, windows(1, 160), {BASELINE: Breaks}, chunk=32, failed=failed)
    if failed is None:
        with pytest.raises(RuntimeError, match="exploded"):
            score(llama, windows(1, 160), {"peer": Breaks}, chunk=32)


def test_rows_have_what_score_and_weights_say(llama):
    segments = windows(2, 160)
    own = lineup.Entry("kivi", "KIVI", lambda: kivi.kivi_cache(3, 2))
    broken = lineup.Entry("quanto", "breaks", lambda: kivi.kivi_cache(3, 2).nothing)
    rows = peers.measure(llama, segments, [broken, own], chunk=32, batch_size=1)
    assert [row["label"] for row in rows] == [BASELINE, "breaks", "KIVI"]
    assert rows[1]["not_run"].startswith("AttributeError")
    assert rows[0]["ppl_delta"] == 0 and rows[0]["bytes_per_token"] == llama.geometry.bytes_per_token()
    scores = score(llama, segments, {BASELINE: baseline_factory(llama), "KIVI": own.make}, chunk=32, batch_size=1)
    assert rows[2].items() >= compare(scores[BASELINE], scores["KIVI"]).items() and rows[2]["kl_nats"] > 0
    assert rows[2]["cache_bytes_2048"] == held_bytes(own.make, llama.geometry, 2048, chunk=32)
    assert rows[2]["compression_ratio_2048"] == rows[0]["cache_bytes_2048"] / rows[2]["cache_bytes_2048"]


def test_needles_go_on_without_the_cache_that_fails(llama):
    haystack = torch.randint(60, 90, (2000,), generator=torch.Generator().manual_seed(0))
    compared = [lineup.Entry("quanto", "breaks", Breaks), lineup.Entry("kivi", "KIVI", lambda: kivi.kivi_cache(3, 4))]
    rows = [{"label": BASELINE}, {"label": "breaks"}, {"label": "KIVI"}, {"label": "gone", "not_run": "why"}]
    grid = {"lengths": [320], "depths": [0.2, 0.8], "trials": 1, "prefill_chunk": 64}
    asked = peers.ask_needles(llama, haystack, compared, rows, **grid)
    assert "exploded" in rows[1]["needle_not_run"] and "needle_exact_match" not in rows[1] and len(rows[3]) == 2
    caches = {BASELINE: baseline_factory(llama), "KIVI": compared[1].make}
    alone = needle.measure(llama, haystack, caches, **grid)
    assert asked["summary"] == needle.summarize(alone)
    assert sorted(map(str, asked["cells"])) == sorted(map(str, needle.cells(alone)))
    assert rows[2]["needle_exact_match"] == asked["summary"][0]["exact_match"]


def test_reasons_name_no_folder_of_the_machine():
    lost = CalibrationNotFound("Calibration file not found: c.pt. Looked at: /srv/me/c.pt. Make it")
    assert peers.reason(lost) == "Calibration file not found: c.pt."
    assert peers.reason(OSError(f"bad {files.ROOT}/gpt2/x.py")) == "OSError: bad gpt2/x.py"
    assert peers.reason(RuntimeError("can't allocate memory")) == "out of memory"
    assert len(peers.reason(ValueError("x" * 999))) == 160


PRESET = {"rank": 16, "bits": 4, "codec": "identity", "target": "v", "head_dim": 16, "num_layers": 3,
          "compression_ratio": 1.5, "baseline_ppl": 1.0, "compressed_ppl": 1.0, "ppl_delta": 0.0,
          "calibration_file": "nowhere.pt"}  # fmt: skip


def write_presets(folder, model: str) -> None:
    """Built-in presets of a model: the guide's low rank, whose calibration isn't there, and one of ours."""
    folder.mkdir()
    ranks = {"r12-vonly": {"rank": 12, "bits": 16, "codec": "pca"}, "int4-vonly": {}}
    for name, own in ranks.items():
        (folder / f"{name}.json").write_text(json.dumps(PRESET | own | {"model": model, "name": name}))


def test_built_in_presets_are_compared_unless_others_are_given(llama, tmp_path, monkeypatch):
    assert "no preset rN-vonly" in peers.reason(lineup.for_quality(llama, ["lowrank"])[0].error)
    write_presets(tmp_path / "presets", llama.spec)
    monkeypatch.setattr(preset_files, "BUILT_IN", (tmp_path / "presets",))
    found = lineup.for_quality(llama, ["lowrank"])
    assert [(entry.family, entry.label) for entry in found] == [("lowrank", "r12-vonly"), ("ours", "int4-vonly")]
    assert isinstance(found[0].error, CalibrationNotFound) and found[1].preset["bits"] == 4
    assert [entry.label for entry in lineup.for_quality(llama, [], [])] == []
    with pytest.raises(PluginError, match="did you mean 'int4-vonly'"):
        lineup.for_quality(llama, [], ["int5-vonly"])
    with pytest.raises(PluginError, match="two caches are called 'int4-vonly'"):
        lineup.for_quality(llama, [], ["int4-vonly", "int4-vonly"])


# --- script, table, picture


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Runs the script in an empty folder on a tiny saved model; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "RESULTS", tmp_path / "results")
    letters = np.random.default_rng(0).choice(list("abcdefghij   "), size=5000)
    (tmp_path / "prose.txt").write_text("".join(letters))
    tiny_model("llama", **SHAPE).save_pretrained("tiny")
    char_tokenizer().save_pretrained("tiny")
    write_presets(tmp_path / "presets", "tiny")
    monkeypatch.setattr(preset_files, "BUILT_IN", (tmp_path / "presets",))

    def run(*flags) -> int:
        words = ["--model", "tiny", "--text", "prose.txt", "--eval-tokens", 128, "--eval-seq-len", 64, "--chunk", 32]
        monkeypatch.setattr(sys, "argv", ["compare_peers", *map(str, [*words, *flags])])
        try:
            runpy.run_path(str(files.ROOT / "scripts/compare_peers.py"), run_name="__main__")
        except SystemExit as stop:
            return stop.code or 0
        return 0

    return run


def test_the_script_compares(script, tmp_path, capsys, monkeypatch):
    ask, chunks = needle.ask, set()
    monkeypatch.setattr(needle, "ask", lambda *args: chunks.add(args[-1]) or ask(*args))
    monkeypatch.setitem(sys.modules, "optimum.quanto", None)
    flags = ["--peers", "quanto,kivi,lowrank", "--needle-context-lengths", 320, "--num-trials", 1]
    assert script(*flags) == 0 and chunks == {32}
    said = capsys.readouterr().out
    assert "quanto 4 bits, residual 128  not run: optimum-quanto is not installed" in said and "KIVI 3 bits" in said
    written = {path.name for path in (tmp_path / "results").rglob("*.*")}
    assert written == {"peers_tiny.json", "peers_tiny.png"}
    record = json.loads((tmp_path / "results/runs/peers_tiny.json").read_text())
    assert {"args", "git_commit", "versions", "fingerprint", "text_sha256", "peer_versions"} <= record.keys()
    rows = {row["label"]: row for row in record["rows"]}
    assert len(rows) == 1 + 4 + 6 + 1 + 1 and len(record["needle"]["cells"]) == 5 * (1 + 6 + 1)
    assert sum("not_run" in row for row in record["rows"]) == 5 and "not_run" in rows["r12-vonly"]
    assert rows["int4-vonly"]["preset"]["bits"] == 4 and "needle_exact_match" in rows["KIVI 2 bits"]
    assert rows["KIVI 2 bits"]["kl_nats"] > rows["KIVI 4 bits"]["kl_nats"] > 0
    table = regions.fill("<!-- results: peers_tiny kivi -->\n<!-- end -->", tmp_path / "results/runs")
    assert table.count("| KIVI") == 6 and "quanto" not in table and "| 16-bit cache | 384 | 1.00x |" in table


def test_the_script_asks_no_needles_when_told(script, tmp_path):
    flags = ["--peers", "fp8", "--preset", "--needle-context-lengths", "none", "--output", "p.json"]
    assert script(*flags) == 0
    record = json.loads((tmp_path / "p.json").read_text())
    assert record["needle"] is None and [row["label"] for row in record["rows"]] == [BASELINE, "fp8, a scale per layer"]


@pytest.mark.parametrize(("flags", "message"), [
    (["--peers", "kivi,nope"], "unknown nope"),
    (["--preset", "none.json"], "no preset file none.json"),
    (["--needle-context-lengths", "64"], "a context of 64 tokens has no room"),
])  # fmt: skip
def test_bad_input_is_one_clear_line_before_any_work(script, flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "measure", lambda *args, **kwargs: pytest.fail("it measures"))
    assert script(*flags) == 2
    assert message in (err := capsys.readouterr().err) and "Traceback" not in err
    assert not list(tmp_path.rglob("*.png"))


def figures(label: str, family: str, size: float, change: float, **more) -> dict:
    row = {"label": label, "family": family, "bytes_per_token": size, "compression_ratio_2048": 1000 / size}
    row |= {"ppl": 20.0, "ppl_delta": change, "ppl_delta_interval": [change - 0.01, change + 0.01], "tokens": 2047}
    return row | {"kl_nats": abs(change), "top1_agreement": 0.9} | more


RECORD = {
    "model": "m", "text": "t", "args": {"needle_context_lengths": [1024]}, "needle": {"summary": [{"prompts": 15}]},
    "rows": [
        figures(BASELINE, BASELINE, 1000, 0.0, needle_exact_match=1.0),
        {"label": "hqq 4 bits", "family": "hqq", "not_run": "ValueError: a | b"},
        figures("fp8", "fp8", 500, -0.001, needle_not_run="out of memory"),
        figures("kv8", "ours", 500, 0.125, needle_exact_match=0.8),
    ],
}  # fmt: skip


def test_table_has_a_line_per_cache():
    lines = tables.peers(RECORD, []).markdown().splitlines()
    assert lines[2] == "| 16-bit cache | 1,000 | 1.00x | +0.00% | -1.00% … +1.00% | 0.0000 | 90.0% | 100% |"
    assert lines[3] == "| hqq 4 bits | not run: ValueError: a \\| b | | | | | | |"
    assert lines[4].endswith("| 90.0% | – |")
    assert lines[5] == "| kv8 | 500 | 2.00x | +12.50% | +11.50% … +13.50% | 0.1250 | 90.0% | 80% |"
    assert "15 prompts of 1,024 tokens. Not asked: fp8 (out of memory)." in lines[-1]
    with pytest.raises(PluginError, match="no rows of family kivi"):
        tables.peers(RECORD, ["kivi"])


def test_labels_of_the_frontier_lie_apart():
    rng = np.random.default_rng(0)
    sizes, changes = rng.uniform(300, 500, 24), rng.uniform(-0.02, 0.02, 24)
    names = [f"a cache whose name is as long as {i}" for i in range(24)]
    rows = [figures(name, "ours", *point) for name, *point in zip(names, sizes, changes, strict=True)]
    figure = plots.peers([*RECORD["rows"], *rows], "title")
    assert [axis.get_ylabel().split(",")[0] for axis in figure.axes] == [
        "change of perplexity", "KL from the uncompressed model", "top-1 agreement",
    ]  # fmt: skip
    figure.canvas.draw()
    notes = [text for text in figure.axes[0].texts if isinstance(text, Annotation)]
    assert [note.get_text() for note in notes] == [row["label"] for row in [*RECORD["rows"], *rows] if "ppl" in row]
    boxes = [Text.get_window_extent(note) for note in notes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(figure.axes[0].get_window_extent().contains(*corner) for box in boxes for corner in (box.min, box.max))
