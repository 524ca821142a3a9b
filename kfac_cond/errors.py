"""The errors of the library: one base, few kinds, each message with what to do.

A message says which layer or argument is meant, what was found, what was expected and what to change. Whatever raised
one has left parameters and gradients as they were.
"""

from __future__ import annotations


class KFACError(Exception):
    """Base of every error this library raises on purpose."""


class ArgumentError(KFACError, ValueError):
    """An argument is out of its range, of the wrong kind, or contradicts another."""


class LikelihoodError(KFACError, ValueError):
    """A likelihood, criterion, output or label does not fit the others."""


class CoverageError(KFACError, ValueError):
    """A model, layer or parameter that cannot be covered as asked."""


class CaptureError(KFACError, RuntimeError):
    """What was heard of the forward and the loss does not allow a capture."""


class AttachError(KFACError, RuntimeError):
    """An optimizer and a preconditioner that do not fit together."""


class NotReadyError(KFACError, RuntimeError):
    """A result was asked for before anything was captured."""


class ModelChangedError(KFACError, RuntimeError):
    """The model is no longer the one that was wrapped."""


class NumericalError(KFACError, ArithmeticError):
    """Statistics that are not finite, or a factorisation that failed for good."""


class StateError(KFACError, ValueError):
    """A saved state that does not belong to this model, or is not one of ours."""


class RankError(KFACError, RuntimeError):
    """The ranks of a run could not go on together."""
