"""How other libraries train in ``speed.py``, each as it is documented, imported only when run; all contenders."""

from __future__ import annotations

import contextlib
import copy
from functools import cache, partial

import torch
from speed_factors import backpack_factors, curvlinops_factors, kronfluence_factors, nngeometry_factors, positions
from speed_jobs import DAMPING, FACTORS, INVERSES, RATE, Contender, Run, adamw, ours, plain, products, sgd, stepper
from speed_models import Pair, Task, factored
from torch import Tensor, nn
from torch.cuda import nvtx

# -- ASDL: asdfghjkl -------------------------------------------------------------------------------------------------


def asdl_factors(task: Task, labels: Tensor | None) -> Run:
    """Its Fisher maker with one Monte-Carlo draw."""
    from asdl import fisher

    model = copy.deepcopy(task.model)
    settings = {"fisher_type": "fisher_mc", "fisher_shapes": ["kron"], "loss_type": "cross_entropy"}
    maker = fisher.get_fisher_maker(model, fisher.FisherConfig(data_size=len(task.inputs), **settings))
    sums = cache(partial(summed, task))

    def go() -> None:
        maker.setup_model_call(model, task.inputs)
        maker.forward_and_backward()

    def read() -> dict[str, Pair]:
        found = {name: model.get_submodule(name).fisher.kron for name in sums()}
        return {name: (one.A / sums()[name], one.B) for name, one in found.items()}

    return Run(go, read)


def asdl_steps(factors: int, inverses: int, task: Task, labels: Tensor | None) -> Run:
    """Its gradient maker before SGD; the average of factors where inverses are rarer than they."""
    from asdl.precondition import KfacGradientMaker, PreconditioningConfig

    if not torch.cuda.is_available():  # it marks ranges for a profiler that only builds for CUDA have
        nvtx.range = lambda *_: contextlib.nullcontext()
    model = copy.deepcopy(task.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    often = {"curvature_upd_interval": factors, "preconditioner_upd_interval": inverses}
    config = PreconditioningConfig(data_size=len(task.inputs), damping=DAMPING, **often)
    if inverses > factors:
        config.ema_decay = 0.05
    maker, sums = KfacGradientMaker(model, config, swift=False), cache(partial(summed, task))

    def go() -> Tensor:
        optimizer.zero_grad()
        dummy = maker.setup_model_call(model, task.inputs)
        maker.setup_loss_call(nn.CrossEntropyLoss(), dummy, task.labels)
        _, loss = maker.forward_and_backward()
        optimizer.step()
        return loss.detach()

    def read() -> dict[str, Pair]:
        found = {name: model.get_submodule(name).fisher.kron for name in sums()}
        pairs_there = {name: undamped(one.A_inv, one.B_inv) for name, one in found.items()}
        return {name: (A / sums()[name], G) for name, (A, G) in pairs_there.items()}

    def solve(name: str, A: Tensor, G: Tensor, gradient: Tensor) -> Tensor:
        return factored(sums()[name] * A, G, gradient, DAMPING)

    # An average that starts from nothing is not read.
    return Run(go, read, None, model, solve if inverses == factors else None)


def summed(task: Task) -> dict[str, int]:
    """Over how many positions A is a sum there: those of linear layers; of convolutions it is a mean."""
    linear = {name for name, one in task.model.named_modules() if isinstance(one, nn.Linear)}
    return {name: count if name in linear else 1 for name, count in positions(task).items()}


def undamped(A_inverse: Tensor, G_inverse: Tensor) -> Pair:
    """A and G of the inverses of A + pi r I and G + r / pi I, with r the root of the damping.

    pi^2 is the ratio of the mean eigenvalues, of the damped ones as of those before.
    """
    A, G = torch.linalg.inv(A_inverse.double()), torch.linalg.inv(G_inverse.double())
    pi = (A.diagonal().mean() / G.diagonal().mean()).sqrt()
    eye_A, eye_G = (torch.eye(len(one), dtype=torch.float64) for one in (A, G))
    return A - pi * DAMPING**0.5 * eye_A, G - DAMPING**0.5 / pi * eye_G


# -- kfac-pytorch ----------------------------------------------------------------------------------------------------


def kfac_pytorch(method: str, factors: int, inverses: int, task: Task, labels: Tensor | None) -> Run:
    """Its preconditioner before SGD; factors are of the data's labels, and damped one by one, or 'eigen' their product.

    Its average starts from the identity, which would hide the first factors: where they are read it forgets at once.
    """
    from kfac.preconditioner import KFACPreconditioner

    model, decay = copy.deepcopy(task.model), 0.95 if inverses > factors else 1e-30
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    often = {"factor_update_steps": factors, "inv_update_steps": inverses}
    settings = {"damping": DAMPING, "factor_decay": decay, "lr": RATE, "compute_method": method}
    preconditioner = KFACPreconditioner(model, **settings, **often, kl_clip=lambda step: None)
    layers = dict(preconditioner._layers.values())

    def read() -> dict[str, Pair]:
        """g is of the mean loss there, and both factors are divided by the examples times the positions.

        Of convolutions a and g are divided by the positions once more.
        """
        found = {}
        for name, S in positions(task).items():
            again = S**2 if isinstance(model.get_submodule(name), nn.Conv2d) else 1
            A, G = layers[name].a_factor, layers[name].g_factor
            found[name] = A * again, G.double() * again * S * len(task.inputs) ** 2
        return found

    def solve(name: str, A: Tensor, G: Tensor, gradient: Tensor) -> Tensor:
        """Of the factors as they are there."""
        values, bases = zip(*(torch.linalg.eigh(getattr(layers[name], one).double()) for one in FACES), strict=True)
        outer = [values[0][None] + DAMPING, values[1][:, None] + DAMPING]
        divisor = outer[0] * outer[1] if method == "inverse" else values[0][None] * values[1][:, None] + DAMPING
        return bases[1] @ ((bases[1].T @ gradient @ bases[0]) / divisor) @ bases[0].T

    return Run(
        stepper(task, model, optimizer, preconditioner.step),
        read,
        task.labels,
        model,
        solve if inverses == factors else None,
    )


FACES = "a_factor", "g_factor"


# -- others' optimizers ----------------------------------------------------------------------------------------------


def singd_steps(task: Task, labels: Tensor | None) -> Run:
    """Its dense structure every 10 steps, which takes the inverses' place."""
    from singd.optim.optimizer import SINGD

    model = copy.deepcopy(task.model)
    optimizer = SINGD(model, lr=RATE, damping=DAMPING, T=FACTORS, structures=("dense", "dense"))
    return Run(stepper(task, model, optimizer))


def soap_steps(task: Task, labels: Tensor | None) -> Run:
    """SOAP with a new eigenbasis every 10 steps."""
    from pytorch_optimizer import SOAP

    model = copy.deepcopy(task.model)
    return Run(stepper(task, model, SOAP(model.parameters(), lr=RATE, precondition_frequency=FACTORS)))


def _kfac_pytorch(method: str) -> Contender:
    builders = {"step": (1, 1), "training": (FACTORS, INVERSES)}
    made = {job: partial(kfac_pytorch, method, *often) for job, often in builders.items()}
    return Contender(made, "kfac.preconditioner")


CONTENDERS = {
    "forward and backward": Contender({"factors": plain, "step": plain}, checked=False),
    "SGD": Contender({"training": sgd}),
    "plain products": Contender({"factors": products}, checked=False),
    "kfac_cond": Contender(ours),
    "ASDL": Contender(
        {
            "factors": asdl_factors,
            "step": partial(asdl_steps, 1, 1),
            "training": partial(asdl_steps, FACTORS, INVERSES),
        },
        "asdl",
    ),
    "NNGeometry": Contender({"factors": nngeometry_factors}, "nngeometry"),
    "curvlinops": Contender({"factors": curvlinops_factors}, "curvlinops"),
    "BackPACK": Contender({"factors": backpack_factors}, "backpack"),
    "kronfluence": Contender({"factors": kronfluence_factors}, "kronfluence"),
    "kfac-pytorch, inverse": _kfac_pytorch("inverse"),
    "kfac-pytorch, eigen": _kfac_pytorch("eigen"),
    "SINGD": Contender({"training": singd_steps}, "singd"),
    "SOAP": Contender({"training": soap_steps}, "pytorch_optimizer"),
    "AdamW": Contender({"training": adamw}),
}
"""In the order of rows; the first that has a job is what the others' times are divided by."""

PACKAGES = (
    "torch",
    "asdfghjkl",
    "backpack-for-pytorch",
    "curvlinops-for-pytorch",
    "kfac-pytorch",
    "kronfluence",
    "nngeometry",
    "pytorch_optimizer",
    "singd",
)
"""Whose versions are written down."""
