"""Anything that can happen to a cache, in any order, against a plain model of it: what is read is what was stored.

The plain model is one tensor of what should be read; every block that becomes full goes through the codec once, by
itself. `make test` tries a hundred histories, `make fuzz` thousands; what fails is cut down to the shortest that does.
"""

from __future__ import annotations

import os
from unittest import mock

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_cache import BlockInt8, joint, transform
from torch import Tensor

from gpt2.compression import direct
from gpt2.compression.codecs import QUANTIZERS, Compressor, IdentityCompressor
from gpt2.compression.codecs.mixed import Mixed
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.kernels import cpu

HISTORIES = int(os.environ.get("FUZZ_HISTORIES", 100))
H, D = 2, 16
UNIT = 32  # tokens that the plain model codes together where a codec takes each by itself
LAYOUTS = [(0, 0), (4, 0), (5, 6), (64, 0), (70, 40)]  # exact sinks, exact latest tokens
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


class Plain:
    """What should be read of one store, [B, H, T, d], and how many blocks of it have been through the codec."""

    def __init__(self, compressor: Compressor, sinks: int, recent: int):
        self.compressor, self.block = compressor, compressor.block_tokens
        self.sinks, self.recent = (0, 0) if compressor.exact else (sinks, recent)
        self.first = self.sinks - self.sinks % self.block  # position of the first block's first place
        self.seen: Tensor | None = None
        self.blocks = 0

    def append(self, x: Tensor) -> None:
        self.seen = x.clone() if self.seen is None else torch.cat((self.seen, x), dim=2)
        full = (self.seen.shape[2] - self.first - self.recent) // self.block
        while self.blocks < full:
            count = min(full - self.blocks, UNIT) if self.block == 1 else 1
            self._code(self.first + self.blocks * self.block, count * self.block)
            self.blocks += count

    def _code(self, start: int, tokens: int) -> None:
        own = self.seen[:, :, max(start, self.sinks) : start + tokens]
        x = torch.cat((own[:, :, :1].expand(-1, -1, tokens - own.shape[2], -1), own), dim=2)
        back = self.compressor.expand(self.compressor.compress(x, start), x.shape[3], x.dtype, start)
        self.seen[:, :, max(start, self.sinks) : start + tokens] = back[:, :, tokens - own.shape[2] :]

    def crop(self, tokens: int) -> None:
        length = self.seen.shape[2] - tokens
        self.seen = self.seen[:, :, :length].clone()
        # Of a block that is cut, what is left stays as it was decoded
        whole = (length - self.first) // self.block if length > self.sinks else 0
        self.blocks = min(self.blocks, whole)

    def rows(self, rows: Tensor) -> None:
        self.seen = self.seen[rows]


class CacheMachine(RuleBasedStateMachine):
    """One layer of a cache and the plain models of its K and V, or of both together."""

    @initialize(
        k=st.sampled_from(sorted(COMPRESSORS)), v=st.sampled_from(sorted(COMPRESSORS)),
        layout=st.sampled_from(LAYOUTS), batch=st.integers(1, 4), kernels=st.booleans(),
    )  # fmt: skip
    def start(self, k: str, v: str, layout: tuple[int, int], batch: int, kernels: bool) -> None:
        k, v = COMPRESSORS[k](), COMPRESSORS[v]()
        if k.joint or v.joint:
            k = v = k if k.joint else v
        self.kernels = mock.patch.object(cpu, "loaded", cpu.loaded if kernels else lambda: False)
        self.kernels.start()
        self.compressors, self.layout = (k, v), layout
        self.cache = CompressedDynamicCache([k], [v], sink_tokens=layout[0], recent_tokens=layout[1])
        self.layer = self.cache.layers[0]
        self._begin(batch)

    def _begin(self, batch: int) -> None:
        sides = self.compressors[:1] if self.compressors[0].joint else self.compressors
        self.batch, self.plain = batch, [Plain(side, *self.layout) for side in sides]

    @property
    def held(self) -> int:
        return 0 if self.plain[0].seen is None else self.plain[0].seen.shape[2]

    @rule(n=st.one_of(st.integers(1, 4), st.integers(1, 300)), seed=st.integers(0, 9), scale=st.sampled_from([1, 30]))
    def append(self, n: int, seed: int, scale: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        heads = H // 2 if self.compressors[0].joint else H
        # As attention makes them: heads and tokens transposed
        k, v = scale * torch.randn(2, self.batch, n, heads, D, generator=generator).transpose(2, 3)
        if self.held + 1 == n and self.held:  # looks like a prompt fed again, which the cache compares with its own
            k = k + 1
        self.cache.update(k, v, 0)
        for plain, x in zip(self.plain, (torch.cat((k, v), dim=1),) if len(self.plain) == 1 else (k, v), strict=True):
            plain.append(x)

    @precondition(lambda self: self.held)
    @rule(share=st.floats(0, 1), beside=st.one_of(st.none(), st.integers(-2, 6)))
    def crop(self, share: float, beside: int | None) -> None:
        """Some share of what is held, or to the end of the sinks and about there, where blocks are special."""
        left = round((1 - share) * self.held) if beside is None else max(self.layout[0] + beside, 0)
        tokens = max(self.held - left, 0)
        self.cache.crop(-tokens)
        for plain in self.plain if tokens else ():
            plain.crop(tokens)

    @precondition(lambda self: self.held)
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
        self.batch = len(rows)
        for plain in self.plain:
            plain.rows(rows)

    @rule(batch=st.integers(1, 4))
    def reset(self, batch: int) -> None:
        self.cache.reset()
        self._begin(batch)

    @precondition(lambda self: self.held and all(c.foldable for c in self.compressors))
    @rule(queries=st.integers(1, 3), seed=st.integers(0, 9), group=st.integers(1, 3))
    def attend(self, queries: int, seed: int, group: int) -> None:
        """Queries of the last tokens find in the codes what they would find in the plain model."""
        queries = min(queries, self.held)
        q = torch.randn(self.batch, H * group, queries, D, generator=torch.Generator().manual_seed(seed))
        k, v = (plain.seen for plain in self.plain)
        q = 3 * q / (q @ k.repeat_interleave(group, dim=1).mT).abs().amax().clamp_min(1e-3)  # so that many tokens count
        expected = direct.attend_expanded(k, v, q, None, 1.0)
        found = direct.attend(*self.layer.stores.values(), q, None, 1.0)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(v.abs().amax()))

    @invariant()
    def reads_what_was_stored(self) -> None:
        if not hasattr(self, "plain"):
            return
        assert self.cache.get_seq_length() == self.held
        if self.held:
            read = self.layer.read()
            expected = self.plain[0].seen.chunk(2, dim=1) if len(self.plain) == 1 else [p.seen for p in self.plain]
            for found, wanted in zip(read, expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    def teardown(self) -> None:
        if hasattr(self, "kernels"):
            self.kernels.stop()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=HISTORIES, stateful_step_count=15, deadline=None, derandomize=HISTORIES == 100, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
