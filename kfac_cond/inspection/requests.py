"""What the measurements of a report ask of a model and its data, as ``kc.estimate`` asks it."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..checks import settings_of
from ..errors import ArgumentError
from ..heads import Distribution
from ..layers.survey import survey
from ..likelihoods import as_likelihood
from ..linearised import Linearised
from ..options import Batches, Kind, Options, Request
from ..structures import Fisher


def request_of(
    model: nn.Module,
    data: Batches,
    likelihood: Distribution | str | nn.Module,
    options: Options | None,
    *,
    kind: Kind = "exact",
    samples: int = 1,
) -> Request:
    """A request of one kind; labels that were handed in stay where labels are drawn, and nowhere else."""
    chosen = settings_of(options, Options, "options")
    if kind != "sampled":
        chosen = replace(chosen, draws=None)
    return Request(model, data, as_likelihood(likelihood, heard=False), kind, samples, {}, chosen)


def linearised(request: Request, fisher: Fisher) -> Linearised:
    """The model as a function of the parameters that a Fisher is of.

    Raises:
        ArgumentError: parameters that the model does not have, or that do not train.
    """
    known = {row.path for row in survey(request.model).rows}
    strange = [name for name in fisher.parameter_names if name not in known]
    if strange:
        raise ArgumentError(
            f"the Fisher is of {len(strange)} parameters that {type(request.model).__name__} does not train, first "
            f"'{strange[0]}': expected the model that it was estimated of"
        )
    return Linearised(request, set(fisher.parameter_names))
