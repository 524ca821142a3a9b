"""Small models, their loops, and the K-FAC step straight from its formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import kfac_cond as kc

Factors = dict[str, tuple[Tensor, Tensor]]
Batch = tuple[Tensor, Tensor]

EVERY_STEP = kc.Schedule(factors=1, inverses=1)


class HostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "_linalg_check_errors", "equal", "nonzero")
        self.count += func.overloadpacket.__name__ in names
        return func(*args, **(kwargs or {}))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def noisy_network() -> nn.Sequential:
    """With what draws from the global generator and keeps running statistics."""
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 2))


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(16, 3)
    )


def batches(count: int, *, size: int = 8, features: int = 3, classes: int = 2, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, features, generator=generator), torch.randint(classes, (size,), generator=generator))
        for _ in range(count)
    ]


def train(
    model: nn.Module, criterion: Callable[..., Tensor], optimizer: torch.optim.Optimizer, data: Sequence[Batch]
) -> None:
    """The loop that most people have."""
    for inputs, labels in data:
        optimizer.zero_grad()
        criterion(model(inputs), labels).backward()
        optimizer.step()


def parameters_of(model: nn.Module) -> Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def factors_of_draws(model: nn.Module, inputs: Tensor, draws: Sequence[Tensor], *, divisor: float) -> Factors:
    """(A, G) of every layer, [groups, d, d] each, for given class labels: means over positions, sums over M."""
    seen: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (m, args[0].detach(), out)}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    outputs = model(inputs)
    for handle in handles:
        handle.remove()
    factors: Factors = {}
    for labels in draws:
        loss = functional.cross_entropy(outputs, labels, reduction="sum")
        gradients = torch.autograd.grad(loss, [out for _, _, out in seen.values()], retain_graph=True)
        for (name, (module, a, _)), g in zip(seen.items(), gradients, strict=True):
            A, G = _moments(module, a, g)
            before = factors[name][1] if name in factors else torch.zeros_like(G)
            factors[name] = (A, before + G / divisor / len(draws))
    return factors


def _moments(module: nn.Module, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    groups = getattr(module, "groups", 1)
    if isinstance(module, nn.Conv2d):
        rows = [
            functional.unfold(part, module.kernel_size, padding=module.padding, stride=module.stride)
            for part in a.chunk(groups, 1)
        ]
        a_rows = torch.stack([part.mT.flatten(0, 1) for part in rows])
        g_rows = torch.stack([part.flatten(2).mT.flatten(0, 1) for part in g.chunk(groups, 1)])
    else:
        a_rows, g_rows = a[None], g[None]
    if module.bias is not None and module.bias.requires_grad:
        a_rows = torch.cat([a_rows, torch.ones(*a_rows.shape[:2], 1)], 2)
    if not module.weight.requires_grad:
        a_rows = a_rows[..., -1:]
    return a_rows.mT @ a_rows / a_rows.shape[1], g_rows.mT @ g_rows


def gradient_matrix(module: nn.Module, gradients: Mapping[str, Tensor], name: str) -> Tensor:
    """[groups, d_out, d_in]: the weight's gradient, and the bias's as its last column."""
    groups = getattr(module, "groups", 1)
    columns = []
    if f"{name}.weight" in gradients:
        columns.append(gradients[f"{name}.weight"].flatten(1))
    if f"{name}.bias" in gradients:
        columns.append(gradients[f"{name}.bias"][:, None])
    return torch.stack(torch.cat(columns, 1).chunk(groups, 0))


def damped_solution(A: Tensor, G: Tensor, V: Tensor, damping: float, rule: str) -> Tensor:
    """(G (x) A + damping)^-1 vec V for one group, as a matrix."""
    if rule == "exact":
        dense = torch.kron(G, A) + damping * torch.eye(G.shape[0] * A.shape[0])
        return torch.linalg.solve(dense, V.flatten()).reshape(V.shape)
    pi = ((A.trace() / A.shape[0]) / (G.trace() / G.shape[0])).sqrt()
    left = torch.linalg.inv(G + damping**0.5 / pi * torch.eye(G.shape[0]))
    right = torch.linalg.inv(A + pi * damping**0.5 * torch.eye(A.shape[0]))
    return left @ V @ right


def expected_updates(
    model: nn.Module,
    factors: Factors,
    gradients: Mapping[str, Tensor],
    *,
    damping: Callable[[str, Tensor, Tensor], float],
    rule: str,
) -> dict[str, Tensor]:
    """The preconditioned gradient matrix of every layer; ``damping`` is of (name, A, G)."""
    updates = {}
    for name, (A, G) in factors.items():
        V = gradient_matrix(model.get_submodule(name), gradients, name)
        updates[name] = torch.stack(
            [damped_solution(a, g, v, damping(name, a, g), rule) for a, g, v in zip(A, G, V, strict=True)]
        )
    return updates


def found_updates(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    gradients = gradients_of(model)
    return {name: gradient_matrix(model.get_submodule(name), gradients, name) for name in names}


def backward_of(kfac: kc.KFAC, model: nn.Module, inputs: Tensor, labels: Tensor, draws=None) -> dict[str, Tensor]:
    """Forward, update, backward; the plain gradients."""
    model.zero_grad()
    outputs = model(inputs)
    kfac.update(outputs, draws=draws)
    functional.cross_entropy(outputs, labels).backward()
    return gradients_of(model)


def wrapped(model: nn.Module, *optimizers: torch.optim.Optimizer, **options) -> tuple[kc.KFAC, nn.Module]:
    """A K-FAC on one seed, attached, and its criterion."""
    criterion = nn.CrossEntropyLoss()
    options = {"damping": 0.1, "schedule": EVERY_STEP, "data": kc.Data(seed=7), **options}
    kfac = kc.KFAC(model, criterion, **options)
    if optimizers:
        kfac.attach(*optimizers)
    return kfac, criterion
