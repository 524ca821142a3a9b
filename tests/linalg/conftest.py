"""Matrices, and a counter of what reads the device from the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"item", "tolist", "cpu", "numpy", "nonzero", "equal", "__bool__", "__int__", "__float__", "is_nonzero"}
SYNCS = {"aten._local_scalar_dense", "aten._linalg_check_errors", "aten.equal", "aten.nonzero", "aten.is_nonzero"}


class ReadCounter(TorchFunctionMode):
    """Counts the calls, from Python and below it, that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        counter = self

        class Dispatch(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if str(func.overloadpacket) in SYNCS:
                    counter.names.append(str(func.overloadpacket))
                return func(*args, **(kwargs or {}))

        self._dispatch = Dispatch()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> ReadCounter:
        self._dispatch.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._dispatch.__exit__(*error)


@pytest.fixture
def reads() -> ReadCounter:
    return ReadCounter()


@pytest.fixture
def spd() -> Callable[..., Tensor]:
    """A maker of well conditioned positive definite matrices: spd(3) is one of them, spd(2, 3, 3) two."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        d = shape[-1]
        x = torch.randn(*shape[:-2], d, 2 * d + 2, generator=generator, dtype=torch.float64)
        return (x @ x.mT / x.shape[-1]).to(dtype)

    return make
