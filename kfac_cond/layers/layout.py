"""How a layer's parameters sit in the matrix its Kronecker block acts on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from einops import rearrange
from torch import Tensor

from ..errors import ArgumentError

MAX_FACTOR_DIM = 16_384
"""Size of the largest side that is kept whole where nothing else is said; a larger one is kept as its diagonal.

In float32 such a matrix takes 1 GiB, and a layer holds several (sums, moving average, inverse). Nearly all hidden
layers are below it, vocabularies above.
"""


@dataclass(frozen=True)
class WeightLayout:
    """The (d_out x d_in [+ 1]) matrix of a layer, as names and shapes alone: no module, no tensor.

    The weight is flattened to (d_out, d_in), row by row; a trainable bias is the last column. A layer with ``groups``
    is one such matrix per group, stacked first: (groups, d_out / groups, d_in [+ 1]). Row-major ``vec`` of either
    has the same order of entries as the concatenated rows.

    Args:
        weight: canonical name of the weight, or None where it is frozen.
        bias: canonical name of the bias, or None where there is none or it is frozen.
        weight_shape: shape of the weight, frozen or not; its first dimensions count rows.
        groups: number of independent blocks of rows.
        transposed: the weight is stored as (d_in, d_out, *kernel) and the rows of a group are its second dimension;
            groups lie along the first.
        output_dims: how many dimensions of the weight count rows; they are the shape of the bias.
        diagonal_inputs: of the input side the diagonal alone is kept, whatever its size.
    """

    weight: str | None
    bias: str | None
    weight_shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_dims: int = 1
    diagonal_inputs: bool = False

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Canonical names of the trainable parameters, weight first."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each trainable parameter."""
        shapes: dict[str, tuple[int, ...]] = {}
        if self.weight is not None:
            shapes[self.weight] = self.weight_shape
        if self.bias is not None:
            shapes[self.bias] = self._output_shape
        return shapes

    @cached_property
    def _output_shape(self) -> tuple[int, ...]:
        """Shape of the bias, trainable or not."""
        if self.transposed:
            return (self.groups * self.weight_shape[1],)
        return self.weight_shape[: self.output_dims]

    @cached_property
    def _rows(self) -> int:
        """Rows of all groups together; one of a single number."""
        return prod(self._output_shape)

    @cached_property
    def _columns(self) -> int:
        """Columns of the weight."""
        if self.transposed:
            return self.weight_shape[0] // self.groups * prod(self.weight_shape[2:])
        return prod(self.weight_shape[self.output_dims :])

    @cached_property
    def d_out(self) -> int:
        """Rows of one group's matrix."""
        return self._rows // self.groups

    @cached_property
    def columns(self) -> int | None:
        """Columns of a weight that trains; None where it does not."""
        return None if self.weight is None else self._columns

    @cached_property
    def d_in(self) -> int:
        """Columns of the matrix, the bias column included."""
        return (self._columns if self.weight is not None else 0) + (self.bias is not None)

    @cached_property
    def matrix_shape(self) -> tuple[int, ...]:
        """(d_out, d_in), or (groups, d_out, d_in) where there are groups."""
        shape = (self.d_out, self.d_in)
        return shape if self.groups == 1 else (self.groups, *shape)

    @cached_property
    def numel(self) -> int:
        """Number of trainable parameters."""
        return prod(self.matrix_shape)

    def side_shapes(self, max_factor_dim: int = MAX_FACTOR_DIM) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the input side and of the output side of a Kronecker product over the matrix.

        Args:
            max_factor_dim: the largest side that is a matrix, [*groups, d, d]; a larger one is a diagonal,
                [*groups, d].
        """
        *groups, d_out, d_in = self.matrix_shape
        diagonal = self.diagonal_sides(max_factor_dim)
        inputs, outputs = ((*groups, d) if s in diagonal else (*groups, d, d) for s, d in (("A", d_in), ("G", d_out)))
        return inputs, outputs

    def diagonal_sides(self, max_factor_dim: int = MAX_FACTOR_DIM) -> dict[str, int]:
        """The sides 'A' and 'G' of a Kronecker product over the matrix that are kept as their diagonals, with sizes."""
        sides = {"A": self.d_in, "G": self.d_out}
        always = {"A"} if self.diagonal_inputs else set()
        return {side: size for side, size in sides.items() if side in always or size > max_factor_dim}

    def to_matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensors of ``names`` (gradients, directions, values) as one matrix of ``matrix_shape``."""
        for name, shape in self.shapes.items():
            if name not in tensors:
                raise ArgumentError(f"'{name}' is missing: expected a tensor of shape {shape} for it")
            if tuple(tensors[name].shape) != shape:
                raise ArgumentError(f"'{name}' has shape {tuple(tensors[name].shape)}, expected {shape}")
        columns = []
        if self.weight is not None:
            weight = tensors[self.weight]
            if self.transposed:
                weight = rearrange(weight, "(g i) o ... -> g o (i ...)", g=self.groups)
            columns.append(weight.reshape(*self.matrix_shape[:-1], self._columns))
        if self.bias is not None:
            columns.append(tensors[self.bias].reshape(*self.matrix_shape[:-1], 1))
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)

    def from_matrix(self, matrix: Tensor) -> dict[str, Tensor]:
        """The inverse of ``to_matrix``: a tensor for each of ``names``."""
        if tuple(matrix.shape) != self.matrix_shape:
            raise ArgumentError(
                f"{' and '.join(self.names)}: got a matrix of shape {tuple(matrix.shape)}, expected {self.matrix_shape}"
            )
        tensors: dict[str, Tensor] = {}
        if self.weight is not None:
            columns = matrix[..., :-1] if self.bias is not None else matrix
            if self.transposed:
                columns = columns.reshape(self.groups, self.d_out, -1, *self.weight_shape[2:])
                tensors[self.weight] = rearrange(columns, "g o i ... -> (g i) o ...")
            else:
                tensors[self.weight] = columns.reshape(self.weight_shape)
        if self.bias is not None:
            tensors[self.bias] = matrix[..., -1].reshape(self._output_shape)
        return tensors


@dataclass(frozen=True)
class JointLayout(WeightLayout):
    """The parameters of several layers as one vector: each layer's matrix row by row, one after another.

    Its "matrix" is that vector, so that whatever acts on a layer's matrix acts on all layers together.

    Args:
        parts: the layouts of the layers, in order.
    """

    weight: None = None
    bias: None = None
    weight_shape: tuple[int, ...] = ()
    parts: tuple[WeightLayout, ...] = ()

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> JointLayout:
        """Parameters one after another, each flattened, of whatever modules: canonical name -> shape, in order."""
        if not shapes:
            raise ArgumentError("a layout of no parameters: is anything in the model trainable?")
        return cls(parts=tuple(WeightLayout(name, None, tuple(shape)) for name, shape in shapes.items()))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Canonical names of the trainable parameters of all layers."""
        return tuple(name for part in self.parts for name in part.names)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each of them."""
        return {name: shape for part in self.parts for name, shape in part.shapes.items()}

    @cached_property
    def matrix_shape(self) -> tuple[int, ...]:
        """(P,), P the number of parameters."""
        return (sum(part.numel for part in self.parts),)

    def to_matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensors of ``names`` as one vector."""
        return torch.cat([part.to_matrix(tensors).flatten() for part in self.parts])

    def from_matrix(self, matrix: Tensor) -> dict[str, Tensor]:
        """The inverse of ``to_matrix``: a tensor for each of ``names``."""
        if tuple(matrix.shape) != self.matrix_shape:
            raise ArgumentError(
                f"{len(self.parts)} layers: got a vector of shape {tuple(matrix.shape)}, expected {self.matrix_shape}"
            )
        pieces = torch.split(matrix, [part.numel for part in self.parts], dim=-1)
        tensors: dict[str, Tensor] = {}
        for part, piece in zip(self.parts, pieces, strict=True):
            tensors.update(part.from_matrix(piece.reshape(part.matrix_shape)))
        return tensors
