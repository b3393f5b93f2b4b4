"""Prometheus's own judge of metrics, rules and expressions. Debian has it in the package ``prometheus``."""

from __future__ import annotations

import shutil
import subprocess

from tests.conftest import require


def promtool(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs promtool; skips the test where there is none, and fails it in CI."""
    found = shutil.which("promtool")
    require(found is not None, "promtool")
    return subprocess.run(
        [found or "", *arguments], input=stdin, capture_output=True, text=True, timeout=60, check=False
    )
