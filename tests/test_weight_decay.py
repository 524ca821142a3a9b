"""What of weight decay is preconditioned: that in the loss is, the optimizer's own is not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .reference import assert_same
from .training import batches, network, parameters_of, wrapped

RATE, DECAY = 0.1, 0.3


def one_step(optimizer_of, *, l2: float = 0.0) -> tuple[Tensor, Tensor, kc.KFAC, dict[str, Tensor]]:
    """Parameters before and after a step, the KFAC, and the gradients before they were preconditioned."""
    torch.manual_seed(0)
    model = network()
    optimizer = optimizer_of(model.parameters())
    kfac, criterion = wrapped(model, optimizer)
    (inputs, labels), before = batches(1)[0], parameters_of(model)
    loss = criterion(model(inputs), labels) + 0.5 * l2 * sum(p.square().sum() for p in model.parameters())
    loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    return before, parameters_of(model), kfac, plain


def preconditioned(kfac: kc.KFAC, gradients: dict[str, Tensor]) -> Tensor:
    """(F + damping)^-1 of some gradients, in the order of the parameters."""
    found = {}
    for name, layer in kfac.layers.items():
        matrix = layer.layout.to_matrix(gradients)
        inverse = kfac._shared.factors.inverses[name].to_dense()
        found |= layer.layout.from_matrix((inverse @ matrix.flatten()).reshape(matrix.shape))
    return torch.cat([found[name].flatten() for name in gradients])


def test_the_decay_of_sgd_is_added_after_and_not_preconditioned():
    before, after, kfac, plain = one_step(lambda p: torch.optim.SGD(p, lr=RATE, weight_decay=DECAY))
    assert_same(after, before - RATE * (preconditioned(kfac, plain) + DECAY * before))


def test_the_decay_of_adamw_shrinks_the_parameters_alone():
    of = {"lr": RATE, "weight_decay": DECAY}
    before, after, kfac, plain = one_step(lambda p: torch.optim.AdamW(p, **of))
    reference = nn.Parameter(before.clone())
    reference.grad = preconditioned(kfac, plain)
    torch.optim.Adam([reference], lr=RATE).step()
    assert_same(after, reference.detach() - RATE * DECAY * before)


@pytest.mark.parametrize("l2", [0.0, DECAY])
def test_a_term_of_the_loss_is_preconditioned_and_is_not_in_the_fisher(l2):
    before, after, kfac, plain = one_step(lambda p: torch.optim.SGD(p, lr=RATE), l2=l2)
    assert_same(after, before - RATE * preconditioned(kfac, plain))
    without = one_step(lambda p: torch.optim.SGD(p, lr=RATE))[2]
    for name, block in kfac.fisher().items():
        assert torch.equal(block.G, without.fisher()[name].G)


def test_a_trust_region_bounds_the_update_without_the_decay():
    scales = []
    for decay in (0.0, DECAY):
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=decay)
        kfac, criterion = wrapped(model, optimizer, trust_region=kc.KLClip(1e-5))
        (inputs, labels) = copy.deepcopy(batches(1)[0])
        criterion(model(inputs), labels).backward()
        optimizer.step()
        scales.append(kfac.metrics()["kfac/trust_region_scale"])
    assert torch.equal(*scales)
    assert scales[0] < 1
