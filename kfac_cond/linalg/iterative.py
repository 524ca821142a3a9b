"""Iterative methods for a symmetric positive semi-definite matrix that is known by its products alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import sqrt

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""Rows [k, n] to rows [k, n]: each times the matrix."""
Function = Callable[[Tensor], Tensor]
"""A function of eigenvalues, elementwise."""


def conjugate_gradients(
    product: Product,
    right: Tensor,
    *,
    tolerance: float,
    limit: int,
    precondition: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, float]:
    """Solve with the matrix; synchronises with the device at every step.

    Args:
        product: of a positive definite matrix, or of a semi-definite one whose range holds ``right``.
        right: [n].
        tolerance: residual at which to stop, relative to the norm of ``right``.
        limit: most steps.
        precondition: a product [n] to [n] with something near the inverse, positive definite; None for the identity.

    Returns:
        (solution [n], relative residual reached): above the tolerance where the limit or a singular direction was met.

    Source: Hestenes & Stiefel 1952, J. Res. Natl. Bur. Stand. 49(6).
    """
    apply = precondition or _same
    x, r = torch.zeros_like(right), right.clone()
    size = start = sqrt(float(r @ r))
    if start == 0.0:
        return x, 0.0
    p = z = apply(r)
    rho = float(r @ z)
    for _ in range(limit):
        if size <= tolerance * start:
            break
        q = product(p.unsqueeze(0))[0]
        curvature = float(p @ q)
        if not curvature > 0.0:
            break
        step = rho / curvature
        x, r = x + step * p, r - step * q
        z = apply(r)
        before, rho, size = rho, float(r @ z), sqrt(float(r @ r))
        p = z + (rho / before) * p
    return x, size / start


def _same(x: Tensor) -> Tensor:
    return x


def lanczos(product: Product, start: Tensor, limit: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Krylov spaces of growing size with an orthonormal basis; every step costs one product and keeps one vector.

    Args:
        product: of the matrix.
        start: [n], not zero; the first row of the basis is its direction.
        limit: most steps.

    Yields:
        (basis [m, n]; the matrix in it, [m, m], tridiagonal; whether the space is invariant, after which no more come).

    Source: Lanczos 1950; full reorthogonalisation as in Golub & Van Loan, Matrix Computations, section 10.3.
    """
    basis = (start / torch.linalg.vector_norm(start)).unsqueeze(0)
    inner = start.new_zeros(0, 0)
    coupling = 0.0
    for size in range(1, min(limit, len(start)) + 1):
        image = product(basis[-1:])[0]
        grown = inner.new_zeros(size, size)
        grown[:-1, :-1] = inner
        if size > 1:
            grown[-1, -2] = grown[-2, -1] = coupling
        grown[-1, -1] = basis[-1] @ image
        inner = grown
        for _ in range(2):
            image = image - (basis @ image) @ basis
        coupling = float(torch.linalg.vector_norm(image))
        scale = float(torch.linalg.matrix_norm(inner))
        done = size == len(start) or coupling <= 10 * size * torch.finfo(start.dtype).eps * scale
        yield basis, inner, done
        if done:
            return
        basis = torch.cat([basis, (image / coupling).unsqueeze(0)])


def function_product(
    product: Product, function: Function, right: Tensor, *, tolerance: float, limit: int
) -> tuple[Tensor, float]:
    """f(matrix) times a vector.

    Args:
        product: of the matrix.
        function: of the eigenvalues; it is given those of the matrix in a Krylov space, not negative.
        right: [n].
        tolerance: change of the result at which to stop, relative to it.
        limit: most steps.

    Returns:
        (result [n], the last relative change).

    Source: Higham 2008, Functions of Matrices, section 13.2.
    """
    norm = torch.linalg.vector_norm(right)
    if float(norm) == 0.0:
        return torch.zeros_like(right), 0.0
    last, change = right.new_zeros(0), float("inf")
    result = torch.zeros_like(right)
    for basis, inner, done in lanczos(product, right, limit):
        values, vectors = torch.linalg.eigh(inner)
        coefficients = vectors @ (function(values.clamp(min=0)) * vectors[0])
        difference = coefficients.clone()
        difference[: len(last)] -= last
        before, last = change, coefficients
        change = float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(coefficients).clamp(min=1e-300))
        if done:
            change = 0.0
        # Twice in a row: a step that happens to change little is no convergence.
        result = last @ basis
        if done or max(before, change) <= tolerance:
            break
    return norm * result, change


def function_quadratic(product: Product, function: Function, right: Tensor, *, tolerance: float, limit: int) -> Tensor:
    """v^T f(matrix) v by Lanczos quadrature, 0-d; arguments as for ``function_product``.

    Source: Ubaru, Chen & Saad 2017, SIAM J. Matrix Anal. Appl. 38(4).
    """
    last = right.new_zeros(())
    before = float("inf")
    for _, inner, done in lanczos(product, right, limit):
        values, vectors = torch.linalg.eigh(inner)
        found = (function(values.clamp(min=0)) * vectors[0].square()).sum()
        change = float((found - last).abs() / found.abs().clamp(min=1e-300))
        last = found
        if done or max(before, change) <= tolerance:
            break
        before = change
    return last * (right @ right)


def top_eigenpairs(product: Product, start: Tensor, *, tolerance: float, limit: int) -> tuple[Tensor, Tensor, float]:
    """The largest eigenvalues and their eigenvectors, by block Krylov spaces with full reorthogonalisation.

    A block as wide as the number of pairs finds eigenvalues with their multiplicities, which a single vector does not.

    Args:
        product: of the matrix.
        start: [k, n], a random block; k pairs are sought.
        tolerance: residual ||F u - value u|| at which to stop, relative to the largest eigenvalue.
        limit: most rows of the basis; twice as many vectors are kept.

    Returns:
        (values [k], descending, not negative; vectors [k, n]; the largest relative residual).

    Source: Golub & Underwood 1977; Musco & Musco 2015 (arXiv:1504.05477) for the random block.
    """
    k, n = start.shape
    basis = torch.linalg.qr(start.mT)[0].mT.contiguous()
    images = product(basis)
    fresh = images
    while True:
        inner = basis @ images.mT
        values, rotation = torch.linalg.eigh((inner + inner.mT) / 2)
        values, rotation = values[-k:].flip(0), rotation[:, -k:].flip(1).mT
        vectors = rotation @ basis
        residuals = torch.linalg.vector_norm(rotation @ images - values.unsqueeze(1) * vectors, dim=1)
        scale = float(values[0])
        residual = float(residuals.max()) / scale if scale > 0.0 else 0.0
        fresh = _new_directions(fresh, basis, scale)[: max(0, min(limit, n) - len(basis))]
        if residual <= tolerance or len(fresh) == 0:
            return values.clamp(min=0), vectors, 0.0 if len(basis) == n else residual
        basis = torch.cat([basis, fresh])
        fresh = product(fresh)
        images = torch.cat([images, fresh])


def _new_directions(rows: Tensor, basis: Tensor, scale: float) -> Tensor:
    """An orthonormal basis of what rows add to a basis; round-off is not a direction."""
    for _ in range(2):
        rows = rows - (rows @ basis.mT) @ basis
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    directions = directions[sizes > 10 * len(basis) * torch.finfo(rows.dtype).eps * scale]
    directions = directions - (directions @ basis.mT) @ basis
    basis_of_new: Tensor = torch.linalg.qr(directions.mT)[0].mT.contiguous()
    return basis_of_new


def probes(count: int, like: Tensor, seed: int) -> Iterator[Tensor]:
    """Vectors z with E[z z^T] = I: random signs, or where ``count`` is n or more every scaled unit vector, exactly.

    Args:
        count: number of vectors.
        like: [n], for size, dtype and device.
        seed: of the signs, drawn on the CPU so that every device sees the same.

    Source: Hutchinson 1990, Commun. Stat. Simul. Comput. 19(2).
    """
    n = len(like)
    if count >= n:
        for index in range(n):
            unit = torch.zeros_like(like)
            unit[index] = sqrt(n)
            yield unit
        return
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield (torch.randint(0, 2, (n,), generator=generator) * 2 - 1).to(like)
