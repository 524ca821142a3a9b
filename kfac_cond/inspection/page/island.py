"""Data inside a page: one JSON text that no name in it can end."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

DIGITS = 8
"""Significant digits of a number in a page: more than it shows, so that what is counted from them is exact as shown."""

ESCAPED = {character: f"\\u{ord(character):04x}" for character in "<>&'\u2028\u2029\u007f"}


def island(data: Any) -> str:
    """Data as JSON that is inert inside a ``<script>`` element.

    Whatever could end or begin an element, or a line of a script, is written as an escape of JSON. JSON knows no number
    that is not finite: NaN becomes null, an infinity the largest number there is, which the page shows as one.

    Args:
        data: mappings, sequences, strings, numbers, booleans and None.
    """
    text = json.dumps(_plain(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escape in ESCAPED.items():
        text = text.replace(character, escape)
    # A lone surrogate is no text that a file could hold.
    return "".join(f"\\u{ord(c):04x}" if "\ud800" <= c <= "\udfff" else c for c in text)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)
    if math.isnan(number):
        return None
    if math.isinf(number):
        return math.copysign(sys.float_info.max, number)
    return float(f"{number:.{DIGITS}g}")
