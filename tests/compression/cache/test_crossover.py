"""Whether a step reads codes or reconstructs, by times that a table gives in the place of a clock."""

import copy
import json
import logging
import pickle

import pytest
import torch
from direct import SETTINGS, cache_of
from tiny import tiny_model, windows

from gpt2.common.errors import PluginError
from gpt2.compression.attention import disable_compressed_attention, enable_compressed_attention, is_enabled
from gpt2.compression.cache import crossover, direct_attention
from gpt2.compression.cache.crossover import Crossover, Crossovers
from gpt2.compression.cache.token_store import TokenStore

DIRECT, RECONSTRUCTED = "direct", "reconstructed"
# Seconds of both ways at 8, 16 and 32 tokens, and the tokens from which on reading codes pays
TABLES = {
    "never": ([3e-3, 4e-3, 6e-3], [1e-3, 2e-3, 3e-3], None),
    "from 12 on": ([3e-3, 3e-3, 3e-3], [1e-3, 5e-3, 6e-3], 12),
    "always": ([1e-3, 2e-3, 3e-3], [1e-3, 3e-3, 6e-3], 0),
    "only in between": ([3e-3, 3e-3, 9e-3], [1e-3, 5e-3, 6e-3], None),
}


class Pretended:
    """A clock that goes on only while attention reads a cache, as a table says; `ran` has the ways that were taken."""

    def __init__(self, monkeypatch, direct: list[float], reconstructed: list[float]):
        self.now, self.ran, self.measured = 0.0, [], 0
        self.seconds = {
            way: dict(zip(crossover.LENGTHS, times, strict=True))
            for way, times in ((DIRECT, direct), (RECONSTRUCTED, reconstructed))
        }
        attend, read, measure = direct_attention.attend, TokenStore.read, crossover.measure

        def timed_attend(k, v, query, *args, **how):
            self.take(DIRECT, len(k), 1)
            return attend(k, v, query, *args, **how)

        def timed_read(store):
            self.take(RECONSTRUCTED, len(store), 2)  # once for K and once for V
            return read(store)

        def counted(*args):
            self.measured += 1
            found = measure(*args)
            self.ran.clear()
            return found

        monkeypatch.setattr(direct_attention, "attend", timed_attend)
        monkeypatch.setattr(TokenStore, "read", timed_read)
        monkeypatch.setattr(crossover, "measure", counted)
        monkeypatch.setattr(crossover, "clock", lambda: self.now)

    def take(self, way: str, tokens: int, parts: int) -> None:
        self.now += self.seconds[way].get(tokens, 0.0) / parts
        self.ran.append(way)


@pytest.fixture
def path(tmp_path):
    """The file of crossovers."""
    return tmp_path / "kept" / "crossovers.json"


@pytest.fixture
def fresh(monkeypatch, path):
    """Go on as in a process that has just started."""
    return lambda: monkeypatch.setattr(crossover, "KNOWN", Crossovers(lambda: path))


@pytest.fixture
def pretend(monkeypatch, fresh):
    """Pretend that a named table of TABLES is this machine's; crossovers are kept in a folder of the test."""
    monkeypatch.setattr(crossover, "LENGTHS", (8, 16, 32))
    monkeypatch.setattr(crossover, "FLUSH_BYTES", 1)
    fresh()
    return lambda table: Pretended(monkeypatch, *TABLES[table][:2])


@pytest.fixture
def llama():
    return tiny_model("llama", num_hidden_layers=1)


@pytest.fixture
def auto(llama):
    """The model, which is to take the faster way."""
    return enable_compressed_attention(llama, when="auto")


@torch.no_grad()
def ways(model, pretended: Pretended, lengths, batch: int = 1, k: str = "int8", v: str = "int4") -> list[str]:
    """The way that a step takes at each of these numbers of tokens held, in ascending order."""
    cache, held, found = cache_of(model, SETTINGS[k], SETTINGS[v]), 0, []
    ids = windows(batch, max(lengths))
    for length in lengths:
        pretended.ran.clear()
        model(ids[:, held:length], past_key_values=cache)
        found.append(pretended.ran[-1])  # before it, a store may have been read to recognise a prompt
        held = length
    return found


# --- "auto"


@pytest.mark.parametrize("table", TABLES)
def test_each_step_takes_the_faster_way_for_what_it_holds(table, pretend, auto):
    pretended, start = pretend(table), TABLES[table][2]
    lengths = [5, 11, 12, 13, 40, 41]
    expected = [RECONSTRUCTED if start is None or n < start else DIRECT for n in lengths]
    assert ways(auto, pretended, lengths) == expected and pretended.measured == 1


TIMES = {"tokens": [8, 16], "direct_ms": [1.0, 2.0], "reconstructed_ms": [2.0, 3.0]}


def test_a_crossover_is_measured_once_and_read_by_later_processes(pretend, auto, fresh, path, caplog):
    """What another process writes meanwhile stays in the file."""
    pretended = pretend("from 12 on")
    assert crossover.KNOWN.find("nothing") is None, "the file is read before the other process writes it"
    path.parent.mkdir()
    path.write_text(json.dumps({"crossovers": {"of another": TIMES}}))
    for _ in range(3):
        assert ways(auto, pretended, [11, 13]) == [RECONSTRUCTED, DIRECT]
        fresh()
    assert pretended.measured == 1
    (record,) = caplog.records
    assert "below 12 tokens (3 against 1 ms at 8 tokens, " in record.message and "\n" not in record.message
    assert str(path.parent) in record.message
    held = json.loads(path.read_text())["crossovers"]
    assert len(held) == 2 and held["of another"] == TIMES


def test_another_kind_of_step_is_measured_for_itself(pretend, auto, monkeypatch):
    pretended = pretend("never")
    for how in ({}, {"batch": 2}, {"v": "int8"}, {"k": "mixed"}):
        ways(auto, pretended, [5], **how)
    monkeypatch.setenv("KV_CPU_ISA", "generic")
    ways(auto, pretended, [5])
    monkeypatch.setattr(crossover.cpu, "usable", lambda x: False)
    ways(auto, pretended, [5])
    kinds = set(crossover.KNOWN.read())
    assert pretended.measured == len(kinds) >= 4 + 2 * crossover.cpu.loaded()
    ways(auto, pretended, [5])
    assert pretended.measured == len(kinds)


DAMAGED = {
    "empty": "", "cut off": '{"crossovers": {"a', "a list": "[]", "of another kind": '{"crossovers": 3}',
    "without crossovers": "{}", "not text": b"\xff\xfe\x00\xff", "deep": "[" * 100_000,
    "no times": {"tokens": [8]}, "words": TIMES | {"direct_ms": ["fast", "slow"]},
    "uneven": TIMES | {"tokens": [8]}, "none": dict.fromkeys(TIMES, []), "backwards": TIMES | {"tokens": [16, 8]},
}  # fmt: skip


def test_a_damaged_file_counts_as_empty_and_is_replaced(pretend, auto, fresh, path):
    pretended = pretend("from 12 on")
    ways(auto, pretended, [5])
    (kind,) = json.loads(path.read_text())["crossovers"]
    for what, content in DAMAGED.items():
        if isinstance(content, dict):
            content = json.dumps({"crossovers": {kind: content}})
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        fresh()
        pretended.measured = 0
        assert ways(auto, pretended, [11, 13]) == [RECONSTRUCTED, DIRECT] and pretended.measured == 1, what
        held = json.loads(path.read_text())["crossovers"]
        assert list(held) == [kind] and held[kind]["tokens"] == [8, 16, 32], what


@pytest.mark.parametrize("where", ["a folder", "below a file", "no home"])
def test_where_nothing_can_be_written_it_is_kept_in_memory(where, pretend, auto, monkeypatch, tmp_path, caplog):
    pretended = pretend("from 12 on")
    (tmp_path / "file").write_text("")

    def path():
        if where == "no home":
            raise RuntimeError("Could not determine home directory.")
        return tmp_path if where == "a folder" else tmp_path / "file" / "crossovers.json"

    monkeypatch.setattr(crossover, "KNOWN", Crossovers(path))
    assert ways(auto, pretended, [11, 13]) == ways(auto, pretended, [11, 13]) == [RECONSTRUCTED, DIRECT]
    assert pretended.measured == 1 and "kept in this process alone (" in caplog.records[-1].message


def test_a_slow_machine_is_measured_at_fewer_lengths(pretend, auto, monkeypatch):
    monkeypatch.setitem(TABLES, "slow", ([0.1] * 3, [0.05] * 3, None))
    assert ways(auto, pretend("slow"), [5]) == [RECONSTRUCTED]
    (held,) = crossover.KNOWN.read().values()
    assert held.tokens == [8]


def test_out_of_memory_reads_codes_and_keeps_nothing(pretend, auto, monkeypatch, tmp_path):
    pretended = pretend("never")
    monkeypatch.setattr(crossover, "fill", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    assert ways(auto, pretended, [5, 6]) == [DIRECT] * 2
    assert pretended.measured == 1 and not list(tmp_path.iterdir())
    assert Crossover().pays(0) and Crossover([8], [1.0], [1.0]).pays(1), "nothing says that it is slower"


# --- "always"


@pytest.mark.parametrize(("table", "told_at"), [("never", 5), ("from 12 on", 5), ("always", None)])
def test_who_reads_codes_where_that_is_slower_is_told_once(table, told_at, pretend, auto, fresh, caplog, monkeypatch):
    """Another process has measured it; above the crossover no warning is logged."""
    pretended, asked, kind = pretend(table), [], crossover.kind
    ways(auto, pretended, [5])
    fresh()
    llama = enable_compressed_attention(disable_compressed_attention(auto))
    caplog.clear()
    monkeypatch.setattr(crossover, "kind", lambda *of: asked.append(0) or kind(*of))
    if table != "never":
        ways(llama, pretended, range(12, 20))
        assert not caplog.records
        # The name of a kind of step takes a good part of a step to put together
        assert len(asked) == (table == "from 12 on"), "a layer asks once what is known, and only if anything is slower"
    for _ in range(2):
        assert set(ways(llama, pretended, [5, 6, 30])) == {DIRECT}, "always reads codes"
    said = [record.message for record in caplog.records]
    assert len(said) == (told_at is not None)
    assert all(f"at {told_at} tokens" in line and "when='auto'" in line for line in said)
    assert pretended.measured == 1


def test_by_default_nothing_is_measured_and_codes_are_read(pretend, llama, tmp_path, caplog):
    pretended = pretend("never")
    with caplog.at_level(logging.INFO, "gpt2"):
        enable_compressed_attention(llama)
        assert set(ways(llama, pretended, [5, 6])) == {DIRECT}
    assert not pretended.measured and not list(tmp_path.iterdir()) and not caplog.records


# --- `when` of a model


def test_a_wrong_choice_names_the_right_ones(llama):
    for when in ("sometimes", "", None, True, "AUTO"):
        with pytest.raises(PluginError, match=r"^when=.*: expected 'always' \(.*\) or 'auto' \(.*\)$") as caught:
            enable_compressed_attention(llama, when=when)
        assert repr(when) in str(caught.value) and not is_enabled(llama)


def test_enabling_again_takes_what_the_last_call_says_and_copies_keep_their_choice(pretend, llama):
    pretended = pretend("never")
    for when, expected in (("always", DIRECT), ("auto", RECONSTRUCTED)):
        assert enable_compressed_attention(llama, when=when) is llama
        assert ways(llama, pretended, [5]) == [expected]
    copies = copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))
    enable_compressed_attention(llama)
    assert ways(llama, pretended, [5]) == [DIRECT]
    for other in copies:
        assert ways(other, pretended, [5]) == [RECONSTRUCTED]
    enable_compressed_attention(llama, when="auto")
    disable_compressed_attention(llama)
    enable_compressed_attention(llama)
    assert ways(llama, pretended, [5]) == [DIRECT], "a disabled model has no choice left"
