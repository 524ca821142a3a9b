"""Brute force: the Fisher of small models straight from its definition, and checks that print ratios."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from kfac_cond.layers import WeightLayout

LogProb = Callable[[Tensor, Tensor], Tensor]


def categorical_log_prob(outputs: Tensor, labels: Tensor) -> Tensor:
    """Sum of log p over all terms of (..., C) logits."""
    return torch.log_softmax(outputs, -1).gather(-1, labels[..., None]).sum()


def bernoulli_log_prob(outputs: Tensor, labels: Tensor) -> Tensor:
    return -nn.functional.binary_cross_entropy_with_logits(outputs, labels, reduction="sum")


def gaussian_log_prob(outputs: Tensor, labels: Tensor, variance: float = 1.0) -> Tensor:
    return -((outputs - labels) ** 2).sum() / (2 * variance)


def example_gradients(
    model: nn.Module, inputs: Tensor, labels: Tensor, log_prob: LogProb, parameters: Sequence[Tensor]
) -> Tensor:
    """[N, P]: the gradient of each example's -log p (its terms summed), one example at a time."""
    rows = []
    for x, y in zip(inputs, labels, strict=True):
        loss = -log_prob(model(x[None]), y[None])
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for g, p in zip(gradients, parameters, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def fisher_of_draws(
    model: nn.Module,
    inputs: Tensor,
    draws: Iterable[Tensor],
    log_prob: LogProb,
    *,
    parameters: Sequence[Tensor],
    divisor: float,
) -> Tensor:
    """(1/M) sum_n mean over draws of the outer product of example n's gradient: the definition, for given labels."""
    blocks = []
    for labels in draws:
        rows = example_gradients(model, inputs, labels, log_prob, parameters)
        blocks.append(rows.T @ rows / divisor)
    return torch.stack(blocks).mean(0)


def exact_fisher(
    model: nn.Module,
    inputs: Tensor,
    output_fisher: Callable[[Tensor], Tensor],
    *,
    parameters: Sequence[Tensor],
    divisor: float,
) -> Tensor:
    """(1/M) sum_n J_n^T H_n J_n with H the Fisher of one example's flattened outputs."""
    total = torch.zeros(())
    for x in inputs:
        outputs = model(x[None])
        rows = []
        for value in outputs.flatten():
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        (torch.zeros_like(p) if g is None else g).flatten()
                        for g, p in zip(gradients, parameters, strict=True)
                    ]
                )
            )
        jacobian = torch.stack(rows)
        total = total + jacobian.T @ output_fisher(outputs.detach()[0]) @ jacobian / divisor
    return total


def matrix_order(module: nn.Module) -> Tensor:
    """Where the entries of a layer's row-major matrix [W, b] are among its concatenated (weight, bias) entries."""
    d_out = module.weight.shape[0]
    weight = torch.arange(module.weight.numel()).reshape(d_out, -1)
    if module.bias is None:
        return weight.flatten()
    bias = module.weight.numel() + torch.arange(d_out)[:, None]
    return torch.cat([weight, bias], 1).flatten()


def entries_of(model: nn.Module, layout: WeightLayout) -> Tensor:
    """Where the entries of a layer's row-major matrix are in a flat vector of the model's trainable parameters."""
    start, places = 0, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            places[name] = torch.arange(start, start + parameter.numel()).reshape(parameter.shape)
            start += parameter.numel()
    return layout.to_matrix({name: places[name] for name in layout.names}).flatten()


def within_groups(layout: WeightLayout) -> Tensor:
    """Entries of a layer's block that a form with a pair of factors for each group keeps."""
    group = torch.arange(layout.numel) // (layout.numel // layout.groups)
    return group[:, None] == group


def assert_same(found: Tensor, expected: Tensor, *, tolerance: float = 1e-10) -> None:
    """Equal up to ``tolerance`` relative to the largest entry; the message has the ratio, so a factor of 2 shows."""
    assert found.shape == expected.shape, f"shapes {tuple(found.shape)} and {tuple(expected.shape)}"
    scale = expected.abs().max()
    error = (found - expected).abs().max()
    ratio = (found * expected).sum() / (expected * expected).sum()
    assert error <= tolerance * max(scale, torch.finfo(expected.dtype).tiny), (
        f"largest error {error:.3e} against a largest entry {scale:.3e}; ratio {ratio:.6f}"
    )
