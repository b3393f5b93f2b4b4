"""The code that a page of docs/ shows, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def page(name: str) -> str:
    """A page of docs/."""
    return (DOCS / name).read_text()


def blocks(name: str, language: str) -> list[str]:
    """A page's code blocks of one language ('' for those that name none), in order."""
    return [code for named, code in re.findall(r"^```(\w*)\n(.*?)^```$", page(name), re.M | re.S) if named == language]


def files(name: str) -> dict[str, str]:
    """A page's JSON files: each is named at the begin of the paragraph above it."""
    return dict(re.findall(r"^`([\w-]+\.json)`(?:(?!^#).)*?^```json\n(.*?)^```$", page(name), re.M | re.S))
