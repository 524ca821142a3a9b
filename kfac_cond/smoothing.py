"""Averages of gradients and of iterates, where steps follow the noise of their batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

BELOW, ABOVE = 0.25, 0.75
"""Averages begin where the next batch gained less of what was predicted than the one, and end above the other."""

POWER = 4
"""Of the weights of iterates: the k-th counts as k to that power, and the average lags by a sixth of its steps."""


class Smoothing:
    """Averages over the steps since batches disagree on where to go.

    The direction is then that of m <- rho m + (1 - rho) g, which starts at the first such gradient, and the parameters
    that a user sees are theta_bar <- theta_bar + (p + 1) / (k + p) (theta - theta_bar) at the k-th such step. Between
    steps a parameter holds theta_bar, and its state theta - theta_bar.

    Args:
        average: rho; 0 for no averages.
        tensors: of the parameters.
        state: gives the optimizer's state, by parameter.

    Source: Martens & Grosse 2015 (arXiv:1503.05671), section 13, evaluate an average of the iterates; Shamir & Zhang
    2013 (arXiv:1212.1824) for its weights.
    """

    def __init__(self, average: float, tensors: Sequence[nn.Parameter], state: Callable[[], Any]) -> None:
        self.average, self._tensors, self._state = average, tensors, state
        #: Steps since averages began; 0 where there are none.
        self.count = 0
        self._gradient: list[Tensor] | None = None

    def judge(self, fresh: float) -> None:
        """Begin or end averages by what the batch after each step gained, over what was predicted of its own."""
        if self.count == 0 and self.average > 0.0 and fresh < BELOW:
            self.count = 1
        elif self.count and fresh > ABOVE:
            self.count = 0
            for p in self._tensors:
                self._state()[p].pop("smooth", None)

    def smooth(self, gradient: list[Tensor]) -> list[Tensor]:
        """The gradient that directions are of: averaged with those of the steps before."""
        before = [self._state()[p].get("smooth") for p in self._tensors]
        self._gradient = None
        if self.count == 0:
            return gradient
        self._gradient = [
            g if m is None else m.lerp(g, 1.0 - self.average) for m, g in zip(before, gradient, strict=True)
        ]
        return self._gradient

    def keep(self) -> None:
        """Remember the averaged gradient: its step was taken, and was not taken back."""
        if self._gradient is not None:
            for p, m in zip(self._tensors, self._gradient, strict=True):
                self._state()[p]["smooth"] = m

    @contextmanager
    def at_the_iterate(self, kept: Callable[[], bool]) -> Iterator[None]:
        """Have the parameters hold theta within, and their average after.

        Args:
            kept: whether the step within was taken, and not taken back; otherwise parameters are left as they were.
        """
        shown = [p.detach().clone() for p in self._tensors] if self._ahead else None
        for p in self._tensors if shown else ():
            p.add_(self._state()[p]["ahead"])
        try:
            yield
        except BaseException:
            self._show(shown)
            raise
        if self.count == 0:
            # Averages have ended, or never began: what is seen is the iterate.
            for p in self._tensors:
                self._state()[p].pop("ahead", None)
        elif kept():
            self._advance(shown)
        else:
            self._show(shown)

    @property
    def _ahead(self) -> bool:
        """Whether what the parameters hold is an average."""
        return "ahead" in self._state()[self._tensors[0]]

    def _advance(self, shown: list[Tensor] | None) -> None:
        """Take theta into its average, and show that."""
        weight = (POWER + 1) / (self.count + POWER)
        for p, mean in zip(self._tensors, shown or [p.detach().clone() for p in self._tensors], strict=True):
            mean.lerp_(p, weight)
            self._state()[p]["ahead"] = p.detach() - mean
            p.copy_(mean)
        self.count += 1

    def _show(self, shown: list[Tensor] | None) -> None:
        for p, mean in zip(self._tensors, shown or (), strict=shown is not None):
            p.copy_(mean)
