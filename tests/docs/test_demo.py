"""``make demo`` as the README shows it. ``python -m tests.docs.test_demo`` puts into the README what it prints now."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.conftest import require
from tests.docs.code_blocks import ROOT, Block, blocks_of, comparable, is_as_shown
from tests.support.nats_server import BINARY
from tests.support.relay_process import clean_environment

README = ROOT / "README.md"


def shown_block() -> Block:
    """The README's block."""
    (block,) = (each for each in blocks_of(README) if each.code.startswith("$ make demo\n"))
    return block


def played() -> str:
    """What the demo prints; it must succeed."""
    done = subprocess.run(
        [sys.executable, "scripts/demo.py"],
        cwd=ROOT,
        env=clean_environment({}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_demo_prints_what_the_readme_shows() -> None:
    require(BINARY.exists(), "nats-server")
    shown, printed = _without_places(shown_block().code.partition("\n")[2]), _without_places(played())
    for line, other in zip(shown, printed, strict=False):
        assert line == other, "run `python -m tests.docs.test_demo`"
    assert is_as_shown(shown, printed)


def _without_places(text: str) -> list[str]:
    text = re.sub(r"(?<=127\.0\.0\.1:)\d+|(?<=port )\d+|(?<=state in ).*", "0", text)
    lines = comparable(re.sub(r'"00000\d"', '"000000"', text))
    return [line for line in lines if line]


if __name__ == "__main__":
    lines = [line.rstrip() for line in played().strip().splitlines() if not line.startswith("waiting: ")]
    output = re.sub(r"(?<=state in ).*", "/tmp/relay-demo-example", "\n".join(lines))
    README.write_text(README.read_text().replace(shown_block().code, f"$ make demo\n{output}\n", 1))
