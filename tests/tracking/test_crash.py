"""What is left when a process, a connection or a server dies between any two steps of tracking a mail.

A mail's ``sent`` fact and its record are two messages. A proxy that reads along ends the connection, or the process,
exactly at one of them. The figures may then be wrong by the mail that was in flight and by no other, and what the log
lacks ``relayctl repair`` appends.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gevent
import orjson
import pytest

from relay import contract
from relay.bus.client import Bus, Publication
from relay.bus.jetstream import JetStream
from relay.bus.kv import Bucket
from relay.ops.presence import read_presence
from relay.tracking.facts import Fact
from relay.tracking.groups import group_token
from relay.tracking.log import Log
from relay.tracking.repair import Repair
from relay.tracking.storage import StorageConfig
from relay.tracking.tracker import HandedOver, Tracker
from scripts.drills.fold import Event, folded, stated
from tests.support.caller import MAIL
from tests.support.nats_proxy import Action, NatsProxy, is_tracking
from tests.support.nats_server import NatsServer, free_port
from tests.support.relay_process import CatchingServer, RelayProcess, Worker

ACK_SECONDS = 0.5
WAIT_SECONDS = 20.0
GROUP = "crash"
MAILS = 2
INBOX = "_INBOX.crash"
REQUEST = Publication(contract.SEND_EMAIL, orjson.dumps(MAIL | {"group_id": GROUP}))
AN_OPEN = Event("event-1", "2025-01-15T11:05:33.000Z", (0,))
A_LATER_OPEN = Event("event-2", "2025-01-15T12:05:33.000Z", (0,))


@pytest.fixture
def server(new_nats_server: Callable[..., NatsServer]) -> NatsServer:
    """A nats-server of the test's own."""
    return new_nats_server()


@pytest.fixture
def proxy(server: NatsServer) -> Iterator[NatsProxy]:
    """A proxy before it."""
    made = NatsProxy(server.port)
    yield made
    made.stop()


@pytest.fixture
def bus(proxy: NatsProxy, new_bus: Callable[[str], Bus]) -> Bus:
    """The bus of the process that meets the accident."""
    return new_bus(proxy.url)


@pytest.fixture
def jetstream(bus: Bus) -> JetStream:
    """The same, for looking at what is left once the accident is over."""
    return JetStream(bus)


@pytest.fixture
def tracker(bus: Bus) -> Iterator[Tracker]:
    """Its tracker."""
    made = Tracker(JetStream(bus), StorageConfig(), ACK_SECONDS, on_change=lambda _: None, arrears_bytes=0)
    made.start()
    assert not made.off_reason
    yield made
    made.stop()


def note(tracker: Tracker, email_id: str, *, outcome: str = "") -> None:
    """Notes one mail of the group."""
    tracker.note(HandedOver(email_id, GROUP, "user@example.com", "Hello", time.time(), outcome))


def mail_ids(count: int) -> list[str]:
    """New ones."""
    return [str(uuid.uuid4()) for _ in range(count)]


def records(jetstream: JetStream) -> dict[str, dict[str, Any]]:
    """All records, from the leader's last state."""
    bucket = Bucket(jetstream, contract.RECIPIENTS_BUCKET)
    return {entry.key: orjson.loads(entry.value) for page in bucket.scan() for entry in page}


def sent_facts(jetstream: JetStream) -> list[str]:
    """The mails that are counted, as often as they are."""
    return [email_id for page in Log(jetstream).email_ids(GROUP) for email_id in page]


def fold(server: NatsServer, email_id: str, *events: Event) -> None:
    """Folds events as another process does: in a thread of its own, as there is one event loop to a thread."""
    done: list[bool] = []

    def work() -> None:
        bus = Bus(server.url, "another process")
        bus.start()
        try:
            assert bus.wait_connected(5)
            bucket = Bucket(JetStream(bus), contract.RECIPIENTS_BUCKET)
            for event in events:
                change = partial(with_event, event)
                entry = bucket.update(email_id, change, deadline=time.monotonic() + 5)
                assert entry is not None
                answers = JetStream(bus).store(stated(group_token(GROUP), email_id, entry.value, event))
                assert not [answer for answer in answers if isinstance(answer, Exception)]
            done.append(True)
        finally:
            bus.close()
            gevent.get_hub().destroy()

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: not thread.is_alive())
    assert done


def with_event(event: Event, value: bytes | None) -> bytes | None:
    """The change of an update that folds the event."""
    return None if value is None else folded(value, event)


def event_ids(record: dict[str, Any]) -> list[str]:
    """The events in a record, in its order."""
    return [each["event_id"] for each in record["opened_at_list"]]


def wait_until(is_so: Callable[[], bool]) -> None:
    """Lets the others work until it is."""
    with gevent.Timeout(WAIT_SECONDS):
        while not is_so():
            gevent.sleep(0.005)


def repair(server: NatsServer, state_dir: Path) -> None:
    """``relayctl repair``, in a process of its own."""
    done = RelayProcess(state_dir, server.url, free_port()).relayctl("repair", GROUP, "--yes", "--min-age", "0")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


# -- the connection ends, or one publication is lost -------------------------------------------------------------------
@pytest.mark.parametrize("place", range(1, 2 * MAILS + 1))
@pytest.mark.parametrize("action", [Action.CUT_BEFORE, Action.CUT_AFTER, Action.DROP], ids=lambda action: action.name)
def test_wherever_it_happens_the_figures_lack_one_mail_at_most_and_are_mended(
    proxy: NatsProxy, bus: Bus, tracker: Tracker, jetstream: JetStream, place: int, action: Action
) -> None:
    # Given mails that are tracked one after the other
    email_ids = mail_ids(MAILS)
    hit, is_fact = email_ids[(place - 1) // 2], place % 2 == 1
    # When one of their publications is lost, or the connection with it
    proxy.begin(place, action)
    for email_id in email_ids:
        note(tracker, email_id)
        proxy.accept_again()
        assert bus.wait_connected(WAIT_SECONDS)
    assert proxy.is_reached
    # Then the others are counted and have their records
    facts, kept = sent_facts(jetstream), records(jetstream)
    assert [each for each in facts if each != hit] == [each for each in email_ids if each != hit]
    assert set(email_ids) - {hit} <= kept.keys() <= set(email_ids)
    # … the one that was hit has what got through
    has_fact = not is_fact or action is Action.CUT_AFTER
    has_record = action is (Action.DROP if is_fact else Action.CUT_AFTER)
    assert (facts.count(hit), hit in kept) == (int(has_fact), has_record)
    # … and the tracker knows: only an acknowledgement would have told it otherwise
    assert (tracker.tracked, tracker.lost) == (MAILS - 1, 1)
    # When it is repaired, whatever left a record is counted, each mail once, and nothing else is changed
    Repair(jetstream, GROUP, min_age_seconds=0).mend()
    assert sorted(sent_facts(jetstream)) == sorted({*facts, *kept})
    assert records(jetstream) == kept
    assert Repair(jetstream, GROUP, min_age_seconds=0).look().is_well


# -- a lost acknowledgement, a retry, and an event in between ----------------------------------------------------------
@pytest.mark.parametrize("place", [1, 2])
def test_a_mail_tracked_again_keeps_the_event_that_came_in_between(
    server: NatsServer, proxy: NatsProxy, bus: Bus, tracker: Tracker, jetstream: JetStream, place: int
) -> None:
    # Given a mail whose acknowledgement is lost after its fact, or after its record
    (email_id,) = mail_ids(1)
    proxy.begin(place, Action.CUT_AFTER)
    note(tracker, email_id)
    assert (tracker.tracked, tracker.lost) == (0, 1)
    # When an event is folded into the record, if there is one, and the mail is tracked again
    if place == 2:
        fold(server, email_id, AN_OPEN)
    proxy.accept_again()
    assert bus.wait_connected(WAIT_SECONDS)
    note(tracker, email_id)
    # Then it counts once and nothing of the record is lost
    assert tracker.tracked == 1
    assert sent_facts(jetstream) == [email_id]
    record = records(jetstream)[email_id]
    assert event_ids(record) == [AN_OPEN.event_id] if place == 2 else "opened_at_list" not in record


@pytest.mark.parametrize("action", [Action.CUT_BEFORE, Action.CUT_AFTER], ids=lambda action: action.name)
@pytest.mark.parametrize("place", [1, 2])
def test_settling_that_is_tried_again_keeps_the_event_that_came_in_between(
    server: NatsServer, proxy: NatsProxy, tracker: Tracker, jetstream: JetStream, place: int, action: Action
) -> None:
    # Given a mail in doubt whose settling is cut at its fact, or at its record
    (email_id,) = mail_ids(1)
    note(tracker, email_id, outcome="in_doubt")
    proxy.begin(place, action)
    relayed = HandedOver(email_id, GROUP, "user@example.com", "Hello", time.time(), remote_id="r1")
    settling = gevent.spawn(tracker.settle, relayed)
    wait_until(lambda: proxy.is_reached or settling.dead)
    # When an event is folded in before it can be tried again
    fold(server, email_id, AN_OPEN)
    proxy.accept_again()
    settling.get(timeout=WAIT_SECONDS)
    # Then the record has both and the mail counts once
    record = records(jetstream)[email_id]
    assert (record.get("outcome"), record["remote_id"], event_ids(record)) == (None, "r1", [AN_OPEN.event_id])
    assert sent_facts(jetstream) == [email_id]
    assert tracker.unsettled == 0


@pytest.mark.parametrize("action", [Action.CUT_BEFORE, Action.CUT_AFTER], ids=lambda action: action.name)
def test_an_update_that_is_tried_again_is_applied_once_and_loses_nothing(
    server: NatsServer, proxy: NatsProxy, bus: Bus, tracker: Tracker, jetstream: JetStream, action: Action
) -> None:
    # Given an event whose compare-and-set is cut
    (email_id,) = mail_ids(1)
    note(tracker, email_id)
    proxy.begin(1, action)
    bucket = Bucket(JetStream(bus), contract.RECIPIENTS_BUCKET)
    folding = gevent.spawn(
        bucket.update,
        email_id,
        partial(with_event, AN_OPEN),
        deadline=time.monotonic() + WAIT_SECONDS,
        tries=100,  # without a connection each takes no time
    )
    wait_until(lambda: proxy.is_reached or folding.dead)
    # When another process folds the same event and a later one before it can be tried again
    fold(server, email_id, AN_OPEN, A_LATER_OPEN)
    proxy.accept_again()
    entry = folding.get(timeout=WAIT_SECONDS)
    # Then each is there once, and both processes say so
    record = records(jetstream)[email_id]
    assert (event_ids(record), record["open_count"]) == ([AN_OPEN.event_id, A_LATER_OPEN.event_id], 2)
    assert orjson.loads(entry.value) == record


# -- a send worker is killed -------------------------------------------------------------------------------------------
@pytest.fixture
def smtp(tmp_path: Path) -> Iterator[CatchingServer]:
    """An SMTP server that takes everything."""
    made = CatchingServer(tmp_path / "smtp")
    yield made
    made.stop()


def start_worker(nats_url: str, smtp: CatchingServer, state_dir: Path) -> Worker:
    """A send worker, ready."""
    relay = RelayProcess(state_dir, nats_url, smtp.port)
    worker = Worker("send", relay.settings)
    deadline = time.monotonic() + WAIT_SECONDS
    while (report := read_presence(state_dir, "send", worker.process.pid)) is None or report.reason:
        assert worker.process.poll() is None, worker.output()
        assert time.monotonic() < deadline
        gevent.sleep(0.02)
    return worker


def ask(caller: Bus) -> dict[str, Any]:
    """One request and its reply."""
    reply: dict[str, Any] = orjson.loads(caller.request(REQUEST, WAIT_SECONDS).payload)
    return reply


STEPS = {
    "before the fact": (1, Action.CUT_BEFORE, 0, 0),
    "between fact and record": (2, Action.CUT_BEFORE, 1, 0),
    "before the reply": (3, Action.CUT_BEFORE, 1, 1),
    "after the reply": (3, Action.CUT_AFTER, 1, 1),
}
"""Which publication, what happens to it, and what then is there of the mail: facts, records."""


@pytest.mark.parametrize("step", STEPS)
def test_a_send_worker_killed_at_any_step(
    server: NatsServer, new_bus: Callable[[str], Bus], smtp: CatchingServer, tmp_path: Path, step: str
) -> None:
    # Given a worker that relayed a mail
    place, action, facts, kept = STEPS[step]
    proxy = NatsProxy(server.port, lambda nats_subject: is_tracking(nats_subject) or nats_subject.startswith(INBOX))
    caller = new_bus(server.url)
    jetstream = JetStream(caller)
    workers = []
    try:
        workers.append(start_worker(proxy.url, smtp, tmp_path / "one"))
        assert ask(caller)["email_id"]
        pid = workers[0].process.pid
        # When it is killed with the next one in hand
        proxy.begin(place, action, lambda: os.kill(pid, signal.SIGKILL))
        replies: list[bytes] = []
        caller.subscribe(f"{INBOX}.1", "", lambda msg: replies.append(msg.payload))
        caller.publish(REQUEST, f"{INBOX}.1")
        wait_until(lambda: proxy.is_reached)
        assert workers[0].process.wait(WAIT_SECONDS) == -signal.SIGKILL
        # Then the mail was sent, once, and the figures lack that one at most
        assert smtp.count() == 2
        assert (len(sent_facts(jetstream)), len(records(jetstream))) == (1 + facts, 1 + kept)
        # … whoever was told so has both
        caller.flush()
        assert len(replies) == (1 if step == "after the reply" else 0)
        # When another worker goes on, and the log is repaired
        workers.append(start_worker(server.url, smtp, tmp_path / "two"))
        assert ask(caller)["email_id"] in records(jetstream)
        repair(server, tmp_path / "repair")
        # Then nothing is lost or invented
        assert smtp.count() == 3
        assert (len(sent_facts(jetstream)), len(records(jetstream))) == (2 + facts, 2 + kept)
        assert Log(jetstream).counts(GROUP) == {Fact.SENT: 2 + facts}
    finally:
        for worker in workers:
            worker.end()
        proxy.stop()


# -- nats-server is killed ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_a_killed_nats_server_has_acknowledged_is_there_when_it_is_back(
    server: NatsServer, new_bus: Callable[[str], Bus], caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    # Given mails that are tracked all the time
    bus = new_bus(server.url)
    tracker = Tracker(JetStream(bus), StorageConfig(), ACK_SECONDS, on_change=lambda _: None, arrears_bytes=0)
    tracker.start()
    noted: list[str] = []
    is_over = gevent.event.Event()

    def keep_noting() -> None:
        while not is_over.is_set():
            (email_id,) = mail_ids(1)
            note(tracker, email_id)
            noted.append(email_id)
            gevent.sleep(0)

    with caplog.at_level(logging.WARNING, "relay.tracking"):
        callers = [gevent.spawn(keep_noting) for _ in range(20)]
        wait_until(lambda: tracker.tracked >= 400 * seed)
        # When nats-server is killed in the middle, and started again
        assert server.process is not None
        server.process.kill()
        server.process.wait(WAIT_SECONDS)
        wait_until(lambda: tracker.lost > 0)
        server.start()
        assert bus.wait_connected(WAIT_SECONDS)
        wait_until(lambda: not tracker.off_reason)
        before = tracker.tracked
        wait_until(lambda: tracker.tracked >= before + 100)
        is_over.set()
        gevent.joinall(callers, timeout=WAIT_SECONDS, raise_error=True)
    tracker.stop()
    # Then every mail that was said to be tracked is counted once and has its record
    lost = {record.email_id for record in caplog.records if hasattr(record, "email_id")}
    tracked = [email_id for email_id in noted if email_id not in lost]
    assert len(tracked) == tracker.tracked
    jetstream = JetStream(bus)
    facts, kept = sent_facts(jetstream), records(jetstream)
    assert set(tracked) <= set(facts) & kept.keys()
    assert len(facts) == len(set(facts))
    assert set(facts) | kept.keys() <= set(noted)
