"""The Fisher of a model over data: one pass, a block per layer, nothing of the model changed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from .capture import Capture, counted, gathered
from .checks import are_tensors, check_module, check_seed, checked_rules, described, settings_of
from .data import Data, call_model, leading_dimension
from .draws import Draws
from .errors import ArgumentError, CaptureError, CoverageError, LikelihoodError, NumericalError
from .forwards import Pairs, Wanted
from .guards import kept_state, without_autocast
from .hooks import hook_owners
from .layers.survey import Layer, survey
from .likelihoods import Categorical, Likelihood, as_likelihood, exact_scores, sampled_scores
from .listening import bound_to_batch
from .progress import tracked
from .statistics import Statistics
from .structures import COLLECTORS, Fisher, Joint, KroneckerBlock, LayerByLayer

logger = logging.getLogger("kfac_cond")

Kind = Literal["sampled", "exact", "empirical", "forward_only"]
KINDS = ("sampled", "exact", "empirical", "forward_only")
STRUCTURES = (*COLLECTORS, "dense", "mixed")
Batches = Iterable[Any] | Callable[[], Iterable[Any]]


@dataclass(frozen=True)
class Options:
    """What rarely changes from one estimate to the next.

    Args:
        layers: pattern or patterns (``fnmatch``) of the layers wanted; None for all.
        rules: settings by layer-name pattern, {pattern: dict(sharing=, exclude=, structure=)}; ``structure``
            is for structure='mixed'.
        seed: seed of the label draws; None takes ``torch.initial_seed()``.
        draws: labels in place of the sampled ones: for each batch a sequence of label tensors, one a draw.
        second_pass: go through the data twice, where 'ekfac' would keep a and g of all of them. They must give the
            same batches again, in the same order: no iterator, and nothing that shuffles.
        progress: show a progress bar; None shows it on a terminal.
        data: where to find masks, positions and outputs in a batch.
    """

    layers: str | Sequence[str] | None = None
    rules: Mapping[str, Mapping[str, Any]] | None = None
    seed: int | None = None
    draws: Iterable[Sequence[Tensor]] | None = None
    second_pass: bool = False
    progress: bool | None = None
    data: Data | None = None

    def __post_init__(self) -> None:
        patterns = [self.layers] if isinstance(self.layers, str) else self.layers
        fits = isinstance(patterns, Sequence) and all(isinstance(one, str) for one in patterns)
        if not (patterns is None or fits):
            raise ArgumentError(f"Options(layers={self.layers!r}): expected a pattern, a list of patterns, or None")
        check_seed(self.seed, "Options")
        if not (self.draws is None or isinstance(self.draws, Iterable)):
            raise ArgumentError(
                f"Options(draws=...) is {described(self.draws)}: expected a list of label tensors for each batch"
            )
        if self.progress not in (None, True, False):
            raise ArgumentError(f"Options(progress={self.progress!r}): expected True, False, or None for a terminal")
        settings_of(self.data, Data, "Options.data")


@overload
def estimate(
    model: nn.Module,
    data: Batches,
    likelihood: Likelihood | str | nn.Module,
    *,
    structure: str = "kfac",
    kind: Kind = "sampled",
    samples: int = 1,
    options: Options | None = None,
) -> Fisher: ...


@overload
def estimate(
    model: nn.Module,
    data: Batches,
    likelihood: Likelihood | str | nn.Module,
    *,
    structure: list[str] | tuple[str, ...],
    kind: Kind = "sampled",
    samples: int = 1,
    options: Options | None = None,
) -> list[Fisher]: ...


def estimate(
    model: nn.Module,
    data: Batches,
    likelihood: Likelihood | str | nn.Module,
    *,
    structure: str | list[str] | tuple[str, ...] = "kfac",
    kind: Kind = "sampled",
    samples: int = 1,
    options: Options | None = None,
) -> Fisher | list[Fisher]:
    """The conditional Fisher of ``model`` over ``data``: inputs from the data, labels from the model.

    The model runs in the mode it is in; its parameters, gradients and buffers, and the global random state, are the
    same afterwards. The result does not depend on how the data are batched (on CPU; elsewhere with injected draws).

    Args:
        model: any module.
        data: batches, or a function that yields them: a tensor, a tuple (inputs, labels), or a mapping of keyword
            arguments. Labels serve masks and class weights alone.
        likelihood: a likelihood, its name, or a criterion module.
        structure: what each layer's block is stored as: 'kfac' (a Kronecker pair), 'ekfac' (its eigenbasis with
            eigenvalues of its own), 'tkfac' and 'kpsvd' (other Kronecker pairs), 'diagonal', 'block' (a dense matrix);
            'dense' (all layers in one matrix); 'mixed' (what ``Options(rules=)`` says of each layer, 'kfac' elsewhere).
            A list gives a list, from one pass of forwards and backwards. 'ekfac' and 'kpsvd' hold a and g of all the
            data until the end.
        kind: 'sampled' draws ``samples`` labels for each term; 'exact' sums over all labels in closed form (type-2),
            one backward for each term of an example and each output. Two kinds are not the conditional Fisher:
            'empirical' takes the data labels in place of labels drawn from the model (gradients of one example's loss,
            squared; not zero on average away from the optimum); 'forward_only' takes no labels and no backward, and
            sets G = I.
        samples: label draws a batch, each one backward through the one forward.
        options: see ``Options``.

    Returns:
        A ``Fisher``: a mapping from layer name to block; a list of them for a list of structures.

    Raises:
        ArgumentError: an argument out of range, or data that yield nothing.
        CoverageError: no layer to cover, or a pattern that matches none.
        LikelihoodError: outputs or labels that do not fit the likelihood.
        NumericalError: a batch with statistics that are not finite.

    Examples:
        >>> import torch, kfac_cond as kc
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> fisher = kc.estimate(model, [torch.randn(8, 3)], "categorical", samples=4)
        >>> fisher["0"].A.shape, fisher["0"].G.shape
        (torch.Size([4, 4]), torch.Size([4, 4]))

    Source: Martens & Grosse 2015 (arXiv:1503.05671), section 3; Martens 2020 (arXiv:1412.1193), section 9 for the exact
    expectation.
    """
    options = settings_of(options, Options, "options")
    words = [structure] if isinstance(structure, str) else list(structure)
    _check(model, words, kind, samples, options)
    if not callable(data):
        _checked(data)
    layers = _wanted(model, options)
    stored = [_storage(word, layers, twice=options.second_pass and kind != "forward_only") for word in words]
    given = (model, layers, as_likelihood(likelihood, heard=False), kind, samples, options, stored)
    single = _Pass(*given)
    total = single.run(data)
    factors = single.factors(total)
    if any(one.waiting for one in stored):
        for one in stored:
            one.look_again(factors)
        _check_again(total, _Pass(*given).run(data))
    fishers = single.fishers(total, factors, words)
    return fishers[0] if isinstance(structure, str) else fishers


def _check(model: nn.Module, words: list[str], kind: str, samples: int, options: Options) -> None:
    check_module(model)
    if not words:
        raise ArgumentError("structure is an empty list: expected at least one structure")
    for word in words:
        if word not in STRUCTURES:
            raise ArgumentError(f"structure={word!r}: expected one of {', '.join(STRUCTURES)}")
    if kind not in KINDS:
        raise ArgumentError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    rules = checked_rules(options.rules)
    ruled = [pattern for pattern, rule in rules.items() if rule.get("structure") is not None]
    if ruled and "mixed" not in words:
        raise ArgumentError(f"rules['{ruled[0]}'] sets a structure: pass structure='mixed' for it to hold")
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
        raise ArgumentError(f"samples={samples!r}: expected a whole number >= 1")
    if kind != "sampled" and (samples != 1 or options.draws is not None):
        raise ArgumentError(f"kind={kind!r} draws no labels: leave out samples and draws")


def _check_again(first: Statistics, second: Statistics) -> None:
    if first.examples != second.examples or not (first.divisor.is_meta or bool(first.divisor == second.divisor)):
        raise ArgumentError(
            f"the second pass gave {second.examples} examples and M = {float(second.divisor):g}, the first "
            f"{first.examples} and {float(first.divisor):g}: second_pass=True needs the same batches again"
        )


def _checked(data: Any) -> Iterable[Any]:
    """The same data, unless they are one batch: the rows of a tensor, or the keys of a mapping, would pass for some."""
    if isinstance(data, Tensor | Mapping):
        raise ArgumentError(f"data is {described(data)}, which is one batch: expected batches, pass [x]")
    if not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise ArgumentError(
            f"data is {described(data)}: expected batches (a list, a loader), or a function that yields them"
        )
    batches: Iterable[Any] = data
    return batches


def _wanted(model: nn.Module, options: Options) -> dict[str, Layer]:
    found = survey(model, options.rules).layers
    for pattern, rule in (options.rules or {}).items():
        if rule.get("damping") is not None:
            raise ArgumentError(
                f"rules['{pattern}']: damping={rule['damping']!r} means nothing here, since kc.estimate inverts "
                f"nothing: leave it out, and give it where you do, fisher.solve(v, damping=...)"
            )
    patterns = [options.layers] if isinstance(options.layers, str) else options.layers
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in found):
            raise CoverageError(f"layers: '{pattern}' matches none of {', '.join(found) or 'no layers'}")
    wanted = {
        name: layer
        for name, layer in found.items()
        if patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    if not wanted:
        raise CoverageError(f"{type(model).__name__} has no layer that can be covered: see kc.coverage(model)")
    return wanted


def _storage(word: str, layers: Mapping[str, Layer], *, twice: bool) -> LayerByLayer | Joint:
    """What collects one estimate."""
    layouts = {name: layer.layout for name, layer in layers.items()}
    if word == "dense":
        return Joint(layouts)
    structures = {name: layer.rule.structure or "kfac" if word == "mixed" else word for name, layer in layers.items()}
    for name, structure in structures.items():
        if structure not in COLLECTORS:
            raise ArgumentError(f"rules: layer '{name}' has structure={structure!r}, expected one of {[*COLLECTORS]}")
    return LayerByLayer(layouts, structures, twice=twice)


class _Pass:
    """One pass over data: what is the same for every batch."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        likelihood: Likelihood,
        kind: Kind,
        samples: int,
        options: Options,
        stored: Sequence[LayerByLayer | Joint],
    ) -> None:
        self.model, self.layers, self.likelihood, self.stored = model, layers, likelihood, stored
        self.kind, self.samples = kind, samples
        self.data = options.data or Data()
        self.draws = Draws(options.seed if options.seed is not None else self.data.seed)
        self.progress = options.progress
        self.injected = None if options.draws is None else iter(options.draws)
        self.call: tuple[tuple[Any, ...], dict[str, Any], Any] = ((), {}, None)
        self.wanted = self._wanted()
        self.capture = Capture(
            model,
            layers,
            due=lambda: True,
            owner=None,
            positions=self.data.pick_positions,
            heard=self._called,
            wanted=self.wanted,
        )

    def _wanted(self) -> Wanted:
        """What the structures ask of the capture, together."""
        if self.kind == "forward_only":
            return Wanted(frozenset(self.layers), frozenset(), self._take)
        moments = frozenset[str]().union(*(one.moments for one in self.stored))
        return Wanted(moments, frozenset[str]().union(*(one.pairs for one in self.stored)), self._take)

    def _take(self, pairs: Pairs, weight: float) -> None:
        for one in self.stored:
            if asked := {name: pair for name, pair in pairs.items() if name in one.pairs}:
                one.take(asked, weight)

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.call = (args, kwargs, output)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks on, whoever else listens paused; buffers and the random state as before afterwards."""
        with ExitStack() as stack:
            for owner in hook_owners(self.model):
                stack.enter_context(owner.paused())
            stack.enter_context(kept_state(self.model))
            stack.callback(self.capture.remove)
            self.capture.install()
            yield

    def run(self, data: Batches) -> Statistics:
        """The statistics of all batches."""
        total: Statistics | None = None
        with self.listening():
            batches = _checked(data() if callable(data) else data)
            # Closed even after an exception, which would leave a progress bar on the terminal.
            with closing(tracked(batches, description="Fisher", show=self.progress)) as shown:
                for number, batch in enumerate(shown):
                    statistics = self.statistics(number, batch)
                    total = statistics if total is None else total.merged(statistics)
        if total is None:
            raise ArgumentError("data yielded no batch: an iterator that was used up already? Pass a list or a loader.")
        self._require_all_drawn()
        return total

    def statistics(self, number: int, batch: Any) -> Statistics:
        """The statistics of one batch, seen to be finite."""
        with torch.enable_grad():
            output, targets = call_model(self.model, batch)
        args, kwargs, _ = self.call
        outputs = self.data.pick_outputs(args, kwargs, output)
        labels = self.data.pick_targets(args, kwargs, output) if targets is None else targets
        if not (self.likelihood.needs_targets or isinstance(self.likelihood, Categorical)):
            # Labels that mean nothing to p, say the digits of the images that an autoencoder is given.
            targets = None
        bound = bound_to_batch(
            self.likelihood, self.data, outputs, args=args, kwargs=kwargs, output=output, targets=targets
        )
        if bound.needs_targets:
            raise LikelihoodError(f"{bound!r} needs data labels, and the batch has none: yield (inputs, labels)")
        found, invalid = self._sums(bound, outputs, batch, labels)
        self.capture.forget()
        if found is None:
            raise CaptureError(
                "the model's outputs do not depend on any layer that was captured: were they computed under no_grad, "
                "or in a compiled model? Pass the plain module."
            )
        self._check_usable(number, found, invalid)
        return found

    def _sums(
        self, bound: Likelihood, outputs: Tensor, batch: Any, labels: Tensor | None
    ) -> tuple[Statistics | None, Tensor]:
        """The sums of one batch, and whether some label is out of range."""
        if self.kind == "forward_only":
            invalid = bound.invalid_targets(outputs)
            with without_autocast(outputs.device):
                sums = self.capture.inputs()
                return counted(sums, outputs, bound, invalid) if sums else None, invalid
        scores, invalid = self._scores(bound, outputs, batch, labels)
        return gathered(self.capture, outputs, bound, scores, invalid=invalid), invalid

    def _scores(
        self, bound: Likelihood, outputs: Tensor, batch: Any, labels: Tensor | None
    ) -> tuple[Iterator[tuple[Tensor, float]], Tensor]:
        invalid = bound.invalid_targets(outputs)
        if self.kind == "exact":
            size = leading_dimension(batch)
            if size is not None and size != bound.examples(outputs):
                raise LikelihoodError(
                    f"kind='exact' needs one example per index of dimension 0: the batch has {size}, the outputs have "
                    f"{bound.examples(outputs)}. Give outputs (N, T, C) with kc.Data(outputs=...)."
                )
            return exact_scores(bound, outputs), invalid
        if self.kind == "empirical":
            if labels is None:
                raise LikelihoodError(
                    "kind='empirical' needs data labels, and the batch has none: yield (inputs, labels)"
                )
            invalid = invalid | bound.invalid_labels(outputs, labels)
            return sampled_scores(bound, outputs, draws=[labels]), invalid
        if self.injected is None:
            generators = self.draws.generators(step=0, count=self.samples, device=outputs.device)
            return sampled_scores(bound, outputs, generators=generators), invalid
        drawn = next(self.injected, None)
        if drawn is None:
            raise ArgumentError("Options(draws=...) has fewer entries than the data have batches")
        if not (isinstance(drawn, Tensor) or are_tensors(drawn)):
            raise ArgumentError(
                f"Options(draws=...) has {described(drawn)} for a batch: expected a list of label tensors, one a draw"
            )
        for labels in drawn:
            invalid = invalid | bound.invalid_labels(outputs, labels)
        return sampled_scores(bound, outputs, draws=drawn), invalid

    def _require_all_drawn(self) -> None:
        """Refuse injected draws of which some are left when the data are over."""
        if self.injected is not None and next(self.injected, None) is not None:
            raise ArgumentError("Options(draws=...) has more entries than the data have batches")

    def _check_usable(self, number: int, statistics: Statistics, invalid: Tensor) -> None:
        if statistics.finite.is_meta or bool(statistics.finite):
            return
        if bool(invalid):
            raise LikelihoodError(f"batch {number}: labels out of the range of {self.likelihood!r}")
        bad = [name for name, flag in statistics.nonfinite.items() if bool(flag)]
        raise NumericalError(
            f"batch {number}: statistics that are not finite in {len(bad)} of {len(self.layers)} layers, first in "
            f"'{bad[0]}': look for NaN or infinite inputs or weights."
        )

    def fishers(self, total: Statistics, factors: Mapping[str, KroneckerBlock], words: Sequence[str]) -> list[Fisher]:
        """The sums divided, in each of the structures."""
        counts = {"examples": total.examples, "terms": total.divisor}
        fishers = []
        for word, one in zip(words, self.stored, strict=True):
            known = self.kind == "forward_only"
            blocks = one.of_kronecker(factors) if known else one.blocks(factors, total.divisor)
            meta = {"likelihood": repr(self.likelihood), "kind": self.kind, "structure": word, "samples": self.samples}
            if self.kind in ("empirical", "forward_only"):
                meta["note"] = "not the conditional Fisher"
            fishers.append(Fisher(blocks, meta={**meta, "counts": counts}))
        return fishers

    def factors(self, total: Statistics) -> dict[str, KroneckerBlock]:
        """G (x) A of the layers that took part and whose moments were asked for."""
        missing = [name for name in self.layers if name not in total.layers]
        if missing:
            logger.warning("layers that never took part in a forward have no block: %s", ", ".join(missing))
        if not total.divisor.is_meta and not bool(total.divisor > 0):
            raise ArgumentError("the data have no valid loss term (M = 0): every label is masked or ignored")
        factors = {}
        for name, layer in self.layers.items():
            sums = total.layers.get(name)
            if sums is None or name not in self.wanted.moments:
                continue
            A = sums.A / sums.A_count
            if self.kind == "forward_only":
                G = torch.eye(layer.layout.d_out, dtype=A.dtype, device=A.device)
                G = G.expand(*layer.layout.matrix_shape[:-2], *G.shape).contiguous()
            else:
                G = sums.G / total.divisor.to(sums.G.device)
            factors[name] = KroneckerBlock(layer.layout, A, G, name=name)
        return factors
