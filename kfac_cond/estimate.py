"""The Fisher of a model over data: one pass, a block per layer, nothing of the model changed."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import overload

from torch import nn

from .checks import check_module, checked_rules, settings_of
from .errors import ArgumentError, CoverageError
from .implicit import WORDS, Whole
from .layers.survey import Layer, survey
from .likelihoods import Likelihood, as_likelihood
from .options import KINDS, Batches, Kind, Options
from .passes import Pass, checked_batches
from .statistics import Statistics
from .structures import COLLECTORS, Fisher, Joint, LayerByLayer

STRUCTURES = (*COLLECTORS, "dense", "mixed", *WORDS)


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
            Two are of all trainable parameters, in a layer or not, and go through the data again for every product:
            'implicit' (nothing is stored; of the same labels as the others) and 'low_rank' (its largest eigenpairs,
            ``Options(rank=)``); with ``Options(layers=)`` of those layers, and without what a rule excludes.
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
    words = [structure] if isinstance(structure, str) else list(structure)
    _check(model, words, kind, samples, options)
    if not callable(data):
        checked_batches(data)
    chosen = as_likelihood(likelihood, heard=False)
    stored = [word for word in words if word not in WORDS]
    whole = None
    if len(stored) < len(words):
        # First, so that data which cannot be gone through again are refused before a pass has used them up.
        whole = Whole(model, data, chosen, kind, samples, options, _names(model, options))
    passed = iter(_of_one_pass(model, data, chosen, stored, kind, samples, options) if stored else ())
    fishers = [next(passed) if whole is None or word not in WORDS else whole.fisher(word) for word in words]
    return fishers[0] if isinstance(structure, str) else fishers


def _of_one_pass(
    model: nn.Module,
    data: Batches,
    likelihood: Likelihood,
    words: list[str],
    kind: Kind,
    samples: int,
    options: Options,
) -> list[Fisher]:
    """The Fishers that are stored layer by layer or as one matrix, from a pass that they share."""
    layers = _wanted(model, options)
    stored = [_storage(word, layers, twice=options.second_pass and kind != "forward_only") for word in words]
    given = (model, layers, likelihood, kind, samples, options, stored)
    single = Pass(*given)
    total = single.run(data)
    factors = single.factors(total)
    if any(one.waiting for one in stored):
        for one in stored:
            one.look_again(factors)
        _check_again(total, Pass(*given).run(data))
    return single.fishers(total, factors, words)


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
    for pattern, rule in rules.items():
        if rule.get("damping") is not None:
            raise ArgumentError(
                f"rules['{pattern}']: damping={rule['damping']!r} means nothing here, since kc.estimate inverts "
                f"nothing: leave it out, and give it where you do, fisher.solve(v, damping=...)"
            )
    if options.rank is not None and "low_rank" not in words:
        raise ArgumentError(f"Options(rank={options.rank}) is for structure='low_rank', and the structure is {words}")
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


def _wanted(model: nn.Module, options: Options) -> dict[str, Layer]:
    found = survey(model, options.rules).layers
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


def _names(model: nn.Module, options: Options) -> set[str]:
    """The parameters of 'implicit' and 'low_rank': the wanted layers', or all that no rule excludes."""
    if options.layers is not None:
        return {name for layer in _wanted(model, options).values() for name in layer.layout.names}
    found = survey(model, options.rules)
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
    return LayerByLayer(layouts, structures, twice=twice)
