"""K-FAC in a loop of the Accelerate library."""

from __future__ import annotations

from typing import Any

from ..errors import AttachError
from ..preconditioner import KFAC
from . import library

_accelerate = library("accelerate", "accelerate")


def attach(accelerator: Any, kfac: KFAC, *optimizers: Any) -> None:
    """Precondition the steps of prepared optimizers, and have the accelerator save and load KFAC with the rest.

    A step that the accelerator leaves out, as all but the last of an accumulation, is none for KFAC either: the
    forwards between two real steps make one capture. A step that a gradient scaler skips changes nothing.

    Args:
        accelerator: the ``Accelerator``.
        kfac: made of the model before or after it was prepared.
        optimizers: what ``accelerator.prepare`` returned.

    Raises:
        AttachError: an optimizer that was not prepared.

    Examples:
        >>> import torch, accelerate, kfac_cond as kc
        >>> from kfac_cond.integrations.accelerate import attach
        >>> accelerator = accelerate.Accelerator(cpu=True)
        >>> model = torch.nn.Linear(3, 2)
        >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> attach(accelerator, kc.KFAC(model, "categorical"), optimizer)
    """
    for optimizer in optimizers:
        if not isinstance(optimizer, _accelerate.optimizer.AcceleratedOptimizer):
            raise AttachError(
                f"attach() got {type(optimizer).__name__}, expected what accelerator.prepare(optimizer) returned: "
                f"only that knows which steps are left out"
            )
    kfac.attach(*optimizers)
    accelerator.register_for_checkpointing(kfac)
