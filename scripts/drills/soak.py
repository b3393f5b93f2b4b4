"""Twice what can be done, for as long as you like: memory stays flat, and every mail is accounted for.

    python -m scripts.drills.soak [--seconds 600] [--keep]

The overload of the drill of that name, alone and longer. Exits 1 when a check does not hold. Writes what it found to
``var/soak.json``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from scripts.drills.overload import SOAK
from scripts.drills.run import end_on_signals, run, write

WRITTEN = Path(__file__).parents[2] / "var" / "soak.json"
LEAST_SECONDS = 30.0
"""Shorter, the fifths that are compared hold too little."""


def main() -> int:
    """Soaks as long as the command line says; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SOAK.seconds, help="length of the load, %(default)g")
    parser.add_argument("--keep", action="store_true", help="keep logs and stores, also when everything holds")
    options = parser.parse_args()
    if options.seconds < LEAST_SECONDS:
        parser.error(f"--seconds must be at least {LEAST_SECONDS:g}")
    end_on_signals()
    found = run(SOAK, options.seconds, None, is_kept=options.keep)
    write(WRITTEN, [found])
    return 0 if found["is_good"] else 1


if __name__ == "__main__":
    sys.exit(main())
