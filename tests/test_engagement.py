"""The job, against a real nats-server: events into records and facts, each once, whatever happens in between."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gevent
import orjson
import pytest

from relay import contract
from relay.bus.client import Bus, Publication
from relay.bus.jetstream import JetStream
from relay.bus.kv import Bucket
from relay.engagement import Engagement, EngagementConfig
from relay.errors import BusRefused, BusUnavailable
from relay.tracking.batch import DONE, Notification, Verdict
from relay.tracking.facts import Fact
from relay.tracking.folding import stated_at
from relay.tracking.groups import group_token
from relay.tracking.log import Log, fact_publication
from relay.tracking.parked import Parked, Parking
from relay.tracking.record import rfc3339
from relay.tracking.repair import Repair
from relay.tracking.storage import StorageConfig, ensure_storage
from tests.support.groups import SENT_AT, put_records, record_of, send_mails, store
from tests.support.nats_proxy import Action, NatsProxy
from tests.support.nats_server import NatsServer
from tests.support.ses_events import OBJECTS, enveloped, notification, ses_event

TIMEOUT_SECONDS = 5.0
EARLY_SECONDS = 60.0
LONG_AGO = 1_736_937_000.0
"""2025-01-15T10:30:00Z."""
WINDOW_SECONDS = 2


@pytest.fixture
def group_id() -> str:
    """A group of the test's own."""
    return f"group-{uuid.uuid4()}"


@pytest.fixture
def engagement(jetstream: JetStream) -> Engagement:
    """Ready to handle, on the shared server."""
    return made_ready(jetstream)


def made_ready(jetstream: JetStream) -> Engagement:
    assert ensure_storage(jetstream, StorageConfig()) == ""
    made = Engagement(jetstream, EngagementConfig(EARLY_SECONDS))
    made.prepare()
    return made


def note(kind: str, email_id: str, group_id: str, notification_id: str = "", **told: Any) -> Notification:
    """An event of a mail, enveloped."""
    received_count = told.pop("received_count", 1)
    queued_at = told.pop("queued_at", 0.0)
    body = enveloped(ses_event(kind, email_id, group_id=group_id, **told), notification_id or str(uuid.uuid4()))
    return notification(body, received_count, queued_at)


def handle(engagement: Engagement, *notifications: Notification) -> list[Verdict]:
    return engagement.handle(notifications, TIMEOUT_SECONDS)


def record(jetstream: JetStream, email_id: str) -> dict[str, Any]:
    entry = Bucket(jetstream, contract.RECIPIENTS_BUCKET).get_from_leader(email_id)
    assert entry is not None
    return dict(orjson.loads(entry.value))


def counts(jetstream: JetStream, group_id: str) -> dict[str, int]:
    """What the log holds of the group."""
    return Log(jetstream).counts(group_token(group_id))


def parked_now(jetstream: JetStream) -> list[Parked]:
    return [each for page in Parking(jetstream).pages() for each in page]


# -- what an event becomes --------------------------------------------------------------------------------------------
def test_every_kind_of_event_is_folded_and_stated(jetstream: JetStream, engagement: Engagement, group_id: str) -> None:
    (email_id,) = send_mails(jetstream, group_id, 1)
    batch = [note(kind, email_id, group_id, at=LONG_AGO) for kind in OBJECTS]
    assert handle(engagement, *batch) == [DONE] * len(batch)
    assert counts(jetstream, group_id) == dict.fromkeys((fact.value for fact in Fact), 1)
    found = record(jetstream, email_id)
    assert (found["open_count"], found["click_count"], found["delivered"], found["failed"]) == (1, 1, True, True)
    assert found["remote_id"] == f"ses-{email_id}"
    assert found["bounce"]["diagnostic"] == "smtp; 550 5.1.1 unknown"
    assert engagement.counts["folded"] == len(batch)


def test_a_raw_notification_that_comes_twice_counts_once(
    jetstream: JetStream, engagement: Engagement, group_id: str
) -> None:
    (email_id,) = send_mails(jetstream, group_id, 1)
    body = orjson.dumps(ses_event("Open", email_id, group_id=group_id, at=LONG_AGO, sent_at=LONG_AGO)).decode()
    assert handle(engagement, notification(body), notification(body)) == [DONE, DONE]
    assert engagement.counts["folded"] == 2
    before = Bucket(jetstream, contract.RECIPIENTS_BUCKET).get_from_leader(email_id)
    assert handle(engagement, notification(body)) == [DONE]
    assert Bucket(jetstream, contract.RECIPIENTS_BUCKET).get_from_leader(email_id) == before
    assert engagement.counts["repeated"] == 1
    assert counts(jetstream, group_id) == {"sent": 1, "open": 1, "opened": 1}


def test_events_of_a_mail_without_a_group_are_logged_together(jetstream: JetStream, engagement: Engagement) -> None:
    email_id = str(uuid.uuid4())
    before = Log(jetstream).counts("-").get("delivered", 0)
    send_mails(jetstream, email_id, 0)
    assert handle(engagement, note("Delivery", email_id, email_id, sent_at=LONG_AGO, queued_at=LONG_AGO)) == [DONE]
    assert Log(jetstream).counts("-")["delivered"] == before + 1


def test_what_is_no_event_of_ours_is_deleted_and_what_nobody_can_read_is_parked(
    jetstream: JetStream, engagement: Engagement
) -> None:
    foreign = ses_event("Open", "x" * 65, group_id="g")
    bodies = [
        "Successfully validated SNS topic for Amazon SES event publishing.",
        orjson.dumps(foreign).decode(),
        orjson.dumps({**ses_event("Open", "e"), "eventType": "Levitation"}).decode(),
        "{ this is no JSON",
        "[]",
    ]
    before = len(parked_now(jetstream))
    assert handle(engagement, *map(notification, bodies)) == [DONE] * len(bodies)
    parked = parked_now(jetstream)[before:]
    assert [each.body for each in parked] == bodies[3:]
    assert all(each.reason for each in parked)
    assert engagement.counts["dropped: validation"] == 1
    assert engagement.counts["dropped: foreign"] == 1
    assert engagement.counts["dropped: unknown type"] == 1
    assert engagement.counts["parked"] == 2


def test_a_mail_whose_record_is_broken_is_parked(jetstream: JetStream, engagement: Engagement, group_id: str) -> None:
    email_id = str(uuid.uuid4())
    put_records(jetstream, {email_id: b"{"})
    assert handle(engagement, note("Open", email_id, group_id)) == [DONE]
    assert engagement.counts["parked"] == 1


def test_a_mail_in_doubt_is_proved_to_be_sent(jetstream: JetStream, engagement: Engagement, group_id: str) -> None:
    email_id = str(uuid.uuid4())
    doubted = orjson.loads(record_of(email_id, group_id)) | {"outcome": "in_doubt"}
    put_records(jetstream, {email_id: orjson.dumps(doubted)})
    assert handle(engagement, note("Delivery", email_id, group_id)) == [DONE]
    assert "outcome" not in record(jetstream, email_id)
    assert counts(jetstream, group_id) == {"sent": 1, "delivered": 1}


# -- a record that is not there ---------------------------------------------------------------------------------------
def test_an_event_that_beats_its_record_waits_for_it(
    jetstream: JetStream, engagement: Engagement, group_id: str
) -> None:
    email_id = str(uuid.uuid4())
    (verdict,) = handle(engagement, note("Delivery", email_id, group_id, received_count=3))
    assert (verdict.is_done, verdict.retry_seconds) == (False, 8)
    assert engagement.counts["early"] == 1
    assert counts(jetstream, group_id) == {}


def test_a_record_that_does_not_come_is_made_from_the_event(
    jetstream: JetStream, engagement: Engagement, group_id: str
) -> None:
    email_id = str(uuid.uuid4())
    old = {"sent_at": LONG_AGO, "queued_at": time.time() - EARLY_SECONDS - 1}
    assert handle(engagement, note("Delivery", email_id, group_id, **old)) == [DONE]
    found = record(jetstream, email_id)
    assert (found["group_id"], found["to"], found["subject"]) == (group_id, "user@example.com", "Hello")
    assert (found["delivered"], found["sent_at"]) == (True, "2025-01-15T10:30:00.000Z")
    assert counts(jetstream, group_id) == {"sent": 1, "delivered": 1}
    assert engagement.counts["rebuilt"] == 1


@pytest.mark.parametrize("has_header", [True, False])
def test_a_mail_that_cannot_be_known_any_more_is_dropped(
    jetstream: JetStream, engagement: Engagement, group_id: str, has_header: bool
) -> None:
    email_id = str(uuid.uuid4())
    if has_header:  # its record was deleted on purpose, and does not come back
        put_records(jetstream, {email_id: record_of(email_id, group_id)})
        Bucket(jetstream, contract.RECIPIENTS_BUCKET).delete(email_id)
    late = note("Open", email_id, group_id, sent_at=LONG_AGO, has_header=has_header)
    assert handle(engagement, late) == [DONE]
    assert engagement.counts["unknown"] == 1
    assert Bucket(jetstream, contract.RECIPIENTS_BUCKET).get(email_id) is None
    assert counts(jetstream, group_id) == {}


# -- limits -----------------------------------------------------------------------------------------------------------
def test_a_bucket_of_lfx_takes_any_number_of_opens(new_nats_server: Callable[..., NatsServer], new_bus: Any) -> None:
    jetstream = JetStream(new_bus(new_nats_server().url))
    name = f"KV_{contract.RECIPIENTS_BUCKET}"
    config = {"name": name, "subjects": [f"$KV.{contract.RECIPIENTS_BUCKET}.>"], "max_msgs_per_subject": 1}
    jetstream.api(f"STREAM.CREATE.{name}", config | {"max_msg_size": 65_536, "discard": "new"})
    engagement = made_ready(jetstream)
    (email_id,) = send_mails(jetstream, "spring", 1)
    for start in range(0, 1000, 100):
        batch = [note("Open", email_id, "spring", f"{start + number:036}") for number in range(100)]
        assert handle(engagement, *batch) == [DONE] * 100
    found = record(jetstream, email_id)
    assert found["open_count"] == 1000
    assert 200 < len(found["opened_at_list"]) < 600
    assert counts(jetstream, "spring") == {"sent": 1, "open": 1000, "opened": 1}


def test_a_record_that_its_bucket_refuses_is_parked_and_costs_nobody_else(
    new_nats_server: Callable[..., NatsServer], new_bus: Any
) -> None:
    jetstream = JetStream(new_bus(new_nats_server().url))
    engagement = made_ready(jetstream)
    large, small = send_mails(jetstream, "spring", 2)
    bulky = record(jetstream, large) | {"other": "x" * 5000}
    put_records(jetstream, {large: orjson.dumps(bulky)})
    name = f"KV_{contract.RECIPIENTS_BUCKET}"
    config = dict(jetstream.stream_info(name).config)
    jetstream.api(f"STREAM.UPDATE.{name}", config | {"max_msg_size": 4096})
    engagement.prepare()
    assert handle(engagement, note("Open", large, "spring"), note("Open", small, "spring")) == [DONE, DONE]
    assert len(parked_now(jetstream)) == 1
    assert counts(jetstream, "spring") == {"sent": 2, "open": 1, "opened": 1}


def test_two_at_work_on_one_mail_lose_nothing(jetstream: JetStream, engagement: Engagement, group_id: str) -> None:
    """Both read the record before either writes: one of them meets a conflict, and folds anew."""
    other = made_ready(jetstream)
    (email_id,) = send_mails(jetstream, group_id, 1)
    at_work = [
        gevent.spawn(handle, each, *[note("Open", email_id, group_id) for _ in range(10)])
        for each in (engagement, other) * 5
    ]
    gevent.joinall(at_work, timeout=20, raise_error=True)
    undone = sum(not verdict.is_done for each in at_work for verdict in each.value)
    assert record(jetstream, email_id)["open_count"] == 100 - undone
    assert counts(jetstream, group_id) == {"sent": 1, "open": 100 - undone, "opened": 1}
    assert undone <= 20


# -- others ----------------------------------------------------------------------------------------------------------
class BeatenBucket(Bucket):
    """Somebody else is always faster."""

    def replacement(self, key: str, value: bytes, revision: int) -> Publication:
        return super().replacement(key, value, revision + 1)

    def creation(self, key: str, value: bytes) -> Publication:
        return super().replacement(key, value, 1 << 40)


@pytest.mark.parametrize("has_record", [True, False])
def test_who_is_always_beaten_states_nothing_and_leaves_the_event(
    jetstream: JetStream, engagement: Engagement, group_id: str, has_record: bool
) -> None:
    (email_id,) = send_mails(jetstream, group_id, 1) if has_record else [str(uuid.uuid4())]
    engagement._bucket = BeatenBucket(jetstream, contract.RECIPIENTS_BUCKET)
    (verdict,) = handle(engagement, note("Open", email_id, group_id, sent_at=LONG_AGO))
    assert (verdict.is_done, engagement.counts["conflict"]) == (False, 1)
    assert counts(jetstream, group_id) == ({"sent": 1} if has_record else {})


def test_a_sent_fact_whose_record_was_lost_is_not_stated_again(
    jetstream: JetStream, engagement: Engagement, group_id: str
) -> None:
    email_id = str(uuid.uuid4())
    fact = fact_publication(group_token(group_id), Fact.SENT, email_id, SENT_AT)
    store(jetstream, [fact._replace(headers={})])  # longer ago than the log remembers its id
    for _ in range(2):
        event = note("Delivery", email_id, group_id, "n-1", sent_at=time.time() - 100)
        assert handle(engagement, event) == [DONE]
    assert engagement.counts["rebuilt"] == 1
    assert counts(jetstream, group_id) == {"sent": 1, "delivered": 1}


def test_an_expired_mail_does_not_come_back(new_nats_server: Callable[..., NatsServer], new_bus: Any) -> None:
    jetstream = JetStream(new_bus(new_nats_server().url))
    assert ensure_storage(jetstream, StorageConfig(ttl_days=1)) == ""
    engagement = made_ready(jetstream)
    assert handle(engagement, note("Open", str(uuid.uuid4()), "spring", sent_at=LONG_AGO)) == [DONE]
    assert engagement.counts["unknown"] == 1
    assert counts(jetstream, "spring") == {}


def test_a_record_that_names_no_group_is_parked(jetstream: JetStream, engagement: Engagement) -> None:
    email_id = str(uuid.uuid4())
    put_records(jetstream, {email_id: b'{"email_id":"x","group_id":7}'})
    assert handle(engagement, note("Open", email_id, "spring")) == [DONE]
    assert "names no group" in parked_now(jetstream)[-1].reason


def test_each_worker_goes_by_the_servers_clock(jetstream: JetStream, group_id: str) -> None:
    """Or one that is an hour ahead would leave replays that seem fresh for as long to all others."""
    (email_id,) = send_mails(jetstream, group_id, 1)
    engagement = Engagement(jetstream, EngagementConfig(), clock=lambda: time.time() + 3600)
    engagement.prepare()
    assert handle(engagement, note("Open", email_id, group_id, "n-1")) == [DONE]
    at = stated_at(record(jetstream, email_id), "n-1", Fact.OPEN)
    assert at is not None
    assert abs(at - time.time()) < 5


def fold_long_ago(jetstream: JetStream, engagement: Engagement, group_id: str, count: int) -> list[Notification]:
    """Deliveries that were folded a while ago, by their records; whether their facts were stated is another matter."""
    email_ids = send_mails(jetstream, group_id, count)
    events = [note("Delivery", email_id, group_id, f"n-{email_id}") for email_id in email_ids]
    records = {}
    for email_id in email_ids:
        told = {"first": {"delivered": f"n-{email_id}"}, "folded_at": {f"n-{email_id}": rfc3339(time.time() - 100)}}
        records[email_id] = orjson.dumps(record(jetstream, email_id) | {"delivered": True} | told)
    put_records(jetstream, records)
    return events


def test_what_the_log_may_have_forgotten_is_looked_up(
    jetstream: JetStream, engagement: Engagement, group_id: str
) -> None:
    """Among many, for a whole batch in one walk; six of ten are there."""
    events = fold_long_ago(jetstream, engagement, group_id, 10)
    token = group_token(group_id)
    others = [fact_publication(token, Fact.DELIVERED, f"other-{number}", SENT_AT) for number in range(3000)]
    store(jetstream, others)
    stated = [orjson.loads(read.body)["MessageId"].removeprefix("n-") for read in events[:6]]
    store(jetstream, [fact_publication(token, Fact.DELIVERED, each, SENT_AT)._replace(headers={}) for each in stated])
    assert handle(engagement, *events) == [DONE] * 10
    assert counts(jetstream, group_id) == {"sent": 10, "delivered": 3010}


def test_what_a_repair_has_stated_meanwhile_is_not_stated_again(
    new_nats_server: Callable[..., NatsServer], new_bus: Any
) -> None:
    jetstream = JetStream(new_bus(new_nats_server().url))
    engagement = made_ready(jetstream)
    (email_id,) = send_mails(jetstream, "spring", 1)
    told = {"first": {"delivered": "n-1"}, "folded_at": {"n-1": rfc3339(time.time() - 3600)}, "delivered": True}
    put_records(jetstream, {email_id: orjson.dumps(record(jetstream, email_id) | told)})
    Repair(jetstream, "spring", min_age_seconds=0.0).mend()
    assert counts(jetstream, "spring") == {"sent": 1, "delivered": 1}
    config = dict(jetstream.stream_info(contract.LOG_STREAM).config)
    jetstream.api(f"STREAM.UPDATE.{contract.LOG_STREAM}", config | {"duplicate_window": 100_000_000})
    engagement.prepare()
    gevent.sleep(0.2)
    assert handle(engagement, note("Delivery", email_id, "spring", "n-1")) == [DONE]
    assert counts(jetstream, "spring") == {"sent": 1, "delivered": 1}


def test_what_would_take_too_long_to_look_up_is_left_to_a_repair(
    jetstream: JetStream, engagement: Engagement, group_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.tracking.log.LOOKUP_PAGES", 1)
    events = fold_long_ago(jetstream, engagement, group_id, 1)
    token = group_token(group_id)
    store(jetstream, [fact_publication(token, Fact.DELIVERED, f"yet-another-{each}", SENT_AT) for each in range(1001)])
    (verdict,) = handle(engagement, *events)
    assert (verdict.is_done, engagement.counts["put off"]) == (False, 1)
    assert handle(engagement, events[0]._replace(received_count=10)) == [DONE]
    assert counts(jetstream, group_id) == {"sent": 1, "delivered": 1001}


def test_a_log_that_is_gone_is_said_and_nothing_is_done(
    new_nats_server: Callable[..., NatsServer], new_bus: Any
) -> None:
    jetstream = JetStream(new_bus(new_nats_server().url))
    engagement = made_ready(jetstream)
    jetstream.api(f"STREAM.DELETE.KV_{contract.RECIPIENTS_BUCKET}")
    with pytest.raises(BusRefused):
        handle(engagement, note("Open", "mail-1", "spring", sent_at=LONG_AGO))
    assert parked_now(jetstream) == []


# -- crashes ----------------------------------------------------------------------------------------------------------
class Scene(NamedTuple):
    """A server whose log forgets after two seconds, reached through a proxy."""

    proxy: NatsProxy
    jetstream: JetStream

    def worker(self) -> Engagement:
        """A new process's: nothing is remembered."""
        return made_ready(self.jetstream)


@pytest.fixture
def scene(new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]) -> Iterator[Scene]:
    """With storage."""
    proxy = NatsProxy(new_nats_server().port)
    jetstream = JetStream(new_bus(proxy.url), TIMEOUT_SECONDS)
    assert ensure_storage(jetstream, StorageConfig()) == ""
    config = dict(jetstream.stream_info(contract.LOG_STREAM).config)
    jetstream.api(f"STREAM.UPDATE.{contract.LOG_STREAM}", config | {"duplicate_window": WINDOW_SECONDS * 10**9})
    yield Scene(proxy, jetstream)
    proxy.stop()


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        gevent.sleep(0.01)


def is_reachable(jetstream: JetStream) -> bool:
    try:
        jetstream.stream_info(contract.LOG_STREAM, 1.0)
    except BusUnavailable:
        return False
    return True


ACCIDENTS = [(step, action) for step in (1, 2, 3) for action in (Action.CUT_BEFORE, Action.CUT_AFTER, Action.DROP)]
"""What a click publishes is its record and two facts: the worker dies before, after or between, or waits in vain."""


@pytest.mark.parametrize("later_seconds", [0.0, 5.0], ids=["at once", "5 s later"])
def test_a_crash_between_any_two_steps_counts_once(scene: Scene, later_seconds: float) -> None:
    """The notification comes again, at once or when the log has forgotten, and after as long a second copy of it."""
    events = {}
    for step, action in ACCIDENTS:
        group_id = f"step-{step}-{action.name}"
        (email_id,) = send_mails(scene.jetstream, group_id, 1)
        events[group_id] = note("Click", email_id, group_id, at=LONG_AGO)
        worker = scene.worker()
        scene.proxy.begin(step, action)
        with pytest.raises(BusUnavailable):
            worker.handle([events[group_id]], 1.0)
        wait_for(lambda: scene.proxy.is_reached)
        scene.proxy.begin(0, action)
        scene.proxy.accept_again()
        wait_for(lambda: is_reachable(scene.jetstream))
    again = scene.worker()
    for copies in (1, 2):
        gevent.sleep(later_seconds)
        for event in events.values():
            assert again.handle([event] * copies, TIMEOUT_SECONDS) == [DONE] * copies
    for group_id in events:
        assert counts(scene.jetstream, group_id) == {"sent": 1, "click": 1, "clicked": 1}, group_id


def test_without_an_accident_redelivery_and_a_second_copy_count_once(scene: Scene) -> None:
    (email_id,) = send_mails(scene.jetstream, "spring", 1)
    events = [note(kind, email_id, "spring", f"n-{kind}", at=LONG_AGO) for kind in OBJECTS]
    worker = scene.worker()
    for _ in range(3):
        assert worker.handle(events, TIMEOUT_SECONDS) == [DONE] * len(events)
        gevent.sleep(5.0)
    assert counts(scene.jetstream, "spring") == dict.fromkeys((fact.value for fact in Fact), 1)


def test_a_worker_that_stood_still_between_record_and_facts_states_nothing(scene: Scene) -> None:
    """Or it might state what the log has forgotten that another worker had stated meanwhile."""
    (email_id,) = send_mails(scene.jetstream, "spring", 1)
    event = note("Open", email_id, "spring", "n-1", at=LONG_AGO)
    worker = scene.worker()
    scene.proxy.begin(1, Action.HOLD)
    (verdict,) = worker.handle([event], TIMEOUT_SECONDS)
    assert scene.proxy.is_reached
    assert (verdict.is_done, worker.counts["late"]) == (False, 1)
    assert record(scene.jetstream, email_id)["open_count"] == 1
    assert counts(scene.jetstream, "spring") == {"sent": 1}
    assert worker.handle([event], TIMEOUT_SECONDS) == [DONE]
    assert counts(scene.jetstream, "spring") == {"sent": 1, "open": 1, "opened": 1}


class Heard:
    """A follower that remembers batches."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, dict[str, str | int | None]]] = []

    def step(self, name: str, begun: float, ended: float, *, problem: str = "", **facts: str | int | None) -> None:
        """There are none."""

    def came_to(self, outcome: str, *, problem: str = "", **facts: str | int | None) -> None:
        """There are none."""

    def handled(self, begun: float, ended: float, *, problem: str = "", **facts: str | int | None) -> None:
        """One batch."""
        assert 0 <= ended - begun < 30
        self.batches.append((problem, facts))


def test_who_follows_hears_of_each_batch(
    new_nats_server: Callable[..., NatsServer], new_bus: Any, group_id: str
) -> None:
    server = new_nats_server()
    jetstream = JetStream(new_bus(server.url), timeout_seconds=0.5)
    assert ensure_storage(jetstream, StorageConfig()) == ""
    heard = Heard()
    engagement = Engagement(jetstream, EngagementConfig(EARLY_SECONDS), follower=heard)
    engagement.prepare()
    broken = Notification("{", "sqs-1", 1, time.time())
    engagement.handle([broken, broken], 10.0)
    server.stop()
    with pytest.raises(BusUnavailable):
        engagement.handle([broken], 1.0)
    assert heard.batches == [("", {"messages": 2, "done": 2}), ("BusUnavailable", {"messages": 1, "done": 0})]
