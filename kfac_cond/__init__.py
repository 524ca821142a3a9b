"""Kronecker-factored approximations of the conditional Fisher: x from the data, y from the model."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from .coverage import Coverage, coverage
from .damping import Damping
from .data import Data
from .errors import (
    ArgumentError,
    AttachError,
    CaptureError,
    CoverageError,
    KFACError,
    LikelihoodError,
    ModelChangedError,
    NotReadyError,
    NumericalError,
    StateError,
)
from .estimate import Options, estimate
from .implicit import Gram, gram, implicit, low_rank
from .likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from .preconditioner import KFAC
from .schedules import Schedule
from .structures import (
    Block,
    DenseBlock,
    DiagonalBlock,
    EigenBlock,
    Fisher,
    ImplicitBlock,
    Iteration,
    KroneckerBlock,
    LowRankBlock,
    SumBlock,
)
from .trust_region import KLClip
from .wrapping import detach

try:
    __version__ = version("kfac-cond")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.0.0"

__all__ = [
    "KFAC",
    "ArgumentError",
    "AttachError",
    "Bernoulli",
    "Block",
    "CaptureError",
    "Categorical",
    "Coverage",
    "CoverageError",
    "Damping",
    "Data",
    "DenseBlock",
    "DiagonalBlock",
    "EigenBlock",
    "Fisher",
    "Gaussian",
    "Gram",
    "ImplicitBlock",
    "Iteration",
    "KFACError",
    "KLClip",
    "KroneckerBlock",
    "Likelihood",
    "LikelihoodError",
    "LowRankBlock",
    "ModelChangedError",
    "NotReadyError",
    "NumericalError",
    "Options",
    "Schedule",
    "StateError",
    "SumBlock",
    "coverage",
    "detach",
    "estimate",
    "gram",
    "implicit",
    "low_rank",
]
