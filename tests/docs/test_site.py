"""The documentation as a site: it builds without a warning, leads everywhere, and fetches nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import require
from tests.docs.code_blocks import ROOT

CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
MKDOCS_IS_THERE = importlib.util.find_spec("mkdocs") is not None and importlib.util.find_spec("material") is not None
FETCHED = re.compile(r"""<(?:link|script|img|iframe|source|video)\b[^>]*?(?:src|href)=["']?((?:https?:)?//[^"'>\s]+)""")


def pages_in(nav: object) -> list[str]:
    """Every page, in the reader's order."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    assert not isinstance(parts, (str, int))
    return [page for part in parts for page in pages_in(part)]  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    require(MKDOCS_IS_THERE, "mkdocs-material (the extra `docs`)")
    directory = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return directory


def test_every_page_is_in_the_navigation_once() -> None:
    listed = pages_in(CONFIG["nav"])
    assert len(listed) == len(set(listed))
    assert set(listed) == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_it_builds_with_every_page(site: Path) -> None:
    for page in pages_in(CONFIG["nav"]):
        assert (site / page.replace(".md", ".html")).is_file(), page


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for path in site.glob("**/*.html"):
        assert FETCHED.findall(path.read_text()) == [], path.name
    for path in site.glob("**/*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", path.read_text()), path.name
    assert not any('class="mermaid"' in path.read_text() for path in site.glob("**/*.html")), "its script is elsewhere"


def test_every_link_of_the_readme_leads_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
