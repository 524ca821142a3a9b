"""Parameters without a form of their own: their blocks against the definition of the Fisher, labels enumerated."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_cond as kc

from .reference import assert_same, categorical_log_prob, fisher_of_draws

CLASSES = 2


class Raw(nn.Module):
    """A token, a table, a scale, a slope, a stack of experts and a functional weight, whose tokens are mixed."""

    def __init__(self, *, tokens: int = 2) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 3))
        self.table = nn.Parameter(torch.randn(1, tokens, 3))
        self.scale = nn.Parameter(torch.randn(3))
        self.slope = nn.Parameter(torch.randn(()))
        self.experts = nn.Parameter(torch.randn(2, 3, 4))
        self.out = nn.Parameter(torch.randn(CLASSES, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x + self.table + self.token)
        h = h + torch.softmax(h @ h.mT, -1) @ h * self.scale
        h = torch.einsum("ntd,edk->ntk", h, self.experts)
        return F.linear(self.slope * torch.tanh(h), self.out)


@pytest.fixture
def model() -> Raw:
    torch.manual_seed(0)
    return Raw()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(1))


def enumerated(outputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """All label combinations of all terms together, each with its probability."""
    log_p = torch.log_softmax(outputs.detach(), -1)
    labels = [
        torch.tensor(one).reshape(outputs.shape[:-1]) for one in product(range(CLASSES), repeat=log_p[..., 0].numel())
    ]
    return [(one, log_p.gather(-1, one[..., None]).sum().exp()) for one in labels]


def summed_gradients(model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradient of the sum over all terms, by parameter."""
    loss = -categorical_log_prob(model(inputs), labels)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def brute_force(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """The block of every parameter, from the gradients of each example at all of its label combinations."""
    blocks = {name: torch.zeros(p.numel(), p.numel()) for name, p in model.named_parameters()}
    M = model(inputs)[..., 0].numel()
    for x in inputs:
        for labels, probability in enumerated(model(x[None])):
            for name, g in summed_gradients(model, x[None], labels).items():
                blocks[name] += probability * torch.outer(g.flatten(), g.flatten()) / M
    return blocks


def as_stack(parameter: Tensor) -> tuple[int, int, int]:
    """(groups, rows, columns) of a parameter, by hand."""
    shape = [size for size in parameter.shape if size != 1]
    if len(shape) < 2:
        return 1, parameter.numel(), 1
    return int(torch.tensor(shape[:-2]).prod()), shape[-2], shape[-1]


def partial_traces(block: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
    """(R, C) of each group: the block summed over equal columns, and over equal rows."""
    groups, rows, columns = as_stack(parameter)
    full = block.reshape(groups, rows, columns, groups, rows, columns)
    own = torch.stack([full[g, :, :, g] for g in range(groups)])
    return torch.einsum("goipi->gop", own), torch.einsum("goioj->gij", own)


def estimated(model: nn.Module, inputs: Tensor, labels: Tensor, structure: str) -> kc.Fisher:
    options = kc.Options(draws=[[labels]], dtype=torch.float64)
    return kc.estimate(model, [inputs], kc.Categorical(dim=-1), structure=structure, options=options)


def averaged(model: nn.Module, inputs: Tensor, structure: str, read: Callable[[kc.Block], Tensor]) -> dict[str, Tensor]:
    """What is read of each block, averaged over all label combinations of the whole batch."""
    total: dict[str, Tensor] = {}
    for labels, probability in enumerated(model(inputs)):
        for name, block in estimated(model, inputs, labels, structure).items():
            total[name] = total.get(name, torch.zeros(())) + probability * read(block)
    return total


def test_every_parameter_is_covered(model):
    table = kc.coverage(model)
    assert table.share == 1.0
    assert {row.form for row in table.rows} == {"universal"}


@pytest.mark.parametrize("structure", ["block", "diagonal", "unit_wise"])
def test_the_average_over_all_labels_is_the_block(model, inputs, structure):
    found = averaged(model, inputs, structure, lambda block: block.to_dense())
    expected = brute_force(model, inputs)
    assert found.keys() == expected.keys()
    for name, parameter in model.named_parameters():
        kept = {
            "block": torch.ones_like(expected[name]),
            "diagonal": torch.eye(parameter.numel()),
            "unit_wise": torch.block_diag(
                *[torch.ones(as_stack(parameter)[2], as_stack(parameter)[2])]
                * (parameter.numel() // as_stack(parameter)[2])
            ),
        }[structure]
        assert_same(found[name], expected[name] * kept)


@pytest.mark.parametrize("structure", ["kfac", "tkfac"])
def test_the_average_over_all_labels_has_both_partial_traces(model, inputs, structure):
    expected = brute_force(model, inputs)
    R = averaged(model, inputs, structure, lambda block: block.G)
    # A = C / t of one draw: C itself is A times the trace of R.
    C = averaged(model, inputs, structure, carried)
    for name, parameter in model.named_parameters():
        exact_R, exact_C = partial_traces(expected[name], parameter)
        if as_stack(parameter)[2] == 1:
            exact_R = exact_R.diagonal(dim1=-2, dim2=-1)
        if as_stack(parameter)[0] == 1:
            exact_R, exact_C = exact_R[0], exact_C[0]
        if parameter.numel() == 1:
            exact_R = exact_R.reshape(1, 1)
        assert_same(R[name], exact_R)
        assert_same(C[name], exact_C)


def carried(block: kc.Block) -> Tensor:
    """C of a block R (x) C / t."""
    _, G = block.sides
    t = G.diagonal(dim1=-2, dim2=-1).sum(-1)
    return block.A * t.reshape(*t.shape, *[1] * (block.A.dim() - t.dim()))


def test_the_nearest_product_is_no_further_than_that_of_the_moments(model, inputs):
    labels = torch.randint(CLASSES, (2, 2), generator=torch.Generator().manual_seed(2))
    block, nearest, kfac = (estimated(model, inputs, labels, word) for word in ("block", "kpsvd", "kfac"))
    for name, exact in block.items():
        distances = [torch.linalg.norm(one[name].to_dense() - exact.to_dense()) for one in (nearest, kfac)]
        assert distances[0] <= distances[1] + 1e-10


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "tkfac", "diagonal", "unit_wise", "block"])
def test_the_trace_averages_to_that_of_the_fisher(model, inputs, structure):
    found = averaged(model, inputs, structure, lambda block: block.trace())
    for name, block in brute_force(model, inputs).items():
        assert_same(found[name], block.trace())


def test_the_formula_of_given_labels(model, inputs):
    """One backward, squared as it is: R = D D^T / M, C = D^T D / M, block = R (x) C / tr R."""
    labels = torch.randint(CLASSES, (2, 2), generator=torch.Generator().manual_seed(2))
    found = estimated(model, inputs, labels, "kfac")
    for name, D in summed_gradients(model, inputs, labels).items():
        groups, rows, columns = as_stack(D)
        D = D.reshape(groups, rows, columns)
        R, C = D @ D.mT / 4, D.mT @ D / 4
        if columns == 1:
            R = torch.diag_embed(R.diagonal(dim1=-2, dim2=-1))
        products = [torch.kron(r, c / r.trace()) for r, c in zip(R, C, strict=True)]
        assert_same(found[name].to_dense(), torch.block_diag(*products))


def test_draws_are_squared_one_by_one(model, inputs):
    draws = [torch.randint(CLASSES, (2, 2), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    options = kc.Options(draws=[draws], dtype=torch.float64)
    found = kc.estimate(model, [inputs], kc.Categorical(dim=-1), structure="block", options=options)
    for name, _ in model.named_parameters():
        rows = torch.stack([summed_gradients(model, inputs, labels)[name].flatten() for labels in draws])
        assert_same(found[name].to_dense(), rows.mT @ rows / 3 / 4)


@pytest.mark.parametrize("structure", ["diagonal", "block"])
def test_batches_are_squared_one_by_one(model, inputs, structure):
    labels = torch.randint(CLASSES, (2, 2), generator=torch.Generator().manual_seed(2))
    options = kc.Options(draws=[[labels[:1]], [labels[1:]]], dtype=torch.float64)
    found = kc.estimate(model, [inputs[:1], inputs[1:]], kc.Categorical(dim=-1), structure=structure, options=options)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        expected = fisher_of_draws(model, inputs, [labels], categorical_log_prob, parameters=[parameter], divisor=4)
        assert_same(found[name].diagonal().flatten(), expected.diagonal())


@pytest.mark.parametrize("structure", ["block", "diagonal", "dense"])
def test_exact_takes_the_gradient_of_each_example(model, inputs, structure):
    found = kc.estimate(
        model,
        [inputs],
        kc.Categorical(dim=-1),
        structure=structure,
        kind="exact",
        options=kc.Options(dtype=torch.float64),
    )
    expected = brute_force(model, inputs)
    diagonal = found.diagonal()
    for name, block in expected.items():
        assert_same(diagonal[name].flatten(), block.diagonal())
        if structure == "block":
            assert_same(found[name].to_dense(), block)


def test_exact_has_both_partial_traces(model, inputs):
    found = kc.estimate(model, [inputs], kc.Categorical(dim=-1), kind="exact", options=kc.Options(dtype=torch.float64))
    for name, block in brute_force(model, inputs).items():
        parameter = dict(model.named_parameters())[name]
        R, C = partial_traces(block, parameter)
        assert_same(found[name].diagonal().flatten().sum(), block.trace())
        if as_stack(parameter)[2] > 1:
            assert_same(found[name].G.reshape(R.shape), R)
            assert_same(found[name].A.reshape(C.shape), C / R.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None])


def test_data_labels_are_taken_example_by_example(model, inputs):
    labels = torch.randint(CLASSES, (2, 2), generator=torch.Generator().manual_seed(2))
    found = kc.estimate(
        model,
        [(inputs, labels)],
        kc.Categorical(dim=-1),
        structure="block",
        kind="empirical",
        options=kc.Options(dtype=torch.float64),
    )
    for name, parameter in model.named_parameters():
        expected = fisher_of_draws(model, inputs, [labels], categorical_log_prob, parameters=[parameter], divisor=4)
        assert_same(found[name].to_dense(), expected)


def test_dense_couples_parameters_example_by_example(inputs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), Scaled(2))
    labels = torch.randint(CLASSES, (2, 2), generator=torch.Generator().manual_seed(2))
    found = estimated(model, inputs, labels, "dense")
    parameters = [model.get_parameter(name) for name in found.parameter_names]
    expected = fisher_of_draws(model, inputs, [labels], categorical_log_prob, parameters=parameters, divisor=4)
    assert_same(found.to_dense(), expected)


class Scaled(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_a_z_test_over_drawn_labels(model, inputs):
    """The mean over many draws lies within the spread of the draws themselves."""
    exact = brute_force(model, inputs)
    draws = 400
    fisher = kc.estimate(
        model,
        [inputs],
        kc.Categorical(dim=-1),
        structure="diagonal",
        samples=draws,
        options=kc.Options(dtype=torch.float64, seed=3),
    )
    for name, block in exact.items():
        squares = torch.stack(
            [
                p * (summed_gradients(model, inputs, labels)[name].flatten() ** 2 / 4 - block.diagonal()) ** 2
                for labels, p in enumerated(model(inputs))
            ]
        ).sum(0)
        z = (fisher[name].diagonal().flatten() - block.diagonal()) / (squares / draws).sqrt()
        assert z.abs().max() < 5.0


def test_the_error_of_sampling_is_known_for_them(model, inputs):
    fisher = kc.estimate(model, [inputs], kc.Categorical(dim=-1), samples=64, options=kc.Options(seed=0))
    error = fisher.sampling_error()
    exact = {name: block.trace() for name, block in brute_force(model, inputs).items()}
    for name, trace in exact.items():
        assert abs(error[name].trace.value - trace) < 6 * error[name].trace.error


def test_an_iterated_pass_and_a_kept_one_agree(model, inputs):
    settings = {"samples": 2, "options": kc.Options(seed=0)}
    kept, again = (
        kc.estimate(model, [inputs], kc.Categorical(dim=-1), structure=structure, **settings)
        for structure in ("ekfac", kc.Structure("ekfac", second_pass=True))
    )
    for name in kept:
        assert_same(again[name].values, kept[name].values, tolerance=1e-5)


def test_two_estimates_merge_to_the_one_over_all_the_data(model, inputs):
    def over(*pieces: slice) -> kc.Fisher:
        options = kc.Options(draws=[[labels[piece]] for piece in pieces], dtype=torch.float64)
        return kc.estimate(model, [inputs[piece] for piece in pieces], kc.Categorical(dim=-1), options=options)

    inputs, labels = torch.cat([inputs, inputs + 1]), torch.randint(CLASSES, (4, 2))
    merged, whole = over(slice(1)).merge(over(slice(1, 4))), over(slice(1), slice(1, 4))
    for name, block in whole.items():
        assert_same(merged[name].A, block.A)
        assert_same(merged[name].G, block.G)


def test_a_forward_alone_says_nothing_of_them(inputs, caplog):
    model = nn.Sequential(nn.Linear(3, 2), Scaled(2))
    found = kc.estimate(model, [inputs], kc.Categorical(dim=-1), kind="forward_only")
    assert list(found) == ["0"]
    assert "1.scale" in caplog.text


@pytest.mark.parametrize("limit", [1, 3])
def test_a_large_side_is_the_diagonal_of_the_same_moment(model, inputs, limit):
    labels = torch.randint(CLASSES, (2, 2), generator=torch.Generator().manual_seed(2))
    whole = estimated(model, inputs, labels, "kfac")
    options = kc.Options(draws=[[labels]], dtype=torch.float64, max_factor_dim=limit)
    found = kc.estimate(model, [inputs], kc.Categorical(dim=-1), options=options)
    for name, block in found.items():
        assert_same(block.diagonal(), whole[name].diagonal())
        _, rows, columns = as_stack(dict(model.named_parameters())[name])
        sizes = {"A": columns, "G": rows}
        expected = ["G"] if columns == 1 and rows > 1 else [side for side in "AG" if sizes[side] > limit]
        assert list(block.diagonal_sides) == expected
