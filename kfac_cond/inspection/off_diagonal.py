"""How much of the Fisher lies outside the layers' blocks, by random probes of its exact products."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from ..checks import is_size
from ..errors import ArgumentError
from ..heads import Distribution
from ..implicit import Whole
from ..options import Batches, Options, Structure
from ..quadratic import inner
from ..structures import Block, Fisher
from .requests import linearised, request_of

PROBES = 4
"""How many, where nothing else is said."""


@dataclass(frozen=True)
class BlockDiagonality:
    """The share of the exact Fisher outside the layers' blocks, in the squared Frobenius norm; no unit.

    With F_lm the part between layers l and m, and s = sum_{l != m} |F_lm|^2 / sum_{l, m} |F_lm|^2. A probe is a normal
    vector z and two products y = F D z, y' = F D' z with independent signs D, D' of whole layers: |y|^2 has the mean
    sum |F_lm|^2 over signs and z, and sum_l <(D y)_l, (D' y')_l> that of the diagonal blocks alone, since the signs of
    different layers cancel. Nothing of the side of F is stored. Cost: two exact products a probe, each about a forward
    and a backward over the data with tangents.

    Args:
        share: s, of all that is off the diagonal blocks; 0 for a block-diagonal Fisher. It may come out slightly
            negative, as an unbiased estimate does.
        standard_error: of it, from the spread of probes; None of one.
        norm: |F| in the Frobenius norm, in the units of F.
        layers: how many blocks there are.
        probes: how many there were.

    Source: Hutchinson 1990 (Communications in Statistics 19(2)) for probes; Martens & Grosse 2015 (arXiv:1503.05671),
    section 4.1, for what is left out with the blocks off the diagonal.
    """

    share: float
    standard_error: float | None
    norm: float
    layers: int
    probes: int


def passes(probes: int) -> float:
    """Forward-backwards over the data: a forward, and for each probe two products, whose forwards have tangents."""
    return 1 / 3 + 2 * probes * 4 / 3


def measure(
    model: nn.Module,
    data: Batches,
    likelihood: Distribution | str | nn.Module,
    fisher: Fisher,
    *,
    probes: int = PROBES,
    options: Options | None = None,
) -> BlockDiagonality:
    """The share of the exact Fisher outside the blocks of a Fisher's layers; nothing of the model changes.

    Args:
        model, likelihood, options: as for ``kc.estimate``; its seed is that of the probes.
        data: batches that can be gone through many times.
        fisher: says which parameters there are, and which of them a block holds.
        probes: how many, at least 1.

    Raises:
        ArgumentError: no probe, or data that can be gone through only once.
        LikelihoodError: a likelihood whose Fisher has no closed form.
    """
    if not is_size(probes):
        raise ArgumentError(f"probes={probes!r}: expected a whole number >= 1")
    request = request_of(model, data, likelihood, options)
    names = set(linearised(request, fisher).parameters)
    exact = Whole(request, names).fisher(Structure("implicit"))["model"]
    seed = request.options.seed
    return of_matrix(exact, fisher, probes=probes, seed=torch.initial_seed() if seed is None else seed)


def of_matrix(exact: Block, fisher: Fisher, *, probes: int, seed: int) -> BlockDiagonality:
    """The same of a matrix that is known by its products.

    Args:
        exact: over all the parameters of the Fisher.
        fisher: says which of them a block holds.
        probes: how many, at least 1.
        seed: of them.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    pairs = torch.tensor([_probe(exact, fisher, generator) for _ in range(probes)], dtype=torch.float64)
    total, within = pairs.mean(0).tolist()
    share = 1 - within / total if total > 0 else 0.0
    return BlockDiagonality(share, _standard_error(pairs, share), sqrt(max(total, 0.0)), len(fisher), probes)


def _probe(exact: Block, fisher: Fisher, generator: torch.Generator) -> tuple[float, float]:
    """|F|^2 and that of the diagonal blocks, estimated by one probe."""
    z = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(exact.device, exact.dtype)
        for block in fisher.values()
        for name, shape in block.layout.shapes.items()
    }
    products, signs = [], []
    for _ in range(2):
        drawn = (torch.randint(2, (len(fisher),), generator=generator) * 2 - 1).tolist()
        sign = {name: s for s, block in zip(drawn, fisher.values(), strict=True) for name in block.layout.names}
        products.append(exact.matvec({name: sign[name] * one for name, one in z.items()}))
        signs.append(sign)
    total = sum(float(inner([*y.values()], [*y.values()])) for y in products) / 2
    mine, theirs = ([sign[name] * one for name, one in y.items()] for sign, y in zip(signs, products, strict=True))
    return total, float(inner(mine, theirs))


def _standard_error(pairs: Tensor, share: float) -> float | None:
    """Of one minus the quotient of two means, to first order."""
    n, mean = len(pairs), float(pairs[:, 0].mean())
    if n == 1:
        return None
    left = pairs[:, 0] - pairs[:, 1] - share * pairs[:, 0]
    return sqrt(float(left.square().sum()) / (n * (n - 1))) / mean if mean > 0 else 0.0
