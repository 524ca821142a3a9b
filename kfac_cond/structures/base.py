"""The verbs that every block of the Fisher answers, whatever it stores: one layer's block is a matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor

from ..errors import ArgumentError, NumericalError
from ..layers.shards import brought_together
from ..linalg.kronecker import block_diagonal

if TYPE_CHECKING:
    from ..layers.layout import WeightLayout
    from .iterative import Iteration

Rule = Literal["exact", "factored"]
Vector = TypeVar("Vector", Tensor, Mapping[str, Tensor])

MAX_DENSE = 20_000
"""Side of the largest dense matrix that is made when asked for: 3.2 GB in float64."""


class Block(ABC):
    """One layer's block F of the Fisher: a symmetric positive semi-definite (P x P) matrix, P the layer's parameters.

    A vector v is a tensor of ``layout.matrix_shape``, a flat one of P entries in the row-major order of that matrix, or
    a mapping of the layer's parameter names to tensors; results come in the form that was given, in the block's
    dtype. A block never changes: every verb that gives a matrix gives a new one. Damping is in the units of F.
    """

    layout: WeightLayout
    name: str
    #: Whether scalars of the block cost iterations, so that a table leaves them out.
    iterative: bool = False
    # numpy's scalars would otherwise take a block for an array in `np.float64(2) * block`.
    __array_ufunc__ = None

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of what is stored and of every result."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of what is stored and of every result."""

    @property
    def diagonal_sides(self) -> tuple[str, ...]:
        """Which of the sides A and G are kept as their diagonals; none where the block has no sides."""
        return ()

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return (self.layout.numel, self.layout.numel)

    @property
    def label(self) -> str:
        """How messages call the block."""
        return f"layer '{self.name}'" if self.name else f"the block of {' and '.join(self.layout.names)}"

    def matvec(self, v: Vector) -> Vector:
        """F v.

        Raises:
            ArgumentError: where v has none of the three forms, or is on another device.
        """
        return self._in_form(v, self._product)

    def __matmul__(self, v: Vector) -> Vector:
        """F v."""
        return self.matvec(v)

    def solve(self, v: Vector, *, damping: float = 0.0, rule: Rule = "exact") -> Vector:
        """(F + damping I)^-1 v, or with ``rule="factored"`` the inverse of the separately damped factors times v.

        Args:
            v: in any of the three forms.
            damping: lambda >= 0.
            rule: "exact", or "factored" for (G + sqrt(lambda) / pi I)^-1 (x) (A + pi sqrt(lambda) I)^-1.

        Raises:
            NumericalError: where the matrix is singular or not finite.
            ArgumentError: for a negative damping, or where the block has no two factors to damp.
        """
        return self._in_form(v, self.inverse(damping=damping, rule=rule)._product)

    @abstractmethod
    def inverse(self, *, damping: float = 0.0, rule: Rule = "exact") -> Block:
        """(F + damping I)^-1 as a block; arguments and errors as for ``solve``."""

    @abstractmethod
    def sqrt(self) -> Block:
        """F^1/2, the symmetric positive semi-definite root."""

    @abstractmethod
    def inverse_sqrt(self, *, damping: float = 0.0) -> Block:
        """(F + damping I)^-1/2; raises NumericalError where that matrix is singular."""

    @abstractmethod
    def trace(self) -> Tensor:
        """tr F."""

    @abstractmethod
    def logdet(self, *, damping: float = 0.0) -> Tensor:
        """log det(F + damping I); raises NumericalError where that matrix is singular."""

    @abstractmethod
    def frobenius_norm(self) -> Tensor:
        """The root of the sum of all squared entries of F."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """The diagonal of F, as a tensor of ``layout.matrix_shape``."""

    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """All P eigenvalues of F, descending."""

    @abstractmethod
    def top_eigenpairs(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest eigenvalues [k], descending, and their unit eigenvectors [k, *matrix_shape]."""

    @abstractmethod
    def to(self, target: torch.device | torch.dtype | str) -> Block:
        """The same block on another device or in another dtype."""

    def with_iteration(self, iteration: Iteration) -> Block:
        """The same block, whose iterative verbs go as far as this; one with closed forms alone stays as it is."""
        return self

    @abstractmethod
    def _product(self, matrix: Tensor) -> Tensor:
        """F times each matrix of [..., *matrix_shape]."""

    @abstractmethod
    def _scaled(self, factor: float) -> Block:
        """factor F, for a factor that is finite and not negative."""

    @abstractmethod
    def _dense(self) -> Tensor:
        """F as [P, P], or the blocks along its diagonal as [groups, P / groups, P / groups]."""

    def quadratic(self, v: Tensor | Mapping[str, Tensor]) -> Tensor:
        """v^T F v, a scalar; twice the KL divergence of a step v, to second order."""
        matrix = self._to_matrix(v)
        return torch.sum(matrix * self._product(matrix))

    def kl(self, v: Tensor | Mapping[str, Tensor]) -> Tensor:
        """v^T F v / 2: the KL divergence per loss term of a step v, to second order."""
        return 0.5 * self.quadratic(v)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n Gaussian vectors of mean 0 and covariance F, [n, *matrix_shape]; the generator is on the block's device."""
        shape = (n, *self.layout.matrix_shape)
        return self.sqrt()._product(torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device))

    def to_dense(self) -> Tensor:
        """F as a (P x P) tensor, row-major vec; raises ArgumentError above ``MAX_DENSE`` parameters."""
        require_dense(self.layout.numel, self.label)
        dense = self._dense()
        return dense if dense.dim() == 2 else block_diagonal(list(dense))

    def __mul__(self, factor: float) -> Block:
        """factor F, for a number that is finite and not negative."""
        if not isinstance(factor, Real):
            return NotImplemented
        return self._scaled(checked_factor(float(factor)))

    __rmul__ = __mul__

    def __add__(self, other: Block) -> Block:
        """The sum of two blocks of one layer, a ``SumBlock``: its docstring says how each verb is answered."""
        if not isinstance(other, Block):
            return NotImplemented
        # A sum is a block itself, so its module imports this one.
        from .sums import sum_of

        return sum_of(self, other)

    def __repr__(self) -> str:
        size = " x ".join(str(side) for side in self.layout.matrix_shape)
        name = f"'{self.name}', " if self.name else ""
        return f"{type(self).__name__}({name}{size}, {str(self.dtype).removeprefix('torch.')}, {self.device})"

    def _in_form(self, v: Vector, function: Callable[[Tensor], Tensor]) -> Vector:
        """A function of the vector as a matrix, its result in the form of the vector."""
        matrix = function(self._to_matrix(v))
        if isinstance(v, Tensor):
            return matrix.reshape(v.shape)
        return named(self.layout, matrix)

    def _to_matrix(self, v: Tensor | Mapping[str, Tensor]) -> Tensor:
        """A vector in any form as a matrix in the block's dtype; DTensors are brought together by all their ranks."""
        v = brought_together(v)
        if isinstance(v, Tensor):
            if tuple(v.shape) not in (self.layout.matrix_shape, (self.layout.numel,)):
                raise ArgumentError(
                    f"{self.label}: got a tensor of shape {tuple(v.shape)}, expected {self.layout.matrix_shape} or "
                    f"({self.layout.numel},), or a mapping of {', '.join(self.layout.names)}"
                )
            matrix = v.reshape(self.layout.matrix_shape)
        else:
            extra = sorted(set(v) - set(self.layout.names))
            if extra:
                raise ArgumentError(
                    f"{self.label}: got {', '.join(extra)}, expected {', '.join(self.layout.names)} only"
                )
            matrix = self.layout.to_matrix(v)
        if matrix.device != self.device:
            raise ArgumentError(
                f"{self.label}: got a vector on {matrix.device}, the block is on {self.device}: move one with .to()"
            )
        return matrix.to(self.dtype)


def named(layout: WeightLayout, matrix: Tensor) -> dict[str, Tensor]:
    """A matrix as named tensors, each contiguous as a parameter is, so that torch's own utilities take them.

    Args:
        layout: the layer's.
        matrix: [*batch, *matrix_shape], with at most one batch dimension.
    """
    split = layout.from_matrix if matrix.dim() == len(layout.matrix_shape) else torch.vmap(layout.from_matrix)
    return {name: tensor.contiguous() for name, tensor in split(matrix).items()}


def checked_damping(damping: float) -> float:
    """The damping as a number, refused where it is negative or not finite."""
    value = float(damping)
    if not 0.0 <= value < float("inf"):
        raise ArgumentError(f"damping is {value}, expected a finite number >= 0")
    return value


def checked_factor(factor: float) -> float:
    """A scale, refused where the product would not be a Fisher."""
    if not 0.0 <= factor < float("inf"):
        raise ArgumentError(f"a Fisher is multiplied by {factor}, expected a finite number >= 0")
    return factor


def checked_rule(rule: str) -> str:
    """The damping rule, refused where there is none of that name."""
    if rule not in ("exact", "factored"):
        raise ArgumentError(f"rule is {rule!r}, expected 'exact' or 'factored'")
    return rule


def require_unfactored(block: Block, rule: str) -> None:
    """Refuse to damp the factors of a block that has none."""
    if checked_rule(rule) == "factored":
        raise ArgumentError(
            f"{block.label}: rule='factored' damps the factors A and G, and {type(block).__name__} has none: "
            "use rule='exact'"
        )


def require_eigenpairs(block: Block, k: int) -> None:
    """Refuse a number of eigenpairs that the block does not have."""
    if not 1 <= k <= block.layout.numel:
        raise ArgumentError(f"{block.label}: asked for {k} eigenpairs, expected 1 to {block.layout.numel}")


def require_dense(size: int, label: str) -> None:
    """Refuse a dense matrix too large to be meant."""
    if size > MAX_DENSE:
        raise ArgumentError(
            f"{label}: to_dense would make a {size} x {size} matrix, the most is {MAX_DENSE} x {MAX_DENSE}: "
            "use matvec, solve, top_eigenpairs or to_scipy, or one layer's block"
        )


def require_regular(eigenvalues: Tensor, label: str, size: int) -> None:
    """Refuse a matrix that is singular to working precision; reads the host.

    Args:
        eigenvalues: [..., n], a row for each matrix.
        label: how the message calls it.
        size: side of the factor the eigenvalues come from; it sets what counts as round-off.
    """
    round_off = eigenvalues.amax(-1) * (size * torch.finfo(eigenvalues.dtype).eps)
    if bool((eigenvalues.amin(-1) <= round_off).any()):
        raise NumericalError(
            f"{label} is singular: its eigenvalues go from {eigenvalues.min().item():.3g} to "
            f"{eigenvalues.max().item():.3g}. Pass damping > 0, in the units of the block; a thousandth of the block's "
            "mean eigenvalue, trace() / P, is a first value to try"
        )
