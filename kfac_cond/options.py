"""What is asked of an estimate: the arguments of ``kc.estimate``, and what rarely changes from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checks import check_seed, described, is_size, is_whole, settings_of
from .data import Data
from .errors import ArgumentError
from .likelihoods import Likelihood, Product

Kind = Literal["sampled", "exact", "empirical", "forward_only"]
KINDS = ("sampled", "exact", "empirical", "forward_only")
Batches = Iterable[Any] | Callable[[], Iterable[Any]]


@dataclass(frozen=True)
class Structure:
    """What blocks are stored as, where the word alone does not say enough.

    Args:
        name: the word.
        second_pass: of 'ekfac': go through the data twice, in place of keeping a and g of all of them. They must give
            the same batches again, in the same order: no iterator, and nothing that shuffles.
        rank: of 'low_rank': number of eigenpairs; None for 10, or all where there are fewer.
    """

    name: str
    second_pass: bool = False
    rank: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ArgumentError(f"Structure({self.name!r}): expected the name of a structure")
        if self.second_pass not in (True, False):
            raise ArgumentError(f"Structure(second_pass={self.second_pass!r}): expected True or False")
        if self.second_pass and self.name not in ("ekfac", "mixed"):
            raise ArgumentError(f"Structure('{self.name}', second_pass=True): only 'ekfac' has use for a second pass")
        if self.rank is not None and not (is_whole(self.rank) and self.rank >= 1):
            raise ArgumentError(f"Structure(rank={self.rank!r}): expected a whole number >= 1, or None for 10")
        if self.rank is not None and self.name != "low_rank":
            raise ArgumentError(f"Structure('{self.name}', rank={self.rank}): only 'low_rank' has a rank")


@dataclass(frozen=True)
class Options:
    """What rarely changes from one estimate to the next.

    Args:
        layers: pattern or patterns (``fnmatch``) of the layers wanted; None for all.
        max_factor_dim: size of the largest side of a Kronecker product that is kept whole; a larger one is kept as its
            diagonal. A layer's rule goes before it; None takes 16 384.
        seed: seed of the label draws; None takes ``torch.initial_seed()``.
        draws: labels in place of the sampled ones: for each batch a sequence of label tensors, one a draw (of mappings
            by head for a ``kc.Product``).
        dtype: of the statistics, torch.float32 or torch.float64; that of the model where it is wider.
        progress: show a progress bar for the pass of stored structures; None shows it on a terminal.
        partial: path of a file in which the estimate notes how far it got, between batches. Where it is there, the same
            call goes on from it, to bitwise the same result; it is gone once the estimate is complete.
        data: where to find masks, positions and outputs in a batch.
        held_out: batches that the Fisher does not come from, on which ``kc.inspect`` measures as well what the Fisher
            predicts; an estimate has no use for them, and refuses them.
    """

    layers: str | Sequence[str] | None = None
    max_factor_dim: int | None = None
    seed: int | None = None
    draws: Iterable[Sequence[Any]] | None = None
    dtype: torch.dtype = torch.float32
    progress: bool | None = None
    partial: str | PathLike[str] | None = None
    data: Data | None = None
    held_out: Batches | None = None

    def __post_init__(self) -> None:
        patterns = [self.layers] if isinstance(self.layers, str) else self.layers
        fits = isinstance(patterns, Sequence) and all(isinstance(one, str) for one in patterns)
        if not (patterns is None or fits):
            raise ArgumentError(f"Options(layers={self.layers!r}): expected a pattern, a list of patterns, or None")
        if not (self.max_factor_dim is None or is_size(self.max_factor_dim)):
            raise ArgumentError(
                f"Options(max_factor_dim={self.max_factor_dim!r}): expected a whole number >= 1, or None"
            )
        check_seed(self.seed, "Options")
        if not (self.draws is None or (isinstance(self.draws, Iterable) and not isinstance(self.draws, Tensor))):
            raise ArgumentError(
                f"Options(draws=...) is {described(self.draws)}: expected a list of label tensors for each batch"
            )
        if self.dtype not in (torch.float32, torch.float64):
            raise ArgumentError(f"Options(dtype={self.dtype!r}): expected torch.float32 or torch.float64")
        if self.progress not in (None, True, False):
            raise ArgumentError(f"Options(progress={self.progress!r}): expected True, False, or None for a terminal")
        if not (self.partial is None or isinstance(self.partial, str | PathLike)):
            raise ArgumentError(f"Options(partial={self.partial!r}): expected the path of a file, or None")
        settings_of(self.data, Data, "Options.data")


@dataclass(frozen=True, eq=False)
class Request:
    """What one call of ``kc.estimate`` asks for, whatever the structures are.

    Args:
        model, data, likelihood, kind, samples, rules, options: as given, seen to fit.
    """

    model: nn.Module
    data: Batches
    likelihood: Likelihood | Product
    kind: Kind
    samples: int
    rules: Mapping[str, Mapping[str, Any]]
    options: Options

    def __post_init__(self) -> None:
        if self.options.held_out is not None:
            raise ArgumentError("Options(held_out=...) means nothing to an estimate: it is for kc.inspect")
