"""What a block of the Fisher can be stored as, all with one algebra, and the Fisher that is made of them."""

from .base import Block
from .eigen import EigenBlock
from .fisher import Fisher
from .inverses import damped_inverses_of
from .kronecker import KroneckerBlock

__all__ = ["Block", "EigenBlock", "Fisher", "KroneckerBlock", "damped_inverses_of"]
