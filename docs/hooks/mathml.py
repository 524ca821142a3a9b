"""Turns formulas into MathML when the pages are built, so that they show without a network and without scripts."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL)


def _mathml(match: re.Match[str]) -> str:
    inline, block = match.group(2), match.group(3)
    latex = html.unescape(inline if inline is not None else block).strip()
    return convert(latex, display="inline" if inline is not None else "block")


def on_page_content(content: str, **_: Any) -> str:
    """Replace what the arithmatex extension marked as formulas."""
    return _FORMULA.sub(_mathml, content)
