"""What a block of the Fisher can be stored as, all with one algebra, and the Fisher that is made of them."""

from .base import Block
from .bases import diagonals_in, near, refreshed, stepped
from .cholesky import CholeskyBlock
from .collect import COLLECTORS, Joint, LayerByLayer
from .dense import DenseBlock
from .diagonal import DiagonalBlock
from .eigen import EigenBlock
from .fisher import Fisher
from .implicit import ImplicitBlock
from .inverses import Trained, averaged, damped_inverse, damped_inverses_of, scaling_sides
from .iterative import FunctionBlock, Iteration, IterativeBlock
from .kronecker import KroneckerBlock
from .low_rank import LowRankBlock
from .sampling import SamplingError
from .storage import Stored, register_stored
from .sums import SumBlock
from .unit_wise import UnitWiseBlock
from .unread import unread_inverses_of

__all__ = [
    "COLLECTORS",
    "Block",
    "CholeskyBlock",
    "DenseBlock",
    "DiagonalBlock",
    "EigenBlock",
    "Fisher",
    "FunctionBlock",
    "ImplicitBlock",
    "Iteration",
    "IterativeBlock",
    "Joint",
    "KroneckerBlock",
    "LayerByLayer",
    "LowRankBlock",
    "SamplingError",
    "Stored",
    "SumBlock",
    "Trained",
    "UnitWiseBlock",
    "averaged",
    "damped_inverse",
    "damped_inverses_of",
    "diagonals_in",
    "near",
    "refreshed",
    "register_stored",
    "scaling_sides",
    "stepped",
    "unread_inverses_of",
]
