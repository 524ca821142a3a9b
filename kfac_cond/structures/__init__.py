"""What a block of the Fisher can be stored as, all with one algebra, and the Fisher that is made of them."""

from .base import Block
from .collect import COLLECTORS, Joint, LayerByLayer
from .dense import DenseBlock
from .diagonal import DiagonalBlock
from .eigen import EigenBlock
from .fisher import Fisher
from .inverses import damped_inverses_of
from .kronecker import KroneckerBlock

__all__ = [
    "COLLECTORS",
    "Block",
    "DenseBlock",
    "DiagonalBlock",
    "EigenBlock",
    "Fisher",
    "Joint",
    "KroneckerBlock",
    "LayerByLayer",
    "damped_inverses_of",
]
