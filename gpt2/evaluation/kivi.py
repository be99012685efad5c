"""KIVI (Liu et al. 2024, arXiv:2402.02750) as a cache to compare with, written from the paper.

K is quantized per channel over 32 tokens, V per token over 32 channels, asymmetrically, with scale and zero point in
float16. Only the first tokens and K's unfinished group stay exact; attention reads a new chunk already quantized.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from gpt2.common.errors import PluginError

KIVI_GROUP = 32


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


def quantize(x: Tensor, bits: int) -> dict[str, Tensor]:
    """Groups x [..., g] as packed codes [..., g · bits / 8] with float16 scale and zero point, [..., 1] each."""
    low, high = x.float().aminmax(dim=-1, keepdim=True)
    zero = low.half()
    scale = ((high - low) / (2**bits - 1)).half().clamp(min=torch.finfo(torch.float16).smallest_normal)
    codes = ((x.float() - zero.float()) / scale.float()).round().clamp(0, 2**bits - 1)
    return {"codes": pack(codes, bits), "scale": scale, "zero": zero}


def dequantize(fields: Mapping[str, Tensor], bits: int) -> Tensor:
    """The groups that `quantize` stored, float32 [..., g]."""
    return unpack(fields["codes"], bits) * fields["scale"].float() + fields["zero"].float()


class KiviSide:
    """K or V of one layer, [B, H, T, d]: exact attention sinks | packed groups | exact rest of less than a group.

    block: tokens in a group of one channel; with 1 a group is 32 channels of one token.
    """

    def __init__(self, bits: int, sink_tokens: int, block: int):
        self.bits, self.sink_tokens, self.block = bits, sink_tokens, block
        self.sinks: Tensor | None = None
        self.rest: Tensor | None = None
        self.fields: dict[str, Tensor] = {}

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
            new = quantize(self._grouped(x[:, :, :full]), self.bits)
            old = self.fields or {name: part[:, :, :0] for name, part in new.items()}
            self.fields = {name: torch.cat((old[name], part), dim=2) for name, part in new.items()}
        self.rest = x[:, :, full:].clone()  # a slice would keep the whole chunk in memory

    def read(self) -> Tensor:
        """All tokens, dequantized where they are quantized, [B, H, T, d]."""
        if not self.fields:
            return torch.cat((self.sinks, self.rest), dim=2)
        groups = dequantize(self.fields, self.bits)
        stored = groups.mT.flatten(2, 3) if self.block > 1 else groups.flatten(3)
        return torch.cat((self.sinks, stored.to(self.sinks.dtype), self.rest), dim=2)

    def _grouped(self, x: Tensor) -> Tensor:
        """Tokens [B, H, n, d] with groups in the last dimension: [B, H, n / block, d, block] or [B, H, n, d / g, g]."""
        if self.block > 1:
            return x.unflatten(2, (-1, self.block)).mT
        group = math.gcd(x.shape[3], KIVI_GROUP)
        if group % 8:
            raise PluginError(f"KIVI's codes are packed by 8 channels: head_dim {x.shape[3]} isn't a multiple of 8")
        return x.unflatten(3, (-1, group))


class KiviLayer(CacheLayerMixin):
    """One layer of KIVI, for measurements only: it can't be reordered or cropped, as beam search would need."""

    is_sliding = False  # all tokens are stored, and the attention mask applies a sliding window
    supports_early_init = False

    def __init__(self, bits: int, sink_tokens: int):
        super().__init__()
        self.k, self.v = KiviSide(bits, sink_tokens, KIVI_GROUP), KiviSide(bits, sink_tokens, 1)

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


def kivi_cache(num_layers: int, bits: int, sink_tokens: int = 4) -> Cache:
    """An empty KIVI cache of 2, 3 or 4 bits that keeps the first `sink_tokens` tokens exact."""
    return Cache(layers=[KiviLayer(bits, sink_tokens) for _ in range(num_layers)])
