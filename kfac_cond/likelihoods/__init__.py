"""Conditional distributions p(y | outputs): draws, scores, their Fisher, and the scale of the loss they stand for."""

from .base import Likelihood
from .bernoulli import Bernoulli
from .categorical import Categorical
from .continuous import Beta, Gamma, Laplace, VonMises
from .counts import Binomial, NegativeBinomial, Poisson
from .criteria import as_likelihood, from_criterion, heard_call
from .distribution import FromDistribution, MixtureDensity
from .elementwise import Elementwise
from .expectation import exact_scores, sampled_scores
from .gaussian import Gaussian
from .ordinal import Ordinal
from .product import Product
from .tempered import Tempered
from .vectors import HeteroscedasticGaussian, Multinomial, MultivariateGaussian
from .vectorwise import Vectorwise

__all__ = [
    "Bernoulli",
    "Beta",
    "Binomial",
    "Categorical",
    "Elementwise",
    "FromDistribution",
    "Gamma",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Laplace",
    "Likelihood",
    "MixtureDensity",
    "Multinomial",
    "MultivariateGaussian",
    "NegativeBinomial",
    "Ordinal",
    "Poisson",
    "Product",
    "Tempered",
    "Vectorwise",
    "VonMises",
    "as_likelihood",
    "exact_scores",
    "from_criterion",
    "heard_call",
    "sampled_scores",
]
