"""The Fisher of a model over data: one pass, a block per layer, nothing of the model changed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from torch import nn

from .checks import check_module, checked_rules, settings_of
from .errors import ArgumentError, CoverageError
from .heads import Distribution
from .implicit import WORDS, Whole
from .layers.layer import Layer
from .layers.rules import matches
from .layers.survey import survey
from .likelihoods import as_likelihood
from .options import KINDS, Batches, Kind, Options, Request, Structure
from .partial import Partial, digest_of_model
from .passes import Pass, checked_batches
from .statistics import Statistics
from .structures import COLLECTORS, Fisher, Joint, LayerByLayer
from .wrapping import name_left_out, refuse_unfit

logger = logging.getLogger("kfac_cond")

STRUCTURES = (*COLLECTORS, "dense", "mixed", *WORDS)


@overload
def estimate(
    model: nn.Module,
    data: Batches,
    likelihood: Distribution | str | nn.Module,
    *,
    structure: str | Structure = "kfac",
    kind: Kind = "sampled",
    samples: int = 1,
    rules: Mapping[str, Mapping[str, Any]] | None = None,
    options: Options | None = None,
) -> Fisher: ...


@overload
def estimate(
    model: nn.Module,
    data: Batches,
    likelihood: Distribution | str | nn.Module,
    *,
    structure: list[str] | list[Structure] | list[str | Structure] | tuple[str | Structure, ...],
    kind: Kind = "sampled",
    samples: int = 1,
    rules: Mapping[str, Mapping[str, Any]] | None = None,
    options: Options | None = None,
) -> list[Fisher]: ...


def estimate(
    model: nn.Module,
    data: Batches,
    likelihood: Distribution | str | nn.Module,
    *,
    structure: str | Structure | Sequence[str | Structure] = "kfac",
    kind: Kind = "sampled",
    samples: int = 1,
    rules: Mapping[str, Mapping[str, Any]] | None = None,
    options: Options | None = None,
) -> Fisher | list[Fisher]:
    """The conditional Fisher of ``model`` over ``data``: inputs from the data, labels from the model.

    The model runs in the mode it is in; its parameters, gradients and buffers, and the global random state, are the
    same afterwards. The result does not depend on how the data are batched (on CPU; elsewhere with injected draws).

    Args:
        model: any module.
        data: batches, or a function that yields them: a tensor, a tuple (inputs, labels), or a mapping of keyword
            arguments. Labels serve masks and class weights alone.
        likelihood: a likelihood, its name, a criterion module, or a ``kc.Product`` of several heads.
        structure: what each layer's block is stored as: 'kfac' (a Kronecker pair), 'ekfac' (its eigenbasis with
            eigenvalues of its own), 'tkfac' and 'kpsvd' (other Kronecker pairs), 'diagonal', 'unit_wise' (a dense
            matrix for each output), 'block' (a dense matrix); 'dense' (all layers in one matrix); 'mixed' (what
            ``rules`` say of each layer, 'kfac' elsewhere).
            Two are of all trainable parameters, in a layer or not, and go through the data again for every product:
            'implicit' (nothing is stored; of the same labels as the others) and 'low_rank' (its largest eigenpairs,
            ``kc.Structure('low_rank', rank=)``); with ``Options(layers=)`` of those layers, and without what a rule
            excludes.
            A list gives a list, from one pass of forwards and backwards. 'ekfac' and 'kpsvd' hold a and g of all the
            data until the end.
        kind: 'sampled' draws ``samples`` labels for each term; 'exact' sums over all labels in closed form (type-2),
            one backward for each term of an example and each output. Two kinds are not the conditional Fisher:
            'empirical' takes the data labels in place of labels drawn from the model (gradients of one example's loss,
            squared; not zero on average away from the optimum); 'forward_only' takes no labels and no backward, and
            sets G = I.
        samples: label draws a batch, each one backward through the one forward.
        rules: settings by layer-name pattern, {pattern: dict(sharing=, exclude=, max_factor_dim=, structure=)};
            ``structure`` is for structure='mixed'.
        options: see ``Options``.

    Returns:
        A ``Fisher``: a mapping from layer name to block; a list of them for a list of structures.

    Raises:
        ArgumentError: an argument out of range, or data that yield nothing.
        CoverageError: no layer to cover or parameter to differentiate, or a pattern that matches none.
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
    one = isinstance(structure, str | Structure)
    words = _structures([structure] if isinstance(structure, str | Structure) else structure)
    _check(model, words, kind, samples, rules, options)
    if not callable(data):
        checked_batches(data)
    chosen = as_likelihood(likelihood, heard=False)
    request = Request(model, data, chosen, kind, samples, checked_rules(rules), options)
    stored = [word for word in words if word.name not in WORDS]
    # First, so that data which cannot be gone through again are refused before a pass has used them up.
    whole = Whole(request, _names(request)) if len(stored) < len(words) else None
    passed = iter(_of_one_pass(request, stored) if stored else ())
    fishers = [next(passed) if whole is None or word.name not in WORDS else whole.fisher(word) for word in words]
    return fishers[0] if one else fishers


def _of_one_pass(request: Request, words: list[Structure]) -> list[Fisher]:
    """The Fishers that are stored layer by layer or as one matrix, from a pass that they share."""
    again = request.kind != "forward_only"

    def made(functional: frozenset[str]) -> tuple[dict[str, Layer], list[LayerByLayer | Joint]]:
        layers = _wanted(request, functional)
        return layers, [_storage(word.name, layers, twice=word.second_pass and again) for word in words]

    single = Pass(request, made)
    named = {} if request.options.partial is None else _described(request, single, words)
    partial = Partial(request.options.partial, named)
    total = single.run(partial)
    single.check_complete(total)
    if any(one.waiting for one in single.stored):
        factors = single.factors(total)
        for one in single.stored:
            one.look_again(factors)
        _check_again(total, Pass(request, lambda _: (single.layers, single.stored)).run(partial, [total]))
    fishers = single.fishers(total, [word.name for word in words])
    partial.remove()
    return fishers


def _structures(given: Sequence[str | Structure]) -> list[Structure]:
    """The structures asked for, each by a word or with what is said of it."""
    words = [Structure(one) if isinstance(one, str) else one for one in given]
    if not words:
        raise ArgumentError("structure is an empty list: expected at least one structure")
    for word in words:
        if not isinstance(word, Structure) or word.name not in STRUCTURES:
            name = word.name if isinstance(word, Structure) else word
            raise ArgumentError(f"structure={name!r}: expected one of {', '.join(STRUCTURES)}")
    return words


def _check(
    model: nn.Module,
    words: list[Structure],
    kind: str,
    samples: int,
    rules: Mapping[str, Mapping[str, Any]] | None,
    options: Options,
) -> None:
    check_module(model)
    refuse_unfit(model)
    if kind not in KINDS:
        raise ArgumentError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    mixed = any(word.name == "mixed" for word in words)
    for pattern, rule in checked_rules(rules).items():
        if rule.get("structure") is not None and not mixed:
            raise ArgumentError(f"rules['{pattern}'] sets a structure: pass structure='mixed' for it to hold")
        if rule.get("damping") is not None:
            raise ArgumentError(
                f"rules['{pattern}']: damping={rule['damping']!r} means nothing here, since kc.estimate inverts "
                f"nothing: leave it out, and give it where you do, fisher.solve(v, damping=...)"
            )
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
        raise ArgumentError(f"samples={samples!r}: expected a whole number >= 1")
    if kind != "sampled" and (samples != 1 or options.draws is not None):
        raise ArgumentError(f"kind={kind!r} draws no labels: leave out samples and draws")


def _described(request: Request, single: Pass, words: list[Structure]) -> dict[str, Any]:
    """What makes two estimates the same, as plain values."""
    return {
        "likelihood": repr(request.likelihood),
        "structure": [repr(word) for word in words],
        "kind": request.kind,
        "samples": request.samples,
        "seed": single.expectation.draws.seed,
        "dtype": str(request.options.dtype),
        "layers": {
            name: [list(one.layout.matrix_shape), one.sharing, one.max_factor_dim, one.rule.structure]
            for name, one in single.layers.items()
        },
        "model": digest_of_model(request.model),
    }


def _check_again(first: Statistics, second: Statistics) -> None:
    same = first.divisor.is_meta or torch.equal(first.divisor, second.divisor)
    if first.examples != second.examples or not same:
        M, again = (", ".join(f"{one:g}" for one in total.divisor.tolist()) for total in (first, second))
        raise ArgumentError(
            f"the second pass gave {second.examples} examples and M = {again}, the first {first.examples} and {M}: "
            f"second_pass=True needs the same batches again"
        )


def _wanted(request: Request, functional: frozenset[str] = frozenset()) -> dict[str, Layer]:
    surveyed, options = survey(request.model, request.rules, functional=functional), request.options
    found = surveyed.layers
    if options.layers is None and not functional:
        name_left_out(surveyed)
    if request.kind == "forward_only":
        found = _with_inputs(found)
    patterns = [options.layers] if isinstance(options.layers, str) else options.layers
    for pattern in patterns or ():
        if not any(_named(layer, [pattern]) for layer in found.values()):
            raise CoverageError(f"layers: '{pattern}' matches none of {', '.join(found) or 'no layers'}")
    wanted = {
        name: limited(layer, options.max_factor_dim)
        for name, layer in found.items()
        if patterns is None or _named(layer, patterns)
    }
    if not wanted:
        trainable = [parameter.requires_grad for parameter in request.model.parameters()]
        why = "no trainable parameter: call requires_grad_(True) on what is to be looked at"
        known = why if trainable and not any(trainable) else "no layer that can be covered: see kc.coverage(model)"
        raise CoverageError(f"{type(request.model).__name__} has {known}")
    return wanted


def _with_inputs(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The layers that a forward alone says something of, by their inputs, after the others are named."""
    kept = {name: replace(layer, gradient_sums=None) for name, layer in layers.items() if layer.modules}
    if len(kept) < len(layers):
        logger.warning(
            "kind='forward_only' has nothing for parameters in the universal form, which are known by their gradients: "
            "%s have no block.",
            ", ".join(name for name in layers if name not in kept),
        )
    return kept


def _named(layer: Layer, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches a layer: its name, that of its module, or that of one of its parameters."""
    # By its parameter as well, which is the layer's name once its weight is seen to be used without a call.
    owner = layer.owner if layer.modules else layer.name.rpartition(".")[0]
    names = [layer.name, owner, *layer.layout.names]
    return any(matches(name, pattern) for name in names for pattern in patterns)


def limited(layer: Layer, max_factor_dim: int | None) -> Layer:
    """The layer with a largest side, where its own rule says none."""
    if layer.rule.max_factor_dim is not None:
        return layer
    return replace(layer, rule=replace(layer.rule, max_factor_dim=max_factor_dim))


def _names(request: Request) -> set[str]:
    """The parameters of 'implicit' and 'low_rank': the wanted layers', or all that no rule excludes."""
    if request.options.layers is not None:
        return {name for layer in _wanted(request).values() for name in layer.layout.names}
    found = survey(request.model, request.rules)
    return {row.path for row in found.rows} - found.excluded


def _storage(word: str, layers: Mapping[str, Layer], *, twice: bool) -> LayerByLayer | Joint:
    """What collects one estimate."""
    layouts = {name: layer.layout for name, layer in layers.items()}
    if word == "dense":
        return Joint(layouts)
    structures = {name: layer.rule.structure or "kfac" if word == "mixed" else word for name, layer in layers.items()}
    for name, structure in structures.items():
        if structure not in COLLECTORS:
            raise ArgumentError(f"rules: layer '{name}' has structure={structure!r}, expected one of {[*COLLECTORS]}")
    limits = {name: layer.max_factor_dim for name, layer in layers.items()}
    return LayerByLayer(layouts, structures, twice=twice, limits=limits)
