"""The same matrices from other libraries, on the same model, data and likelihood: curvlinops, NNGeometry, BackPACK.

    python examples/benchmarks/peers.py [--out FILE.json]

For each quantity: the ratio of this library's numbers to the other's (their inner product over the other's square), the
largest difference relative to the other's largest entry, and whether they agree. Where they differ, by which
convention: this library's numbers under that convention are compared once more, and what is still different then is
printed as unexplained. A library that is absent is a line that says so; ``pip install --no-deps -r tests/peers.txt``
installs them. ``docs/peers.md`` quotes the table.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial, reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peer_cases import SETTINGS, Case, Setting, apart
from torch import Tensor

import kfac_cond as kc

TOLERANCE = 1e-9
PACKAGES = {"curvlinops": "curvlinops-for-pytorch", "nngeometry": "nngeometry", "backpack": "backpack-for-pytorch"}
APART = "weight and bias are two blocks there"
MERGED = "columns of all terms of an example go back at once there, and mix"
BY_TERM = "each term is squared by itself there, each example here"
SUMMED = "A is a sum over positions there, and G of gradients summed over them"
UNIT = "variance 1 and a mean over examples there; the criterion means 1/2 and a mean over elements"


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
    ours, theirs = of.matrix("kfac", "empirical"), partial(matrix, "KFAC", "empirical")
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
        return implicit.mv(forms.PVector(implicit.generator.layer_collection, vector_repr=of.vector)).to_torch()

    scale = 1.0 if of.classes else of.size / 2

    def compared(quantity: str, ours: Tensor, theirs: Callable[[], Any]) -> Compared:
        return Compared(quantity, ours, theirs, UNIT, lambda: scale * ours)

    yield compared("product", kc.implicit(of.model, [of.inputs], of.likelihood) @ of.vector, product)
    for word, name in (("dense", "Dense"), ("block", "BlockDiag"), ("kfac", "KFAC"), ("ekfac", "EKFAC")):
        ours = of.matrix(word, "exact")
        yield compared(f"{word} exact", ours, lambda name=name: form(name).to_torch())
        yield compared(f"{word} exact, trace", ours.trace(), lambda name=name: form(name).trace())
    yield compared("diagonal exact", of.matrix("diagonal", "exact").diagonal(), lambda: form("Diag").get_diag())


def with_backpack(of: Case) -> Iterator[Compared]:
    """The diagonal, Kronecker factors of weight and bias apart, and gradients of single examples."""

    def quantities(name: str, attribute: str) -> list[Any]:
        from backpack import backpack, extend, extensions

        model, criterion = extend(copy.deepcopy(of.model)), extend(copy.deepcopy(of.criterion))
        with backpack(getattr(extensions, name)()):
            criterion(model(of.inputs), of.labels).backward()
        return [getattr(p, attribute) for p in model.parameters()]

    def kronecker() -> Tensor:
        return torch.block_diag(*[reduce(torch.kron, factors) for factors in quantities("KFLR", "kflr")])

    def empirical() -> Tensor:
        rows = torch.cat([rows.flatten(1) for rows in quantities("BatchGrad", "grad_batch")], 1)
        return rows.T @ rows * of.labels.numel()

    def diagonal() -> Tensor:
        return torch.cat([part.flatten() for part in quantities("DiagGGNExact", "diag_ggn_exact")])

    def summed() -> Tensor:
        expand, reduced = (of.estimate("kfac", "exact", rules={"*": {"sharing": how}}) for how in ("expand", "reduce"))
        positions, blocks = expand.meta["counts"]["positions"], []
        for name, block in expand.items():
            A = block.A[:-1, :-1] * float(positions[name]) / len(of.inputs)
            blocks += [torch.kron(reduced[name].G, A), reduced[name].G]
        return torch.block_diag(*blocks)

    yield Compared("diagonal exact", of.matrix("diagonal", "exact").diagonal(), diagonal)
    yield Compared("dense empirical", of.matrix("dense", "empirical"), empirical)
    ours = apart(of.matrix("kfac", "exact"), of.model)
    yield Compared("kfac exact, weight and bias apart", ours, kronecker, SUMMED, summed)


PEERS = {"curvlinops": with_curvlinops, "nngeometry": with_nngeometry, "backpack": with_backpack}


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
