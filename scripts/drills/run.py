"""Runs the drills, all of them or those that are named, and says what they found.

    python -m scripts.drills.run [NAME ...] [--whole] [--seconds 40] [--seed 7] [--keep]

Several drills are played two at a time, each in a process of its own, whose output is shown when it has ended; those
that say how long something takes are played alone. One in which nothing but a timing did not hold is played once more
when all others have ended, and that counts; what else does not hold is never tried again. Exits 1 when a check does not
hold, when a drill breaks, when one takes longer than it may, or all of them together longer than ``TOTAL_SECONDS``.
Writes all findings to ``var/drills.json``. A new drill is a file with a function, and its ``Drill`` in the table here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from scripts.drills import (
    clock,
    engagement,
    garbage,
    idempotency,
    nats_faults,
    overload,
    processes,
    ses,
    smtp_faults,
    tracking,
)
from scripts.drills.frame import Drill, Findings, Stage

DRILLS: tuple[Drill, ...] = (
    *ses.DRILLS,
    *tracking.DRILLS,
    *idempotency.DRILLS,
    *engagement.DRILLS,
    *overload.DRILLS,
    *processes.DRILLS,
    *nats_faults.DRILLS,
    *smtp_faults.DRILLS,
    *clock.DRILLS,
    *garbage.DRILLS,
)
ROOT = Path(__file__).parents[2]
WRITTEN = ROOT / "var" / "drills.json"
PROGRAM = (sys.executable, "-m", "scripts.drills.run")
TOTAL_SECONDS = 720.0
"""What all drills together may take at their usual lengths: so long every change waits for them."""
LANES = 2
"""Drills at a time: most wait most of the time."""
END_SECONDS = 60.0
"""Beyond its limit, for a drill to end what it started; then its process is killed."""

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
        "is_late": findings.is_late and not problem,
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


# -- several drills ----------------------------------------------------------------------------------------------------
class Lanes:
    """Drills in processes of their own, ``LANES`` at a time. Their output does not mix."""

    def __init__(self, arguments: Sequence[str], *, is_whole: bool, program: Sequence[str] = PROGRAM) -> None:
        """``arguments``: of the command line, for each of them, after its name; ``program`` plays one."""
        self._arguments = arguments
        self._program = program
        self._is_whole = is_whole
        self._lock = threading.Lock()
        self._running: list[subprocess.Popen[str]] = []
        self._is_over = False
        self.played: dict[str, dict[str, Any]] = {}
        """What each found, by name."""

    def play(self, drills: Sequence[Drill]) -> None:
        """Those that may have company first, the longest of them at once; then the others one by one."""
        together = sorted((each for each in drills if not each.is_alone), key=self._longest, reverse=True)
        try:
            self._play(together, LANES)
            self._play([each for each in drills if each.is_alone], 1)
            self._play_again([each for each in drills if self.played[each.name].get("is_late")])
        except BaseException:
            self._end()
            raise

    def _play_again(self, drills: Sequence[Drill]) -> None:
        """Alone, and each once: what it finds now counts, what it found first is kept with it."""
        first = {drill.name: self.played[drill.name] for drill in drills}
        self._play(drills, 1)
        for name, found in first.items():
            self.played[name]["first"] = found

    def _longest(self, drill: Drill) -> float:
        return drill.length_seconds(is_whole=self._is_whole) + drill.margin_seconds / 4

    def _play(self, drills: Iterable[Drill], lanes: int) -> None:
        left = deque(drills)
        threads = [threading.Thread(target=self._play_lane, args=(left,), daemon=True) for _ in range(lanes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.5)  # a signal is heard in between

    def _play_lane(self, left: deque[Drill]) -> None:
        while not self._is_over:
            try:
                drill = left.popleft()
            except IndexError:
                return
            found, printed = self._play_one(drill)
            with self._lock:
                self.played[drill.name] = found
                sys.stdout.write(printed)
                sys.stdout.flush()

    def _play_one(self, drill: Drill) -> tuple[dict[str, Any], str]:
        """What it found, and what it printed."""
        begun = time.monotonic()
        seconds = drill.length_seconds(is_whole=self._is_whole)
        with tempfile.TemporaryDirectory(prefix="relay-drills-") as directory:
            into = Path(directory) / "found.json"
            command = [*self._program, drill.name, *self._arguments, "--into", str(into)]
            colour = {"FORCE_COLOR": "1"} if console.is_terminal else {}
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=ROOT,
                env={**os.environ, **colour},
                start_new_session=True,  # Ctrl-C is for this process, which then ends the others in order
            )
            with self._lock:
                self._running.append(process)
            try:
                printed, _ = process.communicate(timeout=seconds + drill.margin_seconds + END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                printed, _ = process.communicate()
            with contextlib.suppress(FileNotFoundError, ValueError):
                found: dict[str, Any] = json.loads(into.read_text())["drills"][0]
                return found, printed
        problem = f"its process ended with {process.returncode} before it said what it found"
        return {
            "name": drill.name,
            "is_good": False,
            "is_late": False,
            "seconds": seconds,
            "took_seconds": round(time.monotonic() - begun, 1),
            "checks": [],
            "problem": problem,
        }, f"{printed}\n{drill.name}: {problem}\n"

    def _end(self) -> None:
        """Has those that run end what they started, and waits for them."""
        self._is_over = True
        with self._lock:
            running = list(self._running)
        for process in running:
            if process.poll() is None:
                process.terminate()
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)


def show_all(played: Sequence[dict[str, Any]], took_seconds: float) -> None:
    """Prints how long each took, what did not hold, and how long all took together."""
    console.print()
    summed = 0.0
    for found in played:
        first = found.get("first")
        verdict = "[green]held[/]" if found["is_good"] else "[red]not well[/]"
        took = found["took_seconds"] + (first["took_seconds"] if first else 0.0)
        summed += took
        again = ", played again for its timing" if first else ""
        console.print(f"  {found['name']:18} {found['seconds']:4g} s of load {took:6.0f} s  {verdict}{again}")
        for each in filter(None, (first, found)):
            for what in failures(each):
                console.print(f"    ✗ {what}", markup=False)
    console.print(f"  {len(played)} drills took {took_seconds:.0f} s; one after the other {summed:.0f} s")


def failures(found: dict[str, Any]) -> list[str]:
    """What did not hold, a line each."""
    lines = [f"{check['what']} ({check['seen']})" for check in found["checks"] if not check["holds"]]
    return lines + [line for line in found["problem"].strip().splitlines()[-1:] if line]


def main() -> int:
    """Runs what the command line names; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(drill.name for drill in DRILLS))
    parser.add_argument("--whole", action="store_true", help="each drill at its full length")
    parser.add_argument("--seconds", type=float, help="length of the load, instead of each drill's own; at least 40")
    parser.add_argument("--seed", type=int, help="of what some drills leave to chance, instead of their own")
    parser.add_argument("--keep", action="store_true", help="keep logs and stores, also when everything holds")
    parser.add_argument("--into", type=Path, default=WRITTEN, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.names) - {drill.name for drill in DRILLS}:
        parser.error(f"there is no drill named {', '.join(sorted(unknown))}")
    if options.seconds is not None and options.seconds < 40:
        parser.error("shorter than 40 s there is no room for a pause in which connections grow stale")
    end_on_signals()
    chosen = [drill for drill in DRILLS if not options.names or drill.name in options.names]
    begun = time.monotonic()
    if len(chosen) == 1:
        seconds = options.seconds or chosen[0].length_seconds(is_whole=options.whole)
        played = [run(chosen[0], seconds, options.seed, is_kept=options.keep)]
    else:
        lanes = Lanes(arguments_of(options), is_whole=options.whole)
        lanes.play(chosen)
        played = [lanes.played[drill.name] for drill in chosen]
        show_all(played, time.monotonic() - begun)
    took_seconds = time.monotonic() - begun
    write(options.into, played)
    failed = [each["name"] for each in played if not each["is_good"]]
    has_limit = len(chosen) == len(DRILLS) and not options.whole and options.seconds is None
    if has_limit and took_seconds > TOTAL_SECONDS:
        failed.append(f"all together took longer than {TOTAL_SECONDS:g} s")
    again = sum("first" in each for each in played)
    good = f"Everything held{f', {again} for the second time of asking' if again else ''}."
    console.print(f"\n[red]Not well: {', '.join(failed)}[/]" if failed else f"\n[green]{good}[/]")
    return 1 if failed else 0


def arguments_of(options: argparse.Namespace) -> list[str]:
    """The command line again, for each drill."""
    arguments = ["--whole"] if options.whole else []
    arguments += ["--seconds", str(options.seconds)] if options.seconds is not None else []
    arguments += ["--seed", str(options.seed)] if options.seed is not None else []
    return arguments + (["--keep"] if options.keep else [])


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
