"""Blocks over layouts of every kind, and the dense matrix each of them is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kfac_cond.layers.layout import JointLayout, WeightLayout
from kfac_cond.structures import (
    Block,
    DenseBlock,
    DiagonalBlock,
    EigenBlock,
    Fisher,
    KroneckerBlock,
    UnitWiseBlock,
)

LAYOUTS = {
    "linear": WeightLayout("fc.weight", "fc.bias", (3, 4)),
    "no-bias": WeightLayout("fc.weight", None, (3, 4)),
    "weight-frozen": WeightLayout(None, "fc.bias", (3, 4)),
    "convolution": WeightLayout("conv.weight", "conv.bias", (3, 2, 1, 2)),
    "groups": WeightLayout("conv.weight", "conv.bias", (6, 2, 2), groups=3),
    "groups-no-bias": WeightLayout("conv.weight", None, (6, 2, 2), groups=3),
    "groups-weight-frozen": WeightLayout(None, "conv.bias", (6, 2, 2), groups=3),
    "norm": WeightLayout("norm.weight", "norm.bias", (2, 3), groups=6, output_dims=2),
}
SPD = Callable[..., Tensor]


@pytest.fixture
def spd() -> SPD:
    """A maker of well conditioned positive definite matrices: spd(3) is one of them, spd(2, 3, 3) two."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        d = shape[-1]
        x = torch.randn(*shape[:-2], d, 2 * d + 2, generator=generator, dtype=torch.float64)
        return x @ x.mT / x.shape[-1]

    return make


@pytest.fixture
def kronecker(spd: SPD) -> Callable[..., KroneckerBlock]:
    """A maker of Kronecker blocks over a layout; the sides named in ``diagonal`` are diagonals."""

    def make(layout: WeightLayout, name: str = "fc", diagonal: str = "") -> KroneckerBlock:
        *groups, d_out, d_in = layout.matrix_shape
        sides = {"A": spd(*groups, d_in, d_in), "G": spd(*groups, d_out, d_out)}
        for side in diagonal:
            sides[side] = sides[side].diagonal(dim1=-2, dim2=-1).clone()
        return KroneckerBlock(layout, **sides, name=name)

    return make


@pytest.fixture
def partner(kronecker, spd: SPD) -> Callable[[WeightLayout], Block]:
    """A maker of another block over any layout: Kronecker where there is one layer, dense over several."""

    def make(layout: WeightLayout) -> Block:
        if isinstance(layout, JointLayout):
            return DenseBlock(layout, spd(layout.numel, layout.numel), name="fc")
        made: Block = kronecker(layout)
        return made

    return make


@pytest.fixture
def layouts() -> dict[str, WeightLayout]:
    return LAYOUTS


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> WeightLayout:
    return LAYOUTS[request.param]


@pytest.fixture(
    params=["kronecker", "eigen", "diagonal", "unit-wise", "dense", "joint"]
    + [f"{word} with diagonal {sides}" for word in ("kronecker", "eigen") for sides in ("A", "G", "AG")]
)
def block(request: pytest.FixtureRequest, layout: WeightLayout, kronecker, spd: SPD) -> Block:
    """A block of each structure over each layout; the eigenvalues of the eigen block are of no Kronecker form."""
    if request.param in ("dense", "joint"):
        joint = JointLayout(parts=(layout, WeightLayout("other.weight", None, (2, 1))))
        whole = joint if request.param == "joint" else layout
        return DenseBlock(whole, spd(whole.numel, whole.numel), name="fc")
    if request.param == "unit-wise":
        return UnitWiseBlock(layout, spd(*layout.matrix_shape, layout.d_in), name="fc")
    structure, _, diagonal = request.param.partition(" with diagonal ")
    made: KroneckerBlock = kronecker(layout, diagonal=diagonal)
    if structure == "kronecker":
        return made
    values = torch.rand(layout.matrix_shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.1
    if structure == "diagonal":
        return DiagonalBlock(layout, values, name="fc")
    basis_A, basis_G = (
        None if name in diagonal else torch.linalg.eigh(side)[1].contiguous()
        for name, side in (("A", made.A), ("G", made.G))
    )
    return EigenBlock(layout, basis_A, basis_G, values, name="fc")


@pytest.fixture
def dense(block: Block) -> Tensor:
    """The block's matrix by torch.kron and torch.block_diag, group by group."""
    layout = block.layout

    def groups(tensor: Tensor) -> Tensor:
        return tensor if layout.groups > 1 else tensor.unsqueeze(0)

    def matrices(side: Tensor) -> Tensor:
        return groups(torch.diag_embed(side) if side.dim() < len(layout.matrix_shape) else side)

    def bases(basis: Tensor | None, d: int) -> Tensor:
        return torch.eye(d, dtype=torch.float64).repeat(layout.groups, 1, 1) if basis is None else groups(basis)

    if isinstance(block, KroneckerBlock):
        return torch.block_diag(*[torch.kron(g, a) for g, a in zip(matrices(block.G), matrices(block.A), strict=True)])
    if isinstance(block, DiagonalBlock):
        return torch.diag(block.values.flatten())
    if isinstance(block, DenseBlock):
        return block.matrix
    if isinstance(block, UnitWiseBlock):
        return torch.block_diag(*block.matrices.reshape(-1, layout.d_in, layout.d_in))
    assert isinstance(block, EigenBlock)
    left, right = bases(block.basis_G, layout.d_out), bases(block.basis_A, layout.d_in)
    products = [
        (torch.kron(g, a), values.flatten()) for g, a, values in zip(left, right, groups(block.values), strict=True)
    ]
    return torch.block_diag(*[basis @ torch.diag(values) @ basis.T for basis, values in products])


@pytest.fixture
def vector(block: Block) -> Tensor:
    return torch.randn(block.layout.numel, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.fixture
def fisher(kronecker) -> Fisher:
    """Three layers of three kinds, the last one in its eigenbasis."""
    conv = WeightLayout("conv.weight", "conv.bias", (6, 2, 2), groups=3)
    head = WeightLayout("head.weight", None, (2, 3))
    return Fisher(
        {
            "fc": kronecker(LAYOUTS["linear"], "fc"),
            "conv": kronecker(conv, "conv"),
            "head": kronecker(head, "head").eigen(),
        },
        meta={"likelihood": "Categorical()", "kind": "sampled", "samples": 2, "counts": {"examples": 7, "terms": 9}},
    )
