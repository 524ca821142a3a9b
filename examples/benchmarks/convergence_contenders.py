"""Who takes part in ``convergence.py``: how other libraries train, and what is tried of each optimizer's settings."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from example_optimizers import OPTIMIZERS, Entry, Gradients, Settings, Setup, Stepper, decay, muon

BUDGET = 6
"""Settings that are tried of each optimizer on each problem."""
Grid = Sequence[Settings]

# -- other libraries, each as it is documented, imported only when run -------------------------------------------------


def soap(setup: Setup) -> Gradients:
    """SOAP with a new eigenbasis every 10 steps."""
    from pytorch_optimizer import SOAP

    return Gradients(setup, SOAP(setup.model.parameters(), **setup.settings, weight_decay=decay(setup.task)))


def shampoo(setup: Setup) -> Gradients:
    """Shampoo in blocks of 512, roots every 20 steps, with the length of RMSProp's update."""
    from pytorch_optimizer import ScalableShampoo
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    options: dict[str, Any] = {
        "preconditioning_compute_steps": 20,
        "graft_type": LayerWiseGrafting.RMSPROP,
        "weight_decay": decay(setup.task),
        "decoupled_weight_decay": True,
    }
    return Gradients(setup, ScalableShampoo(setup.model.parameters(), **setup.settings, **options))


def singd(setup: Setup) -> Gradients:
    """Its dense structure every 10 steps; SGD at the same rate for the parameters of layers that it does not take."""
    from singd.optim.optimizer import SINGD

    taken = [one for one in setup.model.modules() if isinstance(one, nn.Linear | nn.Conv2d)]
    inside = [one for layer in taken for one in layer.parameters()]
    rest = [one for one in setup.model.parameters() if all(one is not other for other in inside)]
    over = "batch+sequence" if setup.task.name == "language_model" else "batch"
    made: list[torch.optim.Optimizer] = [SINGD(setup.model, inside, **setup.settings, loss_average=over)]
    if rest:
        made.append(torch.optim.SGD(rest, lr=setup.settings["lr"], momentum=0.9))
    return Gradients(setup, *made)


def kfac_pytorch(setup: Setup) -> Gradients:
    """Its preconditioner before SGD, factors every 10 steps and inverses every 50; its KL clip needs the rate."""
    from kfac.preconditioner import KFACPreconditioner

    optimizer = torch.optim.SGD(setup.model.parameters(), lr=setup.settings["lr"], momentum=0.9)
    often = {"factor_update_steps": 10, "inv_update_steps": 50}
    preconditioner = KFACPreconditioner(
        setup.model, damping=setup.settings["damping"], lr=lambda step: optimizer.param_groups[0]["lr"], **often
    )
    return Gradients(setup, optimizer, before=preconditioner.step)


# -- all of them -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """A row of the tables.

    Args:
        title: of the row.
        build: what trains by it.
        grids: by problem the settings that are tried, ``BUDGET`` of them, the likeliest first.
        module: that must be there; none for torch and this library.
    """

    title: str
    build: Callable[[Setup], Stepper]
    grids: Mapping[str, Grid]
    module: str = ""

    @property
    def entry(self) -> Entry:
        """As an example takes it."""
        return Entry(self.title, self.build, {}, {})

    @property
    def installed(self) -> bool:
        """Whether its module is there."""
        try:
            return not self.module or importlib.util.find_spec(self.module) is not None
        except ImportError:  # the package is another one of the same name
            return False


PROBLEMS = ("autoencoder", "classifier", "language_model")


def rates(**first: float) -> dict[str, Grid]:
    """Six rates a problem, a factor of about three apart, from two below ``first`` to three above."""
    return {name: [{"lr": first[name] * by} for by in (1.0, 3.0, 0.3, 10.0, 0.1, 30.0)] for name in PROBLEMS}


def pairs(numbers: Mapping[str, tuple[Sequence[float], Sequence[float]]], **fixed: float) -> dict[str, Grid]:
    """Three rates times two dampings a problem."""
    return {
        name: [{"lr": lr, "damping": damping, **fixed} for lr, damping in product(*numbers[name])] for name in PROBLEMS
    }


def _here(name: str, grids: Mapping[str, Grid]) -> Contender:
    return Contender(OPTIMIZERS[name].title, OPTIMIZERS[name].build, grids)


ADAM = {"autoencoder": 1e-3, "classifier": 3e-3, "language_model": 3e-3}

CONTENDERS: dict[str, Contender] = {
    "sgd": _here("sgd", rates(autoencoder=1e-3, classifier=0.1, language_model=0.3)),
    "adam": _here("adam", rates(**ADAM)),
    "adamw": _here("adamw", rates(**ADAM)),
    "muon": Contender("Muon", muon, rates(autoencoder=0.02, classifier=0.02, language_model=0.02), "torch.optim._muon"),
    "soap": Contender("SOAP", soap, rates(autoencoder=3e-3, classifier=3e-3, language_model=3e-3), "pytorch_optimizer"),
    "shampoo": Contender("Shampoo", shampoo, rates(**ADAM), "pytorch_optimizer"),
    "singd": Contender(
        "SINGD",
        singd,
        pairs(
            {
                "autoencoder": ((1e-3, 1e-2, 1e-4), (1e-1, 1e-3)),
                "classifier": ((1e-2, 1e-1, 1e-3), (1e-3, 1e-1)),
                "language_model": ((1e-2, 1e-1, 1e-3), (1e-3, 1e-1)),
            }
        ),
        "singd",
    ),
    "kfac-pytorch": Contender(
        "kfac-pytorch",
        kfac_pytorch,
        pairs(
            {
                "autoencoder": ((0.1, 0.3, 0.03), (1e-1, 1e-2)),
                "classifier": ((0.1, 0.3, 0.03), (1e-2, 1e-3)),
                "language_model": ((0.1, 0.3, 0.03), (1e-2, 1e-3)),
            }
        ),
        "kfac.preconditioner",
    ),
    "kfac": _here(
        "kfac",
        pairs(
            {
                "autoencoder": ((0.3, 1.0, 0.1), (1.0, 10.0)),
                "classifier": ((0.1, 0.03, 0.3), (0.1, 0.03)),
                "language_model": ((3.0, 1.0, 10.0), (1.0, 0.3)),
            },
            max_kl=1e-2,
            factors=10,
            inverses=50,
        ),
    ),
    "kfac-graft": _here(
        "kfac-graft",
        pairs(dict.fromkeys(PROBLEMS, ((3e-3, 1e-2, 1e-3), (0.1, 0.03))), factors=5, inverses=10),
    ),
    # It is what needs no tuning: its defaults alone.
    "natural": _here("natural", {name: [{}] for name in PROBLEMS}),
}
