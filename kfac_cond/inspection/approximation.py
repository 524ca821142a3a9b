"""How far Kronecker-factored, eigen-corrected and diagonal blocks are from the exact block of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import checked_rules, is_whole, settings_of
from ..data import leading_dimension
from ..errors import ArgumentError
from ..estimate import estimate, limited
from ..heads import Distribution
from ..layers.layer import Layer
from ..layers.survey import survey
from ..linalg.inner import inner_products, squared_inner_products
from ..linalg.sides import Diagonal, Side, inner
from ..linalg.sparse import SparseRows
from ..options import Batches, Kind, Options, Request
from ..partial import Partial
from ..passes import Pass, checked_batches
from ..statistics import Statistics
from ..structures import Block, Fisher, KroneckerBlock, LayerByLayer
from ..structures.collectors import Pairs
from ..structures.diagonalised import DiagonalisedBlock
from ..structures.keeping import EigenCollector
from .requests import request_of

EXAMPLES = 512
"""Examples that are looked at, the first of the data: time grows with the square of their number."""
WORDS = ("kfac", "ekfac", "diagonal")


@dataclass(frozen=True)
class ApproximationError:
    """Relative errors |F - F'| / |F| in the Frobenius norm, of approximations F' against the exact block F of a layer.

    F is that of the examples looked at, (1/M) sum_n E[vec V_n vec V_n^T] with V_n one example's weight gradient; so are
    the F'. |F|^2 = (1/M^2) sum_nm E<V_n, V_m>^2 and <F, F'> come from inner products of gradients: no matrix has the
    side of vec V_n. From drawn labels, F and F' are estimated by each draw (or group of draws) alone, and only products
    of two different ones enter: then |F - F'|^2 and |F|^2 are unbiased, and the noise of drawing does not count as
    error. No unit. Cost: two forwards, two backwards a draw, then N^2 draws^2 (d_in + d_out) for one position.

    Args:
        kfac: the error of 'kfac'; 0 where the estimate of its square is negative. Where 'kfac' is no linear function of
            the moments (norms, and parameters by themselves), it is that of one draw.
        ekfac: that of 'ekfac' likewise, in the eigenbasis of as many other draws: one of the same would fit their
            noise, and seem too good.
        diagonal: that of 'diagonal' likewise.
        kfac_standard_error: of the error of 'kfac', by leaving out one draw at a time; 0 of the exact expectation, None
            of two draws.
        ekfac_standard_error: of that of 'ekfac' likewise.
        diagonal_standard_error: of that of 'diagonal' likewise.
        independence_gap: tr A tr G / ((1/M) sum_n E|V_n|^2), the trace of 'kfac' over the exact one: 1 where inputs and
            gradients are uncorrelated in size; less where the positions of an example add up.
        gap_standard_error: of it.
        norm: |F|, in the units of F.
        examples: that were looked at.

    Source: Martens & Grosse 2015 (arXiv:1503.05671), section 6.3.1 for the comparison; Quenouille 1956 (Biometrika 43)
    for the standard errors.
    """

    kfac: float
    ekfac: float
    diagonal: float
    independence_gap: float
    norm: float
    examples: int
    kfac_standard_error: float | None = None
    ekfac_standard_error: float | None = None
    diagonal_standard_error: float | None = None
    gap_standard_error: float | None = None


def passes(samples: int) -> float:
    """Forward-backwards over the examples looked at: twice a forward, and a backward to the layers for each draw."""
    return 2 * (1 + samples) / 3


def measure(
    model: nn.Module,
    data: Batches,
    likelihood: Distribution | str | nn.Module,
    fisher: Fisher,
    *,
    kind: Kind = "sampled",
    samples: int = 4,
    rules: Mapping[str, Mapping[str, Any]] | None = None,
    options: Options | None = None,
) -> dict[str, ApproximationError]:
    """The errors of approximations of each layer of a Fisher, over the first ``EXAMPLES`` examples of the data.

    Args:
        model, likelihood, options: as for ``kc.estimate``; labels are always drawn anew.
        data: batches that can be gone through twice; once for 'exact'.
        fisher: says which layers; its own blocks are not what is looked at.
        kind: 'sampled' or 'exact', the expectation over y; the latter takes a backward for each term and output.
        samples: label draws, 2 at least, of 'sampled'.
        rules: as for ``kc.estimate``, for how positions enter the factors.

    Raises:
        ArgumentError: a kind or number of draws of which there is no unbiased error, or a Fisher of other layers.
    """
    if kind not in ("sampled", "exact") or (kind == "sampled" and not (is_whole(samples) and samples >= 2)):
        raise ArgumentError(
            f"kind={kind!r}, samples={samples!r}: expected kind='exact', or 'sampled' with at least two draws, so that "
            f"each can be compared with the others"
        )
    chosen = replace(settings_of(options, Options, "options"), draws=None, dtype=_widest(model), partial=None)
    drawn = samples if kind == "sampled" else 1
    first = first_examples(data, EXAMPLES)
    request = request_of(model, first, likelihood, chosen, kind=kind, samples=drawn)
    request = replace(request, rules=checked_rules(rules))
    single = Pass(request, partial(_made, request, fisher, _bases(request) if kind == "sampled" else {}))
    total = single.run(Partial(None, {}))
    single.check_complete(total)
    return dict(_errors(single, total))


def first_examples(data: Batches, examples: int) -> Callable[[], Iterator[Any]]:
    """The first examples of data, whole batches and a part of one."""

    def batches() -> Iterator[Any]:
        left = examples
        for batch in checked_batches(data() if callable(data) else data):
            size = leading_dimension(batch)
            yield batch if size is None or size <= left else _part(batch, size, left)
            left -= size or 0
            if left <= 0:
                return

    return batches


class Keeping(LayerByLayer):
    """An estimate that keeps the pairs (a, g) beside what it makes of them.

    Args:
        layers: by name.
        word: what it is stored as.
    """

    def __init__(self, layers: Mapping[str, Layer], word: str) -> None:
        super().__init__(*_storage(layers, word), limits={name: one.max_factor_dim for name, one in layers.items()})
        #: By layer: activations, each with (g, weight, slot) of the scores that came back to them.
        self.kept: dict[str, list[tuple[Any, list[tuple[Tensor, float, int]]]]] = {}

    def take(self, pairs: Pairs, weight: float, slot: int) -> None:
        for name, (a, g) in pairs.items():
            kept = self.kept.setdefault(name, [])
            if not kept or kept[-1][0] is not a:
                kept.append((a, []))
            kept[-1][1].append((g, weight, slot))
        super().take(pairs, weight, slot)


def _bases(request: Request) -> Mapping[str, Block]:
    """G (x) A of other draws, and as many."""
    seed = request.options.seed
    other = (torch.initial_seed() if seed is None else seed) + 1
    options = replace(request.options, seed=other % 2**63, progress=False)
    return estimate(
        request.model,
        request.data,
        request.likelihood,
        kind=request.kind,
        samples=request.samples,
        rules=request.rules,
        options=options,
    )


def _made(
    request: Request, fisher: Fisher, bases: Mapping[str, Block], functional: frozenset[str]
) -> tuple[dict[str, Layer], list[LayerByLayer]]:
    """The layers of a Fisher, and what makes all approximations of them from the same gradients and keeps these."""
    found = survey(request.model, request.rules, functional=functional).layers
    limit = request.options.max_factor_dim
    layers = {name: limited(layer, limit) for name, layer in found.items() if name in fisher}
    if not layers:
        raise ArgumentError(
            f"the Fisher has {', '.join(list(fisher)[:3])}, none of which is a layer of "
            f"{type(request.model).__name__}: expected one of its layers, as 'kfac' has them"
        )
    limits = {name: layer.max_factor_dim for name, layer in layers.items()}
    keeping = Keeping(layers, "ekfac")
    for name, collector in keeping.collectors.items():
        if isinstance(collector, EigenCollector) and isinstance(basis := bases.get(name), KroneckerBlock):
            collector.look_again(basis)
    plain = {word: LayerByLayer(*_storage(layers, word), limits=limits) for word in ("kfac", "diagonal")}
    return layers, [plain["kfac"], keeping, plain["diagonal"]]


def _storage(layers: Mapping[str, Layer], word: str) -> tuple[dict[str, Any], dict[str, str]]:
    return {name: layer.layout for name, layer in layers.items()}, dict.fromkeys(layers, word)


def _errors(single: Pass, total: Statistics) -> Iterator[tuple[str, ApproximationError]]:
    slots, (_, keeping, _) = single.slots, single.stored
    assert isinstance(keeping, Keeping)
    # First of all draws: without a basis of others, eigenvalues of every group are in the basis of these.
    of_all = _blocks(single, total, None)
    groups = [_blocks(single, total, group) for group in range(slots.groups)] if slots.groups > 1 else [of_all]
    scales = {
        slot: (group, float(scale))
        for group in range(slots.groups)
        for slot, scale in slots.scales(total.divisor, group).items()
    }
    for name in of_all["kfac"]:
        rows = [
            (a, [(g, *_scaled(scales[slot], weight)) for g, weight, slot in of_a])
            for a, of_a in keeping.kept.get(name, [])
        ]
        if rows:
            yield name, _error(rows, [{word: of[word][name] for word in WORDS} for of in groups], total.examples)


def _blocks(single: Pass, total: Statistics, group: int | None) -> dict[str, dict[str, Block]]:
    """By structure and layer, of all draws or of a group of them."""
    factors, scales = single.factors(total, group), single.slots.scales(total.divisor, group)
    return {word: one.blocks(factors, scales) for word, one in zip(WORDS, single.stored, strict=True)}


def _scaled(place: tuple[int, float], weight: float) -> tuple[int, float]:
    group, scale = place
    return group, scale * weight


Rows = Sequence[tuple[Any, Sequence[tuple[Tensor, int, float]]]]
"""Activations, each with (g, group of draws, what its second moment is multiplied by in that group's F)."""


def _error(rows: Rows, groups: Sequence[Mapping[str, Block]], examples: int) -> ApproximationError:
    """The errors of one layer, from products of every group of draws with every other."""
    kronecker = [one["kfac"] for one in groups]
    exact = _exact_products(rows, len(groups))
    mixed = _mixed_products(rows, kronecker)
    squares = {"kfac": exact - mixed - mixed.T + _kronecker_products(kronecker)}
    for word in ("ekfac", "diagonal"):
        # Both have the diagonal of F in their basis, and nothing else: <F_i, F'_j> = <F'_i, F'_j>.
        values = torch.stack([_values(one[word]).flatten().double().cpu() for one in groups])
        squares[word] = exact - values @ values.T
    traces = torch.stack(
        [torch.stack([one[word].trace().double().cpu() for word in ("kfac", "ekfac")]) for one in groups]
    )
    numbers: dict[str, Any] = {"norm": max(_unbiased(exact, range(len(groups))), 0.0) ** 0.5, "examples": examples}
    for word, of_word in squares.items():
        value, error = _estimated(partial(_relative, of_word, exact), len(groups))
        numbers |= {word: max(value, 0.0) ** 0.5, f"{word}_standard_error": _of_root(value, error)}
    numbers["independence_gap"], numbers["gap_standard_error"] = _estimated(partial(_gap, traces), len(groups))
    return ApproximationError(**numbers)


def _exact_products(rows: Rows, groups: int) -> Tensor:
    """<F_i, F_j>, [groups, groups], float64 on the host."""
    found = torch.zeros(groups, groups, dtype=torch.float64)
    for index, (a, of_a) in enumerate(rows):
        g, at, scales = _stacked(of_a)
        for b, of_b in rows[index:]:
            h, there, theirs = _stacked(of_b)
            values = squared_inner_products(a, g, b, h).double().cpu() * scales[:, None] * theirs
            found.index_put_((at[:, None].expand_as(values), there.expand_as(values)), values, accumulate=True)
            if b is not a:
                found.index_put_(
                    (there[:, None].expand_as(values.T), at.expand_as(values.T)), values.T, accumulate=True
                )
    return found


def _stacked(of_a: Sequence[tuple[Tensor, int, float]]) -> tuple[Tensor, Tensor, Tensor]:
    g, groups, scales = zip(*of_a, strict=True)
    return torch.stack(g), torch.tensor(groups), torch.tensor(scales, dtype=torch.float64)


def _mixed_products(rows: Rows, blocks: Sequence[Block]) -> Tensor:
    """<F_i, G_j (x) A_j> = sum_n <V_n, G_j V_n A_j> over group i, [groups, groups]."""
    found = torch.zeros(len(blocks), len(blocks), dtype=torch.float64)
    for a, of_a in rows:
        before: tuple[Side, Any] | None = None
        for index, block in enumerate(blocks):
            A, G = _sides(block)
            if before is None or not _same(before[0], A):
                before = A, _times(a, A)
            for g, group, scale in of_a:
                found[group, index] += float(inner_products(a, g, before[1], _times(g, G))) * scale
    return found


def _kronecker_products(blocks: Sequence[Block]) -> Tensor:
    """<G_i (x) A_i, G_j (x) A_j>, [groups, groups]."""
    sides = [_sides(block) for block in blocks]
    rows = [[float((inner(A, B) * inner(G, H)).sum()) for B, H in sides] for A, G in sides]
    return torch.tensor(rows, dtype=torch.float64)


def _sides(block: Block) -> tuple[Side, Side]:
    assert isinstance(block, KroneckerBlock)
    return block.sides


def _values(block: Block) -> Tensor:
    assert isinstance(block, DiagonalisedBlock)
    return block.values


def _same(mine: Side, theirs: Side) -> bool:
    of_mine, of_theirs = (one.values if isinstance(one, Diagonal) else one for one in (mine, theirs))
    return torch.equal(of_mine, of_theirs)


def _times(x: Any, side: Side) -> Any:
    """Each row [..., n, s, d] of one half of the pairs times a side."""
    if isinstance(x, SparseRows):
        # Of indices the input side is always a diagonal.
        assert isinstance(side, Diagonal)
        return replace(x, values=x.values * side.values[x.columns])
    return x * side.values[..., None, None, :] if isinstance(side, Diagonal) else x @ side.unsqueeze(-3)


# Estimates from groups of draws --------------------------------------------------------------------------------------


def _unbiased(products: Tensor, keep: Sequence[int]) -> float:
    """The mean of the products of different groups; of one alone, the exact expectation, its own."""
    some = products[list(keep)][:, list(keep)]
    n = len(some)
    return float(some[0, 0]) if n == 1 else float(some.sum() - some.trace()) / (n * (n - 1))


def _relative(squares: Tensor, exact: Tensor, keep: Sequence[int]) -> float:
    return _quotient(_unbiased(squares, keep), _unbiased(exact, keep))


def _gap(traces: Tensor, keep: Sequence[int]) -> float:
    kronecker, exact = traces[list(keep)].sum(0).tolist()
    return _quotient(kronecker, exact)


def _quotient(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


def _estimated(number: Callable[[Sequence[int]], float], groups: int) -> tuple[float, float | None]:
    """A number from all groups, with its standard error by leaving out one at a time."""
    everything = list(range(groups))
    value = number(everything)
    if groups == 1:
        return value, 0.0
    if groups == 2:
        return value, None
    left = torch.tensor([number([k for k in everything if k != out]) for out in everything], dtype=torch.float64)
    return value, float(((left - left.mean()).square().sum() * (groups - 1) / groups).sqrt())


def _of_root(value: float, error: float | None) -> float | None:
    """The standard error of a root from that of its square; where the square is nothing, the root of that."""
    if error is None or error == 0.0:
        return error
    return error / (2 * sqrt(max(value, error)))


def _widest(model: nn.Module) -> torch.dtype:
    """float64 where the device has it: errors are differences of large numbers."""
    on_mps = any(parameter.device.type == "mps" for parameter in model.parameters())
    return torch.float32 if on_mps else torch.float64


def _part(value: Any, size: int, count: int) -> Any:
    """The first examples of a batch."""
    if isinstance(value, Tensor):
        return value[:count] if value.ndim and len(value) == size else value
    if isinstance(value, Mapping):
        return {key: _part(one, size, count) for key, one in value.items()}
    return type(value)(_part(one, size, count) for one in value) if type(value) in (list, tuple) else value
