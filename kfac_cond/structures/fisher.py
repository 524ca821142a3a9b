"""The Fisher of a whole model: a mapping from layer name to block, and one block-diagonal matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import reduce
from math import prod
from numbers import Real
from os import PathLike
from typing import Any, TypeVar, cast

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn

from ..errors import ArgumentError
from ..linalg.kronecker import block_diagonal
from .base import Block, Rule, checked_factor, named, require_dense
from .iterative import Iteration
from .merging import merged
from .report import fisher_table
from .sampling import Groups, SamplingError, sampling_error
from .storage import load_blocks, save_blocks

Form = TypeVar("Form", Tensor, Mapping[str, Tensor], list[Tensor], tuple[Tensor, ...])
AnyForm = Tensor | Mapping[str, Tensor] | list[Tensor] | tuple[Tensor, ...]


class Fisher(Mapping[str, Block]):
    """A block-diagonal matrix F over all its layers, per loss term (DESIGN scale: the Fisher of the user's loss).

    A vector v is a mapping of exactly ``parameter_names`` to tensors, a list or tuple of tensors in that order, or one
    flat tensor, the parameters in that order, each flattened, as ``torch.nn.utils.parameters_to_vector`` does. Results
    come in the form that was given.

    Args:
        blocks: layer name -> block, in the order of the model's layers.
        meta: how it was estimated: likelihood, kind, structure, samples, counts, dtype.
        groups: what groups of the label draws give by themselves, for ``sampling_error``.

    Raises:
        ArgumentError: where there is no block, or a parameter is in two of them.
    """

    __array_ufunc__ = None

    def __init__(self, blocks: Mapping[str, Block], *, meta: Mapping[str, Any], groups: Groups = ()) -> None:
        if not blocks:
            raise ArgumentError("a Fisher of no layers: expected at least one block")
        self._blocks = dict(blocks)
        self.meta = dict(meta)
        self._groups = tuple(groups)
        self.parameter_names: tuple[str, ...] = tuple(n for block in blocks.values() for n in block.layout.names)
        twice = sorted({name for name in self.parameter_names if self.parameter_names.count(name) > 1})
        if twice:
            raise ArgumentError(f"{', '.join(twice)} in more than one block: expected each parameter in one")
        self._shapes = {name: s for block in blocks.values() for name, s in block.layout.shapes.items()}

    def __getitem__(self, layer: str) -> Block:
        try:
            return self._blocks[layer]
        except KeyError:
            near = get_close_matches(str(layer), self._blocks, n=3) or list(self._blocks)[:3]
            raise KeyError(f"no layer '{layer}' among {len(self)}; did you mean {', '.join(near)}?") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P), P the number of parameters."""
        size = sum(block.layout.numel for block in self._blocks.values())
        return (size, size)

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of the blocks."""
        return reduce(torch.promote_types, (block.dtype for block in self._blocks.values()))

    @property
    def device(self) -> torch.device:
        """The device of the first block, where scalars are summed."""
        return next(iter(self._blocks.values())).device

    def matvec(self, v: Form) -> Form:
        """F v; raises ArgumentError where v has none of the three forms."""
        return self._in_form(v, lambda block, part: block.matvec(part))

    def __matmul__(self, v: Form) -> Form:
        """F v."""
        return self.matvec(v)

    def solve(self, v: Form, *, damping: float = 0.0, rule: Rule = "exact") -> Form:
        """(F + damping I)^-1 v; the rule and the errors are those of ``Block.solve``."""
        return self._in_form(v, lambda block, part: block.solve(part, damping=damping, rule=rule))

    def inverse(self, *, damping: float = 0.0, rule: Rule = "exact") -> Fisher:
        """(F + damping I)^-1, block by block."""
        return self._derived(
            f"inverse(damping={damping}, rule={rule!r})", lambda b: b.inverse(damping=damping, rule=rule)
        )

    def sqrt(self) -> Fisher:
        """F^1/2, block by block."""
        return self._derived("sqrt()", lambda block: block.sqrt())

    def inverse_sqrt(self, *, damping: float = 0.0) -> Fisher:
        """(F + damping I)^-1/2, block by block."""
        return self._derived(f"inverse_sqrt(damping={damping})", lambda block: block.inverse_sqrt(damping=damping))

    def to(self, target: torch.device | torch.dtype | str) -> Fisher:
        """The same Fisher on another device or in another dtype."""
        groups = [(share, {name: block.to(target) for name, block in of.items()}) for share, of in self._groups]
        return Fisher({name: block.to(target) for name, block in self.items()}, meta=self.meta, groups=groups)

    def with_iteration(self, iteration: Iteration) -> Fisher:
        """The same Fisher, whose iterative verbs (of implicit blocks, of sums, of their inverses) go as far as this."""
        blocks = {name: block.with_iteration(iteration) for name, block in self.items()}
        return Fisher(blocks, meta=self.meta, groups=self._groups)

    def __mul__(self, factor: float) -> Fisher:
        """factor F, for a number that is finite and not negative."""
        if not isinstance(factor, Real):
            return NotImplemented
        scale = checked_factor(float(factor))
        return self._derived(f"* {scale:g}", lambda block: block * scale)

    __rmul__ = __mul__

    def __add__(self, other: Fisher) -> Fisher:
        """The sum of two Fishers of the same layers, block by block.

        Raises:
            ArgumentError: other layers, or layers with other parameters.
        """
        if not isinstance(other, Fisher):
            return NotImplemented
        odd = [name for name in (*self, *other) if name not in self or name not in other]
        if odd:
            raise ArgumentError(
                f"Fishers are added: {', '.join(odd[:5])} in one of them only, expected the same layers"
            )
        shared = {key: value for key, value in self.meta.items() if key != "counts" and other.meta.get(key) == value}
        derived = (*self.meta.get("derived", ()), "+ another Fisher")
        return Fisher({name: self[name] + other[name] for name in self}, meta={**shared, "derived": derived})

    def merge(self, other: Fisher) -> Fisher:
        """The estimate over both pieces of data, from two estimates of one model over each of them.

        Exactly what one pass over all the data gives for Kronecker blocks: A weighted by positions, G by M, and in the
        universal form both of its moments by M. Any other block becomes the sum weighted by M, which is exact as a
        matrix. A layer that one of them lacks was not used there and adds nothing, while M counts.

        Args:
            other: of the same likelihood, kind and structure, with counts in its ``meta``.

        Raises:
            ArgumentError: where these differ, or counts are absent: it names them.
        """
        blocks, meta = merged(self, self.meta, other, other.meta)
        return Fisher(blocks, meta=meta)

    def sampling_error(self) -> SamplingError:
        """Standard errors of each layer's trace and top eigenvalue, and how many draws a given precision needs.

        Of the drawing of labels alone: the inputs are taken as given. From the spread of up to eight groups of draws,
        so they have few degrees of freedom, which ``Estimated.interval`` takes into account. Of an estimate as
        ``kc.estimate`` gives it: groups of draws are not saved, added or merged.

        Raises:
            ArgumentError: an estimate without label draws, or with one draw only.

        Examples:
            >>> import torch, kfac_cond as kc
            >>> fisher = kc.estimate(torch.nn.Linear(3, 2), [torch.randn(8, 3)], "categorical", samples=8)
            >>> error = fisher.sampling_error()[""].trace
            >>> low, high = error.interval(0.95)
            >>> low < error.value < high
            True
        """
        if not self._groups:
            kind, draws = self.meta.get("kind"), self.meta.get("samples")
            if "derived" in self.meta:
                why = f"this one is {self.meta['derived'][-1]} of an estimate"
            elif kind == "sampled" and draws != 1:
                why = "this one does not hold its draws apart (it was merged, or read from a file)"
            else:
                why = f"this one is of kind {kind!r} with samples={draws}"
            raise ArgumentError(
                f"sampling_error needs an estimate from at least two drawn labels a term, as kc.estimate gives it, and "
                f"{why}: kc.estimate(..., kind='sampled', samples=8)"
            )
        return sampling_error(self._blocks, self._groups, int(self.meta["samples"]))

    def save(self, path: str | PathLike[str]) -> None:
        """Write this Fisher to one safetensors file with a JSON header, all of it or nothing.

        Args:
            path: of the file; one that is there is replaced in one step.

        Raises:
            ArgumentError: a block known by its products alone (an implicit one, a function of a sum): it says what to
                do instead.
            OSError: the file could not be written, say on a full disk; one that was there is left.
            ImportError: without ``safetensors``, with what to install.
        """
        save_blocks(path, self._blocks, self.meta)

    @classmethod
    def load(cls, path: str | PathLike[str], model: nn.Module | None = None) -> Fisher:
        """A Fisher that ``save`` wrote, bitwise, on the CPU; numbers of ``meta`` that were tensors are plain numbers.

        Args:
            path: of the file.
            model: refuse a file whose parameters are not this model's, by name and shape.

        Raises:
            StateError: a truncated, damaged or foreign file, an unknown version, or another model's: it says which.
            FileNotFoundError: no such file.
            ImportError: without ``safetensors``, with what to install.
        """
        blocks, meta = load_blocks(path, model)
        return cls(blocks, meta=meta)

    def trace(self) -> Tensor:
        """tr F."""
        return self._gathered([block.trace() for block in self.values()]).sum()

    def logdet(self, *, damping: float = 0.0) -> Tensor:
        """log det(F + damping I); raises NumericalError where that matrix is singular."""
        return self._gathered([block.logdet(damping=damping) for block in self.values()]).sum()

    def frobenius_norm(self) -> Tensor:
        """The root of the sum of all squared entries of F."""
        norm: Tensor = torch.linalg.vector_norm(self._gathered([block.frobenius_norm() for block in self.values()]))
        return norm

    def eigenvalues(self) -> Tensor:
        """All P eigenvalues of F, descending."""
        return torch.sort(self._gathered([block.eigenvalues() for block in self.values()]), descending=True)[0]

    def top_eigenpairs(self, k: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The k largest eigenvalues [k], descending, and their unit eigenvectors: name -> [k, *shape of the parameter].

        An eigenvector lives in one layer; it is zero in the others.
        """
        if not 1 <= k <= self.shape[0]:
            raise ArgumentError(f"asked for {k} eigenpairs, expected 1 to {self.shape[0]}")
        pairs = [block.top_eigenpairs(min(k, block.layout.numel)) for block in self.values()]
        values, chosen = self._gathered([pair[0] for pair in pairs]).topk(k)
        vectors: dict[str, Tensor] = {}
        start = 0
        for block, (found, matrices) in zip(self.values(), pairs, strict=True):
            index = chosen.to(found.device) - start
            mine = (index >= 0) & (index < len(found))
            selected = matrices[index.clamp(0, len(found) - 1)]
            selected = selected * mine.reshape(-1, *[1] * (selected.dim() - 1))
            vectors.update(named(block.layout, selected))
            start += len(found)
        return values, vectors

    def diagonal(self) -> dict[str, Tensor]:
        """The diagonal of F: name -> a tensor of the parameter's shape."""
        diagonal: dict[str, Tensor] = {}
        for block in self.values():
            diagonal.update(named(block.layout, block.diagonal()))
        return diagonal

    def quadratic(self, v: AnyForm) -> Tensor:
        """v^T F v, a scalar; twice the KL divergence of a step v, to second order."""
        return self._gathered([block.quadratic(part) for block, part in self._parts(v)]).sum()

    def kl(self, v: AnyForm) -> Tensor:
        """v^T F v / 2: the KL divergence per loss term of a step v, to second order."""
        return 0.5 * self.quadratic(v)

    def sample(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """n Gaussian vectors of mean 0 and covariance F: name -> [n, *shape of the parameter]."""
        samples: dict[str, Tensor] = {}
        for block in self.values():
            samples.update(named(block.layout, block.sample(n, generator)))
        return samples

    def to_dense(self) -> Tensor:
        """F as a (P x P) tensor in the order of a flat vector; raises ArgumentError where P is too large for that."""
        size = self.shape[0]
        require_dense(size, f"a Fisher of {len(self)} layers")
        dense = block_diagonal([block.to_dense().to(self.device, self.dtype) for block in self.values()])
        # Where in the blocks' own order, row by row with the bias as a column, each entry of a flat vector is.
        order = torch.empty(size, dtype=torch.int64, device=self.device)
        start = at = 0
        for block in self.values():
            own = torch.arange(start, start + block.layout.numel, device=self.device).reshape(block.layout.matrix_shape)
            for index in block.layout.from_matrix(own).values():
                order[at : at + index.numel()] = index.flatten()
                at += index.numel()
            start += block.layout.numel
        return dense[order][:, order]

    def to_scipy(self) -> LinearOperator:
        """F as a linear operator on flat float64 vectors, for ``eigsh``, ``cg`` and the like."""

        def product(x: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
            flat = torch.tensor(x.reshape(-1)).to(self.device, self.dtype)
            result: np.ndarray[Any, np.dtype[Any]] = self.matvec(flat).cpu().to(torch.float64).numpy()
            return result

        return LinearOperator(self.shape, matvec=product, rmatvec=product, dtype=np.float64)

    def __repr__(self) -> str:
        return fisher_table(self._blocks, self.meta)

    def _derived(self, verb: str, function: Callable[[Block], Block]) -> Fisher:
        """A function of every block; ``meta["derived"]`` says which, in order."""
        blocks = {name: function(block) for name, block in self.items()}
        return Fisher(blocks, meta={**self.meta, "derived": (*self.meta.get("derived", ()), verb)})

    def _gathered(self, values: Sequence[Tensor]) -> Tensor:
        """One vector of what the blocks gave, on one device, whichever the blocks are on."""
        return torch.cat([value.reshape(-1).to(self.device, self.dtype) for value in values])

    def _in_form(self, v: Form, function: Callable[[Block, Mapping[str, Tensor]], Mapping[str, Tensor]]) -> Form:
        """A function of each block and its part of the vector, its results in the form of the vector."""
        results: dict[str, Tensor] = {}
        for block, part in self._parts(v):
            results.update(function(block, part))
        if isinstance(v, Tensor):
            return torch.cat([results[name].flatten().to(v.device) for name in self.parameter_names])
        # A mapping gives a dict, a list a list, a tuple a tuple: more than the type checker follows.
        result: Any = results
        if not isinstance(v, Mapping):
            ordered = [results[name] for name in self.parameter_names]
            result = ordered if isinstance(v, list) else tuple(ordered)
        return cast("Form", result)

    def _parts(self, v: AnyForm) -> list[tuple[Block, dict[str, Tensor]]]:
        """Each block with its named part of a vector in any form."""
        tensors = self._by_name(v)
        return [(block, {name: tensors[name] for name in block.layout.names}) for block in self.values()]

    def _by_name(self, v: AnyForm) -> Mapping[str, Tensor]:
        """A vector in any form as a mapping of exactly the parameter names."""
        if isinstance(v, Mapping):
            missing = [name for name in self.parameter_names if name not in v]
            extra = [name for name in v if name not in self._shapes]
            if missing or extra:
                raise ArgumentError(
                    "expected exactly the tensors of parameter_names: "
                    + "; ".join(f"{what} {', '.join(n)}" for what, n in (("missing", missing), ("unknown", extra)) if n)
                )
            return v
        if isinstance(v, Tensor):
            if tuple(v.shape) != self.shape[:1]:
                raise ArgumentError(
                    f"got a tensor of shape {tuple(v.shape)}, expected a flat one of shape {self.shape[:1]}, "
                    "or a mapping, or a list in the order of parameter_names"
                )
            pieces = torch.split(v, [prod(shape) for shape in self._shapes.values()])
            tensors = {n: p.reshape(s) for p, (n, s) in zip(pieces, self._shapes.items(), strict=True)}
            # A flat vector is on one device whatever the blocks are on.
            return {n: tensors[n].to(block.device) for block in self.values() for n in block.layout.names}
        if len(v) != len(self.parameter_names):
            raise ArgumentError(
                f"got {len(v)} tensors, expected {len(self.parameter_names)}: one of each parameter_names"
            )
        return dict(zip(self.parameter_names, v, strict=True))
