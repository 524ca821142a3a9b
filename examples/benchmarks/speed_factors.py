"""How other libraries make factors in ``speed.py``: each as it is documented, each imported only when run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from speed_jobs import Run
from speed_models import Pair, Task, pairs
from torch import Tensor, nn
from torch.utils.data import DataLoader


def positions(task: Task) -> dict[str, int]:
    """Of each layer in the order of calls, at how many positions an example goes through it."""
    return {name: a.shape[1] for name, (_, a, _) in pairs(task.model, task.inputs, task.labels).items()}


class OneBatch(DataLoader):  # type: ignore[type-arg]
    """A loader of one batch as it is, so that nobody is charged for putting it together."""

    def __init__(self, task: Task) -> None:
        super().__init__(range(len(task.inputs)))  # type: ignore[arg-type]
        self.batch = task.inputs, task.labels

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.batch

    def __len__(self) -> int:
        return 1


def curvlinops_factors(task: Task, labels: Tensor | None) -> Run:
    """Its operator with one Monte-Carlo draw, or with labels in the place of the data's."""
    from curvlinops import KFACLinearOperator

    model, criterion = copy.deepcopy(task.model), nn.CrossEntropyLoss()
    data = [(task.inputs, task.labels if labels is None else labels)]
    settings = {"fisher_type": "mc" if labels is None else "empirical", "separate_weight_and_bias": False}
    known = {"num_data": len(task.inputs), "num_per_example_loss_terms": 1, "check_deterministic": False}
    parameters, found, seed = list(model.parameters()), [], [0]

    def go() -> None:
        seed[0] += 1
        one = KFACLinearOperator(model, criterion, parameters, data, seed=seed[0], **settings, **known)
        one.compute_kronecker_factors()
        found[:] = [one]

    def read() -> dict[str, Pair]:
        A, G = found[0]._input_covariances, found[0]._gradient_covariances
        return {name: (A[name], G[name]) for name in positions(task)}

    return Run(go, read, labels)


def nngeometry_factors(task: Task, labels: Tensor | None) -> Run:
    """Its Monte-Carlo Fisher of one trial. A is a sum over positions there, and G is divided by their number."""
    from nngeometry.metrics import FIM_MonteCarlo
    from nngeometry.object import PMatKFAC

    model, found = copy.deepcopy(task.model), []
    loader = OneBatch(Task(model, task.inputs.clone(), task.labels))

    def go() -> None:
        found[:] = [FIM_MonteCarlo(model, loader, PMatKFAC, trials=1)]

    def read() -> dict[str, Pair]:
        rows = zip(positions(task).items(), found[0].data.values(), strict=True)
        return {name: (A / count, G * count) for (name, count), (A, G) in rows}

    return Run(go, read)


def backpack_factors(task: Task, labels: Tensor | None) -> Run:
    """Its extension with one sample. A is a sum over positions there, and G of gradients summed over them."""
    from backpack import backpack, extend, extensions

    model, criterion = extend(copy.deepcopy(task.model)), extend(nn.CrossEntropyLoss())
    counts = positions(task)

    def go() -> None:
        model.zero_grad()
        with backpack(extensions.KFAC(mc_samples=1)):
            criterion(model(task.inputs), task.labels).backward()

    def read() -> dict[str, Pair]:
        kept = {name: model.get_submodule(name).weight.kfac for name in counts}
        return {name: (A / counts[name], G) for name, (G, A) in kept.items()}

    return Run(go, read, sharing="reduce")


def kronfluence_factors(task: Task, labels: Tensor | None) -> Run:
    """Its covariances; the task of its user draws the labels. Both are sums over examples and positions there."""
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.task import Task as Theirs
    from kronfluence.utils.state import State

    class Classes(Theirs):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            outputs = model(batch[0])
            drawn = labels
            if drawn is None:
                drawn = torch.multinomial(outputs.detach().softmax(-1), 1).flatten()
            return nn.functional.cross_entropy(outputs, drawn, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            raise NotImplementedError

    model, found, counts = prepare_model(copy.deepcopy(task.model), Classes()), [], positions(task)
    settings = {"loader": OneBatch(task), "factor_args": FactorArguments(), "disable_tqdm": True}

    def go() -> None:
        found[:] = [fit_covariance_matrices_with_loader(model=model, state=State(), task=Classes(), **settings)[1]]

    def read() -> dict[str, Pair]:
        A, G = found[0]["activation_covariance"], found[0]["gradient_covariance"]
        number = len(task.inputs)
        return {name: (A[name] / (number * count), G[name] / number) for name, count in counts.items()}

    return Run(go, read, labels)
