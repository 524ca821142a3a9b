"""What a report lacks, and what would give it: a sentence in place of a section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Sections of layers: what each shows, and what measures it.
OF_LAYERS = {
    "spectrum": ("spectra, conditions and effective dimensions", "any level of kc.inspect"),
    "kl": ("KL shares and predicted against measured KL", 'kc.inspect(..., level="standard")'),
    "signal": ("gradient signal to noise", 'kc.inspect(..., level="standard")'),
    "empirical": ("the empirical Fisher beside the conditional one", 'kc.inspect(..., level="standard")'),
    "approximation": ("errors of the approximations", 'kc.inspect(..., level="full")'),
    "sampling": ("sampling errors", "kc.inspect(..., samples=2) or more"),
    "update": ("geometry of the update", "kc.inspect of a kc.KFAC in training"),
    "staleness": ("staleness", "kc.inspect of a kc.KFAC in training"),
}

#: Sections of the whole likewise.
OF_THE_WHOLE = {
    "whole.sampling": ("the check of the drawn labels", 'kc.inspect(..., level="standard")'),
    "block_diagonality": ("the share of the Fisher outside the layer blocks", 'kc.inspect(..., level="full")'),
}


def absent(data: Mapping[str, Any], maps: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is not in the data of a report, each with the reason, or with what gives it.

    Args:
        data: of ``Report.to_dict``.
        maps: pictures of factors, by layer.
    """
    lacking = {key: both for key, both in OF_LAYERS.items() if not any(layer.get(key) for layer in data["layers"])}
    lacking |= {key: both for key, both in OF_THE_WHOLE.items() if not data["whole"].get(key.removeprefix("whole."))}
    problems = data.get("problems", {})
    said = [
        (what, f"could not be measured: {problems[key]}" if key in problems else f"not measured here; {how} has them")
        for key, (what, how) in lacking.items()
    ]
    said += [(key.replace("_", " "), reason) for key, reason in problems.items() if key not in lacking]
    if not maps:
        said.append(("pictures of the factors", "the report holds no Kronecker factors"))
    return said
