"""A layer: where it and its parameters are, how they form a matrix, and what is summed of it."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ModelChangedError
from ..linalg.moments import second_moment, second_moment_diagonal, second_moment_triangle
from ..linalg.triangles import triangle_shape, unfolded
from .base import WHOLE, LayerKind, Part
from .layout import MAX_FACTOR_DIM, WeightLayout
from .rules import PLAIN, LayerRule, Sharing
from .shards import device_of, is_sharded, local
from .sharing import Moment
from .summed import EigenSquares, GradientMoments, GradientSquares, GradientSums


@dataclass(frozen=True)
class Layer:
    """A layer: a name, where it and its parameters are, and how they form a matrix.

    Args:
        name: canonical name of the first module that holds the weight; in the universal form that of the parameter.
        kind: how inputs and output gradients become [batch, positions, features].
        modules: the modules that apply the weight; their uses count as positions of one layer. None of them in the
            universal form, which is known by the gradient of its parameter.
        layout: the layer's matrix.
        places: where each of its parameters is, frozen ones as well: by canonical name a module and an attribute of it.
        rule: the settings that hold for it.
        part: what of its modules it is.
        gradient_sums: what is summed of the weight gradients of examples; None where a a^T and g g^T are summed over
            positions.
        triangles: whether of what is summed one triangle is kept where it is symmetric, as training does, which keeps
            sums beside averages: together they take the memory of one of them.
    """

    name: str
    kind: LayerKind
    modules: tuple[nn.Module, ...]
    layout: WeightLayout
    places: Mapping[str, tuple[nn.Module, str]]
    rule: LayerRule = PLAIN
    part: Part = WHOLE
    gradient_sums: GradientSums | None = None
    triangles: bool = False

    @property
    def sharing(self) -> Sharing:
        """How positions enter the factors; it means nothing where they are summed before anything is squared."""
        return self.rule.sharing or "expand" if self.sums_inputs else "expand"

    @property
    def fraction(self) -> float:
        """Share of the positions that its factors are made of."""
        return 1.0 if self.rule.fraction is None else self.rule.fraction

    @property
    def sums_inputs(self) -> bool:
        """Whether the outer products of its inputs are summed."""
        return self.gradient_sums is None or self.gradient_sums.sums_inputs

    @property
    def max_factor_dim(self) -> int:
        """Size of the largest side that is kept whole."""
        return MAX_FACTOR_DIM if self.rule.max_factor_dim is None else self.rule.max_factor_dim

    @property
    def diagonal_sides(self) -> dict[str, int]:
        """The sides that are kept as their diagonals, 'A' or 'G', with their sizes."""
        if isinstance(self.gradient_sums, GradientSquares):
            return {}
        return self.layout.diagonal_sides(self.max_factor_dim)

    @property
    def turns(self) -> bool:
        """Whether it is kept in eigenbases, which follow its factors."""
        return isinstance(self.gradient_sums, EigenSquares)

    @property
    def input_moment(self) -> Moment:
        """How the outer products of its inputs are summed."""
        return self._moment("A")

    @property
    def sums_every_position(self) -> bool:
        """Whether A is the matrix of the outer products of the inputs at all positions."""
        return (
            self.gradient_sums is None
            and self.sharing == "expand"
            and self.fraction == 1
            and "A" not in self.diagonal_sides
        )

    @property
    def gradient_moment(self) -> Moment:
        """How the outer products of its output gradients are summed."""
        return self._moment("G")

    def _moment(self, side: str) -> Moment:
        if side in self.diagonal_sides:
            return second_moment_diagonal
        return second_moment_triangle if self.triangles else second_moment

    @property
    def owner(self) -> str:
        """Canonical name of the module that it is a part of."""
        return self.name[: len(self.name) - len(self.part.name)].rstrip(".")

    @property
    def ones(self) -> bool:
        """Whether the constant feature is summed beside its inputs: for a bias, or to count positions."""
        return self.layout.bias is not None or self.kind.counts_groups(self.layout)

    @property
    def sum_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of what is summed for A and, in each slot, for G."""
        shapes = dict(zip("AG", self.kind.sum_shapes(self.layout, self.max_factor_dim), strict=True))
        shapes |= {side: triangle_shape(shapes[side]) for side in self._folded}
        of_G = shapes["G"]
        if self.gradient_sums is not None:
            of_G = self.gradient_sums.shape(self.layout, self.max_factor_dim)
        return shapes["A"] if self.sums_inputs else (), of_G

    @property
    def _folded(self) -> list[str]:
        """The sides of what is summed of which one triangle is kept."""
        summed = {"A": self.sums_inputs, "G": self.gradient_sums is None}
        return [side for side in "AG" if self.triangles and summed[side] and side not in self.diagonal_sides]

    def whole(self, A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
        """What is summed for A, and for G of one slot, with matrices in the place of triangles."""
        shapes = dict(zip("AG", self.kind.sum_shapes(self.layout, self.max_factor_dim), strict=True))
        A, G = (
            unfolded(one, shapes[side]) if side in self._folded else one for side, one in zip("AG", (A, G), strict=True)
        )
        return A, G

    def largest(self, A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
        """Of what was summed for A and for G the entries that are finite only where all are.

        Of sums of outer products those are the diagonals, the sums of squares: |sum x y|^2 <= sum x^2 sum y^2.
        """
        if self.gradient_sums is not None:
            return A, G
        sums, leading, others = {"A": A, "G": G}, {"A": 0, "G": 1}, {*self.diagonal_sides, *self._folded}
        of_A, of_G = (
            x if side in others or x.dim() < leading[side] + 2 else x.diagonal(dim1=-2, dim2=-1)
            for side, x in sums.items()
        )
        return of_A, of_G

    def factors(self, A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
        """(A, G) of its Kronecker block from what was summed for them, each divided by what it is a mean over."""
        A, G = self.whole(A, G)
        sums = self.gradient_sums
        if isinstance(sums, EigenSquares):
            (G, _), sums = sums.parts(G, self.layout), sums.moments
        if isinstance(sums, GradientMoments):
            return sums.factors(G, self.layout, self.max_factor_dim)
        if sums is not None:
            G = G.reshape(self.kind.sum_shapes(self.layout, self.max_factor_dim)[1])
        return self.kind.factors(A, G, self.layout, self.max_factor_dim)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by canonical name, weight first."""
        held = self._held
        return {name: parameter for name in self.layout.names if (parameter := held.get(name)) is not None}

    @property
    def held(self) -> tuple[Tensor, ...]:
        """What is in the places of its parameters now, frozen or not."""
        return tuple(self._held.values())

    @property
    def like(self) -> Tensor:
        """One of its parameters, frozen or not, for where it is and its dtype; of a sharded one the part here."""
        return local(self.held[0])

    @property
    def sharded(self) -> bool:
        """Whether ranks have parts of what trains of it, as DTensors."""
        return any(map(is_sharded, self.parameters.values()))

    @property
    def device(self) -> torch.device:
        """Where it computes, and where what is known of it is; an offloaded parameter is elsewhere between calls."""
        return device_of(self.held[0])

    @property
    def unchanged_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters as ``parameters`` has them; raises ModelChangedError as ``check_unchanged``."""
        held = self._held
        self._check(held)
        return {name: held[name] for name in self.layout.names}

    @property
    def _held(self) -> dict[str, nn.Parameter]:
        """The parameters there are now, frozen or not."""
        found = {name: getattr(module, attribute, None) for name, (module, attribute) in self.places.items()}
        return {name: parameter for name, parameter in found.items() if parameter is not None}

    def check_unchanged(self) -> None:
        """Raise ModelChangedError where a shape or what is frozen differs from when it was wrapped."""
        self._check(self._held)

    def _check(self, held: Mapping[str, nn.Parameter]) -> None:
        now = {name: tuple(one.shape) for name, one in held.items() if one.requires_grad}
        if now != self.layout.shapes:
            raise ModelChangedError(
                f"layer '{self.name}' is no longer what was wrapped: found the trainable parameters {now}, expected "
                f"{self.layout.shapes}. Call kfac.refresh() after changing or freezing layers; it keeps what still "
                f"fits."
            )


def storage_of(layers: Mapping[str, Layer]) -> dict[str, torch.dtype]:
    """The layers whose averages are kept in another dtype than that of their statistics, with that dtype."""
    return {name: layer.rule.storage for name, layer in layers.items() if layer.rule.storage is not None}


def layers_by_module(layers: Mapping[str, Layer]) -> dict[nn.Module, dict[str, Layer]]:
    """The layers that each module is, by part."""
    found: dict[nn.Module, dict[str, Layer]] = {}
    for layer in layers.values():
        for module in layer.modules:
            found.setdefault(module, {})[layer.part.name] = layer
    return found


def draws_needed(layers: Mapping[str, Layer]) -> dict[str, int]:
    """The layers that need more than one draw of labels before they are preconditioned, with how many."""
    return {name: layer.kind.draws_needed for name, layer in layers.items() if layer.kind.draws_needed > 1}


def waiting_for_draws(layers: Mapping[str, Layer], ready: Container[str]) -> list[str]:
    """A line on the layers that need several draws, where there are any, and how many of them are ready."""
    needed = draws_needed(layers)
    if not needed:
        return []
    number = sum(name in ready for name in needed)
    return [
        f"{len(needed)} parameters in the universal form, {number} of them preconditioned: each has its plain gradient "
        f"until {max(needed.values())} effective draws are in"
    ]
