"""Bytes of whatever holds tensors: each storage once and whole, so that what caches share counts once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gpt2.compression.codecs import Compressor

Storages = dict[tuple, int]  # device and address of a storage to its bytes


def storages_of(*holders) -> Storages:
    """All storages that objects keep alive: a small view of a large tensor keeps the large one. Without compressors."""
    storages: Storages = {}
    seen: set[int] = set()
    waiting: list = list(holders)
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, (Compressor, type)):
            continue
        seen.add(id(item))
        if is_traceable_wrapper_subclass(item):
            # Such as quanto's: it reports the size of the tensor it represents, but only its inner tensors have memory
            waiting += [getattr(item, name) for name in item.__tensor_flatten__()[0]]
        elif isinstance(item, Tensor):
            storage = item.untyped_storage()
            # On the meta device storages have no address, but are still distinct
            storages[item.device, storage.data_ptr() or storage._cdata] = storage.nbytes()
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, (list, tuple, set)):
            waiting += item
        elif hasattr(item, "__dict__"):
            waiting += vars(item).values()
    return storages


def bytes_on(storages: Storages, device: torch.device | None) -> int:
    """Bytes on one device, on all where that is None."""
    return sum(size for (own, _), size in storages.items() if device is None or own == device)
