"""One browser for all tests of pages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .browser import Browser, browsing


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with browsing() as started:
        yield started
