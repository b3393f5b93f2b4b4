"""The log made to agree with the records: what is missing, what is surplus, and what is left alone."""

from __future__ import annotations

import random
import time
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

import gevent
import orjson
import pytest

from relay import contract
from relay.bus.client import Bus
from relay.bus.jetstream import JetStream
from relay.bus.kv import Bucket
from relay.errors import BusRefused
from relay.tracking.facts import Fact, facts_of
from relay.tracking.groups import SHARED_TOKEN, group_token
from relay.tracking.log import Log, fact_publication
from relay.tracking.repair import Repair, Report
from relay.tracking.storage import StorageConfig, ensure_storage
from relay.tracking.tracker import HandedOver, Tracker
from tests.support.groups import put_records, record_of, send_mails, store
from tests.support.lfx import written_record
from tests.support.nats_server import NatsServer

AT = "2025-01-15T11:00:00Z"

NewServer = Callable[..., NatsServer]
NewBus = Callable[[str], Bus]


@pytest.fixture
def own(new_nats_server: NewServer, new_bus: NewBus) -> JetStream:
    """Bucket and log of the test's own; the log knows a repeated fact for a moment only."""
    jetstream = JetStream(new_bus(new_nats_server().url))
    assert ensure_storage(jetstream, StorageConfig()) == ""
    config = dict(jetstream.stream_info(contract.LOG_STREAM).config) | {"duplicate_window": 100_000_000}
    jetstream.api(f"STREAM.UPDATE.{contract.LOG_STREAM}", config)
    return jetstream


def looked(jetstream: JetStream, group_id: str | None, **options: Any) -> Report:
    """What is wrong, however new it is."""
    return Repair(jetstream, group_id, **{"min_age_seconds": 0, **options}).look()


def mended(jetstream: JetStream, group_id: str | None, **options: Any) -> Report:
    """What was done; and there is nothing left to be done."""
    gevent.sleep(0.15)  # beyond the duplicate window
    report = Repair(jetstream, group_id, **{"min_age_seconds": 0, **options}).mend()
    again = looked(jetstream, group_id)
    assert (again.missing, again.surplus) == (Counter(), Counter())
    return report


def opens(*event_ids: str) -> list[dict[str, str]]:
    """A record's list of opens."""
    return [{"event_id": event_id, "opened_at": f"2025-01-15T12:00:0{n}Z"} for n, event_id in enumerate(event_ids)]


SPOKEN_OF = {Fact.SENT, Fact.DELIVERED, Fact.OPENED, Fact.OPEN, Fact.FAILED}
"""What every record says yes or no to, or how many."""
CLICKS = {Fact.CLICK, Fact.CLICKED}


# -- a group ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("group_id", ["spring", "an id with spaces", "=", "🚀", "x" * 300])
def test_a_group_is_mended_and_no_other_touched(own: JetStream, group_id: str) -> None:
    # Given a group that lacks a fact and has one too many, and another one likewise
    token = group_token(group_id)
    for each in (group_id, "other"):
        email_ids = send_mails(own, each, 3)
        lost = own.get_last(contract.LOG_STREAM, f"{contract.LOG_PREFIX}.{group_token(each)}.sent")
        assert lost is not None
        own.delete_msg(contract.LOG_STREAM, lost.sequence)
        store(own, [fact_publication(group_token(each), Fact.FAILED, email_ids[0], AT)])
    # When the group is looked at, nothing changes
    report = looked(own, group_id)
    assert (report.missing, report.surplus) == (Counter(sent=1), Counter(failed=1))
    assert (report.records, report.facts) == (3, 3)
    assert Log(own).counts(token) == {"sent": 2, "failed": 1}
    # And when it is mended, it is as its records say, and the other as it was
    report = mended(own, group_id)
    assert (report.missing, report.surplus) == (Counter(sent=1), Counter(failed=1))
    assert Log(own).counts(token) == {"sent": 3}
    assert Log(own).counts("other") == {"sent": 2, "failed": 1}


def test_no_such_group(own: JetStream) -> None:
    send_mails(own, "spring", 1)
    assert not looked(own, "no-such-group").is_known
    assert looked(own, "spring").is_known


def test_lfxs_mails_have_facts_then(own: JetStream) -> None:
    email_ids = [str(uuid.uuid4()) for _ in range(3)]
    optional = [(), ("delivered_at",), ("delivered_at", "opened_at_list", "last_opened_at", "failed_at")]
    put_records(own, {email_ids[n]: written_record(email_ids[n], "lfx", optional[n]) for n in range(3)})
    mended(own, "lfx")
    assert Log(own).counts("lfx") == {"sent": 3, "delivered": 2, "opened": 1, "open": 2, "failed": 1}


def test_mails_without_a_group(own: JetStream) -> None:
    # Given mails that were sent without a group, one of which lacks its fact
    tracker = Tracker(own, StorageConfig(), 1.0, on_change=lambda _: None)
    tracker.start()
    email_ids = [str(uuid.uuid4()) for _ in range(3)]
    for email_id in email_ids:
        tracker.note(HandedOver(email_id, email_id, "", "", time.time()))
    lost = own.get_last(contract.LOG_STREAM, f"{contract.LOG_PREFIX}.{SHARED_TOKEN}.sent")
    assert lost is not None
    own.delete_msg(contract.LOG_STREAM, lost.sequence)
    # Then each is a group of its own
    assert looked(own, email_ids[0]).is_well
    assert looked(own, email_ids[2]).missing == Counter(sent=1)
    report = mended(own, email_ids[2])
    assert (report.records, report.facts) == (1, 0)
    assert Log(own).counts(SHARED_TOKEN) == {"sent": 3}


def test_facts_without_a_record_are_kept(own: JetStream) -> None:
    send_mails(own, "spring", 2)
    store(own, [fact_publication("spring", Fact.SENT, "gone", AT), fact_publication("spring", Fact.OPEN, ">", AT)])
    moved = send_mails(own, "autumn", 1)
    store(own, [fact_publication("spring", Fact.OPEN, moved[0], AT)])
    report = mended(own, "spring")
    assert (report.ownerless, report.is_well) == (3, True)
    assert looked(own, None).ownerless == 3
    assert Log(own).counts("spring") == {"sent": 3, "open": 2}


def test_what_is_new_is_left_alone(own: JetStream) -> None:
    email_ids = send_mails(own, "spring", 2)
    own.delete_msg(contract.LOG_STREAM, 1)
    store(own, [fact_publication("spring", Fact.FAILED, email_ids[1], AT)])
    report = looked(own, "spring", min_age_seconds=60)
    assert (report.is_well, report.left_alone) == (True, 2)
    # Also a new fact of an old record: an event may be on its way
    gevent.sleep(0.6)
    store(own, [fact_publication("spring", Fact.DELIVERED, email_ids[1], AT)])
    report = looked(own, "spring", min_age_seconds=0.5)
    assert (report.missing, report.surplus) == (Counter(sent=1), Counter(failed=1))


def test_what_the_log_takes_for_repeated_is_not_said_to_be_appended(own: JetStream) -> None:
    config = dict(own.stream_info(contract.LOG_STREAM).config) | {"duplicate_window": 60 * 10**9}
    own.api(f"STREAM.UPDATE.{contract.LOG_STREAM}", config)
    send_mails(own, "spring", 1)
    own.delete_msg(contract.LOG_STREAM, 1)
    report = Repair(own, "spring", min_age_seconds=0).mend()
    assert (report.missing, report.repeated) == (Counter(), 1)


def test_a_log_that_forbids_deletion(own: JetStream) -> None:
    # Given a log that forbids it, and mails that lack a fact each, behind some that have one too many
    config = dict(own.stream_info(contract.LOG_STREAM).config) | {"deny_delete": True}
    own.api(f"STREAM.UPDATE.{contract.LOG_STREAM}", config)
    too_many = send_mails(own, "spring", 3)
    store(own, [fact_publication("spring", Fact.FAILED, email_id, AT) for email_id in too_many])
    put_records(own, {f"lacks-{n}": record_of(f"lacks-{n}", "spring") for n in range(3)})
    # When it is mended
    report = Repair(own, "spring", min_age_seconds=0).mend()
    # Then what is missing is there, and it says what is still too much, and why
    assert Log(own).counts("spring") == {"sent": 6, "failed": 3}
    assert (report.missing, report.surplus, report.undeleted) == (Counter(sent=3), Counter(), Counter(failed=3))
    assert report.why_undeleted == "JetStream: message delete not permitted"
    assert not report.is_well


def test_what_was_done_before_it_stopped_is_known(own: JetStream) -> None:
    # Given a log that is full after two more facts
    config = dict(own.stream_info(contract.LOG_STREAM).config) | {"max_msgs": 2, "discard": "new"}
    own.api(f"STREAM.UPDATE.{contract.LOG_STREAM}", config)
    put_records(own, {f"id-{n}": record_of(f"id-{n}", "spring") for n in range(5)})
    # When it is mended as far as that goes
    work = Repair(own, "spring", min_age_seconds=0)
    with pytest.raises(BusRefused, match="maximum messages exceeded"):
        work.mend()
    assert work.report.missing == Log(own).counts("spring") == Counter(sent=2)


def test_what_is_logged_on_the_way_is_not_appended_again(own: JetStream) -> None:
    # Given mails that lack facts, in more parts than one
    email_ids = send_mails(own, "spring", 40)
    delivered = orjson.loads(record_of("x", "spring")) | {"delivered": True, "delivered_at": AT}
    put_records(own, {email_id: orjson.dumps(delivered | {"email_id": email_id}) for email_id in email_ids})
    late = [fact_publication("spring", Fact.DELIVERED, email_id, AT)._replace(headers={}) for email_id in email_ids]
    seen = 0

    def log_them(count: int) -> None:
        """When log and records have been read, the worker logs what it owed, beyond the duplicate window."""
        nonlocal seen
        seen += count
        if late and seen == 80:
            store(own, late)
            late.clear()

    # When they are logged at last while the group is being mended
    report = Repair(own, "spring", min_age_seconds=0, facts_at_once=15).mend(log_them)
    # Then nothing is appended
    assert not late
    assert report.is_well
    assert Log(own).counts("spring") == {"sent": 40, "delivered": 40}


@pytest.mark.parametrize("facts_at_once", [1000, 7])
def test_everything_is_read_once_however_many_parts_there_are(own: JetStream, facts_at_once: int) -> None:
    for number in range(5):
        send_mails(own, f"group-{number}", 10)
    for group_id, facts in ((None, 50), ("group-3", 10)):
        work = Repair(own, group_id, min_age_seconds=0, facts_at_once=facts_at_once)
        read: list[int] = []
        report = work.look(read.append)
        assert (report.is_well, report.records, report.facts) == (True, facts, facts)
        assert sum(read) == work.total == facts + 50


def test_an_id_that_is_a_mails_and_a_groups(own: JetStream) -> None:
    # Given a mail that was sent without a group, and others whose caller took its id for their group
    (other,) = send_mails(own, "solo", 1)
    put_records(own, {"solo": record_of("solo", "solo")})
    store(own, [fact_publication(SHARED_TOKEN, Fact.SENT, "solo", AT)])
    store(own, [fact_publication(SHARED_TOKEN, Fact.SENT, "nobody-elses", AT)])
    # Then both are meant, and both are well
    work = Repair(own, "solo", min_age_seconds=0)
    assert (work.has_mail_without_group, work.is_alone) == (True, False)
    report = work.mend()
    assert (report.is_well, report.records, report.facts, report.ownerless) == (True, 2, 2, 0)
    assert Log(own).counts(SHARED_TOKEN) == {"sent": 2}
    # And what is wrong with either is mended under its own token
    store(own, [fact_publication(SHARED_TOKEN, Fact.FAILED, "solo", AT)])
    store(own, [fact_publication("solo", Fact.FAILED, other, AT)])
    assert mended(own, "solo").surplus == Counter(failed=2)
    assert Log(own).counts(SHARED_TOKEN) == {"sent": 2}
    assert Log(own).counts("solo") == {"sent": 1}


def test_an_id_that_is_a_mails_alone(own: JetStream) -> None:
    send_mails(own, "spring", 3)
    put_records(own, {"solo": record_of("solo", "solo")})
    work = Repair(own, "solo", min_age_seconds=0)
    assert (work.has_mail_without_group, work.is_alone) == (True, True)
    report = work.mend()
    assert (report.missing, report.records) == (Counter(sent=1), 1)
    assert Log(own).counts(SHARED_TOKEN) == {"sent": 1}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("facts_at_once", [100_000, 40])
def test_whatever_went_wrong_is_mended(own: JetStream, seed: int, facts_at_once: int) -> None:
    # Given groups of all kinds, whose records say one thing and whose log another
    chance = random.Random(seed)
    expected: dict[str, Counter[str]] = {}
    records: dict[str, bytes] = {}
    publications = []
    for number in range(60):
        email_id = f"id-{seed}-{number}"
        group_id = chance.choice(["spring", "an odd one", email_id])
        count = chance.choice([0, 0, 1, 3])
        record = orjson.loads(record_of(email_id, group_id)) | {
            "delivered": chance.random() < 0.5,
            "opened": bool(count),
            "open_count": count,
            "opened_at_list": opens(*(f"e{each}" for each in range(count)))[: chance.choice([1, 3])],
        }
        if chance.random() < 0.3:
            record |= {"click_count": 2, "last_clicked_at": AT, "failed": True, "bounced_at": AT}
        token = SHARED_TOKEN if group_id == email_id else group_token(group_id)
        records[email_id] = orjson.dumps(record)
        should = Counter({"sent": 1} | {name: n for name, n in facts_of(record).items() if n})
        expected.setdefault(token, Counter()).update(should)
        for kind in Fact:
            copies = chance.choice([0, should[kind.value], should[kind.value] + 1])
            if not should[kind.value] and kind not in SPOKEN_OF and not (kind in CLICKS and "click_count" in record):
                copies = 0  # A fact that the record is silent about stays.
            event_ids = [chance.choice([f"e{copy}", "x"]) for copy in range(copies)]
            publications += [fact_publication(token, kind, email_id, AT, event_id) for event_id in event_ids]
    put_records(own, records)
    chance.shuffle(publications)
    store(own, publications)
    # When everything is mended
    mended(own, None, facts_at_once=facts_at_once)
    # Then every group's counts are those of its records
    for token, counts in expected.items():
        assert Counter(Log(own).counts(token)) == counts


def test_it_harms_nothing_while_mails_are_sent(own: JetStream) -> None:
    # Given a group, and a tracker that goes on sending to it while it is mended again and again
    tracker = Tracker(own, StorageConfig(), 2.0, on_change=lambda _: None)
    tracker.start()
    is_over = False
    sent = 0
    bucket = Bucket(own, contract.RECIPIENTS_BUCKET)

    def deliver(value: bytes | None) -> bytes | None:
        return orjson.dumps(orjson.loads(value or b"{}") | {"delivered": True, "delivered_at": AT})

    def send() -> None:
        nonlocal sent
        while not is_over:
            email_id = str(uuid.uuid4())
            tracker.note(HandedOver(email_id, "busy", "", "", time.time()))
            bucket.update(email_id, deliver, deadline=time.monotonic() + 5)
            gevent.sleep(0.002)  # between the record and its fact, as where an event is folded
            store(own, [fact_publication("busy", Fact.DELIVERED, email_id, AT)])
            sent += 1

    senders = [gevent.spawn(send) for _ in range(4)]
    try:
        reports = [Repair(own, "busy", min_age_seconds=30).mend() for _ in range(10)]
    finally:
        is_over = True
        gevent.joinall(senders, timeout=10, raise_error=True)
    # Then nothing was appended, nothing deleted, and the counts are right
    assert all(report.is_well for report in reports)
    assert sent > 20
    assert Log(own).counts("busy") == {"sent": sent, "delivered": sent}
    assert looked(own, "busy").is_well


@pytest.mark.parametrize("allow_direct", [True, False])
def test_it_works_without_direct_gets(own: JetStream, allow_direct: bool) -> None:
    for stream in (f"KV_{contract.RECIPIENTS_BUCKET}", contract.LOG_STREAM):
        config = dict(own.stream_info(stream).config) | {"allow_direct": allow_direct}
        own.api(f"STREAM.UPDATE.{stream}", config)
    send_mails(own, "spring", 20)
    own.delete_msg(contract.LOG_STREAM, 7)
    assert mended(own, None).missing == Counter(sent=1)
    assert Log(own).counts("spring") == {"sent": 20}
