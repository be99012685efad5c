"""Which tokens a cache holds: their ids, and the inputs that continue them.

A cache of K and V can't tell. What was read into it is said when it is saved, and stays with it as rows are selected
and tokens cropped; tokens that a model appends since aren't known until somebody says them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpt2.common.errors import PluginError


class HeldTokens:
    """Token ids [B, n] of the first tokens of a cache, None where nothing is known."""

    def __init__(self, ids: Tensor | None = None):
        self.ids = ids

    def crop(self, length: int) -> None:
        """Forget all but the first `length`."""
        self.map_(lambda ids: ids[:, :length])

    def map_(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn` to the ids: batch selection."""
        self.ids = None if self.ids is None else fn(self.ids)

    def check(self, ids: Tensor) -> None:
        """Raise PluginError, naming the first token that differs, where `ids` [B, n] don't begin with what is known."""
        if self.ids is None:
            return
        n = min(self.ids.shape[1], ids.shape[1])
        differs = (self.ids[:, :n] != ids[:, :n].to(self.ids.device)).nonzero()
        if len(differs):
            row, place = differs[differs[:, 1].argmin()].tolist()
            of_row = f" of row {row}" if len(ids) > 1 else ""
            raise PluginError(
                f"the cache holds other tokens than these: token {place}{of_row} is {int(self.ids[row, place])} in the "
                f"cache and {int(ids[row, place])} in the prompt. Crop the cache to {place} tokens, or read the prompt "
                "into a new one"
            )


def as_ids(ids, rows: int) -> Tensor:
    """Token ids as [rows, n] on the CPU: of a list, [n] or [1, n], and of fewer rows that are repeated evenly.

    Raises PluginError for another number of rows.
    """
    ids = torch.as_tensor(ids).detach().cpu().long()
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or not len(ids) or rows % len(ids):
        raise PluginError(f"expected token ids [{rows}, n] for a cache of {rows} rows, got {list(ids.shape)}: "
                          "batch_repeat_interleave the cache, or a fork of it, to as many rows")  # fmt: skip
    return ids.repeat_interleave(rows // len(ids), dim=0)


def _mask(given, ids: Tensor, padding: Tensor | None) -> Tensor:
    """Attention mask [B, T] of ids: the one given, of them all, else one without the slots found to be padding."""
    if given is not None:
        mask = as_ids(given, len(ids))
        if mask.shape != ids.shape or not bool(((mask == 0) | (mask == 1)).all()):
            raise PluginError(f"expected a mask of 0 and 1 for all {ids.shape[1]} tokens, those held and those that "
                              f"follow, got {list(torch.as_tensor(given).shape)}")  # fmt: skip
        return mask
    mask = torch.ones_like(ids)
    if padding is not None:
        mask[torch.arange(ids.shape[1]) < padding[:, None]] = 0
    return mask


def inputs(cache, new, whole, mask) -> dict[str, Tensor]:
    """As `CompressedDynamicCache.inputs`."""
    if (new is None) == (whole is None):
        raise PluginError("give either new=, the tokens that follow what the cache holds, or whole=, all tokens")
    cache.check_awake()
    length, held = cache.get_seq_length(), cache.held_tokens
    given = new if whole is None else whole
    ids = torch.as_tensor(given)
    given_rows = len(ids) if ids.dim() == 2 else 1
    rows = cache.rows or given_rows
    ids = as_ids(ids, rows)
    if whole is None and length:
        if held.ids is None or held.ids.shape[1] != length:
            known = 0 if held.ids is None else held.ids.shape[1]
            raise PluginError(f"the ids of only {known} of the {length} tokens that the cache holds are known: give "
                              "the whole prompt, whole=")  # fmt: skip
        ids = torch.cat((held.ids, ids), dim=1)
    held.check(ids)
    if ids.shape[1] <= length:
        raise PluginError(f"the cache holds {length} tokens and the prompt has {ids.shape[1]}: generate needs at least "
                          "one token more; crop(-1) the cache, or give what follows it")  # fmt: skip
    # A first layer that keeps no K and V shows no padding
    if mask is None and rows > 1 and cache.compressed[0].index > 0 and bool((ids[:, :1] == ids[:, 1:2]).any()):
        raise PluginError("a row begins with one token twice, which may be padding, and this model's first layer "
                          "doesn't tell: give mask=, 0 where rows are padded, of all tokens")  # fmt: skip
    held.ids = ids[:, :length]
    mask = _mask(mask, ids, cache.padding)
    # Beam search repeats rows itself; rows that hold different texts, asked the same question, all stay
    repeats = rows // given_rows
    alike = all(bool((x.unflatten(0, (-1, repeats)) == x[::repeats, None]).all()) for x in (ids, mask))
    fewer = slice(None, None, repeats if alike else 1)
    device = next((layer.device for layer in cache.compressed if layer.is_initialized), ids.device)
    return {"input_ids": ids[fewer].to(device), "attention_mask": mask[fewer].to(device)}
