"""Runs of more than two ranks take longer: they are left to continuous integration."""

from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        of = getattr(item, "callspec", None)
        if Path(__file__).parent in item.path.parents and of is not None and of.params.get("world", 2) > 2:
            item.add_marker(pytest.mark.slow)
