"""The Fisher of a model over data: one pass, a block per layer, nothing of the model changed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, overload

import torch
from torch import nn

from .checks import check_module, checked_rules, settings_of
from .errors import ArgumentError, CoverageError
from .heads import Distribution
from .layers.survey import Layer, survey
from .likelihoods import as_likelihood
from .options import KINDS, Batches, Kind, Options
from .partial import Partial, digest_of_model
from .passes import Pass, checked_batches
from .statistics import Statistics
from .structures import COLLECTORS, Fisher, Joint, LayerByLayer

logger = logging.getLogger("kfac_cond")

STRUCTURES = (*COLLECTORS, "dense", "mixed")


@overload
def estimate(
    model: nn.Module,
    data: Batches,
    likelihood: Distribution | str | nn.Module,
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
    likelihood: Distribution | str | nn.Module,
    *,
    structure: list[str] | tuple[str, ...],
    kind: Kind = "sampled",
    samples: int = 1,
    options: Options | None = None,
) -> list[Fisher]: ...


def estimate(
    model: nn.Module,
    data: Batches,
    likelihood: Distribution | str | nn.Module,
    *,
    structure: str | list[str] | tuple[str, ...] = "kfac",
    kind: Kind = "sampled",
    samples: int = 1,
    options: Options | None = None,
) -> Fisher | list[Fisher]:
    """The conditional Fisher of ``model`` over ``data``: inputs from the data, labels from the model.

    The model runs in the mode it is in; its parameters, gradients and buffers, and the global random state, are the
    same afterwards. The result does not depend on how the data are batched (on CPU; elsewhere with injected draws),
    unless the model's own outputs do, by batch norm in training mode.

    Args:
        model: any module.
        data: batches, or a function that yields them: a tensor, a tuple (inputs, labels), or a mapping of keyword
            arguments. Labels serve masks and class weights alone.
        likelihood: a likelihood, its name, a criterion module, or a ``kc.Product`` of several heads.
        structure: what each layer's block is stored as: 'kfac' (a Kronecker pair), 'ekfac' (its eigenbasis with
            eigenvalues of its own), 'tkfac' and 'kpsvd' (other Kronecker pairs), 'diagonal', 'unit_wise' (a dense
            matrix for each output), 'block' (a dense matrix);
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
        checked_batches(data)
    layers = _wanted(model, options, kind)
    stored = [_storage(word, layers, twice=options.second_pass and kind != "forward_only") for word in words]
    given = (model, layers, as_likelihood(likelihood, heard=False), kind, samples, options, stored)
    single = Pass(*given)
    partial = Partial(options.partial, _request(single, words) if options.partial is not None else {})
    total = single.run(data, partial)
    single.check_complete(total)
    if any(one.waiting for one in stored):
        factors = single.factors(total)
        for one in stored:
            one.look_again(factors)
        _check_again(total, Pass(*given).run(data, partial, [total]))
    fishers = single.fishers(total, words)
    partial.remove()
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


def _request(single: Pass, words: list[str]) -> dict[str, Any]:
    """What makes two estimates the same, as plain values."""
    return {
        "likelihood": repr(single.likelihood),
        "structure": words,
        "kind": single.kind,
        "samples": single.samples,
        "seed": single.draws.seed,
        "dtype": str(single.dtype),
        "layers": {
            name: [list(one.layout.matrix_shape), one.sharing, one.max_factor_dim]
            for name, one in single.layers.items()
        },
        "model": digest_of_model(single.model),
    }


def _check_again(first: Statistics, second: Statistics) -> None:
    same = first.divisor.is_meta or torch.equal(first.divisor, second.divisor)
    if first.examples != second.examples or not same:
        M, again = (", ".join(f"{one:g}" for one in total.divisor.tolist()) for total in (first, second))
        raise ArgumentError(
            f"the second pass gave {second.examples} examples and M = {again}, the first {first.examples} and {M}: "
            f"second_pass=True needs the same batches again"
        )


def _wanted(model: nn.Module, options: Options, kind: str) -> dict[str, Layer]:
    found = survey(model, options.rules).layers
    if kind == "forward_only":
        found = _with_inputs(found)
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
        name: _limited(layer, options.max_factor_dim)
        for name, layer in found.items()
        if patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    if not wanted:
        raise CoverageError(f"{type(model).__name__} has no layer that can be covered: see kc.coverage(model)")
    return wanted


def _with_inputs(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The layers that a forward alone says something of, after the others are named."""
    kept = {name: layer for name, layer in layers.items() if layer.modules}
    if len(kept) < len(layers):
        logger.warning(
            "kind='forward_only' has nothing for parameters in the universal form, which are known by their gradients: "
            "%s have no block.",
            ", ".join(name for name in layers if name not in kept),
        )
    return kept


def _limited(layer: Layer, max_factor_dim: int | None) -> Layer:
    """The layer with a largest side, where its own rule says none."""
    if layer.rule.max_factor_dim is not None:
        return layer
    return replace(layer, rule=replace(layer.rule, max_factor_dim=max_factor_dim))


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
