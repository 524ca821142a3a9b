"""How well blocks can be computed with, and what they cost: bytes, operations, milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from itertools import accumulate
from math import isfinite
from time import perf_counter

import torch
from torch import Tensor

from ..costs import Costing, capture_flops, factor_bytes, inverse_bytes, refresh_flops
from ..errors import NumericalError
from ..layers.layer import Layer
from ..linalg.sides import Diagonal
from ..structures import Block, KroneckerBlock
from ..structures.stacked import StackedBlock
from ..uses import Used
from .report import Cost, Numerics
from .spectra import Spectrum

PROBES = 3
"""Random vectors that a residual is the largest of."""
EXACT = Costing(rule="exact")
"""What is inverted here: F + lambda by eigenbases, not factor by factor."""


def numerics_of(block: Block, spectrum: Spectrum, *, failures: int | None = None) -> Numerics:
    """How well a block can be computed with, but for its inverse; costs d^2 for each side.

    Args:
        block: of a layer, finite.
        spectrum: its own.
        failures: factorisations of it in a row that failed in training.
    """
    matrices: list[Tensor] = []
    if isinstance(block, KroneckerBlock):
        matrices = [side for side in block.sides if not isinstance(side, Diagonal)]
    elif isinstance(block, StackedBlock):
        matrices = [block._stack]
    return Numerics(max(map(_asymmetry, matrices), default=0.0), spectrum.negative, failures=failures)


def cost_of(block: Block, layer: Layer | None, used: Used | None = None) -> Cost:
    """What a layer's block takes up, and what training it would cost by its shapes; nothing is computed.

    Args:
        block: of the layer.
        layer: of a model; None where only the block is known.
        used: what a forward used of it; None where none was run.
    """
    if layer is None:
        return Cost(_bytes(block))
    return Cost(
        _bytes(block),
        factor_bytes=factor_bytes(layer, EXACT),
        inverse_bytes=inverse_bytes(layer, EXACT),
        refresh_flops=refresh_flops(layer, EXACT),
        capture_flops=capture_flops(layer, used.rows, used.examples, used.saved) if used else None,
    )


def warmed_up(block: Block) -> None:
    """Load what a decomposition on the block's device loads when it is first used, which is no layer's time."""
    torch.linalg.eigh(torch.eye(2, dtype=block.dtype, device=block.device))


def inverted(block: Block, damping: float, health: Numerics, cost: Cost, *, seed: int) -> tuple[Numerics, Cost]:
    """The residual and the milliseconds of inverting F + damping, added to what is known of the layer.

    Args:
        block: of the layer, of which nothing was decomposed before; what is decomposed is kept with it.
        damping: lambda > 0, in the units of F.
        health: without a residual.
        cost: without milliseconds.
        seed: of the probes.

    Raises:
        NumericalError: it has no inverse.
    """
    generator = torch.Generator().manual_seed(seed)
    probes = torch.randn(PROBES, *block.layout.matrix_shape, generator=generator, dtype=torch.float64)
    probes = probes.to(block.device, block.dtype)
    # What is queued on the device before is not to be timed.
    float(probes.flatten()[0])
    start = perf_counter()
    inverse = block.inverse(damping=damping)
    float(inverse.trace())
    milliseconds = 1e3 * (perf_counter() - start)
    back = inverse._product(block._product(probes) + damping * probes) - probes
    lengths, off = (torch.linalg.vector_norm(one.reshape(PROBES, -1), dim=1) for one in (probes, back))
    residual = float((off / lengths).max())
    if not isfinite(residual):
        raise NumericalError(
            f"{block.label}: (F + {damping:.3g})^-1 (F + {damping:.3g}) v is not finite: pass more damping"
        )
    return replace(health, residual=residual, damping=damping), replace(
        cost, milliseconds=milliseconds, held_by_inverse=_bytes(inverse)
    )


def with_predictions(costs: Mapping[str, Cost]) -> dict[str, Cost]:
    """The same with milliseconds predicted from operations, at the rate of the middle one of them all.

    Half of the operations went at that rate or faster: a layer that waited for something else does not change it.
    """
    rates = sorted(
        (one.milliseconds / one.refresh_flops, one.refresh_flops)
        for one in costs.values()
        if one.milliseconds is not None and one.refresh_flops
    )
    if not rates:
        return dict(costs)
    half = sum(flops for _, flops in rates) / 2
    passed = accumulate(flops for _, flops in rates)
    rate = next(rate for (rate, _), flops in zip(rates, passed, strict=True) if flops >= half)
    return {
        name: one if one.refresh_flops is None else replace(one, predicted_milliseconds=rate * one.refresh_flops)
        for name, one in costs.items()
    }


def _asymmetry(matrix: Tensor) -> float:
    """|S - S^T| / |S|, of all groups together; 0 for zero."""
    scale = float(torch.linalg.vector_norm(matrix))
    return float(torch.linalg.vector_norm(matrix - matrix.mT)) / scale if scale else 0.0


def _bytes(block: Block) -> int:
    """Bytes of the tensors that a block holds; of one that is made of others those of these."""
    if not is_dataclass(block):
        return 0
    held = [getattr(block, field.name) for field in fields(block)]
    parts = [part for value in held if isinstance(value, tuple) for part in value if isinstance(part, Block)]
    return sum(one.numel() * one.element_size() for one in held if isinstance(one, Tensor)) + sum(map(_bytes, parts))
