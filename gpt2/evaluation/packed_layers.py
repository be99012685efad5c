"""Layers that keep K and V as packed codes, for measurements of methods from papers: KIVI, TurboQuant.

A method is a `PackedSide` with its quantizer. What attention reads is always what is stored, for new tokens too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes below 2**bits, [..., n] with n a multiple of 8, into uint8 [..., n · bits / 8]."""
    shifts, bytes_ = torch.arange(8, device=codes.device), torch.arange(bits, device=codes.device)
    words = (codes.long().unflatten(-1, (-1, 8)) << (bits * shifts)).sum(-1, keepdim=True)  # 8 codes in one number
    return ((words >> (8 * bytes_)) & 255).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes of `pack`, int64 [..., n]."""
    shifts, bytes_ = torch.arange(8, device=packed.device), torch.arange(bits, device=packed.device)
    words = (packed.long().unflatten(-1, (-1, bits)) << (8 * bytes_)).sum(-1, keepdim=True)
    return ((words >> (bits * shifts)) & (2**bits - 1)).flatten(-2)


class PackedSide:
    """K or V of one layer, [B, H, T, d]: exact attention sinks | packed groups | exact rest of less than a group.

    block: tokens in a group of one channel; with 1 a group is made of one token's channels.
    """

    def __init__(self, bits: int, sink_tokens: int, block: int = 1):
        self.bits, self.sink_tokens, self.block = bits, sink_tokens, block
        self.sinks: Tensor | None = None
        self.rest: Tensor | None = None
        self.fields: dict[str, Tensor] = {}

    def quantize(self, groups: Tensor) -> dict[str, Tensor]:
        """Groups as `grouped` gives them to stored tensors [B, H, n / block, …], `codes` among them."""
        raise NotImplementedError

    def dequantize(self, fields: dict[str, Tensor]) -> Tensor:
        """The groups that `quantize` stored, float32."""
        raise NotImplementedError

    def grouped(self, x: Tensor) -> Tensor:
        """Tokens [B, H, n, d] with groups in the last dimension: [B, H, n / block, d, block] or [B, H, n, …, g]."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.sinks.shape[2] + self._groups() * self.block + self.rest.shape[2] if self.sinks is not None else 0

    def _groups(self) -> int:
        return self.fields["codes"].shape[2] if self.fields else 0

    def append(self, x: Tensor) -> None:
        if self.sinks is None:
            self.sinks = self.rest = x.new_empty((*x.shape[:2], 0, x.shape[3]))
        missing = self.sink_tokens - self.sinks.shape[2]
        self.sinks, x = torch.cat((self.sinks, x[:, :, :missing]), dim=2), x[:, :, missing:]
        x = torch.cat((self.rest, x), dim=2)
        full = x.shape[2] // self.block * self.block
        if full:
            new = self.quantize(self.grouped(x[:, :, :full]))
            old = self.fields or {name: part[:, :, :0] for name, part in new.items()}
            self.fields = {name: torch.cat((old[name], part), dim=2) for name, part in new.items()}
        self.rest = x[:, :, full:].clone()  # a slice would keep the whole chunk in memory

    def read(self) -> Tensor:
        """All tokens, dequantized where they are quantized, [B, H, T, d]."""
        if not self.fields:
            return torch.cat((self.sinks, self.rest), dim=2)
        groups = self.dequantize(self.fields)
        stored = groups.mT.flatten(2, 3) if self.block > 1 else groups.flatten(3)
        return torch.cat((self.sinks, stored.to(self.sinks.dtype), self.rest), dim=2)


class PackedLayer(CacheLayerMixin):
    """One layer, for measurements only: it can't be reordered or cropped, as beam search would need."""

    is_sliding = False  # all tokens are stored, and the attention mask applies a sliding window
    supports_early_init = False

    def __init__(self, k: PackedSide, v: PackedSide):
        super().__init__()
        self.k, self.v = k, v

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store new tokens, [B, H, n, d] each; return all tokens, dequantized, [B, H, T, d] each."""
        self.store(key_states, value_states)
        return self.k.read(), self.v.read()

    def store(self, key_states: Tensor, value_states: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.k.append(key_states)
        self.v.append(value_states)

    def get_seq_length(self) -> int:
        return len(self.k)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1
