"""Counts of what PyTorch does in a block: work is counted, since a clock would tell of the machine."""

from __future__ import annotations

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Work(TorchDispatchMode):
    """Counts operations, and numbers and bytes of the tensors that they write, views apart."""

    def __init__(self):
        super().__init__()
        self.operations = self.numbers = self.nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations += 1
        if not any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns):
            made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            self.numbers += sum(x.numel() for x in made)
            self.nbytes += sum(x.nbytes for x in made)
        return out
