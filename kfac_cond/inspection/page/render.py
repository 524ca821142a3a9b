"""A page from its template, its scripts and its data."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from importlib import resources
from typing import Any

from ...files import replaced
from ..findings import Finding, grouped
from .absent import absent
from .island import island
from .maps import factor_maps
from .meanings import of_comparison, of_report

INSTALL = "pip install 'kfac-cond[inspect]'"


def save_page(html: str, path: str | os.PathLike[str]) -> None:
    """Write a page, all of it or nothing.

    Raises:
        OSError: the file could not be written; one that was there is left.
    """
    with replaced(path) as file:
        # Half a surrogate pair in a name is no text that a file can hold.
        file.write_text(html, encoding="utf-8", errors="replace", newline="\n")


def report_page(report: Any) -> str:
    """The page of a report.

    Args:
        report: what has ``to_dict()``; the factors of its ``fisher``, where it has one, become pictures.

    Raises:
        ImportError: without jinja2 or plotly, with what to install.
    """
    data = _with_its_damping(report)
    groups = grouped(Finding(**one) for one in data["findings"])
    found = [asdict(one) for group in groups for one in group.findings]
    maps = factor_maps(getattr(report, "fisher", None), _by_weight(data, found))
    shown = {**data, "maps": maps, "meanings": of_report(report)}
    names = [layer["name"] for layer in data["layers"]]
    return _page("report.html", "report.js", shown, groups=groups, names=names, absent=absent(data, maps))


def comparison_page(comparison: Any) -> str:
    """The page of a comparison; arguments and errors as for ``report_page``."""
    return _page("comparison.html", "comparison.js", {**comparison.to_dict(), "meanings": of_comparison(comparison)})


def _with_its_damping(report: Any) -> dict[str, Any]:
    """The data of a report, its own damping among those that its curves are written out at."""
    data: dict[str, Any] = report.to_dict()
    if data["damping"] and data["lambdas"] and data["damping"] not in data["lambdas"]:
        data["lambdas"] = sorted([*data["lambdas"], data["damping"]])
        data["layers"] = [layer.to_dict(data["lambdas"]) for layer in report.values()]
    return data


def _by_weight(data: Mapping[str, Any], findings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of layers, those with findings first, then by trace."""
    traces = {one["name"]: (one.get("spectrum") or {}).get("trace") or 0.0 for one in data["layers"]}
    found = dict.fromkeys(one["layer"] for one in findings if one["layer"] in traces)
    return list(found | dict.fromkeys(sorted(traces, key=lambda name: -traces[name])))


def _page(template: str, script: str, data: Mapping[str, Any], **context: Any) -> str:
    try:
        import jinja2
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(f"a page needs jinja2 and plotly: {INSTALL}") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["number"] = number
    # With these two hashes and nothing else allowed, no name in the data can become a script, and no script can ask
    # the network for anything.
    own = "".join(map(_asset, ("text.js", "table.js", "figures.js", script)))
    # A browser hashes a script as it reads it, with the line ends of its own.
    drawing = get_plotlyjs().strip().replace("\r\n", "\n")
    return environment.get_template(template).render(
        data=data,
        island=Markup(island(data)),
        style=Markup(_asset("page.css")),
        script=Markup(own),
        drawing=Markup(drawing),
        hashes=[_hash(own), _hash(drawing)],
        **context,
    )


def number(value: float) -> str:
    """A number in four digits."""
    return f"{value:.4g}"


def _asset(name: str) -> str:
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return f"sha256-{b64encode(sha256(script.encode()).digest()).decode()}"
