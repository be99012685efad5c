"""Prompts that a cache holds already: fed again, their tokens would count twice, and nothing else would say so."""

from __future__ import annotations

from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.compression.cache.token_store import TokenStore

# Tokens that must repeat before a prompt counts as held: fewer may do so by chance
FEWEST_ALIKE = 8


def reject_repeated(store: TokenStore, keys: Tensor) -> None:
    """Raise PluginError where new tokens are a prompt that the first layer's store holds from its first position on.

    There K depends only on a token and its position, so that the prompt can be recognised. It is fed again with
    use_cache=False, where generate feeds the prompt and one token more at each step, and where generate is given a
    prompt that the cache holds to its end. In models whose K has no positions (ALiBi), a text that is fed twice in a
    row is rejected by mistake. keys: [B, H, n, d], as the store takes them.

    Where the first layer has a window, what it still holds of the prompt is compared: nothing tells that a prompt was
    fed again behind an answer as long as the window. Nor where it keeps no K and V (linear attention): K of later
    layers depends on all tokens before, and differs the second time.
    """
    held, n = store.seen, keys.shape[2]
    # Of a prompt that is a part of what is held, generate leaves out as many tokens as are held beyond it: of P tokens
    # it feeds n = P - (held - P)
    start = (held - n) // 2
    unknown = max(store.forgotten - start, 0)  # of the new ones, those that a window has forgotten
    part = n - unknown >= FEWEST_ALIKE and start > 0 and (held - n) % 2 == 0
    whole = n in (held, held + 1)
    if not held or not (part or whole) or _alike(keys):  # rarely more than numbers are compared
        return
    if part and store.holds_at(keys[:, :, unknown:], start + unknown):
        raise PluginError(
            f"a prompt of {n + start} tokens was given to a cache that holds it and {held - n - start} tokens "
            "more, so its last tokens would count twice: reset() the cache or make a new one, or give generate the "
            "whole conversation and what follows it"
        )
    if not whole or not store.holds(keys[:, :, :held]):
        return
    advice = (
        "as generate does with a prompt that it holds to its end: crop(-1) the cache first, because generate needs "
        "one token that isn't in it"
        if n == held
        else "as generate(use_cache=False) does: use use_cache=True with this cache, or pass no past_key_values"
    )
    raise PluginError(
        f"the whole prompt was fed again to a cache that holds it, {advice}. Where it is meant, in a model whose "
        "keys have no positions (ALiBi, as Bloom's), give both in one call"
    )


def _alike(x: Tensor) -> bool:
    """Whether all tokens of x [B, H, n, d] are the same, as in padding, so that they don't identify a prompt."""
    return bool((x == x[:, :, :1]).all())
