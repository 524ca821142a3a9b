"""Reports as a page takes them, made up: of any number of layers, with any names and any sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import kfac_cond as kc
from kfac_cond.inspection import Calibration, LayerReport, Report, Whole, spectrum_of

LAMBDAS = np.logspace(-8, 2, 61)
HOSTILE = (
    "<script>window.broken=1</script>",
    "</script><script>window.broken=2</script>",
    "\"><img src=x onerror='window.broken=3'>",
    "a\u2028b\u2029c\\u003c/{{7*7}}{% raw %}",
    "<!--<script>",
    "javascript:window.broken=4//",
    "<b>bold</b>&amp;<br>",
    "__proto__",
)


@dataclass
class MadeUp:
    """What a page asks of a report: its data and its factors."""

    data: dict[str, Any]
    fisher: kc.Fisher | None = None

    def to_dict(self) -> dict[str, Any]:
        return self.data


@dataclass
class Curves:
    """A layer's eigenvalues, and what the page shows of them."""

    A: np.ndarray
    G: np.ndarray
    values: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.values = np.sort(np.outer(self.G, self.A).ravel())[::-1]

    def effective_dimension(self, damping: float) -> float:
        return float((self.values / (self.values + damping)).sum())

    def share_below(self, damping: float) -> float:
        return float((self.values < damping).mean())

    def to_dict(self) -> dict[str, Any]:
        values = self.values
        return {
            "trace": values.sum(),
            "per_parameter": values.mean(),
            "largest": values[0],
            "smallest": values[-1],
            "condition": values[0] / values[-1] if values[-1] > 0 else float("inf"),
            "blame": "A" if self.A.max() / self.A.min() > self.G.max() / self.G.min() else "G",
            "stable_rank": (values**2).sum() / values[0] ** 2,
            "participation": values.sum() ** 2 / (values**2).sum(),
            "rank": int((values > 1e-12 * values[0]).sum()),
            "dead_inputs": [3, 7],
            "dead_outputs": [],
            "top": list(values[:10]),
            "histogram": histogram(values),
            "A": {"top": list(np.sort(self.A)[::-1][:10]), "histogram": histogram(self.A)},
            "G": {"top": list(np.sort(self.G)[::-1][:10]), "histogram": histogram(self.G)},
            "effective_dimension": [self.effective_dimension(damping) for damping in LAMBDAS],
            "share_below": [self.share_below(damping) for damping in LAMBDAS],
        }


def histogram(values: np.ndarray) -> dict[str, list[float]]:
    counts, edges = np.histogram(np.log10(values), bins=40)
    return {"edges": list(edges), "counts": [float(count) for count in counts]}


def names_of(layers: int) -> list[str]:
    parts = ("attn.q_proj", "attn.out_proj", "norm", "mlp.up", "mlp.down")
    return [f"model.blocks.{index // 5}.{parts[index % 5]}" for index in range(layers)]


def made_up(
    names: Sequence[str] | int = 12, *, sections: bool = True, findings: Sequence[Mapping[str, Any]] | None = None
) -> tuple[MadeUp, list[Curves]]:
    """A report and the curves of its layers; with ``sections`` those of KL and others as well."""
    random = np.random.default_rng(0)
    names = names_of(names) if isinstance(names, int) else names
    curves, layers = [], []
    for index, name in enumerate(names):
        d_out, d_in = int(random.integers(8, 24)), int(random.integers(8, 24))
        scale = 10 ** (-3 * index / len(names))
        of = Curves(10 ** random.normal(0, 1, d_in), scale * 10 ** random.normal(-2, 1.5, d_out))
        layer: dict[str, Any] = {
            "name": name,
            "kind": ("linear", "linear", "layer_norm", "linear", "conv2d")[index % 5],
            "shape": [d_out, d_in],
            "parameters": d_out * d_in,
            "depth": index,
            "spectrum": of.to_dict(),
            "health": {"asymmetry": 1e-17, "negative_mass": 0.0, "residual": None, "failures": 0},
        }
        if sections:
            predicted = float(10 ** random.normal(-4, 1))
            layer["kl"] = {
                "share": 1 / len(names),
                "predicted": predicted,
                "measured": predicted * float(np.exp(random.normal(0, 0.3))),
            }
            layer["counts"] = {"covered": 1.0, "uses": 1, "positions": 4096.0, "terms": 512.0, "examples": 64.0}
        curves.append(of)
        layers.append(layer)
    data = {
        "version": 1,
        "meta": {
            "model": "MadeUp",
            "level": "standard",
            "likelihood": "categorical",
            "samples": 4,
            "counts": {"N": 64},
        },
        "damping": float(LAMBDAS[36]),
        "lambdas": list(LAMBDAS),
        "whole": {"parameters": sum(one["parameters"] for one in layers), "trace": 3.25, "effective_dimension": 17.0},
        "layers": layers,
        "findings": list(found(names) if findings is None else findings),
        "problems": {"staleness": "nothing is trained here"},
    }
    return MadeUp(data), curves


def found(names: Sequence[str]) -> list[dict[str, Any]]:
    """A finding of each severity; that of a layer has its name in the sentence."""
    return [
        {
            "severity": severity,
            "layer": layer,
            "code": code,
            "message": f"`{layer}`: {message}" if layer else message,
            "number": number,
            "threshold": threshold,
            "advice": advice,
        }
        for severity, layer, code, message, number, threshold, advice in (
            (
                "info",
                "",
                "calibration",
                "the layers' dampings are 80 apart",
                80.0,
                10.0,
                "give them rules of their own",
            ),
            ("warning", names[1], "damped-away", "97 % of eigenvalues lie below 1e-2", 0.97, 0.9, "try 3e-4"),
            ("error", names[0], "kl", "the measured KL is twice the predicted", 2.0, 1.2, "look at the reduction"),
        )
    ]


def real_report(damping: float | None = 3e-3) -> Report:
    """A report of a small trained network, of its spectra alone."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    fisher = kc.estimate(model, [torch.randn(64, 6)], "categorical", kind="exact")
    spectra = {name: spectrum_of(block) for name, block in fisher.items()}
    layers = {
        name: LayerReport(name, "linear", block.layout.matrix_shape, block.layout.numel, depth, spectrum=spectra[name])
        for depth, (name, block) in enumerate(fisher.items())
    }
    grid = tuple(LAMBDAS)
    curve = tuple(sum(one.effective_dimension(at) for one in spectra.values()) for at in grid)
    calibration = Calibration(grid, curve, grid, sum(one.rank for one in spectra.values()), 1e-3, 1e-4, None)
    whole = Whole(fisher.shape[0], trace=float(fisher.trace()), calibration=calibration)
    return Report(layers, whole, meta={"level": "quick", **fisher.meta}, damping=damping, fisher=fisher)
