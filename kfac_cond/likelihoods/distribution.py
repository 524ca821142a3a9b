"""Likelihoods without a closed form: any torch distribution, and mixtures; drawn, and scored by autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from ..errors import LikelihoodError
from . import events
from .base import Likelihood, uniforms
from .quantiles import standard_normal
from .vectorwise import Vectorwise


class FromDistribution(Likelihood):
    """Any ``torch.distributions.Distribution`` of the outputs: drawn with its ``sample``, scored by autograd.

    There is no closed Fisher: ``kind='sampled'`` alone. The draws of an example depend on how the data are batched, and
    making a distribution's generator from a given one waits for the device once a draw.

    Args:
        make: from outputs (in float32 at least) to the distribution of the labels. Its log_prob is shaped as the terms,
            or further dimensions are summed over as parts of one term.
        event_dims: the dimensions of the outputs that parametrise one term, never 0. None: none of (N,), the last of
            (N, C), and more dimensions are refused.
        reduction: 'mean' over terms or 'sum'.
        divisor: M, where it is neither.

    Raises:
        LikelihoodError: ``make`` is not callable or returns something else, or the distribution cannot be sampled or
            scored, with the reason.

    Examples:
        >>> from torch.distributions import StudentT
        >>> likelihood = FromDistribution(lambda outputs: StudentT(4.0, outputs))
    """

    def __init__(
        self,
        make: Callable[[Tensor], Distribution],
        *,
        event_dims: tuple[int, ...] | None = None,
        reduction: str = "mean",
        divisor: float | None = None,
    ) -> None:
        super().__init__(reduction=reduction, divisor=divisor)
        if not callable(make) or isinstance(make, Distribution):
            raise LikelihoodError(
                f"FromDistribution({type(make).__name__}): expected a function from the outputs to a distribution, "
                f"such as lambda outputs: Normal(outputs, 1.0)."
            )
        self.make = make
        self.event_dims = event_dims

    @torch.no_grad()
    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Labels drawn with the distribution's own ``sample``."""
        self.check(outputs)
        distribution = self._distribution(events.widened(outputs))
        if generator is None:
            return self._sampled(distribution)
        # A distribution takes no generator: it draws from the global one, which is put back.
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        devices = [outputs.device] if outputs.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(seed))
            return self._sampled(distribution)

    def _sampled(self, distribution: Distribution) -> Tensor:
        try:
            return distribution.sample()
        except NotImplementedError as error:
            raise LikelihoodError(
                f"{self!r}: {type(distribution).__name__} cannot be sampled (it has no sample: "
                f"{error or 'not implemented'}), and a Fisher needs labels drawn from p. Pass a distribution with a "
                f"sample, or a class derived from kc.Likelihood with sample and score."
            ) from error

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The gradient of -log p by autograd, zero at invalid terms."""
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            value = -self.log_prob(leaf, labels).sum()
            if not value.requires_grad:
                raise LikelihoodError(f"{self!r}: log p does not depend on the outputs through differentiable steps.")
            (gradient,) = torch.autograd.grad(value, leaf)
        valid = self.valid(outputs)
        return gradient if valid is None else gradient.masked_fill(~self.spread(valid, outputs), 0.0)

    def log_prob(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """log p of each term, zero at invalid terms; differentiable in the outputs."""
        self.check(outputs)
        distribution = self._distribution(events.widened(outputs))
        try:
            values = distribution.log_prob(labels)
        except NotImplementedError as error:
            raise LikelihoodError(
                f"{self!r}: {type(distribution).__name__} has no log_prob, so its draws cannot be scored. Pass a "
                f"class derived from kc.Likelihood with sample and score."
            ) from error
        return self._zero_invalid(self._per_term(values, outputs), outputs)

    def kl_terms(self, outputs: Tensor, other: Tensor) -> Tensor:
        """The KL divergence of each term, where torch has it for this distribution."""
        self.check(outputs)
        self._check_same("other outputs", other, tuple(outputs.shape))
        ours, theirs = (self._distribution(events.widened(values)) for values in (outputs, other))
        try:
            values = kl_divergence(ours, theirs)
        except NotImplementedError as error:
            raise LikelihoodError(f"{self!r}: torch has no KL divergence of {type(ours).__name__}.") from error
        return self._zero_invalid(self._per_term(values, outputs), outputs)

    def _per_term(self, values: Tensor, outputs: Tensor) -> Tensor:
        """Values of the distribution's batch shape, summed to one a term."""
        axes = self.event_axes(outputs)
        terms = self._without(outputs, axes)
        if values.shape == outputs.shape:
            return events.to_events(values, axes).sum(-1)
        if tuple(values.shape[: len(terms)]) != terms:
            raise LikelihoodError(
                f"{self!r}: log p has shape {tuple(values.shape)}, expected that of the terms, {terms}, for outputs of "
                f"shape {tuple(outputs.shape)}: say with event_dims which dimensions parametrise one term."
            )
        return values.flatten(len(terms)).sum(-1) if values.ndim > len(terms) else values

    def _distribution(self, outputs: Tensor) -> Distribution:
        distribution = self.make(outputs)
        if not isinstance(distribution, Distribution):
            raise LikelihoodError(
                f"{self!r}: the function returned {type(distribution).__name__}, expected a torch Distribution."
            )
        return distribution

    def _settings(self) -> dict[str, Any]:
        return {} if self.event_dims is None else {"event_dims": self.event_dims}


class MixtureDensity(Vectorwise):
    """A mixture of K diagonal normals over D labels: outputs are K logits, K D means, then K D log-variances.

    Its Fisher has no closed form: sampled, with the score of the mixture by autograd.

    Args:
        components: K, a positive integer.
        dim: the dimension of the K (1 + 2 D) outputs, never 0; labels have D entries there.
        reduction: 'mean' over terms or 'sum'.
        divisor: M, where it is neither.

    Raises:
        LikelihoodError: components that are no positive integer, or outputs of a size that does not fit them.

    Source: Bishop 1994, Mixture density networks, equations 22 to 25.
    """

    def __init__(
        self, components: int, *, dim: int = -1, reduction: str = "mean", divisor: float | None = None
    ) -> None:
        super().__init__(dim=dim, reduction=reduction, divisor=divisor)
        if not isinstance(components, int) or isinstance(components, bool) or components < 1:
            raise LikelihoodError(f"MixtureDensity(components={components!r}): expected a positive integer.")
        self.components = components

    def check(self, outputs: Tensor) -> None:
        """Refuse outputs whose size along ``dim`` is not K (1 + 2 D)."""
        super().check(outputs)
        (size,) = self._event_sizes(outputs)
        each, rest = divmod(size, self.components)
        if rest or each % 2 == 0 or each < 3:
            raise LikelihoodError(
                f"{self!r}: outputs of shape {tuple(outputs.shape)} have {size} entries along dimension {self.dim}, "
                f"expected K (1 + 2 D) with K = {self.components}: logits, means and log-variances."
            )

    def _label_size(self, size: int) -> int:
        return (size // self.components - 1) // 2

    def _parts(self, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [..., K], means and log-variances [..., K, D]."""
        logits, rest = f[..., : self.components], f[..., self.components :]
        means, log_variances = rest.reshape(*rest.shape[:-1], 2, self.components, -1).unbind(-3)
        return logits, means, log_variances

    def _draw(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        logits, means, log_variances = self._parts(f)
        # All uniforms of a term lie together, so that the stream is that of the terms in order.
        u = uniforms((*f.shape[:-1], 1 + means.shape[-1]), f, generator)
        cdf = logits.softmax(-1).cumsum(-1)
        drawn = torch.searchsorted(cdf / cdf[..., -1:], u[..., :1].to(f.dtype).contiguous(), right=True)
        at = drawn.clamp_max(self.components - 1).unsqueeze(-1).expand(*f.shape[:-1], 1, means.shape[-1])
        mean, log_variance = (part.gather(-2, at).squeeze(-2) for part in (means, log_variances))
        return mean + (log_variance / 2).exp() * standard_normal(u[..., 1:], f.dtype)

    def _score(self, f: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = f.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(-self._log_prob(leaf, y).sum(), leaf)
        return gradient

    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        logits, means, log_variances = self._parts(f)
        squares = (y.unsqueeze(-2) - means).square() * (-log_variances).exp()
        normal = -0.5 * (squares + log_variances + math.log(2 * math.pi)).sum(-1)
        return (logits.log_softmax(-1) + normal).logsumexp(-1)

    def _settings(self) -> dict[str, Any]:
        return {"components": self.components, **super()._settings()}
