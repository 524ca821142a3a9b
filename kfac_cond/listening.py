"""Who is listened to: the criterion that the user calls, or the model's own forward; and what they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .data import Data
from .errors import CaptureError, KFACError
from .hooks import Hook, Owner, in_backward
from .likelihoods import Likelihood, as_likelihood, heard_call

Heard = Callable[[Tensor, Likelihood], None]


class Listener:
    """Turns calls of a criterion, or forwards of a model, into (outputs, likelihood bound to the batch).

    Args:
        likelihood: a likelihood, its name, or the criterion module that the user calls.
        data: where to find what a forward alone does not say.
        due: whether a call at this moment matters.
        heard: called with what was heard.
    """

    def __init__(
        self, likelihood: Likelihood | str | nn.Module, data: Data, *, due: Callable[[], bool], heard: Heard
    ) -> None:
        self.criterion = likelihood if isinstance(likelihood, nn.Module) else None
        #: The likelihood for outputs of the model's own forward.
        self.likelihood = as_likelihood(likelihood, heard=False)
        #: Why the last forward could not be taken in; raised at the step, since an explicit update may still come.
        self.refused: KFACError | None = None
        self._heard_likelihood = as_likelihood(likelihood, heard=True)
        self._data = data
        self._due = due
        self._heard = heard
        self._on = False
        self._handle: RemovableHandle | None = None

    @property
    def on(self) -> bool:
        """Whether calls are listened to."""
        return self._on

    def start(self, owner: Owner) -> None:
        """Listen from now on."""
        self._on = True
        if self.criterion is not None and self._handle is None:
            hook = Hook(self._criterion, owner)
            self._handle = self.criterion.register_forward_pre_hook(hook, with_kwargs=True)

    def stop(self) -> None:
        """Stop listening, and leave no hook."""
        self._on = False
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _criterion(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (torch.is_grad_enabled() and not in_backward() and self._due()):
            return
        outputs, targets = heard_call(module, args, kwargs)
        if outputs.requires_grad:
            self._heard(outputs, self._heard_likelihood.bind(targets))

    def root(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hear a forward of the model itself; used where there is no criterion to listen to."""
        if not self._on or self.criterion is not None:
            return
        try:
            outputs = self._data.pick_outputs(args, kwargs, output)
            if not outputs.requires_grad:
                return
            bound = bound_to_batch(self.likelihood, self._data, outputs, args=args, kwargs=kwargs, output=output)
            if bound.needs_targets:
                raise CaptureError(
                    f"{bound!r} needs the data labels (class weights or ignored labels), and a forward does not say "
                    f"them: call kfac.update(outputs, targets=labels) after the forward, or pass "
                    f"data=kc.Data(targets=lambda args, kwargs, outputs: ...)"
                )
        except KFACError as error:
            self.refused = error
            return
        self.refused = None
        self._heard(outputs, bound)

    def nothing_heard(self, *, forwards: bool) -> KFACError:
        """The error for a due step at which nothing was heard."""
        if self.refused is not None:
            return self.refused
        if not forwards:
            return CaptureError(
                "factors are due at this step, but no forward of the wrapped model with gradients enabled was seen: "
                "call the model that was given to KFAC itself (not a copy, and not a version compiled after wrapping), "
                "outside kfac.paused()."
            )
        if self.criterion is not None:
            return CaptureError(
                f"a forward was captured, but the {type(self.criterion).__name__} given to KFAC was not called on its "
                f"outputs before the optimizer's step. If the loss is functional (F.cross_entropy), pass a likelihood "
                f"such as kc.Categorical() in place of the criterion; if another criterion object computes it, pass "
                f"that object."
            )
        return CaptureError(
            "layers were captured, but the wrapped model itself was not called, so its outputs are not known: call the "
            "model rather than its parts, or kfac.update(outputs) after the forward."
        )


def bound_to_batch(
    likelihood: Likelihood,
    data: Data,
    outputs: Tensor,
    *,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    output: Any = None,
    targets: Tensor | None = None,
) -> Likelihood:
    """A likelihood with the batch's labels and valid terms, as given and as ``data`` picks them from the call."""
    likelihood.check(outputs)
    kwargs = kwargs or {}
    if targets is None and likelihood.needs_targets:
        targets = data.pick_targets(args, kwargs, output)
    mask = data.pick_mask(args, kwargs, output, tuple(likelihood.term_shape(outputs)))
    return likelihood.bind(targets, mask=mask)
