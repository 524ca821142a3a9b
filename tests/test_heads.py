"""Several heads: each with an M and a weight of its own, whatever holds the outputs, in estimates and training."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.linearised import Linearised

from .reference import assert_same, categorical_log_prob, exact_fisher, fisher_of_draws, gaussian_log_prob

WEIGHTS = {"kind": 1.0, "size": 0.3}
FORMS = ["mapping", "tuple", "named tuple", "dataclass"]
Pair = namedtuple("Pair", ["kind", "size"])


@dataclass
class Record:
    kind: Tensor
    size: Tensor


def held(form: str, kind: Tensor, size: Tensor) -> Any:
    """Two heads' outputs in a form that models return them in."""
    if form == "mapping":
        return {"size": size, "kind": kind}
    return {"tuple": lambda *heads: heads, "named tuple": Pair, "dataclass": Record}[form](kind, size)


class TwoHeads(nn.Module):
    def __init__(self, form: str = "mapping") -> None:
        super().__init__()
        self.form = form
        self.trunk, self.kind, self.size = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.trunk(x))
        return held(self.form, self.kind(h), self.size(h))


def heads(reduction: str = "mean", **settings: Any) -> kc.Product:
    return kc.Product(
        {"kind": kc.Categorical(**settings), "size": kc.Gaussian(0.7, reduction=reduction)}, weights={"size": 0.3}
    )


@pytest.fixture
def net() -> TwoHeads:
    torch.manual_seed(0)
    return TwoHeads().double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def draw(n: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "kind": torch.randint(3, (n,), generator=generator),
        "size": torch.randn(n, 2, generator=generator, dtype=torch.float64),
    }


def of_rows(labels: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: values[rows] for name, values in labels.items()}


def brute(net: TwoHeads, x: Tensor, draws: list[dict[str, Tensor]] | None, M: dict[str, float]) -> Tensor:
    """sum_h w_h F_h over all parameters; exact where no draws are given."""
    functions = {"kind": categorical_log_prob, "size": lambda f, y: gaussian_log_prob(f, y, 0.7)}
    total = torch.zeros(())
    for name, log_prob in functions.items():
        settings = {"parameters": list(net.parameters()), "divisor": M[name]}

        def one(rows: Tensor, name: str = name) -> Tensor:
            return net(rows)[name]

        if draws is None:

            def information(f: Tensor, name: str = name) -> Tensor:
                p = f.softmax(-1)
                return torch.diag(p) - p[:, None] * p if name == "kind" else torch.eye(2) / 0.7

            F = exact_fisher(one, x, information, **settings)
        else:
            F = fisher_of_draws(one, x, [labels[name] for labels in draws], log_prob, **settings)
        total = total + WEIGHTS[name] * F
    return total.detach()


MEAN = {"kind": 7.0, "size": 7.0}


@pytest.mark.parametrize("kind", ["sampled", "exact", "empirical"])
def test_the_dense_matrix_is_the_weighted_sum_of_the_heads(net, x, kind):
    draws = [draw(7, 2), draw(7, 3)] if kind == "sampled" else [draw(7, 2)]
    parts = [slice(0, 3), slice(3, 7)]
    options = kc.Options(draws=[[of_rows(one, part) for one in draws] for part in parts] if kind == "sampled" else None)
    data = [(x[part], of_rows(draws[0], part)) for part in parts]
    fisher = kc.estimate(net, data, heads(), structure="dense", kind=kind, options=options)
    assert_same(fisher.to_dense(), brute(net, x, None if kind == "exact" else draws, MEAN))


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "tkfac", "kpsvd", "diagonal", "block"])
def test_one_example_is_exact_in_every_structure(net, x, structure):
    """ORACLES 6: heads of one trunk, one example, several draws; what a structure keeps of the layers' blocks."""
    draws = [draw(1, 2)]
    fisher = kc.estimate(net, [x[:1]], heads(), structure=structure, options=kc.Options(draws=[draws]))
    blocks = kc.estimate(net, [x[:1]], heads(), structure="block", options=kc.Options(draws=[draws]))
    expected = brute(net, x[:1], draws, {"kind": 1.0, "size": 1.0})
    at = 0
    for name, block in fisher.items():
        exact = blocks[name].to_dense()
        wanted = torch.diag(exact.diagonal()) if structure == "diagonal" else exact
        if structure != "kpsvd" or name != "trunk":  # two heads make the trunk's block a sum of two products
            assert_same(block.to_dense(), wanted, tolerance=1e-8 if structure == "kpsvd" else 1e-10)
        at += block.layout.numel
    assert_same(blocks.to_dense().diagonal(), expected.diagonal())


def test_forward_only_sends_nothing_back_for_any_head(net, x):
    fisher = kc.estimate(net, [x], heads(), kind="forward_only")
    assert_same(fisher["trunk"].G, torch.eye(4))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("structure", ["kfac", "diagonal"])
def test_what_the_outputs_are_held_in_does_not_matter(net, x, form, structure):
    expected = kc.estimate(net, [x], heads(), structure=structure, samples=2, options=kc.Options(seed=5))
    net.form = form
    found = kc.estimate(net, [x], heads(), structure=structure, samples=2, options=kc.Options(seed=5))
    assert_same(found.to_dense(), expected.to_dense(), tolerance=0.0)


def test_outputs_may_be_picked(net, x):
    pick = kc.Data(outputs=lambda args, kwargs, outputs: {"kind": outputs["kind"], "size": outputs["size"]})
    found = kc.estimate(net, [x], heads(), kind="exact", options=kc.Options(data=pick))
    assert_same(found.to_dense(), kc.estimate(net, [x], heads(), kind="exact").to_dense(), tolerance=0.0)


def test_masks_may_be_picked_by_head(net, x):
    """As numbers, and of one head alone."""
    known = torch.tensor([0, 1, 1, 0, 1, 1, 0])
    data = kc.Data(mask=lambda args, kwargs, outputs: {"kind": known})
    found = kc.estimate(net, [x], heads(), kind="exact", options=kc.Options(data=data))
    labels = {"kind": torch.where(known.bool(), 0, -100)}
    assert_same(found.to_dense(), kc.estimate(net, [(x, labels)], heads(ignore_index=-100), kind="exact").to_dense())


@pytest.mark.parametrize("sizes", [[7], [2, 5], [1, 1, 5]])
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_terms_that_a_batch_lacks_of_one_head_do_not_change_the_scale(net, x, sizes, structure, reduction):
    """M_h / M differs from batch to batch: labels of one head are missing in some, and one loss may be a sum."""
    labels = draw(7, 4)
    labels["kind"][:4] = -100
    draws = [draw(7, 2), draw(7, 3)]
    pieces = [slice(end - size, end) for size, end in zip(sizes, torch.tensor(sizes).cumsum(0).tolist(), strict=True)]
    data = [(x[piece], of_rows(labels, piece)) for piece in pieces]
    options = kc.Options(draws=[[of_rows(one, piece) for one in draws] for piece in pieces])
    found = kc.estimate(net, data, heads(reduction, ignore_index=-100), structure=structure, options=options)
    whole = [(x, labels)]
    expected = kc.estimate(
        net, whole, heads(reduction, ignore_index=-100), structure=structure, options=kc.Options(draws=[draws])
    )
    assert_same(found.to_dense(), expected.to_dense())
    M = {"kind": 3.0, "size": 7.0 if reduction == "mean" else 1.0}
    assert {name: float(terms) for name, terms in found.meta["counts"]["terms"].items()} == M
    if structure == "diagonal":
        # What is ignored of one head is no term of it, and stays one of the other.
        first = brute(net, x[4:], [of_rows(one, slice(4, 7)) for one in draws], {**M, "size": 1e300})
        second = brute(net, x, draws, {**M, "kind": 1e300})
        assert_same(found.to_dense().diagonal(), (first + second).diagonal())


@pytest.mark.parametrize("size", [1, 3, 7])
def test_draws_of_every_head_do_not_depend_on_the_batch_size(net, x, size):
    found = kc.estimate(net, list(x.split(size)), heads(), samples=2)
    assert_same(found.to_dense(), kc.estimate(net, [x], heads(), samples=2).to_dense())


def test_heads_draw_different_labels(x):
    """Twins with one trunk: the same p, and yet no label of one is that of the other by construction."""
    torch.manual_seed(0)
    twins = kc.Product({"kind": kc.Categorical(), "size": kc.Categorical()})
    model = TwoHeads()
    model.size = nn.Linear(4, 3)
    model.size.load_state_dict(model.kind.state_dict())
    fisher = kc.estimate(model.double(), [x], twins)
    assert (fisher["kind"].G - fisher["size"].G).abs().max() > 1e-3


def test_weights_scale_their_head_alone(net, x):
    by = kc.Product(heads().heads, weights={"size": 30.0})
    found = kc.estimate(net, [x], by, kind="exact")
    expected = kc.estimate(net, [x], heads(), kind="exact")
    assert_same(found["size"].G, expected["size"].G * 100)
    assert_same(found["kind"].G, expected["kind"].G)


# -- as products ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward_mode", [True, False])
@pytest.mark.parametrize("kind", ["sampled", "exact", "empirical"])
def test_products_of_heads_are_those_of_the_dense_matrix(net, x, kind, forward_mode, monkeypatch):
    """M_h differs between heads and batches; by dual numbers, and without."""
    if not forward_mode:
        monkeypatch.setattr(Linearised, "_goes_forward", lambda *_: False)
    labels = draw(7, 4)
    data = [(x[:3], of_rows(labels, slice(0, 3))), (x[3:], of_rows(labels, slice(3, 7)))]
    if kind != "empirical":
        labels["kind"][:2] = -100
    words = ["implicit", kc.Structure("low_rank", rank=41), "dense"]
    likelihood = heads("sum", ignore_index=-100)
    samples = 2 if kind == "sampled" else 1
    implicit, low_rank, dense = kc.estimate(net, data, likelihood, structure=words, kind=kind, samples=samples)
    assert_same(implicit.to_dense(), dense.to_dense())
    assert_same(low_rank.to_dense(), dense.to_dense(), tolerance=1e-8)
    if kind == "exact":
        assert_same(kc.gram(net, data, likelihood).fisher().to_dense(), dense.to_dense())
        assert_same(kc.implicit(net, data, likelihood).to_dense(), dense.to_dense())


def test_draws_of_products_of_heads_have_their_covariance(net, x):
    fisher = kc.implicit(net, [x[:3], x[3:]], heads("sum"))
    drawn = fisher.sample(1500, torch.Generator().manual_seed(0))
    rows = torch.cat([drawn[name].flatten(1) for name in fisher.parameter_names], 1)
    F = fisher.to_dense()
    error = (rows.T @ rows / len(rows) - F).square().sum().sqrt()
    expected = ((F.trace() ** 2 + F.square().sum()) / len(rows)).sqrt()
    assert 0.3 < error / expected < 3.0


# -- training ---------------------------------------------------------------------------------------------------------


def loss_of(outputs: Any, labels: dict[str, Tensor]) -> Tensor:
    kind = nn.functional.cross_entropy(outputs["kind"], labels["kind"])
    size = 0.3 * nn.functional.gaussian_nll_loss(
        outputs["size"], labels["size"], torch.full_like(outputs["size"], 0.7), reduction="sum"
    )
    return kind + size / len(labels["kind"])


def step(kfac: kc.KFAC, net: TwoHeads, optimizer: torch.optim.Optimizer, x: Tensor, seed: int) -> None:
    optimizer.zero_grad()
    loss_of(net(x), draw(len(x), seed)).backward()
    optimizer.step()


def test_training_listens_to_all_heads_of_a_forward(net, x):
    expected = kc.estimate(net, [x], heads(), options=kc.Options(seed=3))
    kfac = kc.KFAC(net, heads(), schedule=kc.Schedule(factors=1, inverses=1), data=kc.Data(seed=3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    kfac.attach(optimizer)
    with torch.no_grad():
        before = loss_of(net(x), draw(7, 9)).item()
    step(kfac, net, optimizer, x, 9)
    assert_same(kfac.fisher().to_dense(), expected.to_dense())
    for _ in range(20):
        step(kfac, net, optimizer, x, 9)
    assert loss_of(net(x), draw(7, 9)).item() < before
    kfac.remove()


@pytest.mark.parametrize("sizes", [[7], [2, 5]])
def test_micro_batches_with_missing_labels_of_a_head_are_one_batch(net, x, sizes):
    labels, drawn = draw(7, 4), draw(7, 2)
    labels["kind"][:4] = -100
    kfac = kc.KFAC(net, heads(ignore_index=-100))
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        kfac.update(net(x[rows]), targets=of_rows(labels, rows), draws=of_rows(drawn, rows))
        start += size
    loss_of(net(x), draw(7, 9)).backward()
    kfac.precondition()
    expected = kc.estimate(net, [(x, labels)], heads(ignore_index=-100), options=kc.Options(draws=[[drawn]]))
    assert_same(kfac.fisher().to_dense(), expected.to_dense())


def test_a_state_goes_round_and_names_other_heads(net, x):
    kfac = kc.KFAC(net, heads(), schedule=kc.Schedule(factors=1, inverses=1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    kfac.attach(optimizer)
    step(kfac, net, optimizer, x, 9)
    net(x)  # gathered, and not taken by a step yet
    saved = kfac.state_dict()
    fisher = kfac.fisher().to_dense()
    kfac.remove()
    again = kc.KFAC(net, heads())
    again.load_state_dict(saved)
    assert torch.equal(again.fisher().to_dense(), fisher)
    again.remove()
    other = kc.KFAC(net, kc.Product({"kind": kc.Categorical(), "weight": kc.Gaussian()}))
    with pytest.raises(kc.StateError, match=r"heads \['kind', 'size'\].*\['kind', 'weight'\]"):
        other.load_state_dict(saved)


# -- the likelihood itself --------------------------------------------------------------------------------------------


@pytest.fixture
def outputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "kind": torch.randn(5, 3, dtype=torch.float64, generator=generator),
        "size": torch.randn(5, 2, dtype=torch.float64, generator=generator),
    }


@pytest.mark.parametrize("form", FORMS)
def test_every_verb_takes_every_form(outputs, form):
    given, likelihood = held(form, **outputs), heads()
    likelihood.check(given)
    assert likelihood.examples(given) == 5
    labels = likelihood.sample(given, torch.Generator().manual_seed(1))
    assert {name: tuple(one.shape) for name, one in labels.items()} == {"kind": (5,), "size": (5, 2)}
    logs = likelihood.log_prob(given, held(form, **labels))
    assert_same(logs["kind"], outputs["kind"].log_softmax(-1).gather(1, labels["kind"][:, None])[:, 0])
    assert_same(likelihood.fisher(given)["size"], torch.eye(2).expand(5, 2, 2) / 0.7)


def test_scores_are_scaled_into_the_first_heads_M(outputs):
    mask = {"kind": torch.tensor([True, True, False, True, False]), "size": None}
    likelihood = heads().bind(mask=mask)
    labels = likelihood.sample(outputs)
    scores = likelihood.score(outputs, labels)
    assert float(likelihood.terms(outputs)) == 3.0
    assert_same(scores["size"], heads().heads["size"].score(outputs["size"], labels["size"]) * (0.3 * 3 / 5) ** 0.5)
    assert not scores["kind"][~mask["kind"]].any()


def test_kl_over_M_is_half_the_quadratic_form_to_third_order(outputs):
    likelihood = heads().bind(mask={"kind": torch.tensor([True, True, False, True, False])})
    direction = {name: torch.randn_like(one) for name, one in outputs.items()}
    information = likelihood.fisher(outputs)
    quadratic = sum(
        WEIGHTS[name] / M * torch.einsum("ni,nij,nj->", direction[name], information[name], direction[name])
        for name, M in (("kind", 3), ("size", 5))
    )
    ratios = []
    for size in (1e-2, 1e-3):
        moved = {name: one + size * direction[name] for name, one in outputs.items()}
        ratios.append(likelihood.kl(outputs, moved) / likelihood.terms(outputs) / (0.5 * size**2 * quadratic) - 1)
    assert abs(ratios[1]) < 1e-2
    assert abs(ratios[1]) < abs(ratios[0]) / 5


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: kc.Product({}), "expected a mapping"),
        (lambda: kc.Product([kc.Categorical()]), "expected a mapping"),
        (lambda: kc.Product({"a": "categorical"}), "head 'a' is str, expected a likelihood"),
        (lambda: kc.Product({"a": kc.Categorical()}, weights={"b": 1.0}), "for one of the heads 'a'"),
        (lambda: kc.Product({"a": kc.Categorical()}, weights={"a": -1.0}), "expected a positive number"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(make, match):
    with pytest.raises(kc.LikelihoodError, match=match):
        make()


@pytest.mark.parametrize(
    ("outputs", "match"),
    [
        (torch.zeros(3, 2), r"one tensor of shape \(3, 2\), expected a tensor for each of the heads 'kind', 'size'"),
        ({"kind": torch.zeros(3, 2)}, r"dict with keys \['kind'\]"),
        ((torch.zeros(3, 2),), "tuple of"),
        ((torch.zeros(3, 2),) * 3, "tuple of"),
        ({"kind": torch.zeros(3, 2), "size": torch.zeros(4, 2)}, "different numbers of examples"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(outputs, match):
    with pytest.raises(kc.LikelihoodError, match=match):
        heads().check(outputs)


def test_labels_of_all_heads_in_one_tensor_are_refused_where_they_are_needed(net, x):
    with pytest.raises(kc.LikelihoodError, match="targets are one tensor"):
        kc.estimate(net, [(x, torch.zeros(7, dtype=torch.long))], heads())


def test_a_head_without_a_valid_term_is_named(net, x):
    labels = draw(7, 1)
    labels["kind"][:] = -100
    with pytest.raises(kc.ArgumentError, match="no valid loss term of head 'kind'"):
        kc.estimate(net, [(x, labels)], heads(ignore_index=-100))


def test_labels_out_of_range_of_a_head_are_named(net, x):
    labels = draw(7, 1)
    labels["kind"][0] = 3
    with pytest.raises(kc.LikelihoodError, match="out of the range"):
        kc.estimate(net, [(x, labels)], heads())


def test_estimates_of_heads_merge_where_their_shares_agree(net, x):
    parts = [kc.estimate(net, [x[rows]], heads(), kind="exact") for rows in (slice(0, 3), slice(3, 7))]
    whole = kc.estimate(net, [x], heads(), kind="exact")
    assert_same(parts[0].merge(parts[1]).to_dense(), whole.to_dense())


def test_files_of_heads_are_read_back_and_merge(net, x, tmp_path):
    parts = [kc.estimate(net, [x[rows]], heads(), kind="exact") for rows in (slice(0, 3), slice(3, 7))]
    for number, part in enumerate(parts):
        part.save(tmp_path / str(number))
    read = [kc.Fisher.load(tmp_path / str(number), net) for number in range(2)]
    assert_same(read[0].merge(read[1]).to_dense(), kc.estimate(net, [x], heads(), kind="exact").to_dense())


def test_estimates_of_heads_whose_shares_differ_do_not_merge(net, x):
    labels = draw(7, 4)
    labels["kind"][:2] = -100
    parts = [
        kc.estimate(net, [(x[rows], of_rows(labels, rows))], heads(ignore_index=-100), kind="exact")
        for rows in (slice(0, 3), slice(3, 7))
    ]
    with pytest.raises(kc.ArgumentError, match="estimate over all the data in one call"):
        parts[0].merge(parts[1])
