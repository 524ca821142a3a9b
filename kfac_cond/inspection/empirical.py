"""The conditional Fisher beside the empirical one: what labels of the data in place of drawn ones would have given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from glob import escape

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..estimate import estimate
from ..heads import Distribution
from ..options import Batches, Options
from ..structures import Block, Fisher
from .gradients import cosine, mean_gradient, metric_of, of_layer
from .overlap import side_overlaps, top_overlap

OF_ALL = ("dense", "implicit", "low_rank")
"""Structures whose block is not of one layer."""

PASSES = 3.0
"""The empirical Fisher, whose backward goes example by example at some layers, about two; the gradient, one."""


@dataclass(frozen=True)
class AgainstEmpirical:
    """A layer's conditional block F beside its empirical one E, of the same data and in the same structure.

    E = (1/M) sum_n grad l_n grad l_n^T at the data labels. It is F where the labels are as the model says they are, and
    with the loss it goes to zero, which F does not. Of an F that is the moving average of a running job, E is of the
    data at hand all the same: what has moved since is in the numbers too.

    Args:
        trace_ratio: tr E / tr F, no unit. Above 1 the labels surprise the model more than it expects, below 1 less;
            None of an F that is zero.
        overlap: |U_F^T U_E|^2 / k, U the k largest eigenvectors of either block: from ``chance`` for unrelated
            subspaces to 1 for equal ones; None where a block is zero.
        overlap_A: the same of the input sides A; 1 for 'kfac', whose A knows no labels. None where there are no sides.
        overlap_G: of the output sides G.
        dimension: k, at most the numerical rank of either.
        chance: k over the number of parameters.
        cosine: of (F + lambda I)^-1 g and (E + lambda I)^-1 g, g the gradient of the loss; None of one that is zero.
        length_ratio: |(E + lambda I)^-1 g| / |(F + lambda I)^-1 g|: how many times as far the step would go.
        damping: lambda, the same for both, in the units of F.

    Cost: an estimate of kind 'empirical', a forward and a backward where no gradient is handed in, and an
    eigendecomposition of each side; nothing of d_in d_out squared.
    Source: Kunstner, Balles & Hennig 2019 (arXiv:1905.12558); Martens 2020 (arXiv:1412.1193), section 11.
    """

    trace_ratio: float | None
    overlap: float | None
    overlap_A: float | None
    overlap_G: float | None
    dimension: int
    chance: float
    cosine: float | None
    length_ratio: float | None
    damping: float


def measure(
    model: nn.Module,
    data: Batches,
    likelihood: Distribution | str | nn.Module,
    fisher: Fisher,
    *,
    damping: float | None = None,
    gradient: Mapping[str, Tensor] | None = None,
    options: Options | None = None,
) -> dict[str, AgainstEmpirical]:
    """Each layer of a conditional Fisher beside the empirical one, which is estimated here.

    Args:
        model: in the mode it is in.
        data: those of ``fisher``, with labels.
        likelihood: of the loss, or the criterion.
        fisher: as ``kc.estimate`` gives it.
        damping: lambda; None for a thousandth of each conditional block's mean eigenvalue.
        gradient: of the loss by parameter name; None to take it from the data.
        options: of the estimate of ``fisher``; draws among them are not used.

    Raises:
        LikelihoodError: a batch without labels.
        NumericalError: a block without an inverse.
        ArgumentError: a Fisher of a structure that ``kc.estimate`` does not know.
    """
    options = options or Options()
    structure = fisher.meta.get("structure", "kfac")
    # Of no more layers than are compared; a Fisher of all parameters at once has none by name.
    layers = None if structure in OF_ALL else [escape(name) for name in fisher]
    wanted = replace(options, draws=None, layers=layers, partial=None)
    empirical = estimate(model, data, likelihood, structure=structure, kind="empirical", options=wanted)
    if gradient is None:
        gradient = mean_gradient(model, data, likelihood, picks=options.data)
    missing = [name for name in fisher if name not in empirical]
    if missing:
        raise ArgumentError(
            f"the empirical Fisher has no block of {', '.join(missing)}: expected data and options that reach the "
            f"layers of the Fisher it is compared with"
        )
    return {name: compared(block, empirical[name], gradient, damping=damping) for name, block in fisher.items()}


def compared(
    conditional: Block, empirical: Block, gradient: Mapping[str, Tensor], *, damping: float | None
) -> AgainstEmpirical:
    """That of one layer; arguments as for ``measure``."""
    metric, used = metric_of(conditional, damping)
    other, _ = metric_of(empirical.to(conditional.device).to(conditional.dtype), used)
    g = of_layer(conditional, gradient)
    mine, theirs = metric.matvec(g), other.matvec(g)
    lengths = [float(torch.linalg.vector_norm(one)) for one in (mine, theirs)]
    trace = float(conditional.trace())
    overlap, k = top_overlap(conditional, empirical)
    of_A, of_G = side_overlaps(conditional, empirical)
    return AgainstEmpirical(
        trace_ratio=float(empirical.trace()) / trace if trace > 0 else None,
        overlap=overlap,
        overlap_A=of_A,
        overlap_G=of_G,
        dimension=k,
        chance=k / conditional.layout.numel,
        cosine=cosine(mine, theirs),
        length_ratio=lengths[1] / lengths[0] if lengths[0] > 0 else None,
        damping=used,
    )
