"""The code blocks of the README and of every page run, in order, each page in one namespace.

A block of text right after one of code is what that prints.
"""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch

from .architectures import library

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    if "```python" in page.read_text(encoding="utf8")
)
#: What a page is skipped without.
NEEDS = {"docs/integrations.md": ("pytorch_lightning", "transformers", "accelerate")}
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    for name in NEEDS.get(page, ()):
        library(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    torch.set_default_dtype(torch.float32)
    text = (ROOT / page).read_text(encoding="utf8")
    namespace: dict[str, object] = {"__name__": "page"}
    for match in BLOCK.finditer(text):
        line = text[: match.start()].count("\n") + 2
        # Padded, so that a traceback shows the page's own line number.
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile("\n" * (line - 1) + match.group(1), page, "exec"), namespace)
        if match.group(2) is not None:
            assert printed.getvalue() == match.group(2), f"{page}, line {line}"
