"""Anything that can happen to a cache, in any order, against a plain model of it: what is read is what was stored.

The plain model is one tensor of all tokens; every block that becomes full goes through the codec once, by itself. What
is read are the last of them, as many as a window lets the newest queries see. `make test` tries some histories, `make
fuzz` thousands; what fails is cut down to the shortest that does.
"""

from __future__ import annotations

import copy
import os
import pickle
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sampling import ALL
from stores import BlockInt8, Plain, joint, transform
from torch import Tensor
from torch.nn.functional import pad

from gpt2.common.errors import PluginError
from gpt2.compression.cache import direct_attention, recoding, token_store
from gpt2.compression.cache.size import cache_bytes
from gpt2.compression.cache.storages import storages_of
from gpt2.compression.codecs import QUANTIZERS, Compressor, IdentityCompressor
from gpt2.compression.codecs.mixed import Mixed
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.kernels import cpu
from gpt2.models.geometry import FULL, LINEAR, NOTHING, SLIDING, Geometry, LayerGeometry, Shape

HISTORIES = int(os.environ.get("FUZZ_HISTORIES", 100 if ALL else 30))
H, D = 2, 16
LAYOUTS = [(0, 0), (4, 0), (5, 6), (64, 0), (70, 40)]  # exact sinks, exact latest tokens
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LOADED = cpu.loaded  # whether there are kernels
LENGTHS = st.one_of(st.integers(0, 4), st.integers(1, 300))
ORDERS = [torch.preserve_format, torch.contiguous_format, torch.channels_last]
# Layers of a cache: windows by their size, of which the first is stored exactly; those behind nothing keep no K and V
LISTS = [(FULL,), (FULL,), (20,), (128,), (150,), (NOTHING, 130), (150, FULL), (LINEAR, FULL, 200, NOTHING)]
SMALLEST = [token_store.SMALLEST_CHUNK, 3]  # with the second, short histories make many pieces and join them
COMPRESSORS = {
    "identity": lambda: IdentityCompressor(),
    "block": lambda: Compressor(BlockInt8(), transform(7)),
    "low-rank": lambda: Compressor(QUANTIZERS["none"], transform(9)),
    "token-int4": lambda: Compressor(QUANTIZERS["int4"], transform(5)),
    "joint-heads": lambda: Compressor(QUANTIZERS["int8"], transform(20, groups=1, width=H * D)),
    "channel-int4": lambda: Compressor(QUANTIZERS["int4_channel"]),
    "channel-int8": lambda: Compressor(QUANTIZERS["int8_channel"], transform(16)),
    "mixed": lambda: Compressor(Mixed(4.0), transform(16)),
    "mixed-heads": lambda: Compressor(Mixed(3.0), transform(32, groups=1, width=H * D)),
    "kv-int8": lambda: Compressor(QUANTIZERS["int8"], joint(20, "half")),
    "kv-mixed": lambda: Compressor(Mixed(5.0), joint(2 * D, "interleaved")),
}


class Watched:
    """One layer that keeps K and V, the plain models of its stores, and what of them it has to hold."""

    def __init__(self, index: int, window: int | None, compressors: tuple[Compressor, ...], layout: tuple[int, int]):
        self.index, self.reach = index, None if window is None else window - 1
        exact = window is not None and window < 128
        self.compressors = [IdentityCompressor() if exact else side for side in compressors]
        self.layout = layout if window is None else (layout[0], min(layout[1], self.reach))

    def begin(self) -> None:
        sides = 1 if self.compressors[0].joint or len(self.compressors) == 1 else 2
        self.plain = [Plain(side, *self.layout) for side in self.compressors[:sides]]
        self.kept = 0  # tokens that it holds at least
        self.shown: int | None = 0  # tokens that are read: all held, where None
        self.recording = False

    @property
    def seen(self) -> int:
        return 0 if self.plain[0].seen is None else self.plain[0].seen.shape[2]

    def append(self, k: Tensor, v: Tensor) -> None:
        n, before = k.shape[2], self.seen
        for plain, x in zip(self.plain, (torch.cat((k, v), dim=1),) if len(self.plain) == 1 else (k, v), strict=True):
            plain.append(x)
        if self.reach is not None:
            self.shown = min(before, self.reach) + n
            self.kept = self.kept + n if self.recording else min(self.seen, self.reach)

    def crop(self, tokens: int) -> None:
        for plain in self.plain if tokens else ():
            plain.crop(tokens)
        if self.reach is not None:
            self.kept, self.shown = min(self.seen, self.reach), None if tokens else self.shown

    def croppable(self, tokens: int) -> bool | None:
        """None where it depends on how much more than `kept` it holds."""
        if self.reach is None or self.seen <= self.reach:
            return True
        if not self.recording:
            return False
        return True if not tokens or self.kept - tokens >= min(self.seen - tokens, self.reach) else None

    def readable(self, store) -> int:
        """How many of the last tokens are read, checked against what the store holds."""
        if self.reach is None:
            assert len(store) == self.seen
            return self.seen
        assert store.seen == self.seen and len(store) >= self.kept
        if not self.recording:
            assert len(store) <= self.reach + 63 + self.layout[0] // 64 * 64, "no more than an unfinished block"
        return len(store) if self.shown is None else min(self.shown, len(store))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, softcap, sinks) -> Tensor:
    """From the definition, in float64: mask is added to scores, sinks are logits of heads that give nothing."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, dim=1), v.double().repeat_interleave(group, dim=1)
    x = scaling * q @ k.mT
    x = (x if softcap is None else softcap * torch.tanh(x / softcap)) + mask
    if sinks is not None:
        x = torch.cat((x, sinks.double().view(1, -1, 1, 1).expand(*x.shape[:3], 1)), dim=-1)
    return x.softmax(-1)[..., : k.shape[2]] @ v


def causal(queries: int, padding: Tensor, held: int) -> Tensor:
    """Where the last of `held` tokens may look in rows that begin with `padding` [B] tokens of it: [B, 1, Q, T]."""
    token = torch.arange(held)
    own = token[held - queries :]
    real = (token >= padding[:, None, None]) | (token == own[:, None])  # padding sees itself: softmax needs something
    return (real & (token <= own[:, None]))[:, None]


class CacheMachine(RuleBasedStateMachine):
    """The layers of a cache and the plain models of K and V of each, or of both together."""

    @initialize(
        k=st.sampled_from(sorted(COMPRESSORS)), v=st.sampled_from(sorted(COMPRESSORS)), kernels=st.booleans(),
        layout=st.sampled_from(LAYOUTS), batch=st.integers(1, 4), dtype=st.sampled_from(DTYPES),
        smallest=st.sampled_from(SMALLEST), n=LENGTHS, order=st.sampled_from(ORDERS), layers=st.sampled_from(LISTS),
    )  # fmt: skip
    def start(
        self, k: str, v: str, kernels: bool, layout: tuple[int, int], batch: int, dtype, smallest: int, n: int, order,
        layers: tuple,
    ) -> None:  # fmt: skip
        k, v = COMPRESSORS[k](), COMPRESSORS[v]()
        if k.joint or v.joint:
            k = v = k if k.joint else v
        self.patches = ExitStack()
        self.patches.enter_context(mock.patch.object(cpu, "loaded", LOADED if kernels else lambda: False))
        self.patches.enter_context(mock.patch.object(token_store, "SMALLEST_CHUNK", smallest))
        self.layout, self.dtype, self.order = layout, dtype, order
        self.other: tuple | None = None  # a fork, with its plain models, codecs and token ids
        shape = Shape(H // 2 if k.joint else H, D)
        kinds = [
            LayerGeometry(SLIDING, shape, shape, window=kind) if isinstance(kind, int)
            else LayerGeometry(kind, *[shape if kind == FULL else None] * 2)
            for kind in layers
        ]  # fmt: skip
        self.kinds, self.compressors = kinds, (k, v)
        self.cache, self.watched = self._empty(), self._watch()
        self._begin(batch, n)

    def _empty(self) -> CompressedDynamicCache:
        k, v = ([side if kind.attends else None for kind in self.kinds] for side in self.compressors)
        exact = {"sink_tokens": self.layout[0], "recent_tokens": self.layout[1]}
        return CompressedDynamicCache(k, v, geometry=Geometry(tuple(self.kinds)), **exact)

    def _watch(self) -> list[Watched]:
        sides = self.compressors[:1] if self.compressors[0].joint else self.compressors
        return [Watched(i, kind.window, sides, self.layout) for i, kind in enumerate(self.kinds) if kind.attends]

    def _begin(self, batch: int, n: int) -> None:
        """With a prompt: rules are left out by chance, and a history without tokens would prove nothing."""
        self.batch, self.ids = batch, torch.zeros(batch, 0, dtype=torch.long)
        for own in self.watched:
            own.begin()
        self.append(n, seed=12, scale=1)

    @property
    def held(self) -> int:
        return self.watched[0].seen

    @property
    def windowed(self) -> bool:
        return any(own.reach is not None for own in self.watched)

    def _stores(self, own: Watched) -> list:
        return list(self.cache.layers[own.index].stores.values())

    def _tokens(self, n: int, seed: int, scale: int = 1) -> tuple[Tensor, Tensor]:
        """K and V as attention makes them, heads and tokens transposed; or in another order in memory."""
        heads = H // 2 if self.compressors[0].joint else H
        x = scale * torch.randn(2, self.batch, n, heads, D, generator=torch.Generator().manual_seed(seed))
        return tuple(side.clone(memory_format=self.order) for side in x.to(self.dtype).transpose(2, 3))

    @rule(n=LENGTHS, seed=st.integers(0, 9), scale=st.sampled_from([1, 30]))
    def append(self, n: int, seed: int, scale: int) -> None:
        k, v = self._tokens(n, seed, scale)
        new = torch.arange(self.held, self.held + n) + 1000 * torch.arange(self.batch)[:, None] + seed
        self.ids = torch.cat((self.ids, new), dim=1)
        if self.held + 1 == n and self.held:  # looks like a prompt fed again, which the cache compares with its own
            k = k + 1
        for own in self.watched:
            read = self.cache.update(k, v, own.index)
            own.append(k, v)
            # Of a window, a long prompt is read before most of it is forgotten
            self._compare(own, read, own.seen if own.reach is None else own.shown)

    @rule()
    def record(self) -> None:
        """As assisted decoding does, before it takes tokens back."""
        self.cache.activate_past_recording()
        for own in self.watched:
            own.recording = True

    @rule(left=st.one_of(st.integers(-9, -1), st.integers(0, 9), st.integers(10, 400)))
    def crop(self, left: int) -> None:
        """To so many tokens behind the sinks, often few, for there blocks are special; or into the sinks."""
        tokens = max(self.held - max(self.layout[0] + left, 0), 0)
        self._crop(tokens)

    @precondition(lambda self: self.windowed)
    @rule(tokens=st.integers(0, 70))
    def crop_a_few(self, tokens: int) -> None:
        """As many as a window that was recorded may have."""
        self._crop(min(tokens, self.held))

    def _crop(self, tokens: int) -> None:
        each = [own.croppable(tokens) for own in self.watched]
        try:
            self.cache.crop(-tokens)
        except RuntimeError:
            assert not all(each), "it holds all that is needed"
            return
        assert False not in each, "it has forgotten what is needed"
        self.ids = self.ids[:, : self.held - tokens]
        for own in self.watched:
            own.crop(tokens)

    @rule(data=st.data(), operation=st.sampled_from(["reorder", "select", "repeat"]))
    def change_rows(self, data: st.DataObject, operation: str) -> None:
        if operation == "repeat":
            repeats = data.draw(st.integers(1, max(4 // self.batch, 1)))
            self.cache.batch_repeat_interleave(repeats)
            rows = torch.arange(self.batch).repeat_interleave(repeats)
        else:
            size = st.just(self.batch) if operation == "reorder" else st.integers(1, 4)
            rows = data.draw(size.flatmap(lambda n: st.lists(st.integers(0, self.batch - 1), min_size=n, max_size=n)))
            rows = torch.tensor(rows)
            change = self.cache.reorder_cache if operation == "reorder" else self.cache.batch_select_indices
            change(rows)
        self.batch, self.ids = len(rows), self.ids[rows]
        for plain in (plain for own in self.watched for plain in own.plain):
            plain.map_(lambda x: x[rows])

    @rule(batch=st.integers(1, 4), n=LENGTHS)
    def reset(self, batch: int, n: int) -> None:
        self.cache.reset()
        assert self.cache.get_seq_length() == cache_bytes(self.cache) == 0
        self._begin(batch, n)

    @rule()
    def keep_reconstructed(self) -> None:
        assert self.cache.keep_reconstructed() is self.cache

    @rule(how=st.sampled_from([copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))]))
    def go_on_with_a_copy(self, how) -> None:
        """What happens to the original afterwards isn't the copy's matter."""
        original, self.cache = self.cache, how(self.cache)
        for own in self.watched:
            original.update(*self._tokens(70, seed=10), own.index)
        original.batch_select_indices(torch.zeros(1, dtype=torch.long))
        original.reset() if self.windowed else original.crop(-original.get_seq_length())

    @precondition(lambda self: self.held)
    @rule()
    def save_and_load(self) -> None:
        """A cache that was loaded knows its tokens, also after rows were selected and tokens cropped."""
        with tempfile.TemporaryDirectory() as folder:
            path = self.cache.save(Path(folder) / "cache.safetensors", token_ids=self.ids)
            self.cache = CompressedDynamicCache.load(path, into=self._empty())
        assert torch.equal(self.cache.token_ids, self.ids)

    @precondition(lambda self: self.held)
    @rule()
    def fork(self) -> None:
        """Whatever happens to one doesn't happen to the other: both go on, in turns."""
        other = self.cache.fork()
        assert cache_bytes(self.cache, other) - cache_bytes(self.cache) <= cache_bytes(other) / 2
        self.other = other, copy.deepcopy(self.watched), self.compressors, self.ids
        self.go_on_with_the_other()

    @precondition(lambda self: self.other)
    @rule()
    def go_on_with_the_other(self) -> None:
        mine = self.cache, self.watched, self.compressors, self.ids
        self.cache, self.watched, self.compressors, self.ids = self.other
        self.batch, self.other = len(self.ids), mine

    @precondition(lambda self: self.held)
    @rule(k=st.sampled_from(sorted(COMPRESSORS)), v=st.sampled_from(sorted(COMPRESSORS)))
    def recode(self, k: str, v: str) -> None:
        """Every token is coded anew; of those that a window forgot copies of the first that it holds."""
        k, v = COMPRESSORS[k](), COMPRESSORS[v]()
        if (k.joint or v.joint) != self.compressors[0].joint:
            return
        self.compressors = (k if k.joint else v,) * 2 if k.joint or v.joint else (k, v)
        old, before, self.cache = self.cache, self.watched, self._empty()
        recoding.recode(old, self.cache)
        self.watched = self._watch()
        for was, own in zip(before, self.watched, strict=True):
            own.begin()
            gone, begin = (cache.layers[own.index].first_store.forgotten for cache in (old, self.cache))
            own.recording, own.kept, own.shown = was.recording, was.kept, None
            for plain, x in zip(own.plain, (plain.seen.clone() for plain in was.plain), strict=True):
                begin = min(begin, gone)
                x[:, :, begin:gone] = x[:, :, gone : gone + 1]
                plain.append(x)

    @rule(what=st.sampled_from(["all but more", "a positive number", "another batch"]))
    def refused(self, what: str) -> None:
        k, v = self._tokens(2, seed=11)
        with pytest.raises((PluginError, RuntimeError) if self.windowed else PluginError):
            if what == "another batch":
                self.cache.update(torch.cat((k, k)), torch.cat((v, v)), self.watched[0].index)
            else:
                self.cache.crop(1 if what == "a positive number" else -self.held - 1)

    @precondition(lambda self: self.held and all(c.readable for c in self.compressors))
    @rule(
        queries=st.sampled_from([1, 2, 3, 70]), seed=st.integers(0, 9), group=st.integers(1, 3),
        padding=st.lists(st.integers(0, 200), min_size=4, max_size=4), masked=st.sampled_from(["no", "bool", "added"]),
        scaling=st.sampled_from([1.0, 0.25]), softcap=st.sampled_from([None, 2.0]), sinks=st.booleans(),
    )  # fmt: skip
    def attend(self, queries: int, seed: int, group: int, padding: list[int], masked: str, scaling, softcap, sinks):
        """Of any kind that a model may want."""
        generator = torch.Generator().manual_seed(seed)
        sinks = torch.randn(H * group, generator=generator) if sinks else None
        padding = torch.tensor(padding[: self.batch]) * (masked != "no")
        own = self.watched[seed % len(self.watched)]
        held = own.readable(self._stores(own)[0])
        queries = min(queries, held)
        allowed = causal(queries, padding, held)
        added = torch.zeros(allowed.shape, dtype=self.dtype).masked_fill(~allowed, torch.finfo(self.dtype).min)
        mask = {"no": None, "bool": pad(allowed, (0, 5), value=True), "added": pad(added, (0, 5))}[masked]
        self._attend(own, queries, group, generator, mask, added, scaling, softcap=softcap, sinks=sinks)

    def _attend(
        self, own: Watched, queries: int, group: int, generator, mask: Tensor | None, added: Tensor, scaling: float,
        **how,
    ) -> None:  # fmt: skip
        """Queries of the last tokens find in the codes what they would find in the plain model."""
        stores = self._stores(own)
        k, v = (plain.seen[:, :, own.seen - own.readable(stores[0]) :] for plain in own.plain)
        q = torch.randn(self.batch, queries, H * group, D, generator=generator).to(self.dtype).transpose(1, 2)
        q = 3 / scaling * q / (q @ k.repeat_interleave(group, dim=1).mT).abs().amax().clamp_min(1e-3)
        expected = attention(q, k, v, added.double(), scaling, **how)
        eps = torch.finfo(torch.float32 if self.dtype == torch.float64 else self.dtype).eps
        for kernels in (LOADED, lambda: False) if queries > 1 else (cpu.loaded,):
            with mock.patch.object(cpu, "loaded", kernels):
                found = direct_attention.attend(*stores, q, mask, scaling, **how)
            assert found.dtype == self.dtype
            tolerance = max(1e-4, 8 * eps) * float(v.abs().amax())
            torch.testing.assert_close(found.double(), expected, rtol=max(1e-3, 8 * eps), atol=tolerance)

    @invariant()
    def attention_finds_what_was_stored(self) -> None:
        if hasattr(self, "watched") and self.held and all(c.readable for c in self.compressors):
            generator = torch.Generator().manual_seed(self.held)
            for own in self.watched if self.batch < 3 else self.watched[:1]:
                if own.readable(self._stores(own)[0]):
                    self._attend(own, 1, 1, generator, None, torch.zeros(()), 1.0, softcap=None, sinks=None)

    @invariant()
    def reads_what_was_stored(self) -> None:
        if not hasattr(self, "watched"):
            return
        assert self.cache.get_seq_length() == self.held
        stores = [store.tensors() for layer in self.cache.compressed for store in layer.stores.values()]
        assert sum(storages_of(stores).values()) == self.cache.nbytes(), "stores account for all that is held"
        for own in self.watched if self.held else ():
            self._compare(own, self.cache.layers[own.index].read(), own.readable(self._stores(own)[0]))

    def _compare(self, own: Watched, read: tuple[Tensor, Tensor], tokens: int) -> None:
        """K and V that were read are the last `tokens` of the plain model."""
        expected = [plain.seen[:, :, own.seen - tokens :] for plain in own.plain]
        expected = expected[0].chunk(2, dim=1) if len(expected) == 1 else expected
        for found, wanted in zip(read, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    def teardown(self) -> None:
        if hasattr(self, "patches"):
            if self.other:
                self.go_on_with_the_other()
                self.reads_what_was_stored()
            self.patches.close()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=HISTORIES, stateful_step_count=40, deadline=None, derandomize="FUZZ_HISTORIES" not in os.environ,
    database=None, suppress_health_check=list(HealthCheck),
)  # fmt: skip
