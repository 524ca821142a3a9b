"""What rarely changes from one estimate to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from .checks import check_seed, described, is_whole, settings_of
from .data import Data
from .errors import ArgumentError

Kind = Literal["sampled", "exact", "empirical", "forward_only"]
KINDS = ("sampled", "exact", "empirical", "forward_only")
Batches = Iterable[Any] | Callable[[], Iterable[Any]]


@dataclass(frozen=True)
class Options:
    """What rarely changes from one estimate to the next.

    Args:
        layers: pattern or patterns (``fnmatch``) of the layers wanted; None for all.
        rules: settings by layer-name pattern, {pattern: dict(sharing=, exclude=, structure=)}; ``structure``
            is for structure='mixed'.
        seed: seed of the label draws; None takes ``torch.initial_seed()``.
        draws: labels in place of the sampled ones: for each batch a sequence of label tensors, one a draw.
        second_pass: go through the data twice, where 'ekfac' would keep a and g of all of them. They must give the
            same batches again, in the same order: no iterator, and nothing that shuffles.
        rank: number of eigenpairs of structure='low_rank'; None for 10, or all where there are fewer.
        progress: show a progress bar for the pass of stored structures; None shows it on a terminal.
        data: where to find masks, positions and outputs in a batch.
    """

    layers: str | Sequence[str] | None = None
    rules: Mapping[str, Mapping[str, Any]] | None = None
    seed: int | None = None
    draws: Iterable[Sequence[Tensor]] | None = None
    second_pass: bool = False
    rank: int | None = None
    progress: bool | None = None
    data: Data | None = None

    def __post_init__(self) -> None:
        patterns = [self.layers] if isinstance(self.layers, str) else self.layers
        fits = isinstance(patterns, Sequence) and all(isinstance(one, str) for one in patterns)
        if not (patterns is None or fits):
            raise ArgumentError(f"Options(layers={self.layers!r}): expected a pattern, a list of patterns, or None")
        check_seed(self.seed, "Options")
        if not (self.draws is None or isinstance(self.draws, Iterable)):
            raise ArgumentError(
                f"Options(draws=...) is {described(self.draws)}: expected a list of label tensors for each batch"
            )
        if self.rank is not None and not (is_whole(self.rank) and self.rank >= 1):
            raise ArgumentError(f"Options(rank={self.rank!r}): expected a whole number >= 1, or None for 10")
        if self.progress not in (None, True, False):
            raise ArgumentError(f"Options(progress={self.progress!r}): expected True, False, or None for a terminal")
        settings_of(self.data, Data, "Options.data")
