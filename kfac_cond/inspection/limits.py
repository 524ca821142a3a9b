"""What numbers are held against, in a report and in training alike: every threshold with the reason for it."""

from __future__ import annotations

from .findings import Limit
from .sampling_check import ALARM

FEW = 4
"""Layers below which one may well have nearly all of an update's KL."""

NOT_FINITE = Limit("not-finite", "error", 0, "numbers that are not finite > 0", "nothing that is made of them holds")
SAMPLING = Limit(
    "sampling-check",
    "error",
    ALARM,
    "probability of draws like these < 0.0001",
    "one healthy run in ten thousand has one",
)
NO_INVERSE = Limit("no-inverse", "error", 0, "blocks without an inverse > 0", "such a layer cannot be preconditioned")
UNCOVERED = Limit(
    "uncovered", "warning", 0, "trainable numbers without a block > 0", "they are trained by the plain gradient"
)
UNUSED = Limit(
    "unused", "warning", 0, "layers without a block > 0", "no forward used them, so nothing is known of them"
)
NO_CURVATURE = Limit(
    "no-curvature", "warning", 0, "trace of F = 0", "the outputs do not depend on the layer, or no score gets there"
)
DEAD_INPUTS = Limit(
    "dead-inputs", "info", 0.05, "share of inputs that are always zero > 0.05", "a few constant pixels are no fault"
)
DEAD_OUTPUTS = Limit(
    "dead-outputs", "warning", 0.05, "share of outputs that no score reaches > 0.05", "these units do not learn"
)
SGD = Limit(
    "acts-as-sgd",
    "warning",
    0.99,
    "cosine of update and gradient >= 0.99, in a report with 90 % of eigenvalues below the damping",
    "eight degrees: what the layer is preconditioned with is a number",
)
ILL_CONDITIONED = Limit(
    "ill-conditioned",
    "warning",
    1.0,
    "damping over the round-off of the spectrum, 2 sqrt(d) eps times the largest eigenvalue, < 1",
    "what is below the round-off of F is divided by noise",
)
RESIDUAL = Limit(
    "residual",
    "warning",
    0.01,
    "relative residual of the inverse on random vectors > 0.01",
    "a hundredth of a step is rounding",
)
ASYMMETRY = Limit(
    "asymmetry",
    "warning",
    1e-3,
    "distance of a side from its transpose, over its length, > 0.001",
    "a second moment has none; bfloat16 rounds to 0.004",
)
NEGATIVE = Limit(
    "negative-mass",
    "warning",
    0.01,
    "share of negative eigenvalues > 0.01",
    "a second moment has none beyond round-off",
)
DEFICIENT = Limit(
    "rank-deficient",
    "info",
    0.5,
    "share of eigenvalues above round-off < 0.5",
    "in more than half of the directions the damping alone decides",
)
LABEL_NOISE = Limit(
    "label-noise",
    "warning",
    0.25,
    "standard error of the trace over the trace > 0.25",
    "two of them are half of the trace, and so of any damping or step that is read off it",
)
FEW_POSITIONS = Limit(
    "few-positions",
    "info",
    1.0,
    "positions behind a factor for each row of its larger side < 1",
    "the factors are singular, and in the rest the damping decides",
)
SCALE = Limit(
    "wrong-scale",
    "warning",
    1.5,
    "measured over predicted KL along random directions, or its inverse, > 1.5 and two standard errors",
    "a factor of two, of a reduction or of a half that is missing, lies beyond",
)
UNDERPREDICTED = Limit(
    "kl-underpredicted",
    "warning",
    3.0,
    "measured KL of the update over 1/2 u^T (F + lambda) u > 3",
    "the damping no longer makes up for what F lacks, and a step is 1.7 times too long or more",
)
NOT_QUADRATIC = Limit(
    "not-quadratic",
    "info",
    0.3,
    "relative change of measured over predicted KL between half a short step and all of it > 0.3",
    "the second order does not describe even a step of 1e-5 nats",
)
CONCENTRATED = Limit(
    "kl-concentrated",
    "info",
    0.9,
    "share of one of four layers or more in the KL of the update > 0.9",
    "a trust region shortens all for the sake of one",
)
LARGE_STEP = Limit(
    "large-step",
    "warning",
    0.3,
    "in training: share of the weights' length that a step moves > 0.3",
    "a few such steps, and nothing is left of what the layer was; plain training moves about a thousandth",
)
DISPROPORTIONATE = Limit(
    "disproportionate",
    "info",
    10.0,
    "update over weights, over the median of four layers or more > 10",
    "no one learning rate suits this layer and the others",
)
EKFAC = Limit(
    "ekfac-better",
    "info",
    0.7,
    "error of 'ekfac' over that of 'kfac' < 0.7, by two standard errors",
    "a third less error is worth the bases that it keeps",
)
INDEPENDENCE = Limit(
    "independence-gap",
    "info",
    1.5,
    "trace of 'kfac' over the exact one, or its inverse, > 1.5, by two standard errors",
    "the layer's damping and steps are off by this factor",
)
EMPIRICAL = Limit(
    "empirical-differs",
    "info",
    0.1,
    "trace of the empirical over the conditional Fisher < 0.1",
    "steps by the empirical Fisher would be ten times as long",
)
SURPRISED = Limit(
    "labels-surprise",
    "warning",
    3.0,
    "trace of the empirical over the conditional Fisher > 3",
    "the data's labels are three times as far from what the model says as it expects",
)
STALE = Limit(
    "stale",
    "warning",
    0.9,
    "cosine of updates by the inverse in use and by a fresh one < 0.9",
    "26 degrees: a good part of each step is of another time",
)
DRIFTED = Limit(
    "drifted",
    "info",
    0.5,
    "share of a side off its diagonal in the basis in use > 0.5",
    "the basis is no longer that of the factors",
)
FAILED = Limit("failed", "warning", 0, "factorisations in a row that failed > 0", "an older inverse stands in")
SKIPPED = Limit(
    "skipped-captures", "warning", 0, "captures left out since the last reading > 0", "their statistics were not finite"
)
SMALL_BATCH = Limit(
    "small-batch",
    "info",
    0.1,
    "squared signal over squared noise of a batch's gradient < 0.1",
    "nine tenths and more of a step are the luck of the batch",
)
COUPLED = Limit(
    "coupled-layers",
    "info",
    0.5,
    "share of the squared norm of F outside the layers' blocks > 0.5, by two standard errors",
    "what a block-diagonal F leaves out is more than what it has",
)
APART = Limit(
    "layers-apart",
    "info",
    100.0,
    "largest over smallest of the dampings that the layers call for > 100",
    "one damping is then too large for some, or too small for others",
)

LIMITS: tuple[Limit, ...] = tuple(value for value in dict(vars()).values() if isinstance(value, Limit))
"""All of them, in the order above."""
