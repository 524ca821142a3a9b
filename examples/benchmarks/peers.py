"""The same matrices from other libraries: curvlinops and NNGeometry on the same model, data and likelihood.

    python examples/benchmarks/peers.py [--out FILE.json]

For each quantity: the ratio of this library's numbers to the other's (their inner product over the other's square), the
largest difference relative to the other's largest entry, and whether they agree. Where they differ, by which
convention: this library's numbers under that convention are compared once more, and what is still different then is
printed as unexplained. A library that is absent is a line that says so; ``pip install --no-deps -r tests/peers.txt``
installs both. ``docs/peers.md`` quotes the table.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kfac_cond as kc

TOLERANCE = 1e-9
PACKAGES = {"curvlinops": "curvlinops-for-pytorch", "nngeometry": "nngeometry"}
APART = "weight and bias are two blocks there"
MERGED = "columns of all terms of an example go back at once there, and mix"
BY_TERM = "each term is squared by itself there, each example here"
UNIT = "variance 1 and a mean over examples there; the criterion means 1/2 and a mean over elements"


class Attention(nn.Module):
    """One attention layer of linear layers; logits (N, C, T), or (N, C) where pooled."""

    def __init__(self, *, pooled: bool) -> None:
        super().__init__()
        self.query, self.value, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        """From (N, T, 3)."""
        weights = (self.query(x) @ x.transpose(1, 2)).softmax(-1)
        h = self.head(torch.tanh(weights @ self.value(x)))
        return h.mean(1) if self.pooled else h.transpose(1, 2)


class ClassesSecond(nn.Module):
    """(N, T, C) to the order of torch's losses, (N, C, T)."""

    def forward(self, x: Tensor) -> Tensor:
        """One transposition."""
        return x.transpose(1, 2)


def perceptron() -> nn.Module:
    """Two layers."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def deep_linear() -> nn.Module:
    """Where K-FAC with a Gaussian is exact."""
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3))


def convolutional() -> nn.Module:
    """Two convolutions and a linear layer."""
    first, second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 2, stride=2)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))


def over_tokens() -> nn.Module:
    """Linear layers that take each token by itself."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), ClassesSecond())


@dataclass(frozen=True)
class Setting:
    """A model, the shape of its inputs, and the loss in torch's words."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    criterion: nn.Module


SETTINGS = (
    Setting("perceptron, classes", perceptron, (8, 4), nn.CrossEntropyLoss()),
    Setting("perceptron, squared error", perceptron, (8, 4), nn.MSELoss()),
    Setting("deep linear, squared error", deep_linear, (12, 4), nn.MSELoss()),
    Setting("convolutions", convolutional, (24, 2, 4, 4), nn.CrossEntropyLoss()),
    Setting("linear layers over tokens", over_tokens, (8, 3, 3), nn.CrossEntropyLoss()),
    Setting("attention, a class a token", lambda: Attention(pooled=False), (8, 3, 3), nn.CrossEntropyLoss()),
    Setting("attention, pooled", lambda: Attention(pooled=True), (8, 3, 3), nn.CrossEntropyLoss()),
)


class Merged(kc.Likelihood):
    """Classes whose 'draw' c is the column c of the output Fisher's root, of all terms at once."""

    event_dims = (1,)

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Never drawn: the columns are handed in."""
        raise NotImplementedError

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """diag(sqrt p) - p sqrt p^T, times the root of the number of columns over which is averaged."""
        p, c = outputs.softmax(1), int(labels.flatten()[0])
        column = -p * p[:, c : c + 1].sqrt()
        column[:, c] += p[:, c].sqrt()
        return outputs.shape[1] ** 0.5 * column


class Case:
    """A setting with data and labels, and what this library says of it, as matrices over parameters in order."""

    def __init__(self, setting: Setting) -> None:
        torch.manual_seed(0)
        self.name, self.criterion = setting.name, setting.criterion
        self.model, self.inputs = setting.make().double(), torch.randn(setting.shape, dtype=torch.float64)
        self.classes = isinstance(self.criterion, nn.CrossEntropyLoss)
        self.likelihood = kc.Categorical(dim=1) if self.classes else kc.Gaussian(0.5, event_dims=())
        outputs = self.model(self.inputs).detach()
        self.labels, self.draw = (self.likelihood.sample(outputs) for _ in range(2))
        self.size = outputs.shape[1]
        self.positions = outputs.shape[2] if outputs.ndim > 2 else 1
        self.shared = self.inputs.ndim > 2
        self.vector = torch.randn(sum(p.numel() for p in self.model.parameters()), dtype=torch.float64)

    def batches(self, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Two, of unequal size."""
        return [(self.inputs[:3], labels[:3]), (self.inputs[3:], labels[3:])]

    def estimate(self, structure: str, kind: str, likelihood: kc.Likelihood | None = None, **options: Any) -> kc.Fisher:
        """kc.estimate on the case; 'sampled' has the labels ``draw``, which are handed in."""
        if kind == "sampled":
            options.setdefault("draws", [[self.draw[:3]], [self.draw[3:]]])
        return kc.estimate(
            self.model,
            self.batches(self.labels),
            likelihood or self.likelihood,
            structure=structure,
            kind=kind,
            options=kc.Options(progress=False, **options),
        )

    def matrix(self, structure: str, kind: str, sharing: str = "expand", **options: Any) -> Tensor:
        """An estimate as a dense matrix in the order of the parameters."""
        return dense(self.estimate(structure, kind, rules={"*": {"sharing": sharing}}, **options))

    def merged(self, sharing: str) -> Tensor:
        """K-FAC with one backward a column for all terms of an example together."""
        sizes = (3, len(self.inputs) - 3)
        draws = [[torch.full((n, self.positions), c) for c in range(self.size)] for n in sizes]
        return self.matrix("kfac", "sampled", sharing, likelihood=Merged(), draws=draws)

    def by_term(self, kind: str) -> Tensor:
        """The Fisher of given labels where each term is an example of its own."""
        total = torch.zeros(())
        for position in range(self.positions):

            def only(args: Any, kwargs: Any, outputs: Tensor, position: int = position) -> Tensor:
                mask = torch.zeros(outputs.shape[0], self.positions, dtype=torch.bool)
                mask[:, position] = True
                return mask

            alone = kc.Categorical(dim=1, reduction="sum")
            total = total + dense(self.estimate("dense", kind, alone, data=kc.Data(mask=only)))
        return total / (len(self.inputs) * self.positions)


def dense(fisher: kc.Fisher) -> Tensor:
    """[P, P] in the order of the parameters."""
    return torch.stack([fisher @ unit for unit in torch.eye(fisher.shape[0], dtype=torch.float64)])


def apart(matrix: Tensor, model: nn.Module) -> Tensor:
    """The entries within each parameter: no coupling of a weight with its bias."""
    number = torch.cat([torch.full((p.numel(),), i) for i, p in enumerate(model.parameters())])
    return matrix * (number[:, None] == number)


@dataclass(frozen=True)
class Row:
    """One comparison; without numbers where there is nothing to compare."""

    setting: str
    peer: str
    quantity: str
    verdict: str
    ratio: float | None = None
    difference: float | None = None


@dataclass(frozen=True)
class Compared:
    """One quantity of both libraries, and the convention by which they differ with this library's numbers under it."""

    quantity: str
    ours: Tensor
    theirs: Callable[[], Any]
    convention: str = ""
    converted: Callable[[], Tensor] | None = None


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest one relative to the other's largest entry."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def judged(setting: str, peer: str, one: Compared) -> Row:
    """The line of one comparison."""
    try:
        theirs = torch.as_tensor(one.theirs()).detach()
    except Exception as error:  # whatever the other library says of what it does not take
        return Row(setting, peer, one.quantity, f"refused: {str(error).splitlines()[0]}")
    found = difference(one.ours, theirs)
    ratio = float((one.ours * theirs).sum() / theirs.square().sum())
    if found <= TOLERANCE:
        verdict = "agree"
    elif one.converted is None or difference(one.converted(), theirs) > TOLERANCE:
        verdict = "differ: unexplained"
    else:
        verdict = f"differ: {one.convention}"
    return Row(setting, peer, one.quantity, verdict, ratio, found)


def with_curvlinops(of: Case) -> Iterator[Compared]:
    """Products with the exact Fisher, with that of given labels and of drawn ones; K-FAC and EKFAC."""
    matrix = partial(curvlinops_matrix, of)
    product = kc.implicit(of.model, [of.inputs[:3], of.inputs[3:]], of.likelihood) @ of.vector
    yield Compared("product", product, lambda: curvlinops_operator(of, "GGN") @ of.vector)
    yield Compared("dense exact", of.matrix("dense", "exact"), partial(matrix, "GGN"))
    by_term = (BY_TERM, lambda: of.by_term("empirical")) if of.positions > 1 else ()
    yield Compared("dense empirical", of.matrix("dense", "empirical"), partial(matrix, "EF"), *by_term)
    if of.classes and of.positions == 1:
        ours = of.matrix("dense", "sampled", draws=drawn_there(of, seed=5, samples=4))
        yield Compared("dense sampled", ours, partial(matrix, "FisherMC", seed=5, mc_samples=4))
    for sharing in ("expand", "reduce") if of.shared else ("expand",):
        joint = {"kfac_approx": sharing, "separate_weight_and_bias": False}
        for kind in ("exact", "sampled", "empirical", "forward_only"):
            other = (MERGED, partial(of.merged, sharing)) if kind == "exact" and of.classes else ()
            ours, theirs = of.matrix("kfac", kind, sharing), partial(matrix, "KFAC", kind, **joint)
            yield Compared(f"kfac {kind} {sharing}", ours, theirs, *other)
        traced = partial(curvlinops_operator, of, "KFAC", "empirical", **joint)
        ours = of.matrix("kfac", "empirical", sharing).trace()
        yield Compared(f"kfac empirical {sharing}, trace", ours, lambda traced=traced: traced().trace)
        for kind in ("exact", "sampled", "empirical"):
            ours, theirs = of.matrix("ekfac", kind, sharing), partial(matrix, "EKFAC", kind, **joint)
            yield Compared(f"ekfac {kind} {sharing}", ours, theirs)
    ours = of.matrix("kfac", "empirical")
    theirs = partial(matrix, "KFAC", "empirical")
    yield Compared("kfac empirical, as set by default", ours, theirs, APART, lambda: apart(ours, of.model))


def curvlinops_operator(of: Case, name: str, kind: str = "", **settings: Any) -> Any:
    """One of its linear operators; drawn labels are handed in as those of the data."""
    import curvlinops

    if kind:
        kinds = {"exact": "type-2", "forward_only": "forward-only"}
        settings["fisher_type"] = kinds.get(kind, "empirical")
    model, data = copy.deepcopy(of.model), of.batches(of.draw if kind == "sampled" else of.labels)
    return getattr(curvlinops, name + "LinearOperator")(model, of.criterion, list(model.parameters()), data, **settings)


def curvlinops_matrix(of: Case, name: str, kind: str = "", **settings: Any) -> Tensor:
    """The same, times the identity."""
    product: Tensor = curvlinops_operator(of, name, kind, **settings) @ torch.eye(len(of.vector))
    return product


def drawn_there(of: Case, *, seed: int, samples: int) -> list[list[Tensor]]:
    """The labels that curvlinops' Monte Carlo Fisher draws, for each batch."""
    generator, draws = torch.Generator().manual_seed(seed), []
    for inputs, _ in of.batches(of.labels):
        p = of.model(inputs).detach().softmax(1)
        draws.append(list(p.multinomial(samples, replacement=True, generator=generator).T))
    return draws


def with_nngeometry(of: Case) -> Iterator[Compared]:
    """Its forms of one matrix, the exact Fisher, and one of given labels."""
    from nngeometry import metrics
    from nngeometry import object as forms
    from torch.utils.data import DataLoader, TensorDataset

    def form(name: str, **settings: Any) -> Any:
        loader = DataLoader(TensorDataset(of.inputs, of.labels), batch_size=3)
        settings = {"variant": "classif_logits" if of.classes else "regression", **settings}
        found = metrics.FIM(copy.deepcopy(of.model), loader, getattr(forms, "PMat" + name), **settings)
        if name == "EKFAC":
            found.update_diag(loader)
        return found

    def product() -> Tensor:
        implicit = form("Implicit")
        collection = implicit.generator.layer_collection
        return implicit.mv(forms.PVector(collection, vector_repr=of.vector)).to_torch()

    scale = 1.0 if of.classes else of.size / 2

    def compared(quantity: str, ours: Tensor, theirs: Callable[[], Any]) -> Compared:
        return Compared(quantity, ours, theirs, UNIT, lambda: scale * ours)

    yield compared("product", kc.implicit(of.model, [of.inputs], of.likelihood) @ of.vector, product)
    for word, name in (("dense", "Dense"), ("block", "BlockDiag"), ("kfac", "KFAC"), ("ekfac", "EKFAC")):
        ours = of.matrix(word, "exact")
        yield compared(f"{word} exact", ours, lambda name=name: form(name).to_torch())
        yield compared(f"{word} exact, trace", ours.trace(), lambda name=name: form(name).trace())
    yield compared("diagonal exact", of.matrix("diagonal", "exact").diagonal(), lambda: form("Diag").get_diag())


PEERS = {"curvlinops": with_curvlinops, "nngeometry": with_nngeometry}


def rows(setting: Setting, peer: str) -> list[Row]:
    """All comparisons of one setting with one library; one line where it is not installed."""
    if importlib.util.find_spec(peer) is None:
        return [Row(setting.name, peer, "all", "not installed")]
    # Defaults of the other library's buffers follow it.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return [judged(setting.name, peer, one) for one in PEERS[peer](Case(setting))]
    finally:
        torch.set_default_dtype(before)


def table(found: list[Row]) -> Iterator[str]:
    """A line for each verdict: the quantities, the largest difference and, where they differ, the ratios."""
    for verdict in dict.fromkeys(row.verdict for row in found):
        some = [row for row in found if row.verdict == verdict]
        numbers = ""
        if some[0].difference is not None:
            numbers = f", at most {max(row.difference or 0.0 for row in some):.0e}"
            ratios = sorted({f"{row.ratio:.3f}" for row in some})
            numbers += f", ratio {' '.join(ratios)}" if verdict != "agree" else ""
        line = f"{verdict}{numbers}: {'; '.join(row.quantity for row in some)}"
        yield textwrap.fill(line, 110, initial_indent="  ", subsequent_indent="    ")


def main() -> None:
    """Print the comparisons, and write them where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="a JSON file for all numbers")
    given = parser.parse_args()
    everything: list[Row] = []
    for peer, package in PACKAGES.items():
        installed = importlib.util.find_spec(peer) is not None
        print(f"\n{peer} {version(package) if installed else ''}")
        for setting in SETTINGS:
            found = rows(setting, peer)
            everything += found
            print(setting.name, *table(found), sep="\n", flush=True)
            if not installed:
                break
    if given.out:
        given.out.write_text(json.dumps([asdict(row) for row in everything], indent=1))


if __name__ == "__main__":
    main()
