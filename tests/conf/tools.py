"""The tools that check what lies in ``conf/``, each of them from a package: a test is skipped where one is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import require

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
GO_BIN = Path.home() / "go" / "bin"


def tool(name: str, comes_with: str) -> str:
    """The path of a program: in this virtual environment, on PATH, or where Go installs."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name) or shutil.which(name, path=GO_BIN)
    require(found is not None, f"{name} ({comes_with})")
    assert found is not None
    return found


def run(*command: str, directory: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs it to its end; never raises for its exit code."""
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=directory)
