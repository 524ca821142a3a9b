"""The tables of ``speed.py`` as a picture: a panel a job, bars with quartiles."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from speed_times import Cell


def draw(found: Sequence[Cell], titles: Mapping[str, str], to: Path) -> None:
    """Write the picture.

    Args:
        titles: of the jobs.
        to: a file whose ending matplotlib knows.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    jobs = list(dict.fromkeys(one.job for one in found))
    counts = [len({one.contender for one in found if one.job == job}) for job in jobs]
    size = {"figsize": (9, 1.0 + 0.55 * sum(counts)), "height_ratios": counts}
    figure, panels = pyplot.subplots(len(jobs), 1, squeeze=False, layout="constrained", **size)
    for job, panel in zip(jobs, panels[:, 0], strict=True):
        _panel(panel, [one for one in found if one.job == job])
        panel.set_title("\n".join(textwrap.wrap(titles[job], 90)), fontsize=9, loc="left")
    models = list(dict.fromkeys(one.model for one in found))
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=f"C{index}") for index in range(len(models))]
    figure.legend(handles, models, fontsize=8, ncols=len(models), loc="outside upper right")
    figure.savefig(to, dpi=120)
    pyplot.close(figure)


def _panel(panel, found: Sequence[Cell]) -> None:  # type: ignore[no-untyped-def]
    contenders = list(dict.fromkeys(one.contender for one in found))
    models = list(dict.fromkeys(one.model for one in found))
    height = 0.8 / len(models)
    for index, model in enumerate(models):
        for one in (one for one in found if one.model == model):
            at = contenders.index(one.contender) + (index - (len(models) - 1) / 2) * height
            value = one.median if one.ratio is None else one.ratio
            if value is None:
                panel.text(0, at, f" {'failed' if one.said != 'not installed' else one.said}", va="center", fontsize=6)
                continue
            spread = None if one.low is None or one.high is None else [[max(value - one.low, 0)], [one.high - value]]
            panel.barh(at, value, height, xerr=spread, color=f"C{index}", error_kw={"lw": 0.8})
            panel.text(one.high or value, at, f"  {value:.3g}", va="center", fontsize=6)
    panel.set_yticks(range(len(contenders)), contenders, fontsize=8)
    panel.set_ylim(len(contenders) - 0.4, -0.6)
    panel.spines[["top", "right"]].set_visible(False)
