"""Runs the drills, all of them or those that are named, and says what they found.

    python -m scripts.drills.run [NAME ...] [--seconds 40] [--seed 7] [--keep]

Exits 1 when a check does not hold, when a drill breaks, or when one takes longer than it may. Writes all findings to
``var/drills.json``. A new drill is a file with a function, and its ``Drill`` in the table here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from scripts.drills import engagement, idempotency, overload, ses, tracking
from scripts.drills.frame import Drill, Findings, Stage

DRILLS: tuple[Drill, ...] = (
    *ses.DRILLS,
    *tracking.DRILLS,
    *idempotency.DRILLS,
    *engagement.DRILLS,
    *overload.DRILLS,
)
WRITTEN = Path(__file__).parents[2] / "var" / "drills.json"

console = Console(highlight=False, emoji=False, soft_wrap=True)


class TimeLimitExceeded(KeyboardInterrupt):
    """The drill takes too long. Of this kind because asyncio hands on no other that a signal raises in the middle."""


def run(drill: Drill, seconds: float, seed: int | None, *, is_kept: bool) -> dict[str, Any]:
    """Plays one drill, ends what it started, shows and returns what it found; ``is_kept``: its directory stays."""
    limit_seconds = seconds + drill.margin_seconds
    console.print(f"\n[bold]{drill.name}[/], {seconds:g} s of load, at most {limit_seconds:g} s in all")
    begun = time.monotonic()
    findings, problem = Findings(), ""
    stage = Stage(seed)
    try:
        with stage:
            try:
                signal.setitimer(signal.ITIMER_REAL, limit_seconds)
                findings = drill.play(stage, seconds)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    except TimeLimitExceeded:
        problem = f"it took longer than {limit_seconds:g} s; it was here:\n{traceback.format_exc()}"
    except Exception:  # noqa: BLE001 - whatever a drill meets, the others are played and this one is named
        problem = f"it broke:\n{traceback.format_exc()}"
    is_good = findings.is_good and not problem
    is_kept = is_kept or not is_good
    if not is_kept:
        stage.forget()
    took_seconds = time.monotonic() - begun
    show(findings, problem)
    if is_kept:
        console.print(f"  what its processes left is in {stage.directory}")
    console.print(f"  took {took_seconds:.0f} s")
    return {
        "name": drill.name,
        "is_good": is_good,
        "seconds": seconds,
        "took_seconds": round(took_seconds, 1),
        "figures": findings.figures,
        "checks": [check._asdict() for check in findings.checks],
        "remarks": findings.remarks,
        "problem": problem,
    }


def show(findings: Findings, problem: str) -> None:
    """Prints every figure and every check."""
    width = max(map(len, findings.figures), default=0)
    for name, value in findings.figures.items():
        console.print(f"  {name:{width}}  {value}", markup=False)
    for check in findings.checks:
        seen = f" [dim]({check.seen})[/]" if check.seen else ""
        console.print(f"  [green]✓[/] {check.what}{seen}" if check.holds else f"  [red]✗ {check.what}[/]{seen}")
    if problem or not findings.is_good:
        for remark in findings.remarks:
            console.print(f"    {remark}", markup=False)
        console.print(problem or "  a check does not hold, or there was none", markup=False, style="red")


def main() -> int:
    """Runs what the command line names; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(drill.name for drill in DRILLS))
    parser.add_argument("--seconds", type=float, help="length of the load, instead of each drill's own; at least 40")
    parser.add_argument("--seed", type=int, help="of what the engagement drills leave to chance, instead of their own")
    parser.add_argument("--keep", action="store_true", help="keep logs and stores, also when everything holds")
    options = parser.parse_args()
    if unknown := set(options.names) - {drill.name for drill in DRILLS}:
        parser.error(f"there is no drill named {', '.join(sorted(unknown))}")
    if options.seconds is not None and options.seconds < 40:
        parser.error("shorter than 40 s there is no room for a pause in which connections grow stale")
    end_on_signals()
    chosen = [drill for drill in DRILLS if not options.names or drill.name in options.names]
    played = [run(drill, options.seconds or drill.seconds, options.seed, is_kept=options.keep) for drill in chosen]
    write(WRITTEN, played)
    failed = [each["name"] for each in played if not each["is_good"]]
    console.print(f"\n[red]Not well: {', '.join(failed)}[/]" if failed else "\n[green]Everything held.[/]")
    return 1 if failed else 0


def end_on_signals() -> None:
    """Has ``run`` give up a drill that takes too long, and SIGTERM end everything as Ctrl-C does."""
    signal.signal(signal.SIGALRM, _give_up)
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def write(path: Path, played: list[dict[str, Any]]) -> None:
    """Keeps what was found."""
    path.parent.mkdir(exist_ok=True)
    told = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "drills": played,
    }
    path.write_text(json.dumps(told, indent=2) + "\n")


def _give_up(*_: object) -> None:
    raise TimeLimitExceeded


if __name__ == "__main__":
    sys.exit(main())
