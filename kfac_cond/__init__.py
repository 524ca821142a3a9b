"""Kronecker-factored approximations of the conditional Fisher: x from the data, y from the model."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from .adaptive import FactorDamping, LevenbergMarquardt
from .checkpoints import load_checkpoint, save_checkpoint
from .coverage import Coverage, coverage
from .damping import Damping
from .data import Data
from .directions import Direction
from .distributed import Plan, PlanTable
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
    RankError,
    StateError,
)
from .estimate import estimate
from .grafting import Graft
from .implicit import Gram, gram, implicit, low_rank
from .inspection import Comparison, Finding, Report, compare, inspect, plots
from .inspection.monitor import Monitor
from .layers import LayerKind, register_layer, unregister_layer
from .likelihoods import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    FromDistribution,
    Gamma,
    Gaussian,
    HeteroscedasticGaussian,
    Laplace,
    Likelihood,
    MixtureDensity,
    Multinomial,
    MultivariateGaussian,
    NegativeBinomial,
    Ordinal,
    Poisson,
    Product,
    Tempered,
    VonMises,
)
from .natural_gradient import NaturalGradient
from .options import Options, Structure
from .preconditioner import KFAC
from .quadratic import QuadraticModel
from .schedules import Adaptive, Schedule
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
    SamplingError,
    SumBlock,
    UnitWiseBlock,
)
from .trust_region import KLClip, NormConstraint
from .wrapping import detach

try:
    __version__ = version("kfac-cond")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.0.0"

__all__ = [
    "KFAC",
    "Adaptive",
    "ArgumentError",
    "AttachError",
    "Bernoulli",
    "Beta",
    "Binomial",
    "Block",
    "CaptureError",
    "Categorical",
    "Comparison",
    "Coverage",
    "CoverageError",
    "Damping",
    "Data",
    "DenseBlock",
    "DiagonalBlock",
    "Direction",
    "EigenBlock",
    "FactorDamping",
    "Finding",
    "Fisher",
    "FromDistribution",
    "Gamma",
    "Gaussian",
    "Graft",
    "Gram",
    "HeteroscedasticGaussian",
    "ImplicitBlock",
    "Iteration",
    "KFACError",
    "KLClip",
    "KroneckerBlock",
    "Laplace",
    "LayerKind",
    "LevenbergMarquardt",
    "Likelihood",
    "LikelihoodError",
    "LowRankBlock",
    "MixtureDensity",
    "ModelChangedError",
    "Monitor",
    "Multinomial",
    "MultivariateGaussian",
    "NaturalGradient",
    "NegativeBinomial",
    "NormConstraint",
    "NotReadyError",
    "NumericalError",
    "Options",
    "Ordinal",
    "Plan",
    "PlanTable",
    "Poisson",
    "Product",
    "QuadraticModel",
    "RankError",
    "Report",
    "SamplingError",
    "Schedule",
    "StateError",
    "Structure",
    "SumBlock",
    "Tempered",
    "UnitWiseBlock",
    "VonMises",
    "compare",
    "coverage",
    "detach",
    "estimate",
    "gram",
    "implicit",
    "inspect",
    "load_checkpoint",
    "low_rank",
    "plots",
    "register_layer",
    "save_checkpoint",
    "unregister_layer",
]
