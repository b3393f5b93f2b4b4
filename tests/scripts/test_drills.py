"""The drills' runner, on drills of its own; what the drills judge by; and that their page names them all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from scripts.drills import run as runner
from scripts.drills.frame import Drill, Findings, Stage
from scripts.drills.garbage import FORBIDDEN, GOOD, Garbage
from scripts.drills.open_loop import Asking, Request, judge_account
from scripts.drills.run import DRILLS, Lanes, run
from scripts.drills.tracking import Kept

ROOT = Path(__file__).parents[2]
PLAYER = """
import json, sys, time
from pathlib import Path

name, directory, into = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[sys.argv.index("--into") + 1])
begun = time.monotonic()
print(f"{name} begins", flush=True)
time.sleep(0.3)
print(f"{name} ends", flush=True)
(directory / name).write_text(json.dumps([begun, time.monotonic()]))
if name == "dies":
    sys.exit(3)
played = directory / f"{name}.played"
times = int(played.read_text()) + 1 if played.exists() else 1
played.write_text(str(times))
is_good = not name.startswith("wrong") and times > {"late": 1, "later": 2}.get(name, 0)
check = {"what": "pigs fly", "holds": is_good, "seen": f"{times} of them"}
found = {"name": name, "is_good": is_good, "is_late": name.startswith("late"), "seconds": 1, "took_seconds": 0.3,
         "checks": [check], "problem": ""}
into.write_text(json.dumps({"drills": [found]}))
"""


# -- the runner --------------------------------------------------------------------------------------------------------
def holding(stage: Stage, seconds: float) -> Findings:
    """A drill in which all is well."""
    del stage
    findings = Findings()
    findings.figures["seconds"] = seconds
    findings.check("time passes", True)
    return findings


def failing(stage: Stage, seconds: float) -> Findings:
    """A drill that finds something."""
    findings = holding(stage, seconds)
    findings.check("pigs fly", False, "none")
    return findings


def breaking(stage: Stage, seconds: float) -> Findings:
    """A drill that breaks."""
    raise RuntimeError(f"after {seconds} s on {stage.directory}")


def silent(stage: Stage, seconds: float) -> Findings:
    """A drill that checks nothing."""
    del stage, seconds
    return Findings()


@pytest.mark.parametrize(
    ("play", "is_good", "problem"),
    [(holding, True, ""), (failing, False, ""), (breaking, False, "RuntimeError"), (silent, False, "")],
)
def test_a_drill_is_good_when_it_checked_something_and_all_of_it_holds(play: Any, is_good: bool, problem: str) -> None:
    found = run(Drill("a drill", play, 1.0, 5.0), 1.0, None, is_kept=False)
    assert found["is_good"] is is_good
    assert problem in found["problem"]


def test_a_drill_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    # In a process of its own: what interrupts it is a signal.
    program = tmp_path / "late.py"
    program.write_text(
        "import json, time\n"
        "from scripts.drills.frame import Drill\n"
        "from scripts.drills.run import end_on_signals, run\n"
        "end_on_signals()\n"
        "print(json.dumps(run(Drill('late', lambda *_: time.sleep(60), 0.2, 0.3), 0.2, None, is_kept=False)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["is_good"]
    assert "it took longer than 0.5 s" in found["problem"]


def lanes(tmp_path: Path) -> Lanes:
    """Whose drills are played by ``PLAYER``."""
    player = tmp_path / "player.py"
    player.write_text(PLAYER)
    return Lanes([str(tmp_path)], is_whole=False, program=(sys.executable, str(player)))


def test_drills_are_played_two_at_a_time_and_some_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drills = [
        Drill("lonely", holding, 1.0, 5.0, is_alone=True),
        *(Drill(f"social-{number}", holding, 1.0, 5.0) for number in range(5)),
        Drill("shy", holding, 1.0, 5.0, is_alone=True),
    ]
    playing = lanes(tmp_path)
    playing.play(drills)
    assert playing.played.keys() == {drill.name for drill in drills}
    times = {drill.name: json.loads((tmp_path / drill.name).read_text()) for drill in drills}

    def company(name: str) -> int:
        """How many others went on when it began."""
        begun = times[name][0]
        return sum(other[0] <= begun < other[1] for who, other in times.items() if who != name)

    assert max(company(drill.name) for drill in drills) == 1
    assert company("lonely") == company("shy") == 0
    assert max(ended for name, (_, ended) in times.items() if name.startswith("social")) <= times["lonely"][0]
    # What they print does not mix.
    printed = capsys.readouterr().out.split()
    names = printed[::2]
    assert names[::2] == names[1::2]
    assert printed[1::2] == ["begins", "ends"] * len(drills)


def test_a_drill_whose_process_dies_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    playing = lanes(tmp_path)
    playing.play([Drill("dies", holding, 1.0, 5.0), Drill("lives", holding, 1.0, 5.0)])
    assert playing.played["lives"]["is_good"]
    assert not playing.played["dies"]["is_good"]
    assert "dies: its process ended with 3 before it said what it found" in capsys.readouterr().out
    runner.show_all([playing.played["dies"], playing.played["lives"]], 1.0)
    assert "2 drills took 1 s" in capsys.readouterr().out


def test_a_drill_that_was_only_late_is_played_once_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("late", "later", "wrong", "well")
    playing = lanes(tmp_path)
    playing.play([Drill(name, holding, 1.0, 5.0) for name in names])
    assert {name: (tmp_path / f"{name}.played").read_text() for name in names} == {
        "late": "2",
        "later": "2",
        "wrong": "1",
        "well": "1",
    }
    assert {name: playing.played[name]["is_good"] for name in names} == {
        "late": True,
        "later": False,
        "wrong": False,
        "well": True,
    }
    assert playing.played["late"]["first"]["checks"][0]["seen"] == "1 of them"
    capsys.readouterr()
    runner.show_all([playing.played[name] for name in names], 2.0)
    late, why_late, later, why_first, why_second, wrong, why_wrong, well, total = capsys.readouterr().out.split("\n")[
        1:-1
    ]
    assert late.endswith("held, played again for its timing")
    assert why_late.strip() == "✗ pigs fly (1 of them)"
    assert later.endswith("not well, played again for its timing")
    assert (why_first.strip(), why_second.strip()) == ("✗ pigs fly (1 of them)", "✗ pigs fly (2 of them)")
    assert wrong.endswith("not well")
    assert why_wrong.strip() == "✗ pigs fly (1 of them)"
    assert well.endswith("held")
    assert total.endswith("one after the other 2 s")


def late(stage: Stage, seconds: float) -> Findings:
    """A drill in which something takes too long."""
    findings = holding(stage, seconds)
    findings.check_timing("pigs fly far", False, "1 m")
    return findings


@pytest.mark.parametrize(
    ("play", "is_late"), [(late, True), (holding, False), (failing, False), (breaking, False), (silent, False)]
)
def test_a_drill_is_late_when_nothing_but_timings_does_not_hold(play: Any, is_late: bool) -> None:
    found = run(Drill("a drill", play, 1.0, 5.0), 1.0, None, is_kept=False)
    assert found["is_late"] is is_late


def test_a_timing_excuses_nothing_else() -> None:
    findings = Findings()
    findings.check_timing("pigs fly far", False)
    findings.check("pigs fly", False)
    assert not findings.is_late


def test_a_drill_is_as_long_as_it_is_told() -> None:
    assert Drill("short", holding, 5.0, 1.0).length_seconds(is_whole=True) == 5.0
    drill = Drill("long", holding, 5.0, 1.0, whole_seconds=50.0)
    assert (drill.length_seconds(is_whole=False), drill.length_seconds(is_whole=True)) == (5.0, 50.0)


def test_the_page_names_every_drill_with_its_lengths() -> None:
    page = (ROOT / "docs" / "drills.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)`(, alone)? \| (\d+) s, (\d+) s \| (\d+) s, (\d+) s \|", page, re.MULTILINE)
    told = [(name, bool(alone), *map(int, numbers)) for name, alone, *numbers in rows]
    lengths = [(drill, drill.seconds, drill.length_seconds(is_whole=True)) for drill in DRILLS]
    assert told == [
        (drill.name, drill.is_alone, usual, whole, usual + drill.margin_seconds, whole + drill.margin_seconds)
        for drill, usual, whole in lengths
    ]


# -- the account -------------------------------------------------------------------------------------------------------
def reply_of(number: int, **more: str) -> tuple[float, dict[str, Any]]:
    """That a mail was relayed."""
    return (time.monotonic(), {"email_id": f"id-{number}", **more})


class Account:
    """Three mails of which everybody says the same; tests change who says what."""

    def __init__(self) -> None:
        self.asking = Asking(["nats://127.0.0.1:1"], 1.0, "account")
        self.asking.requests = [Request(0.0, replies=[reply_of(number)]) for number in range(3)]
        self.taken = {f"id-{number}": 1 for number in range(3)}
        self.records: dict[str, dict[str, Any]] = {f"id-{number}": {} for number in range(3)}
        self.facts = Counter(self.taken)
        self.totals = {"account-0": 3}

    def failed(self) -> list[str]:
        """What does not hold."""
        findings = Findings()
        kept = {"account-0": Kept(self.records, {"sent": self.facts})}
        judge_account(findings, self.asking, self.taken, kept, self.totals)
        return [check.what for check in findings.checks if not check.holds]


def test_an_account_that_agrees_holds() -> None:
    assert Account().failed() == []


def test_an_account_misses_a_reply() -> None:
    account = Account()
    account.asking.requests.append(Request(0.0))
    assert account.failed() == ["every request got exactly one reply"]
    # … unless its caller was cut off; then the mail may have gone out
    account.asking.requests[-1].is_cut = True
    account.taken["id-3"] = 1
    assert account.failed() == []


def test_an_account_finds_what_was_doubled() -> None:
    account = Account()
    account.asking.requests[0].replies.append(reply_of(0))
    assert account.failed() == ["every request got exactly one reply"]
    account = Account()
    account.taken["id-0"] = 2
    assert account.failed() == ["no mail was taken twice"]
    account = Account()
    account.facts["id-0"] = 2
    account.totals["account-0"] = 4
    assert account.failed() == ["no fact is there twice"]


def test_an_account_finds_what_is_missing_and_what_was_invented() -> None:
    account = Account()
    del account.taken["id-1"]
    assert account.failed() == [
        "every mail that was acknowledged was taken, once",
        "nothing is recorded that was not sent",
    ]
    account = Account()
    del account.records["id-1"]
    assert account.failed() == ["every mail that was acknowledged has its record and its fact"]
    account = Account()
    account.taken["id-9"] = 1
    assert account.failed() == ["what else was taken is in doubt or was cut off"]
    account = Account()
    account.totals["account-0"] = 2
    assert account.failed() == ["the counts are exact"]


# -- garbage -----------------------------------------------------------------------------------------------------------
def test_garbage_is_garbage_and_the_same_each_time() -> None:
    ours, others = Garbage(1), Garbage(1)
    asked = [ours.request() for _ in range(3000)]
    assert asked == [others.request() for _ in range(3000)]
    assert len({each.kind for each in asked}) == 12
    assert max(len(each.payload) + len(each.headers) for each in asked) < 1_000_000
    good = json.dumps(GOOD).encode()
    assert all(each.payload != good or each.headers or each.reply_subject in FORBIDDEN for each in asked)
