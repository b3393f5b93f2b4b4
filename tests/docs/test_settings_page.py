"""docs/settings.md is made from ``relay.settings``, and ``python -m tests.docs.test_settings_page`` makes it."""

from __future__ import annotations

import re

from relay.cli.settings_text import markdown_table
from relay.settings import rows
from tests.docs.markdown import DOCS

PAGE = DOCS / "settings.md"
MARK = "<!-- made from relay/settings.py by `python -m tests.docs.test_settings_page` -->\n"


def made(text: str) -> str:
    """The page with the table of now behind the mark, each group under a heading of its own."""
    table = re.sub(r"^\*\*(.+)\*\*$", r"## \1", markdown_table(), flags=re.M)
    return text.partition(MARK)[0] + MARK + "\n" + table


def test_it_is_the_table_of_now() -> None:
    text = PAGE.read_text()
    assert made(text) == text, "run `python -m tests.docs.test_settings_page`"


def test_what_it_says_names_settings_only() -> None:
    known = {name for name, _, _, _ in rows()}
    own_words = PAGE.read_text().partition(MARK)[0]
    assert set(re.findall(r"\b[A-Z]{3,}(?:_[A-Z]+)+\b", own_words)) <= known


if __name__ == "__main__":
    PAGE.write_text(made(PAGE.read_text()))
