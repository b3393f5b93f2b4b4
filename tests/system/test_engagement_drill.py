"""Engagement events by a whole relay under stress: the drills ``engagement…`` with less load."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from scripts.drills.engagement import Kept, judge, play_all, poison_all
from scripts.drills.frame import Findings, Stage
from scripts.drills.mail_events import plan
from tests.conftest import require
from tests.support.moto_server import IS_THERE
from tests.support.nats_server import BINARY


@pytest.fixture
def stage() -> Iterator[Stage]:
    """A stage whose servers end with the test."""
    require(BINARY.exists(), "nats-server")
    made = Stage()
    with made:
        yield made
    made.forget()


def hold(findings: Findings) -> None:
    """Fails with what does not hold."""
    assert findings.is_good, ([check for check in findings.checks if not check.holds], findings.remarks)


def test_killed_workers_and_a_restart_of_nats_lose_and_double_nothing(stage: Stage) -> None:
    require(IS_THERE, "moto's server")
    findings = Findings()
    asyncio.run(play_all(stage, findings, seconds=0.0, seed=1, mails=60, events=600))
    hold(findings)


def test_garbage_is_parked_and_costs_the_rest_nothing(stage: Stage) -> None:
    findings = Findings()
    # Rounds of a fraction of a second differ by what the machine does; a visibility timeout would be 30 s.
    asyncio.run(poison_all(stage, findings, seed=1, mails=30, events=300, most_slower=5.0))
    hold(findings)


def test_the_judge_sees_what_is_wrong() -> None:
    """It would be of no use if it were content with anything."""
    mails = plan(5, 50, ["spring"], 1)
    for mail in mails:
        mail.begin(f"mail-{mail.number}", f"ses-{mail.number}", time.time())
    findings = Findings()
    judge(findings, "nothing", mails, Kept({}, Counter(), Counter()), {"spring": {}})
    assert [check.holds for check in findings.checks] == [False] * 3
