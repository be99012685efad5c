"""Queries rounded to integers, simulated: what kernels would lose that multiply codes with queries of few bits.

Such kernels absorb a query for a frame of keys, scale it by the steps of the block's channels, so that codes are what
it is multiplied with, and round it to multiples of one unit for each head and block. Here the model's own attention
gets what the rounding adds to its scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from gpt2.common.errors import PluginError
from gpt2.compression.cache import attention_math
from gpt2.compression.codecs.multi_head import JointTransform

NAME = "rounded_queries"  # names with "flash", "sdpa" or "flex" mean something to transformers
ATTRIBUTE = "query_rounding"  # of keys that a simulated cache returns


@dataclass(frozen=True)
class QueryRounding:
    """How queries of one layer are rounded, for keys in frames of as many tokens as a block has.

    z [B, G, n, block, w]: coordinates of n blocks as they are read back. steps [B, G, n, w]: of their codes, 0 for
    channels without codes. bits: of a query's integers, the sign included. exact: tokens at the beginning whose keys
    are not coded.
    """

    transform: JointTransform
    z: Tensor
    steps: Tensor
    bits: int
    exact: int

    def score_changes(self, query: Tensor) -> Tensor:
        """What rounding adds to q · k̂ of every token, [B, Hq, Q, T]; query [B, Hq, Q, d]."""
        B, heads, Q, d = query.shape
        G, blocks, block = self.z.shape[1:4]
        top = 2 ** (self.bits - 1) - 1
        kv_heads = G * self.transform.read_basis(d).shape[1]
        q = query.reshape(B, kv_heads, -1, d)
        changes = query.new_empty(B, G, heads // G * Q, blocks, block)
        for n in range(blocks):
            start = torch.tensor([n * block], device=query.device)
            absorbed = self.transform.absorb_query(q, start)[:, :, 0, :, :-1]  # [B, G, heads / G · Q, w]
            steps = self.steps[:, :, n, None]
            scaled = absorbed * steps
            unit = scaled.abs().amax(-1, keepdim=True).clamp_min(1e-30) / top
            rounded_off = (scaled / unit).round_().mul_(unit).sub_(scaled).div_(steps.clamp_min(1e-30))
            changes[:, :, :, n] = rounded_off @ self.z[:, :, n].mT
        changes = changes.flatten(3).view(B, heads, Q, -1)
        changes[..., : self.exact] = 0
        return changes


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **kwargs,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function that transformers calls, for texts without padding that are read in one forward pass."""
    rounding: QueryRounding | None = getattr(key, ATTRIBUTE, None)
    if rounding is not None:
        if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
            raise PluginError("rounded queries aren't simulated in models with capped scores or sink logits")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        causal = attention_math.causal(query.shape[2], key.shape[2], query.device)
        changes = rounding.score_changes(query) * scaling
        attention_mask = changes.masked_fill_(~causal, torch.finfo(changes.dtype).min)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


@contextmanager
def rounding_queries(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, the model's attention rounds queries where the keys that it gets ask for that."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
