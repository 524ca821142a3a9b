"""Who is listened to: the criterion that the user calls, or the model's own forward; and what they say."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .data import Data
from .errors import CaptureError, KFACError, LikelihoodError
from .heads import Distribution, Head, bound_to_batch, picked, require_targets
from .hooks import Hook, leaves_graph
from .layers.shards import brought_together
from .likelihoods import as_likelihood, from_criterion, heard_call

Heard = Callable[[Sequence[Head]], None]


class Listener:
    """Turns calls of a criterion, or forwards of a model, into heads: outputs with the likelihood bound to the batch.

    Args:
        likelihood: a likelihood, its name, or the criterion module that the user calls.
        data: where to find what a forward alone does not say.
        due: whether a call at this moment matters.
        heard: called with what was heard.
        ours: whether a tensor was computed by a forward of the model.
    """

    def __init__(
        self,
        likelihood: Distribution | str | nn.Module,
        data: Data,
        *,
        due: Callable[[], bool],
        heard: Heard,
        ours: Callable[[Tensor], bool],
    ) -> None:
        self.criterion = likelihood if isinstance(likelihood, nn.Module) else None
        #: The likelihood for outputs of the model's own forward.
        self.likelihood = as_likelihood(likelihood, heard=False)
        #: Why the last forward could not be taken in; raised at the step, since an explicit update may still come.
        self.refused: KFACError | None = None
        self._heard_likelihood = None if self.criterion is None else from_criterion(self.criterion, heard=True)
        self._data = data
        self._due = due
        self._heard = heard
        self._ours = ours
        self._on = False
        self._handle: RemovableHandle | None = None

    @property
    def on(self) -> bool:
        """Whether calls are listened to."""
        return self._on

    def start(self) -> None:
        """Listen from now on."""
        self._on = True
        if self.criterion is not None and self._handle is None:
            # Held weakly: a criterion that serves many trials must not keep their models alive.
            called = weakref.WeakMethod(self._criterion)

            def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                listen = called()
                if listen is not None:
                    listen(module, args, kwargs)

            self._handle = self.criterion.register_forward_pre_hook(Hook(call), with_kwargs=True)
            weakref.finalize(self, self._handle.remove)

    def stop(self) -> None:
        """Stop listening, and leave no hook."""
        self._on = False
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _criterion(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (leaves_graph() and self._due()):
            return
        try:
            outputs, targets = heard_call(module, *brought_together((args, kwargs)))
        except LikelihoodError:
            # A criterion may serve other models too; only on outputs of ours is it ours to complain.
            if any(isinstance(one, Tensor) and self._ours(one) for one in (*args, *kwargs.values())):
                raise
            return
        if outputs.requires_grad:
            assert self._heard_likelihood is not None
            self._heard([Head("", self._heard_likelihood.bind(targets), outputs)])

    def root(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hear a forward of the model itself; used where there is no criterion to listen to."""
        if not self._on or self.criterion is not None:
            return
        try:
            outputs = picked(self.likelihood, self._data, args, kwargs, output)
            if not any(one.requires_grad for one in outputs.values()):
                return
            heads = bound_to_batch(self.likelihood, self._data, outputs, args=args, kwargs=kwargs, output=output)
            require_targets(
                heads,
                "a forward does not say class weights or ignored labels. Call kfac.update(outputs, targets=labels) "
                "after the forward, or pass data=kc.Data(targets=lambda args, kwargs, outputs: ...)",
                CaptureError,
            )
        except KFACError as error:
            self.refused = error
            return
        self.refused = None
        self._heard(heads)

    def nothing_heard(self, *, forwards: bool, explicit: bool) -> KFACError:
        """The error for a due step at which nothing was heard."""
        if explicit:
            return CaptureError(
                "factors are due at this step, and kfac.update(outputs) was not called for its forward: call it after "
                "every forward (where nothing is due it does nothing), and capture less often with "
                "kc.Schedule(factors=...)."
            )
        if self.refused is not None:
            return self.refused
        if not forwards:
            return CaptureError(
                "factors are due at this step, but no forward of the wrapped model with gradients enabled was seen: "
                "call the model that was given to KFAC itself, outside kfac.paused(): not a copy, not a version of it "
                "compiled since (compile first, and give KFAC what torch.compile(model) returns), not inside "
                "torch.func.grad or vmap, and not by functional_call on other tensors."
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
