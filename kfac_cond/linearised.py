"""A model linearised at its parameters: products with its Jacobian and the transpose, batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .data import Data, call_model
from .errors import ArgumentError, CaptureError, CoverageError, LikelihoodError, NumericalError
from .guards import EagerForwards, kept_state
from .hooks import hook_owners
from .kinds import Expectation, labels_out_of_range, require_examples
from .layers.naming import join, named_modules
from .likelihoods import Categorical, Likelihood
from .listening import bound_to_batch
from .options import Batches, Options
from .output_fisher import OfLikelihood, OfScores, OutputFisher

logger = logging.getLogger("kfac_cond")

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Point:
    """One batch's outputs, with the graph that leads to them, the likelihood bound to the batch, and H."""

    outputs: Tensor
    likelihood: Likelihood
    fisher: OutputFisher
    tangents: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """The outputs without their graph."""
        return self.outputs.detach()


class _Called(nn.Module):
    """A model as a function of a batch, which remembers how it was called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def forward(self, batch: Any) -> tuple[Any, Any]:
        def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.call = (args, kwargs)

        handle = self.model.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            return call_model(self.model, batch)
        finally:
            handle.remove()


class Linearised:
    """The Jacobian J of a model's outputs in its trainable parameters, over data that can be gone through many times.

    Products with J go by forward-mode differentiation; where some operation has none (or parameters are held where it
    cannot put them, which the first product finds out), by differentiating a backward. Attention runs in its plain
    form, since the fused one on the CPU has neither.

    Args:
        model: any module, in the mode it is in. Dropout masks are those of ``picks.seed``, the same in every product.
        data: batches, or a function that yields them; gone through once for each product.
        likelihood: with an exact Fisher, or for other kinds what they ask for.
        picks: where to find what a batch does not say.
        begin: gives the expectation over y for a pass; by default the exact one.
        names: of the parameters that J is taken in; None for all that are trainable.

    Raises:
        ArgumentError: a module that is none, or data that can be gone through only once.
        CoverageError: nothing trainable, or sharded parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Batches,
        likelihood: Likelihood,
        picks: Data,
        *,
        begin: Callable[[], Expectation] | None = None,
        names: Collection[str] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model is {type(model).__name__}: expected a torch.nn.Module")
        if isinstance(data, Iterator):
            raise ArgumentError(
                f"data is {type(data).__name__}, which can be gone through once, and every product goes through the "
                "data: pass a list, a loader, or a function that yields the batches"
            )
        while isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        self.model, self.data, self.likelihood, self.picks = model, data, likelihood, picks
        self.parameters = _trainable(model, names)
        self.seed = torch.initial_seed() if picks.seed is None else picks.seed
        #: Whether products with J go forward; None until the first has shown it.
        self.forward_mode: bool | None = None
        #: Of the last pass that came to its end: N and M.
        self.counts: dict[str, Any] = {}
        self._begin = begin or (lambda: Expectation("exact", 1, Options()))
        self._expectation = self._begin()
        self._number, self._examples = 0, 0
        self._fisher: OutputFisher | None = None
        self._called = _Called(model)
        self._raw = {id(p): name for name, p in self._called.named_parameters()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each trainable parameter by canonical name."""
        return {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of the parameters, float32 at least."""
        dtype = torch.float32
        for parameter in self.parameters.values():
            dtype = torch.promote_types(dtype, parameter.dtype)
        return dtype

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(iter(self.parameters.values())).device

    def visit(self, visitor: Callable[[Any], Tensor]) -> Tensor:
        """Call ``visitor`` with every batch; nothing of the model changes.

        Args:
            visitor: takes a batch, returns its M, 0-d.

        Returns:
            M of the data, 0-d: the sum over batches for 'mean', that of one for 'sum'.
        """
        divisors = []
        # Anew, so that every pass has the same labels.
        self._expectation, self._examples = self._begin(), 0
        with self._undisturbed():
            for number, batch in enumerate(self.data() if callable(self.data) else self.data):
                self._number, self._fisher = number, None
                divisors.append(visitor(batch))
        self._fisher = None
        self._expectation.finish()
        if not divisors:
            raise ArgumentError("data yielded no batch: expected at least one")
        found = torch.stack(divisors)
        divisor = found.max() if self.likelihood.reduction == "sum" else found.sum()
        if not bool(divisor > 0):
            raise ArgumentError("the data have no valid loss term (M = 0): every label is masked or ignored")
        self.counts = {"examples": self._examples, "terms": divisor}
        return divisor

    def count(self) -> None:
        """One pass of forwards alone, after which ``counts`` are known and the data seen to fit."""

        def visitor(batch: Any) -> Tensor:
            point = self.at(batch)
            return point.likelihood.terms(point.values)

        self.visit(visitor)

    def at(self, batch: Any) -> Point:
        """The outputs on one batch, inside ``visit``."""
        self._sow(self._number)
        return self._point(batch, *self._called(batch))

    def fisher_product(self, batch: Any, direction: Mapping[str, Tensor]) -> tuple[Gradients, Tensor]:
        """J^T H J v of one batch, not divided by M, and its M; inside ``visit``."""
        push = self._pushed_forward if self._goes_forward(batch) else self._pushed_twice
        point = push(batch, direction)
        return self._weighed(point), point.likelihood.terms(point.values)

    def pulled_back(self, point: Point, vectors: Tensor, *, keep: bool = False) -> Gradients:
        """J^T u by parameter; with ``keep`` the graph stays for more."""
        found = torch.autograd.grad(
            point.outputs, list(self.parameters.values()), vectors, retain_graph=keep, allow_unused=True
        )
        return self._filled(found)

    def rows(self, point: Point, vectors: Tensor) -> Tensor:
        """J^T u of many u [k, *outputs.shape] as flat rows [k, P]."""
        flat = [self.flat(self.pulled_back(point, vector, keep=True)) for vector in vectors]
        return torch.stack(flat)

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Named tensors as one vector, in the order and dtype of the whole."""
        return torch.cat([tensors[name].detach().reshape(-1).to(self.device, self.dtype) for name in self.parameters])

    # How -------------------------------------------------------------------------------------------------------------

    def _pushed_forward(self, batch: Any, direction: Mapping[str, Tensor]) -> Point:
        """The outputs and J v by dual numbers."""
        with forward_ad.dual_level():
            duals = {
                self._raw[id(p)]: forward_ad.make_dual(p, direction[name].to(p))  # type: ignore[no-untyped-call]
                for name, p in self.parameters.items()
            }
            self._sow(self._number)
            output, targets = functional_call(self._called, duals, (batch,))
            point = self._point(batch, output, targets)
            primal, tangents = forward_ad.unpack_dual(point.outputs)  # type: ignore[no-untyped-call]
        found = torch.zeros_like(primal) if tangents is None else tangents
        return replace(point, outputs=primal, tangents=found.detach())

    def _pushed_twice(self, batch: Any, direction: Mapping[str, Tensor]) -> Point:
        """The outputs and J v as the derivative of u -> J^T u in the direction v."""
        with torch.backends.cudnn.flags(enabled=False):
            point = self.at(batch)
            probe = torch.zeros_like(point.outputs, requires_grad=True)
            pulled = torch.autograd.grad(
                point.outputs, list(self.parameters.values()), probe, create_graph=True, allow_unused=True
            )
            reached = [
                (gradient, direction[name].to(gradient))
                for name, gradient in zip(self.parameters, pulled, strict=True)
                if gradient is not None and gradient.requires_grad
            ]
            if not reached:
                return replace(point, tangents=torch.zeros_like(point.values))
            gradients, directions = zip(*reached, strict=True)
            tangents = torch.autograd.grad(gradients, probe, directions, retain_graph=True)[0]
        return replace(point, tangents=tangents.detach())

    def _weighed(self, point: Point) -> Gradients:
        """J^T H t, t the tangents of the point."""
        assert point.tangents is not None
        return self.pulled_back(point, point.fisher.times(point.tangents))

    def _goes_forward(self, batch: Any) -> bool:
        """Whether dual numbers give J v here, found out once, in a random direction through every parameter."""
        if self.forward_mode is None:
            generator = torch.Generator().manual_seed(0)
            direction = {n: torch.randn(p.shape, generator=generator).to(p) for n, p in self.parameters.items()}
            try:
                point = self._pushed_forward(batch, direction)
                # The way back too: a checkpointed part runs again there, without dual numbers, and fails.
                found = self._weighed(point)
            except RuntimeError as error:
                logger.info("no forward-mode differentiation of this model (%s)", str(error).split("\n")[0])
                self.forward_mode = False
            else:
                self.forward_mode = self._are_transposes(point, found, direction)
        return bool(self.forward_mode)

    def _are_transposes(self, point: Point, found: Gradients, direction: Gradients) -> bool | None:
        """Whether t^T H t = v^T (J^T H t); None where all is zero and nothing can be said.

        Not so where a module keeps parameters in a place that dual numbers do not get to.
        """
        assert point.tangents is not None
        scores = point.fisher.times(point.tangents)
        left = float((point.tangents.to(self.dtype) * scores.to(self.dtype)).sum())
        right = float(self.flat(found) @ self.flat(direction))
        size = max(abs(left), abs(right))
        rough = 1e-2 if point.outputs.dtype in (torch.float16, torch.bfloat16) else 1e-3
        return abs(left - right) <= rough * size if size > 0.0 else None

    def _point(self, batch: Any, output: Any, targets: Any) -> Point:
        args, kwargs = self._called.call
        outputs = self.picks.pick_outputs(args, kwargs, output)
        if not outputs.requires_grad:
            raise CaptureError("the model's outputs do not depend on its parameters: were they made under no_grad?")
        labels = self.picks.pick_targets(args, kwargs, output) if targets is None else targets
        if not (self.likelihood.needs_targets or isinstance(self.likelihood, Categorical)):
            targets = None
        bound = bound_to_batch(
            self.likelihood, self.picks, outputs, args=args, kwargs=kwargs, output=output, targets=targets
        )
        if bound.needs_targets:
            raise LikelihoodError(f"{bound!r} needs data labels, and the batch has none: yield (inputs, labels)")
        if not bool(outputs.detach().isfinite().all()):
            raise NumericalError("outputs that are not finite: look for NaN or infinite inputs or weights")
        if self._fisher is None:
            # Once a batch, so that all vectors of a pass meet the same labels.
            self._fisher = self._fisher_of(bound, outputs.detach(), batch, labels)
            self._examples += bound.examples(outputs)
        return Point(outputs, bound, self._fisher)

    def _fisher_of(self, bound: Likelihood, outputs: Tensor, batch: Any, labels: Tensor | None) -> OutputFisher:
        """H of a batch: in closed form, or of the labels that the kind puts for y."""
        found: OutputFisher
        if self._expectation.kind == "exact":
            found, invalid = OfLikelihood(bound, outputs), bound.invalid_targets(outputs)
        else:
            require_examples(bound, outputs, batch, f"the score of an example (kind='{self._expectation.kind}')")
            scores, invalid = self._expectation.scores(bound, outputs, batch, labels)
            found = OfScores(scores)
        if bool(invalid):
            raise labels_out_of_range(self._number, bound)
        return found

    def _filled(self, found: Iterable[Tensor | None]) -> Gradients:
        """Zeros where the outputs do not depend on a parameter."""
        pairs = zip(self.parameters.items(), found, strict=True)
        return {name: torch.zeros_like(p) if gradient is None else gradient for (name, p), gradient in pairs}

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Whoever listens paused, plain kernels, dropout as in every other pass, and all as before afterwards."""
        eager = EagerForwards(self.model)
        with ExitStack() as stack:
            for owner in hook_owners(self.model):
                stack.enter_context(owner.paused())
            stack.enter_context(kept_state(self.model))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.enable_grad())
            eager.enter()
            stack.callback(eager.leave)
            self._sow(0)
            yield

    def _sow(self, number: int) -> None:
        """The random state in which a batch meets the model, whichever product it is for: dropout is one linear map."""
        seed = (self.seed + number) % 2**63
        torch.default_generator.manual_seed(seed)
        if self.device.type not in ("cpu", "meta"):
            torch.get_device_module(self.device).manual_seed(seed)


def _trainable(model: nn.Module, names: Collection[str] | None) -> dict[str, nn.Parameter]:
    """Trainable parameters by canonical name, each once, in the order of the modules; of those in ``names``."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for owner, module in named_modules(model):
        for attribute, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = join(owner, attribute)
            if names is not None and name not in names:
                continue
            if hasattr(parameter, "full_tensor"):
                raise CoverageError(f"'{name}' is a sharded DTensor: take the Fisher before sharding")
            found[name] = parameter
    if not found:
        among = "" if names is None else " that is not excluded"
        raise CoverageError(f"{type(model).__name__} has no trainable parameter{among}")
    return found
