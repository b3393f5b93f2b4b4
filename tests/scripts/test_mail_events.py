"""The drills' plain model of events against the relay's own folding: two ways to the same records.

Without servers, so that many seeds can be tried: every event of a mail in any order, some twice, some in one batch.
"""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest

from relay.tracking import folding
from relay.tracking.events import Event, read_notification
from relay.tracking.facts import COUNTED
from relay.tracking.record import new_record, rfc3339
from scripts.drills.mail_events import KINDS, Mail, Wanted, Way, analytics_of, plan

MAILS = 20
EVENTS = 300


def begun(seed: int) -> list[Mail]:
    """Mails that SES has, with all events told; those that SNS would have named have a name."""
    mails = plan(MAILS, EVENTS, ["spring", "", "a>b"], seed)
    for mail in mails:
        mail.begin(f"mail-{mail.number}", f"ses-{mail.number}", time.time())
        for number, each in enumerate(mail.happenings):
            each.event_id = each.event_id or f"sns-{mail.number}-{number}"
    return mails


def folded(mail: Mail, chance: random.Random) -> tuple[dict[str, Any], set[tuple[str, str, str, str]]]:
    """The record, and the facts that were stated, by the relay's own code."""
    record: dict[str, Any] = json.loads(
        new_record(
            email_id=mail.email_id,
            group_id=mail.group_id or mail.email_id,
            to=mail.to,
            subject_header=mail.subject_header,
            sent_at=rfc3339(time.time()),
            remote_id=mail.remote_id,
        )
    )
    told = [*mail.happenings, *(each.copy() for each in mail.happenings if each.is_twice)]
    chance.shuffle(told)
    stated = set()
    for each in told:
        each.way = Way.PUT if each.way is Way.ENVELOPED else each.way
        event = read_notification(each.body, time.time())
        assert isinstance(event, Event)
        record = folding.fold(record, event, rfc3339(time.time()))
        for fact in folding.facts(record, event):
            stated.add((fact.value, mail.email_id, event.event_id if fact in COUNTED else "", event.at))
    return record, stated


@pytest.mark.parametrize("seed", range(10))
def test_the_model_and_the_folding_agree(seed: int) -> None:
    chance = random.Random(seed)
    for mail in begun(seed):
        record, stated = folded(mail, chance)
        wanted = Wanted(mail)
        assert wanted.problem(record) == ""
        assert set(wanted.stated(record)) == stated


def test_a_plan_is_what_it_says() -> None:
    mails = plan(50, 2_000, ["spring", ""], 1)
    happenings = [each for mail in mails for each in mail.happenings]
    assert len(happenings) == 2_000
    assert sum(each.is_twice for each in happenings) == 600
    assert {each.kind for each in happenings} == set(KINDS)
    assert len(KINDS) == 10
    assert {each.way for each in happenings} == set(Way)
    assert plan(50, 2_000, ["spring", ""], 1) == mails
    assert plan(50, 2_000, ["spring", ""], 2) != mails


def busiest(mails: list[Mail]) -> Mail:
    """The mail with the most events."""
    return max(mails, key=lambda mail: len(mail.happenings))


def spoilt(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The record with one thing wrong, each."""
    opens = record["opened_at_list"]
    return {
        "an open too many": record | {"open_count": record["open_count"] + 1},
        "an open lost": record | {"opened_at_list": opens[1:]},
        "an open twice": record | {"opened_at_list": [*opens, opens[0]]},
        "a flag lost": record | {"opened": False},
        "a time": record | {"delivered_at": rfc3339(0)},
        "a field of nobody's": record | {"surplus": 1},
        "another was first": record | {"first": record["first"] | {"opened": "nobody"}},
        "nothing was first": {name: value for name, value in record.items() if name != "first"},
        "an event forgotten": record | {"folded_at": {}},
        "an event invented": record | {"folded_at": record["folded_at"] | {"nobody": rfc3339(0)}},
    }


def test_the_model_sees_what_is_wrong() -> None:
    mail = busiest(begun(3))
    record, _ = folded(mail, random.Random(3))
    wanted = Wanted(mail)
    assert wanted.problem(record) == ""
    assert wanted.problem(None) != ""
    for what, wrong in spoilt(record).items():
        assert wanted.problem(wrong) != "", what


def test_figures_of_a_group_are_counted_from_its_mails() -> None:
    mails = begun(4)
    told = analytics_of(mails)
    opens = {each.event_id for mail in mails for each in mail.happenings if each.kind == "Open"}
    openers = {mail.email_id for mail in mails if any(each.kind == "Open" for each in mail.happenings)}
    assert (told["total_sent"], told["opened"], told["unique_opened"]) == (MAILS, len(opens), len(openers))
