"""Conditional distributions p(y | outputs): draws, scores, their Fisher, and the scale of the loss they stand for."""

from .base import Likelihood
from .bernoulli import Bernoulli
from .categorical import Categorical
from .criteria import as_likelihood, from_criterion, heard_call
from .elementwise import Elementwise
from .expectation import exact_scores, sampled_scores
from .gaussian import Gaussian

__all__ = [
    "Bernoulli",
    "Categorical",
    "Elementwise",
    "Gaussian",
    "Likelihood",
    "as_likelihood",
    "exact_scores",
    "from_criterion",
    "heard_call",
    "sampled_scores",
]
