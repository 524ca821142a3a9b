"""A model linearised at its parameters: products with its Jacobian and the transpose, batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from .data import Data, call_model
from .errors import ArgumentError, CaptureError, CoverageError, NumericalError
from .guards import undisturbed
from .heads import Head, bound_to_batch, divisors, invalid_targets, meaningful, picked, require_targets
from .hooks import Hook, hidden, in_custom_function
from .kinds import Expectation, counts_of, labels_out_of_range, require_examples, require_terms
from .layers.naming import join, named_modules
from .layers.shards import is_sharded
from .layers.survey import survey
from .options import Request
from .output_fisher import OfLikelihood, OfScores, OutputFisher
from .statistics import Slots
from .wrapping import refuse_unfit

logger = logging.getLogger("kfac_cond")

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Point:
    """One batch: its heads, with the graph that leads to their outputs, and H of each; with tangents J v of each."""

    heads: tuple[Head, ...]
    fishers: tuple[OutputFisher, ...]
    tangents: tuple[Tensor, ...] = ()

    @property
    def divisor(self) -> Tensor:
        """M of each head, [heads]."""
        return divisors(self.heads)


class Called(nn.Module):
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
        request: the model, in the mode it is in (dropout masks are those of the data's seed, the same in every
            product); data, gone through once for each product; the likelihood and the kind.
        names: of the parameters that J is taken in; None for all that are trainable.

    Raises:
        ArgumentError: a module that is none, or data that can be gone through only once.
        CoverageError: nothing trainable, or parameters (sharded, complex, sparse) or parts (quantised) that do not fit.
    """

    def __init__(self, request: Request, names: Collection[str] | None = None) -> None:
        model, data = request.model, request.data
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model is {type(model).__name__}: expected a torch.nn.Module")
        if isinstance(data, Iterator):
            raise ArgumentError(
                f"data is {type(data).__name__}, which can be gone through once, and every product goes through the "
                "data: pass a list, a loader, or a function that yields the batches"
            )
        refuse_unfit(model)
        while isinstance(model, DistributedDataParallel):
            model = model.module
        self.model, self.data, self.likelihood = model, data, request.likelihood
        self.picks = request.options.data or Data()
        self.parameters = _trainable(model, names)
        self.seed = torch.initial_seed() if self.picks.seed is None else self.picks.seed
        #: Whether products with J go forward; None until the first has shown it.
        self.forward_mode: bool | None = None
        #: Of the last pass that came to its end: N and M.
        self.counts: dict[str, Any] = {}
        # The seed of draws that None stands for is taken now: inside a pass it is another.
        seed = Expectation(request).draws.seed
        self._request = replace(request, options=replace(request.options, seed=seed))
        self._expectation = Expectation(self._request)
        self._number, self._examples = 0, 0
        self._fishers: tuple[OutputFisher, ...] = ()
        self._called = Called(model)
        #: The modules that hold a parameter, by name.
        self._holders = {name: module for name, module in named_modules(model) if _held_in(module, self.parameters)}
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

    @property
    def slots(self) -> Slots:
        """The heads with their weights."""
        return self._expectation.slots

    def visit(self, visitor: Callable[[Any], Tensor]) -> Tensor:
        """Call ``visitor`` with every batch; nothing of the model changes.

        Args:
            visitor: takes a batch, returns M of its heads, [heads].

        Returns:
            M of the data, [heads]: the sum over batches for 'mean', that of one for 'sum'.
        """
        total: Tensor | None = None
        # Anew, so that every pass has the same labels.
        self._expectation, self._examples = Expectation(self._request), 0
        with self._undisturbed():
            for number, batch in enumerate(self.data() if callable(self.data) else self.data):
                self._number, self._fishers = number, ()
                divisor = visitor(batch)
                total = divisor if total is None else self.slots.added(total, divisor)
        self._fishers = ()
        self._expectation.finish()
        if total is None:
            raise ArgumentError("data yielded no batch: expected at least one")
        require_terms(self.slots, total)
        self.counts = counts_of(self.slots, total, self._examples)
        return total

    def count(self) -> None:
        """One pass of forwards alone, after which ``counts`` are known and the data seen to fit."""
        self.visit(lambda batch: self.at(batch).divisor)

    def at(self, batch: Any) -> Point:
        """The outputs on one batch, inside ``visit``."""
        self._sow(self._number)
        return self._point(batch, *self._called(batch))

    def fisher_product(self, batch: Any, direction: Mapping[str, Tensor]) -> tuple[list[Gradients], Tensor]:
        """J^T H J v of one batch head by head, not divided by M, and M of each; inside ``visit``."""
        push = self._pushed_forward if self._goes_forward(batch) else self._pushed_twice
        point = push(batch, direction)
        return self._weighed(point), point.divisor

    def pulled_back(self, head: Head, vectors: Tensor, *, keep: bool = False) -> Gradients:
        """J^T u by parameter, J that of a head; with ``keep`` the graph stays for more."""
        if not head.outputs.requires_grad:
            return self._filled([None] * len(self.parameters))
        found = torch.autograd.grad(
            head.outputs, list(self.parameters.values()), vectors, retain_graph=keep, allow_unused=True
        )
        return self._filled(found)

    def rows(self, head: Head, vectors: Tensor) -> Tensor:
        """J^T u of many u [k, *outputs.shape] as flat rows [k, P]."""
        flat = [self.flat(self.pulled_back(head, vector, keep=True)) for vector in vectors]
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
            pairs = [forward_ad.unpack_dual(head.outputs) for head in point.heads]  # type: ignore[no-untyped-call]
        heads = tuple(replace(head, outputs=primal) for head, (primal, _) in zip(point.heads, pairs, strict=True))
        tangents = tuple(torch.zeros_like(x) if tangent is None else tangent.detach() for x, tangent in pairs)
        return replace(point, heads=heads, tangents=tangents)

    def _pushed_twice(self, batch: Any, direction: Mapping[str, Tensor]) -> Point:
        """The outputs and J v as the derivative of u -> J^T u in the direction v."""
        with torch.backends.cudnn.flags(enabled=False):
            point = self.at(batch)
            return replace(point, tangents=tuple(self._pushed_head(head, direction) for head in point.heads))

    def _pushed_head(self, head: Head, direction: Mapping[str, Tensor]) -> Tensor:
        """J v of one head."""
        probe = torch.zeros_like(head.outputs, requires_grad=True)
        if not head.outputs.requires_grad:
            return probe.detach()
        pulled = torch.autograd.grad(
            head.outputs, list(self.parameters.values()), probe, create_graph=True, allow_unused=True
        )
        reached = [
            (gradient, direction[name].to(gradient))
            for name, gradient in zip(self.parameters, pulled, strict=True)
            if gradient is not None and gradient.requires_grad
        ]
        if not reached:
            return probe.detach()
        gradients, directions = zip(*reached, strict=True)
        return torch.autograd.grad(gradients, probe, directions, retain_graph=True)[0].detach()

    def _weighed(self, point: Point) -> list[Gradients]:
        """J^T H t head by head, t the tangents of the point."""
        last = len(point.heads) - 1
        parts = enumerate(zip(point.heads, point.fishers, point.tangents, strict=True))
        return [self.pulled_back(head, H.times(t), keep=index < last) for index, (head, H, t) in parts]

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

    def _are_transposes(self, point: Point, found: list[Gradients], direction: Gradients) -> bool | None:
        """Whether t^T H t = v^T (J^T H t), summed over heads; None where all is zero and nothing can be said.

        Not so where a module keeps parameters in a place that dual numbers do not get to.
        """
        left = right = 0.0
        for H, t, gradients in zip(point.fishers, point.tangents, found, strict=True):
            left += float((t.to(self.dtype) * H.times(t).to(self.dtype)).sum())
            right += float(self.flat(gradients) @ self.flat(direction))
        size = max(abs(left), abs(right))
        narrow = any(head.outputs.dtype in (torch.float16, torch.bfloat16) for head in point.heads)
        return abs(left - right) <= (1e-2 if narrow else 1e-3) * size if size > 0.0 else None

    def _point(self, batch: Any, output: Any, targets: Any) -> Point:
        args, kwargs = self._called.call
        outputs = picked(self.likelihood, self.picks, args, kwargs, output)
        if not any(one.requires_grad for one in outputs.values()):
            raise CaptureError("the model's outputs do not depend on its parameters: were they made under no_grad?")
        labels = self.picks.pick_targets(args, kwargs, output) if targets is None else targets
        given = meaningful(self.likelihood, targets)
        heads = bound_to_batch(
            self.likelihood, self.picks, outputs, args=args, kwargs=kwargs, output=output, targets=given
        )
        require_targets(heads, "yield (inputs, labels)")
        if not all(bool(head.outputs.detach().isfinite().all()) for head in heads):
            raise NumericalError("outputs that are not finite: look for NaN or infinite inputs or weights")
        if not self._fishers:
            # Once a batch, so that all vectors of a pass meet the same labels.
            still = [replace(head, outputs=head.outputs.detach()) for head in heads]
            self._fishers = self._fishers_of(still, batch, labels)
            self._examples += heads[0].likelihood.examples(heads[0].outputs)
        return Point(heads, self._fishers)

    def _fishers_of(self, heads: Sequence[Head], batch: Any, labels: Any) -> tuple[OutputFisher, ...]:
        """H of each head of a batch: in closed form, or of the labels that the kind puts for y."""
        fishers: tuple[OutputFisher, ...]
        kind = self._expectation.kind
        if kind == "exact":
            invalid = invalid_targets(heads)
            fishers = tuple(OfLikelihood(head.likelihood, head.outputs) for head in heads)
        else:
            require_examples(heads, batch, f"the score of an example (kind='{kind}')")
            found, invalid = self._expectation.scores(heads, batch, labels)
            sent = list(found)
            fishers = tuple(
                OfScores([(one.score, one.weight) for one in sent if self.slots.head(one.slot) == index])
                for index in range(len(heads))
            )
        if bool(invalid):
            raise labels_out_of_range(self._number, self.likelihood)
        return fishers

    def _filled(self, found: Iterable[Tensor | None]) -> Gradients:
        """Zeros where the outputs do not depend on a parameter."""
        pairs = zip(self.parameters.items(), found, strict=True)
        return {name: torch.zeros_like(p) if gradient is None else gradient for (name, p), gradient in pairs}

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Whoever listens paused, plain kernels, dropout as in every other pass, and all as before afterwards."""
        with ExitStack() as stack:
            stack.enter_context(undisturbed(self.model))
            for name, module in self._holders.items():
                stack.callback(module.register_forward_pre_hook(Hook(partial(_refuse_hidden, name))).remove)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.enable_grad())
            self._sow(0)
            yield

    def _sow(self, number: int) -> None:
        """The random state in which a batch meets the model, whichever product it is for: dropout is one linear map."""
        seed = (self.seed + number) % 2**63
        torch.default_generator.manual_seed(seed)
        if self.device.type not in ("cpu", "meta"):
            torch.get_device_module(self.device).manual_seed(seed)


def _held_in(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether a module holds one of the parameters itself."""
    return any(p is one for p in module._parameters.values() for one in parameters.values())


def _refuse_hidden(name: str, *_: object) -> None:
    """Before the call of a module that holds a parameter."""
    if in_custom_function():
        raise hidden(name)


def _trainable(model: nn.Module, names: Collection[str] | None) -> dict[str, nn.Parameter]:
    """Trainable parameters by canonical name, each once, in the order of the modules; of those in ``names``."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    refused = {row.path: row for row in survey(model).rows if not row.covered and row.remedy}
    for owner, module in named_modules(model):
        for attribute, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = join(owner, attribute)
            if names is not None and name not in names:
                continue
            if name in refused:
                row = refused[name]
                raise CoverageError(f"'{name}' has no place in the Fisher: {row.reason}; {row.remedy}, or freeze it")
            if is_sharded(parameter):
                raise CoverageError(
                    f"'{name}' has no place in the Fisher: it is a sharded DTensor, and products are with whole "
                    f"parameters; take the model before it is sharded, or freeze it"
                )
            found[name] = parameter
    if not found:
        among = "" if names is None else " that is not excluded"
        raise CoverageError(f"{type(model).__name__} has no trainable parameter{among}")
    return found
