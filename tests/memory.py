"""Memory as counts of bytes that hold on any machine: of tensors that were made and are still there."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocated(TorchDispatchMode):
    """The most bytes that were there at a time, of storages made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._there: dict[int, tuple[StorageWeakRef, int]] = {}

    def begin(self) -> None:
        """Count the most anew, from what is there now."""
        self.most = self.now()

    def now(self) -> int:
        """Bytes that are there."""
        self._there = {key: pair for key, pair in self._there.items() if not pair[0].expired()}
        return sum(nbytes for _, nbytes in self._there.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, Tensor) and one.untyped_storage()._cdata not in before:
                storage = one.untyped_storage()
                known = self._there.get(storage._cdata)
                if known is None or known[0].expired():
                    self._there[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, self.now())
        return found
