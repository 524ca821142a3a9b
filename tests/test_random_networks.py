"""Networks drawn at random: blocks of ``kc.estimate`` against the dense Fisher, and against each form's own formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import kfac_cond as kc
from kfac_cond.layers.layer import Layer
from kfac_cond.layers.survey import survey

from .random_networks import PIECES, Drawn, is_real, networks
from .reference import assert_same, categorical_log_prob, entries_of, exact_fisher, fisher_of_draws, within_groups

checked = settings(max_examples=4, deadline=None, derandomize=True)

#: One weight and one position a use where the inputs have one: the pairs (a, g) of an example are one.
SINGLE = tuple(name for name in PIECES if name not in ("used twice", "tied", "raw"))
#: Those in which y[n, s] = W a[n, s] + b is what a module call returns.
PLAIN = ("linear", "convolution", "transposed convolution", "bilinear", "used twice", "tied")


def estimated(drawn: Drawn, structure: str | list[str], kind: str, **arguments: Any) -> Any:
    draws = [drawn.draws] if kind == "sampled" else None
    options = kc.Options(dtype=torch.float64, data=drawn.data, draws=draws)
    likelihood = kc.Categorical(dim=-1)
    return kc.estimate(
        drawn.model, [drawn.inputs], likelihood, structure=structure, kind=kind, options=options, **arguments
    )


def trainable(drawn: Drawn) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in drawn.model.named_parameters() if parameter.requires_grad}


def output_fisher(outputs: Tensor) -> Tensor:
    p = torch.softmax(outputs, -1).reshape(-1, outputs.shape[-1])
    return torch.block_diag(*(torch.diag(one) - torch.outer(one, one) for one in p))


def exact(drawn: Drawn, names: Sequence[str] | None = None) -> Tensor:
    """F in the order of the model's parameters, or of names."""
    held = trainable(drawn)
    parameters = [held[name] for name in names or held]
    return exact_fisher(drawn.model, drawn.inputs, output_fisher, parameters=parameters, divisor=drawn.terms).detach()


def of_draws(drawn: Drawn) -> Tensor:
    settings_ = {"parameters": [*trainable(drawn).values()], "divisor": drawn.terms}
    return fisher_of_draws(drawn.model, drawn.inputs, drawn.draws, categorical_log_prob, **settings_)


def of_batches(drawn: Drawn, layer: Layer) -> Tensor:
    """[draws, *matrix_shape]: the gradient of the sum over all terms, which the universal form squares."""
    rows = []
    for labels in drawn.draws:
        loss = -categorical_log_prob(drawn.model(drawn.inputs), labels)
        gradients = torch.autograd.grad(loss, [*layer.parameters.values()], allow_unused=True)
        named = zip(layer.parameters.items(), gradients, strict=True)
        rows.append(layer.layout.to_matrix({name: torch.zeros_like(p) if g is None else g for (name, p), g in named}))
    return torch.stack(rows)


def compare(found: Tensor, expected: Tensor) -> None:
    """Also where what is expected is zero but for rounding."""
    assert_same(torch.cat([found.flatten(), torch.ones(1)]), torch.cat([expected.flatten(), torch.ones(1)]))


def stored(structure: str, F: Tensor, block: kc.Block) -> Tensor:
    if structure == "block":
        return F
    row = torch.arange(len(F)) // (1 if structure == "diagonal" else block.layout.d_in)
    return F * (row[:, None] == row)


STRUCTURES = ["block", "unit_wise", "diagonal"]


@pytest.mark.parametrize("first", PIECES)
@checked
@given(data=st.data())
def test_the_exact_fisher(data, first):
    """Of every parameter, for any number of examples and positions."""
    drawn = data.draw(networks(first))
    F = exact(drawn)
    *by_layer, dense = estimated(drawn, [*STRUCTURES, "dense"], "exact")
    for structure, fisher in zip(STRUCTURES, by_layer, strict=True):
        assert {name for block in fisher.values() for name in block.layout.names} == set(trainable(drawn))
        for block in fisher.values():
            order = entries_of(drawn.model, block.layout)
            compare(block.to_dense(), stored(structure, F[order][:, order], block))
    compare(dense.to_dense(), exact(drawn, dense.parameter_names))


@pytest.mark.parametrize("first", PIECES)
@checked
@given(data=st.data())
def test_given_labels(data, first):
    """Example by example where a layer has a form of its own, all examples together in the universal form."""
    drawn = data.draw(networks(first))
    F, layers = of_draws(drawn), survey(drawn.model).layers
    for structure, fisher in zip(STRUCTURES, estimated(drawn, STRUCTURES, "sampled"), strict=True):
        for name, block in fisher.items():
            if layers[name].modules:
                order = entries_of(drawn.model, block.layout)
                expected = F[order][:, order]
            else:
                rows = of_batches(drawn, layers[name]).flatten(1)
                expected = rows.T @ rows / (len(rows) * drawn.terms)
            compare(block.to_dense(), stored(structure, expected, block))


@pytest.mark.parametrize("first", SINGLE)
@checked
@given(data=st.data())
def test_one_example_at_one_position_is_exact_in_kronecker_factors(data, first):
    """ORACLES 6, on the entries that a form with groups keeps."""
    drawn = data.draw(networks(first, among=SINGLE, examples=1, positions=1))
    F, layers = of_draws(drawn), survey(drawn.model).layers
    for name, block in estimated(drawn, "kfac", "sampled").items():
        if layers[name].modules:
            order = entries_of(drawn.model, block.layout)
            compare(block.to_dense(), F[order][:, order] * within_groups(block.layout))


@pytest.mark.parametrize("first", ["raw", "tied"])
@checked
@given(data=st.data())
def test_the_universal_form_is_its_own_formula(data, first):
    """R (x) C / tr R of each matrix of a stack, the diagonal of a vector."""
    drawn = data.draw(networks(first))
    layers = survey(drawn.model).layers
    for name, block in estimated(drawn, "kfac", "sampled").items():
        if layers[name].modules:
            continue
        D = of_batches(drawn, layers[name])
        D = D.reshape(len(D), layers[name].layout.groups, *D.shape[-2:])
        R, C = (torch.einsum(f"k g o i, k g {pair}", D, D) for pair in ("p i -> g o p", "o j -> g i j"))
        trace = R.diagonal(dim1=-2, dim2=-1).sum(-1)
        if D.shape[-1] == 1:
            expected = torch.diag(R.diagonal(dim1=-2, dim2=-1).flatten())
        else:
            each = zip(R, C, trace, strict=True)
            expected = torch.block_diag(*(torch.kron(r, c) / t if t > 0 else torch.kron(r, c) for r, c, t in each))
        compare(block.to_dense(), expected / (len(D) * drawn.terms))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("first", PLAIN)
@checked
@given(data=st.data())
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_factors_are_their_formula(data, first, sharing):
    """ORACLES 6 and 12 for several positions and uses: what a module is given and what comes back to it."""
    drawn = data.draw(networks(first, among=PLAIN))
    layers = survey(drawn.model).layers
    fisher = estimated(drawn, "kfac", "sampled", rules={"*": {"sharing": sharing}})
    for name, (inputs, gradients, real) in pairs(drawn, {n: one for n, one in layers.items() if one.modules}).items():
        of_examples = real.sum(1)
        if sharing == "reduce":
            inputs = inputs.sum(2, keepdim=True) / of_examples[:, None, None]
            gradients = gradients.sum(3, keepdim=True)
            rows = len(real)
        else:
            rows = int(real.sum())
        A = torch.einsum("g n s i, g n s j -> g i j", inputs, inputs) / rows
        G = torch.einsum("k g n s o, k g n s p -> g o p", gradients, gradients) / (len(gradients) * drawn.terms)
        compare(fisher[name].A, A.reshape(fisher[name].A.shape))
        compare(fisher[name].G, G.reshape(fisher[name].G.shape))


def pairs(drawn: Drawn, layers: dict[str, Layer]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By layer [groups, n, s, d_in], [draws, groups, n, s, d_out] and real positions [n, s], uses one after another.

    Padded positions are zero in both.
    """
    calls: dict[str, list[tuple[nn.Module, tuple[Tensor, ...], Tensor]]] = {name: [] for name in layers}

    def noted(name: str) -> Callable[..., None]:
        return lambda module, args, output: calls[name].append((module, args, output))

    handles = [module.register_forward_hook(noted(name)) for name, layer in layers.items() for module in layer.modules]
    outputs = drawn.model(drawn.inputs)
    for handle in handles:
        handle.remove()
    losses = [-categorical_log_prob(outputs, labels) for labels in drawn.draws]
    found = {}
    for name, layer in layers.items():
        inputs, gradients, real = [], [], []
        for module, args, output in calls[name]:
            each = [torch.autograd.grad(loss, output, retain_graph=True)[0] for loss in losses]
            g = torch.stack([features_last(module, one) for one in each])
            keep = is_real(drawn.inputs)
            keep = keep if keep.shape == g.shape[1:3] else torch.ones(g.shape[1:3], dtype=torch.bool)
            inputs.append(multiplied(module, args, layer) * keep[..., None])
            of_groups = rearrange(g, "k n s (g o) -> k g n s o", g=layer.layout.groups)
            gradients.append(of_groups * keep[..., None])
            real.append(keep)
        found[name] = torch.cat(inputs, 2), torch.cat(gradients, 3), torch.cat(real, 1)
    return found


def features_last(module: nn.Module, x: Tensor) -> Tensor:
    """[n, s, features] of what a module returned, with one position where it was given none."""
    if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
        return x.mT
    return x if x.dim() == 3 else x[:, None]


def multiplied(module: nn.Module, args: tuple[Tensor, ...], layer: Layer) -> Tensor:
    """[groups, n, s, d_in]: what a row of a layer's matrix multiplies, as the derivative of its output by the row."""
    attributes = [attribute for _, attribute in layer.places.values()]
    held = {attribute: p.detach() for attribute, p in module.named_parameters()}
    named = {name: a for name, (_, a) in layer.places.items() if name in layer.layout.names and a in attributes}
    by = jacrev(lambda values: features_last(module, functional_call(module, {**held, **values}, args)))(
        {attribute: held[attribute] for attribute in named.values()}
    )
    layout = layer.layout
    n, s, _ = next(iter(by.values())).shape[:3]

    def row(group: int, example: int, position: int) -> Tensor:
        at = example, position, group * layout.d_out
        matrix = layout.to_matrix({name: by[attribute][at] for name, attribute in named.items()})
        return matrix.reshape(-1, layout.d_in)[group * layout.d_out]

    rows = [row(*at) for at in torch.cartesian_prod(*map(torch.arange, (layout.groups, n, s))).tolist()]
    return torch.stack(rows).reshape(layout.groups, n, s, layout.d_in).detach()
