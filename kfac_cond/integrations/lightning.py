"""K-FAC in Lightning's loop: a callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..errors import StateError
from ..preconditioner import KFAC
from . import library

_lightning = library("lightning", "lightning.pytorch", "pytorch_lightning")


class KFACCallback(_lightning.Callback):  # type: ignore[misc, name-defined]
    """Wraps the module when the fit starts, preconditions its optimizers' steps, and leaves no trace at the end.

    Automatic and manual optimization, several optimizers, gradient accumulation and clipping are as without it: each
    step is preconditioned after the gradients are clipped. Lightning's checkpoints hold the state of K-FAC, and a fit
    from such a checkpoint goes on with it.

    Args:
        make: gives the KFAC of a module, say ``lambda module: kc.KFAC(module.net, module.criterion, damping=0.1)``.

    Attributes:
        kfac: the KFAC of this fit, or of the last; None before the first.
    """

    def __init__(self, make: Callable[[nn.Module], KFAC]) -> None:
        super().__init__()
        self.kfac: KFAC | None = None
        self._make = make
        self._saved: Mapping[str, Any] | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Wrap the module and attach to the optimizers, which are there by now."""
        self._remove()
        self.kfac = self._make(pl_module)
        self.kfac.attach(*trainer.optimizers)
        if self._saved is not None:
            self._restore(self._saved)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse to go on from a checkpoint that has nothing of K-FAC.

        Raises:
            StateError: it has not.
        """
        if trainer.ckpt_path is not None and self._saved is None:
            raise StateError(
                f"{trainer.ckpt_path} has no state of {self.state_key}: it is of a run without it. To start K-FAC from "
                f"these weights load them into the module (load_from_checkpoint), and fit without ckpt_path"
            )
        self._saved = None

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Take it off the module and the optimizers."""
        self._remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take it off the module and the optimizers."""
        self._remove()

    def state_dict(self) -> dict[str, Any]:
        """What Lightning puts into a checkpoint."""
        return {} if self.kfac is None else {"kfac": self.kfac.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a checkpoint has; with most strategies that comes before the fit starts."""
        self._saved = state_dict.get("kfac")
        if self.kfac is not None and self._saved is not None:
            self._restore(self._saved)

    def _restore(self, saved: Mapping[str, Any]) -> None:
        assert self.kfac is not None
        self.kfac.load_state_dict(saved)

    def _remove(self) -> None:
        if self.kfac is not None:
            self.kfac.remove()
