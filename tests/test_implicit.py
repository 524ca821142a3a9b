"""The exact Fisher as products alone and through its Gram kernel, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.linearised import Linearised

from .helpers import Apply, classifier
from .reference import assert_same, exact_fisher


class Attention(nn.Module):
    """One attention layer over positions, with an output a position."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(2, 6), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, -1))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


class Checkpointed(nn.Module):
    """Runs its first part again on the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=False))


class Hoarder(nn.Module):
    """Uses its parameters from a list of its own, where nobody can put others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
        self.own = [self.first.weight, self.first.bias]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.linear(x, *self.own).tanh())


class Square(torch.autograd.Function):
    """An operation that has a backward, twice differentiable, and no forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(8, 3))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


def frozen() -> nn.Module:
    model = classifier()
    model[0].bias.requires_grad_(False)
    return model


def categorical_fisher(outputs: Tensor) -> Tensor:
    """Of the flattened (..., C) logits of one example."""
    p = outputs.softmax(-1).reshape(-1, outputs.shape[-1])
    return torch.block_diag(*[torch.diag(row) - torch.outer(row, row) for row in p])


def gaussian_fisher(outputs: Tensor) -> Tensor:
    return torch.eye(outputs.numel()) / 0.5


def bernoulli_fisher(outputs: Tensor) -> Tensor:
    p = outputs.sigmoid().flatten()
    return torch.diag(p * (1 - p))


LIKELIHOODS = {
    "categorical": (kc.Categorical, categorical_fisher),
    "gaussian": (lambda **kw: kc.Gaussian(0.5, event_dims=(-1,), **kw), gaussian_fisher),
    "bernoulli": (lambda **kw: kc.Bernoulli(event_dims=(-1,), **kw), bernoulli_fisher),
}
MODELS = {
    "mlp": (classifier, (3,), 1),
    "attention": (Attention, (4, 2), 4),
    "lstm": (Recurrent, (4, 2), 1),
    "convolution": (convolutional, (1, 4, 4), 1),
    "tied": (tied, (3,), 1),
    "frozen": (frozen, (3,), 1),
    "checkpointed": (Checkpointed, (3,), 1),
    "hoarder": (Hoarder, (3,), 1),
    "no forward mode": (lambda: nn.Sequential(nn.Linear(3, 2), Apply(Square.apply), nn.Linear(2, 2)), (3,), 1),
}


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def brute(model: nn.Module, x: Tensor, output_fisher, divisor: float) -> Tensor:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return exact_fisher(model, x, output_fisher, parameters=trainable(model), divisor=divisor)


@pytest.fixture(params=MODELS)
def case(request) -> tuple[nn.Module, Tensor, int]:
    """(model, five inputs, terms an example)."""
    make, shape, terms = MODELS[request.param]
    return make(), torch.randn(5, *shape), terms


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
class TestExact:
    def test_products_are_those_of_the_definition(self, case, name, reduction):
        model, x, terms = case
        likelihood, output_fisher = LIKELIHOODS[name]
        dense = brute(model, x, output_fisher, 5 * terms if reduction == "mean" else 1)
        fisher = kc.implicit(model, [x[:2], x[2:]], likelihood(reduction=reduction))
        assert_same(fisher.to_dense(), dense)

    def test_gram_has_the_non_zero_spectrum(self, case, name, reduction):
        model, x, terms = case
        likelihood, output_fisher = LIKELIHOODS[name]
        dense = brute(model, x, output_fisher, 5 * terms if reduction == "mean" else 1)
        kernel = kc.gram(model, [x[:2], x[2:]], likelihood(reduction=reduction))
        side = len(kernel.matrix)
        assert side == 5 * terms * model(x).shape[-1]
        both = min(side, len(dense))
        assert_same(kernel.eigenvalues()[:both], torch.linalg.eigvalsh(dense).flip(0)[:both])
        assert_same(kernel.fisher().to_dense(), dense)


@pytest.fixture
def small() -> tuple[nn.Module, Tensor, kc.Fisher, Tensor]:
    """A model, its inputs, the implicit Fisher and the dense one; P = 31 with every mean eigenvalue away from zero."""
    model, x = classifier(), torch.randn(40, 3)
    return model, x, kc.implicit(model, [x], "categorical"), brute(model, x, categorical_fisher, 40)


DAMPING = 0.05


def damped(dense: Tensor) -> Tensor:
    return dense + DAMPING * torch.eye(len(dense))


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


class TestVerbs:
    def test_forms_and_quadratic(self, small):
        _, _, fisher, dense = small
        v = torch.randn(len(dense))
        assert_same(fisher @ v, dense @ v)
        named = dict(zip(fisher.parameter_names, _pieces(fisher, v), strict=True))
        found = fisher @ named
        assert_same(torch.cat([found[name].flatten() for name in fisher.parameter_names]), dense @ v)
        assert_same(fisher.quadratic(v), v @ dense @ v)
        assert_same(fisher.kl(v), v @ dense @ v / 2)
        assert_same((3.0 * fisher).quadratic(v), 3 * v @ dense @ v)

    def test_solve(self, small):
        _, _, fisher, dense = small
        v = torch.randn(len(dense))
        assert_same(fisher.solve(v, damping=DAMPING), torch.linalg.solve(damped(dense), v), tolerance=1e-9)

    @pytest.mark.parametrize("verb", ["inverse", "inverse_sqrt"])
    def test_functions_with_damping(self, small, verb):
        _, _, fisher, dense = small
        v = torch.randn(len(dense))
        inverse = torch.linalg.inv(damped(dense))
        expected = inverse if verb == "inverse" else root(inverse)
        assert_same(getattr(fisher, verb)(damping=DAMPING) @ v, expected @ v, tolerance=1e-8)

    def test_sqrt(self, small):
        _, _, fisher, dense = small
        v = torch.randn(len(dense))
        assert_same(fisher.sqrt() @ v, root(dense) @ v, tolerance=1e-6)

    def test_top_eigenpairs(self, small):
        _, _, fisher, dense = small
        values, vectors = fisher["model"].top_eigenpairs(3)
        assert_same(values, torch.linalg.eigvalsh(dense).flip(0)[:3])
        assert_same(vectors @ dense @ vectors.T, torch.diag(values))
        assert_same(vectors @ vectors.T, torch.eye(3))

    def test_multiple_eigenvalues_come_with_their_multiplicity(self):
        model, x = nn.Linear(3, 4, bias=False), torch.randn(6, 3)
        values, _ = kc.implicit(model, [x], kc.Gaussian())["model"].top_eigenpairs(6)
        assert_same(values, torch.linalg.eigvalsh(brute(model, x, lambda f: torch.eye(4), 6)).flip(0)[:6])

    @pytest.mark.parametrize(
        ("verb", "expected"),
        [
            ("trace", torch.trace),
            ("frobenius_norm", torch.linalg.matrix_norm),
            ("diagonal", torch.diagonal),
            ("logdet", lambda dense: torch.logdet(damped(dense))),
        ],
    )
    def test_stochastic_verbs_are_exact_with_as_many_probes_as_parameters(self, small, verb, expected):
        model, x, _, dense = small
        block = kc.implicit(model, [x], "categorical", iteration=kc.Iteration(probes=len(dense)))["model"]
        found = block.logdet(damping=DAMPING) if verb == "logdet" else getattr(block, verb)()
        assert_same(found, expected(dense), tolerance=1e-9)

    def test_stochastic_trace_is_near_and_repeats(self, small):
        model, x, _, dense = small
        block = kc.implicit(model, [x], "categorical", iteration=kc.Iteration(probes=30))["model"]
        assert float(block.trace()) == float(block.trace())
        # Random signs: the variance of one probe is 2 (||F||^2 - ||diag F||^2).
        error = (2 * (dense.square().sum() - dense.diagonal().square().sum()) / 30).sqrt()
        assert abs(block.trace() - dense.trace()) < 4 * error

    def test_samples_have_the_covariance(self, small):
        _, _, fisher, dense = small
        n = 4000
        draws = fisher["model"].sample(n, torch.Generator().manual_seed(1))
        error = (draws.T @ draws / n - dense).abs()
        spread = ((dense.square() + torch.outer(dense.diagonal(), dense.diagonal())) / n).sqrt()
        assert (error <= 5 * spread + 1e-12).all()

    def test_scipy(self, small):
        _, _, fisher, dense = small
        operator = fisher.to_scipy()
        values = scipy.sparse.linalg.eigsh(operator, k=2, which="LA", return_eigenvectors=False)
        np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(dense.numpy())[-2:], atol=1e-10)
        shifted = operator + DAMPING * scipy.sparse.linalg.aslinearoperator(np.eye(len(dense)))
        v = np.random.default_rng(0).normal(size=len(dense))
        solution, _ = scipy.sparse.linalg.cg(shifted, v, rtol=1e-13)
        np.testing.assert_allclose(solution, np.linalg.solve(damped(dense).numpy(), v), atol=1e-9)

    def test_results_by_name(self, small):
        model, _, fisher, dense = small
        shapes = {name: p.shape for name, p in model.named_parameters()}
        values, vectors = fisher.top_eigenpairs(2)
        rows = torch.cat([vectors[name].reshape(2, -1) for name in shapes], 1)
        assert_same(rows @ dense @ rows.T, torch.diag(values))
        assert {name: draw.shape[1:] for name, draw in fisher.sample(3).items()} == shapes
        assert {name: part.shape for name, part in fisher.diagonal().items()} == shapes

    def test_singular_and_refused(self, small):
        _, _, fisher, dense = small
        with pytest.raises(kc.NumericalError, match="damping"):
            fisher.solve(torch.randn(len(dense)))
        with pytest.raises(kc.NumericalError, match="singular"):
            fisher["model"].logdet()
        with pytest.raises(kc.ArgumentError, match="top_eigenpairs"):
            fisher.eigenvalues()
        with pytest.raises(kc.ArgumentError, match="two factors"):
            fisher.solve(torch.randn(len(dense)), damping=1.0, rule="factored")

    @pytest.mark.parametrize("name", ["first.weight", "last.weight"])
    def test_parameters_out_of_reach_are_seen_whatever_the_first_direction(self, name):
        model, x = Hoarder(), torch.randn(5, 3)
        fisher = kc.implicit(model, [x], "categorical")
        direction = {key: torch.zeros_like(p) for key, p in model.named_parameters()}
        direction[name][0, 0] = 1.0
        assert float(fisher.quadratic(direction)) > 0.0
        assert_same(fisher.to_dense(), brute(model, x, categorical_fisher, 5))

    def test_its_table_costs_no_pass(self, small, monkeypatch):
        _, _, fisher, _ = small
        monkeypatch.setattr(Linearised, "visit", None)
        assert "31 parameters" in repr(fisher)


def _pieces(fisher: kc.Fisher, v: Tensor) -> list[Tensor]:
    shapes = [fisher["model"].layout.shapes[name] for name in fisher.parameter_names]
    pieces = torch.split(v, [torch.Size(shape).numel() for shape in shapes])
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]


class TestLowRank:
    @pytest.mark.parametrize("source", ["lanczos", "gram"])
    def test_is_the_best_of_its_rank(self, small, source):
        model, x, _, dense = small
        found = kc.low_rank(model, [x[:9], x[9:]], "categorical", 4, via=source)["model"]
        values, vectors = torch.linalg.eigh(dense)
        assert_same(found.to_dense(), (vectors[:, -4:] * values[-4:]) @ vectors[:, -4:].T, tolerance=1e-9)

    def test_algebra(self, small):
        model, x, _, _ = small
        block = kc.gram(model, [x[:4]], "categorical").fisher()["model"]
        dense = block.to_dense()
        v, size = torch.randn(len(dense)), len(dense)
        inverse = torch.linalg.inv(damped(dense))
        assert_same(block.solve(v, damping=DAMPING), inverse @ v)
        assert_same((block.inverse_sqrt(damping=DAMPING) @ (block.inverse_sqrt(damping=DAMPING) @ v)), inverse @ v)
        assert_same(block.sqrt() @ (block.sqrt() @ v), dense @ v)
        assert_same(block.inverse(damping=DAMPING).to_dense(), inverse)
        assert_same(block.inverse(damping=DAMPING).trace(), inverse.trace())
        assert_same(block.inverse(damping=DAMPING).diagonal(), inverse.diagonal())
        assert_same(block.inverse(damping=DAMPING).eigenvalues(), torch.linalg.eigvalsh(inverse).flip(0))
        assert_same(block.inverse(damping=DAMPING).frobenius_norm(), torch.linalg.matrix_norm(inverse))
        assert_same(block.logdet(damping=DAMPING), torch.logdet(damped(dense)))
        assert_same((2 * block).trace(), 2 * dense.trace())
        assert block.eigenvalues().shape == (size,)
        with pytest.raises(kc.NumericalError, match="singular"):
            block.solve(v)


class TestWoodbury:
    def test_with_damping(self, small):
        model, x, _, _ = small
        kernel, dense = kc.gram(model, [x[:4]], "categorical"), brute(model, x[:4], categorical_fisher, 4)
        assert len(kernel.matrix) < len(dense)
        v = torch.randn(len(dense))
        for damping in (DAMPING, 1e-6):
            expected = torch.linalg.solve(dense + damping * torch.eye(len(dense)), v)
            assert_same(kernel.solve(v, damping=damping), expected, tolerance=1e-9)

    def test_without_damping_in_the_range(self, small):
        model, x, _, _ = small
        kernel, dense = kc.gram(model, [x[:4]], "categorical"), brute(model, x[:4], categorical_fisher, 4)
        loss = nn.functional.cross_entropy(model(x[:4]), torch.tensor([0, 1, 2, 0]))
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        assert_same(kernel.solve(gradient), torch.linalg.pinv(dense, rtol=1e-12) @ gradient, tolerance=1e-8)
        with pytest.raises(kc.NumericalError, match="outside the range"):
            kernel.solve(torch.randn(len(dense)))


class TestLeavesTheModelAlone:
    def test_train_mode_batch_norm_and_dropout(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
        x = torch.randn(6, 3)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        state = torch.get_rng_state()
        fisher = kc.implicit(model, [x], "categorical")
        dense = fisher["model"]._dense()
        assert_same(dense, dense.T)
        kernel = kc.gram(model, [x], "categorical")
        assert_same(kernel.fisher().to_dense(), fisher.to_dense())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)
        assert all(p.grad is None for p in model.parameters())
        assert model.training

    def test_another_dtype(self):
        model, x = Recurrent().float(), torch.randn(5, 4, 2).float()
        found = kc.implicit(model, [x], "categorical").to_dense()
        assert found.dtype == torch.float32
        assert_same(found.double(), brute(model.double(), x.double(), categorical_fisher, 5), tolerance=1e-5)

    def test_mask_leaves_terms_out(self):
        model, x = Attention(), torch.randn(2, 4, 2)
        mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
        picks = kc.Data(mask=lambda args, kwargs, outputs: mask)

        def output_fisher(weights: Tensor):
            return lambda f: categorical_fisher(f) * weights.repeat_interleave(3)[:, None]

        dense = sum(brute(model, x[n : n + 1], output_fisher(mask[n].double()), 5) for n in range(2))
        assert_same(kc.implicit(model, [x], "categorical", picks=picks).to_dense(), dense)
        assert_same(kc.gram(model, [x], "categorical", picks=picks).fisher().to_dense(), dense)

    def test_class_weights_and_ignored_labels(self):
        model, x = classifier(), torch.randn(5, 3)
        y, weight = torch.tensor([0, 2, -100, 1, 2]), torch.tensor([0.5, 1.0, 3.0])
        likelihood = kc.Categorical(weight=weight, ignore_index=-100)
        kappa = torch.where(y >= 0, weight[y.clamp(min=0)], 0.0)
        parts = [
            brute(model, x[n : n + 1], lambda f, n=n: kappa[n] * categorical_fisher(f), float(kappa.sum()))
            for n in range(5)
        ]
        data = [(x[:2], y[:2]), (x[2:], y[2:])]
        assert_same(kc.implicit(model, data, likelihood).to_dense(), sum(parts))
        assert_same(kc.gram(model, data, likelihood).fisher().to_dense(), sum(parts))
        with pytest.raises(kc.LikelihoodError, match="data labels"):
            kc.implicit(model, [x], likelihood) @ torch.zeros(31)

    def test_beside_a_preconditioner(self):
        model, x = classifier(), torch.randn(5, 3)
        dense = brute(model, x, categorical_fisher, 5)
        kfac = kc.KFAC(model, "categorical")
        assert_same(kc.implicit(model, [x], "categorical").to_dense(), dense)
        assert_same(kc.gram(model, [x], "categorical").fisher().to_dense(), dense)
        with pytest.raises(kc.NotReadyError):
            kfac.fisher()
        kfac.remove()

    def test_half_precision_model(self):
        model, x = classifier().to(torch.bfloat16), torch.randn(5, 3).to(torch.bfloat16)
        fisher = kc.implicit(model, [x], "categorical")
        assert fisher.dtype == torch.float32
        v = torch.randn(31)
        found = fisher @ v
        exact = brute(model.double(), x.double(), categorical_fisher, 5) @ v
        assert_same(found.double(), exact, tolerance=0.05)

    def test_outputs_that_are_not_finite_are_refused(self):
        x = torch.randn(5, 3)
        x[2, 1] = float("nan")
        with pytest.raises(kc.NumericalError, match="not finite"):
            kc.implicit(classifier(), [x], "categorical") @ torch.zeros(31)

    def test_used_up_data_are_refused(self):
        with pytest.raises(kc.ArgumentError, match="once"):
            kc.implicit(classifier(), iter([torch.randn(2, 3)]), "categorical")
        with pytest.raises(kc.ArgumentError, match="no batch"):
            kc.implicit(classifier(), [], "categorical") @ torch.zeros(31)

    def test_nothing_trainable_is_refused(self):
        with pytest.raises(kc.CoverageError, match="trainable"):
            kc.implicit(classifier().requires_grad_(False), [torch.randn(2, 3)], "categorical")
