"""Writing records at sending: complete, on time, and never in the way of the mail."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable
from typing import Any

import gevent
import orjson
import pytest
from gevent.server import StreamServer

from relay import contract
from relay.bus.client import Bus, Publication
from relay.bus.jetstream import JetStream
from relay.bus.kv import Bucket
from relay.errors import BusUnavailable
from relay.tracking.log import Log
from relay.tracking.record import RecipientOutcome
from relay.tracking.storage import StorageConfig
from relay.tracking.tracker import FAILURES_TO_SUSPEND, HandedOver, Tracker
from tests.bus.freezing import freeze
from tests.support.groups import put_records, record_of
from tests.support.nats_server import NatsServer

ACK_SECONDS = 0.3


def new_tracker(jetstream: JetStream) -> Tracker:
    """A started tracker."""
    tracker = Tracker(jetstream, StorageConfig(), ACK_SECONDS, on_change=lambda _: None)
    tracker.start()
    return tracker


def note(tracker: Tracker, *, email_id: str = "", group_id: str = "", outcome: str = "") -> str:
    """Notes one mail; its email_id."""
    email_id = email_id or str(uuid.uuid4())
    tracker.note(HandedOver(email_id, group_id or email_id, "user@example.com", "Hello", time.time(), outcome))
    return email_id


def settle(tracker: Tracker, email_id: str, *, group_id: str, outcome: str = "", remote_id: str = "") -> None:
    """Tells what became of a mail in doubt."""
    tracker.settle(HandedOver(email_id, group_id, "user@example.com", "Hello", time.time(), outcome, remote_id))


def test_a_mail_in_doubt_whose_record_was_lost_gets_one_when_it_is_settled(jetstream: JetStream) -> None:
    tracker = new_tracker(jetstream)
    email_id = str(uuid.uuid4())
    settle(tracker, email_id, group_id="tracker-lost", remote_id="r2")
    entry = Bucket(jetstream, contract.RECIPIENTS_BUCKET).get(email_id)
    assert entry is not None
    record = orjson.loads(entry.value)
    assert (record["group_id"], record["remote_id"], "outcome" in record) == ("tracker-lost", "r2", False)
    assert Log(jetstream).counts("tracker-lost") == {"sent": 1}
    # The record of the mail in doubt comes after it, and changes nothing.
    note(tracker, email_id=email_id, group_id="tracker-lost", outcome="in_doubt")
    entry = Bucket(jetstream, contract.RECIPIENTS_BUCKET).get(email_id)
    assert entry is not None
    assert "outcome" not in orjson.loads(entry.value)


def test_a_relayed_mail_has_a_record_and_a_fact(jetstream: JetStream) -> None:
    tracker = new_tracker(jetstream)
    email_id = note(tracker, group_id="tracker-1")
    entry = Bucket(jetstream, contract.RECIPIENTS_BUCKET).get(email_id)
    assert entry is not None
    assert orjson.loads(entry.value)["group_id"] == "tracker-1"
    assert Log(jetstream).counts("tracker-1") == {"sent": 1}
    assert (tracker.tracked, tracker.lost) == (1, 0)
    assert sum(tracker.write_seconds.counts) == 1
    assert 0 < tracker.write_seconds.sum_seconds < 1.0


def test_a_mail_in_doubt_has_a_record_and_no_fact(jetstream: JetStream) -> None:
    email_id = note(new_tracker(jetstream), group_id="tracker-2", outcome="in_doubt")
    entry = Bucket(jetstream, contract.RECIPIENTS_BUCKET).get(email_id)
    assert entry is not None
    assert orjson.loads(entry.value)["outcome"] == "in_doubt"
    assert Log(jetstream).counts("tracker-2") == {}


def test_an_event_that_proved_the_mail_sent_has_stated_it(jetstream: JetStream) -> None:
    tracker = new_tracker(jetstream)
    email_id = str(uuid.uuid4())
    proved = orjson.loads(record_of(email_id, "tracker-proved")) | {"first": {"sent": "n-1"}}
    put_records(jetstream, {email_id: orjson.dumps(proved)})
    settle(tracker, email_id, group_id="tracker-proved", remote_id="r2")
    assert Log(jetstream).counts("tracker-proved") == {}
    tracker.stop()


def test_a_mail_in_doubt_is_settled_also_when_tracking_was_off_for_a_moment(jetstream: JetStream) -> None:
    tracker = new_tracker(jetstream)
    email_id = note(tracker, group_id="tracker-settled", outcome="in_doubt")
    tracker.off_reason = "for a moment"
    settling = gevent.spawn(settle, tracker, email_id, group_id="tracker-settled", remote_id="r1")
    gevent.sleep(0.05)
    assert not settling.dead
    tracker.off_reason = ""
    settling.get(timeout=5.0)
    entry = Bucket(jetstream, contract.RECIPIENTS_BUCKET).get(email_id)
    assert entry is not None
    record = orjson.loads(entry.value)
    assert (record.get("outcome"), record["remote_id"]) == (None, "r1")
    assert Log(jetstream).counts("tracker-settled") == {"sent": 1}
    assert tracker.unsettled == 0


def test_settling_keeps_what_an_event_has_written_meanwhile(jetstream: JetStream) -> None:
    tracker = new_tracker(jetstream)
    email_id = note(tracker, outcome="in_doubt")
    bucket = Bucket(jetstream, contract.RECIPIENTS_BUCKET)
    entry = bucket.get(email_id)
    assert entry is not None
    changed = orjson.dumps(orjson.loads(entry.value) | {"delivered": True})
    jetstream.store([bucket.replacement(email_id, changed, entry.revision)], 1.0)
    settle(tracker, email_id, group_id=email_id, outcome="failed")
    entry = bucket.get(email_id)
    assert entry is not None
    record = orjson.loads(entry.value)
    assert (record["delivered"], record["outcome"]) == (True, "failed")


RELAYED = RecipientOutcome("ann@example.com", "relayed", 250, "2.0.0")
DOUBTED = RecipientOutcome("bob@example.com", "in_doubt", None, "")


def several(email_id: str, group_id: str, *recipients: RecipientOutcome, outcome: str = "") -> HandedOver:
    """A mail to several."""
    return HandedOver(email_id, group_id, "ann@example.com", "Hello", time.time(), outcome, "", recipients)


def recipients_of(jetstream: JetStream, email_id: str) -> tuple[list[str], str]:
    """What its record says of each, and of the mail."""
    entry = Bucket(jetstream, contract.RECIPIENTS_BUCKET).get(email_id)
    assert entry is not None
    record = orjson.loads(entry.value)
    return [each["outcome"] for each in record["recipients"]], record.get("outcome", "")


class Publishing:
    """Watches what is published, also what the log knows already; may lose the next ``sent`` fact on its way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent = 0
        self.loses_the_next = False
        store = JetStream.store

        def watched(
            jetstream: JetStream, publications: list[Publication], timeout_seconds: float | None = None
        ) -> list[Any]:
            facts = [each for each in publications if each.nats_subject.endswith(".sent")]
            if facts and self.loses_the_next:
                self.loses_the_next = False
                others = [each for each in publications if each not in facts]
                return [BusUnavailable("no answer"), *store(jetstream, others, timeout_seconds)]
            self.sent += len(facts)
            return store(jetstream, publications, timeout_seconds)

        monkeypatch.setattr(JetStream, "store", watched)


def test_a_mail_that_was_relayed_to_one_is_not_counted_again_for_another(
    jetstream: JetStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    publishing = Publishing(monkeypatch)
    tracker = new_tracker(jetstream)
    email_id = str(uuid.uuid4())
    tracker.note(several(email_id, "tracker-once", RELAYED, DOUBTED))
    assert publishing.sent == 1
    for _ in range(2):  # however long ago the log heard of it
        tracker.settle(several(email_id, "tracker-once", RELAYED, DOUBTED._replace(outcome="relayed")))
    assert recipients_of(jetstream, email_id) == (["relayed", "relayed"], "")
    assert publishing.sent == 1
    assert tracker.unsettled == 0


def test_a_fact_that_was_lost_is_told_although_the_record_says_it_already(
    jetstream: JetStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    publishing = Publishing(monkeypatch)
    tracker = new_tracker(jetstream)
    email_id = note(tracker, group_id="tracker-told", outcome="in_doubt")
    publishing.loses_the_next = True
    settle(tracker, email_id, group_id="tracker-told")
    assert publishing.sent == 1
    assert Log(jetstream).counts("tracker-told") == {"sent": 1}
    assert tracker.unsettled == 0


def test_a_late_no_for_one_leaves_the_mail_relayed_to_another(jetstream: JetStream) -> None:
    tracker = new_tracker(jetstream)
    email_id = str(uuid.uuid4())
    tracker.note(several(email_id, "tracker-late", DOUBTED, RELAYED))
    late = DOUBTED._replace(outcome="deferred", reply_code=451)
    tracker.settle(several(email_id, "tracker-late", late, RELAYED, outcome="deferred"))
    assert recipients_of(jetstream, email_id) == (["deferred", "relayed"], "")


def test_of_whom_nothing_new_is_said_the_record_knows_best(jetstream: JetStream) -> None:
    tracker = new_tracker(jetstream)
    email_id = str(uuid.uuid4())
    late = RELAYED._replace(outcome="deferred", reply_code=451)
    unheard = DOUBTED._replace(outcome="deferred", reply_code=450)
    news = several(email_id, "tracker-unheard", late, unheard, outcome="deferred")._replace(unheard=(1,))
    tracker.settle(news)
    assert recipients_of(jetstream, email_id) == (["deferred", "deferred"], "deferred"), "it is all there is"
    email_id = str(uuid.uuid4())
    tracker.note(several(email_id, "tracker-unheard", DOUBTED, DOUBTED, outcome="in_doubt"))
    tracker.settle(news._replace(email_id=email_id))
    assert recipients_of(jetstream, email_id) == (["deferred", "in_doubt"], "in_doubt")


def test_mails_without_a_group_share_a_subject(jetstream: JetStream) -> None:
    tracker = new_tracker(jetstream)
    before = Log(jetstream).counts("-").get("sent", 0)
    note(tracker)
    note(tracker)
    assert Log(jetstream).counts("-") == {"sent": before + 2}


def test_our_own_write_arriving_twice_is_no_loss(jetstream: JetStream) -> None:
    tracker = new_tracker(jetstream)
    email_id = note(tracker)
    note(tracker, email_id=email_id)
    assert (tracker.tracked, tracker.lost) == (2, 0)


def test_a_frozen_jetstream_is_given_up_and_comes_back(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]
) -> None:
    # Given a tracker that works
    server = new_nats_server()
    tracker = new_tracker(JetStream(new_bus(server.url), timeout_seconds=ACK_SECONDS))
    with gevent.Timeout(10):
        while tracker.off_reason:  # on a busy machine the first try may take longer than this short limit
            gevent.sleep(0.05)
    note(tracker)
    pid = freeze(server)
    try:
        # When JetStream answers no more, each mail costs the deadline …
        for _ in range(FAILURES_TO_SUSPEND):
            begun = time.monotonic()
            note(tracker)
            assert ACK_SECONDS * 0.9 < time.monotonic() - begun < ACK_SECONDS * 3
        # … and then nothing at all
        assert tracker.off_reason
        begun = time.monotonic()
        note(tracker)
        assert time.monotonic() - begun < ACK_SECONDS / 2
        assert tracker.owed == FAILURES_TO_SUSPEND + 1
    finally:
        os.kill(pid, signal.SIGCONT)
    # Then it comes back by itself, and what is owed is written
    with gevent.Timeout(10):
        while tracker.off_reason or tracker.owed:
            gevent.sleep(0.05)
    note(tracker)
    assert (tracker.tracked, tracker.lost) == (FAILURES_TO_SUSPEND + 3, 0)
    tracker.stop()


def test_without_jetstream_mails_are_counted_as_untracked(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]
) -> None:
    tracker = new_tracker(JetStream(new_bus(new_nats_server(jetstream=False).url)))
    note(tracker)
    assert "JetStream is not enabled" in tracker.off_reason
    assert (tracker.tracked, tracker.owed, tracker.lost) == (0, 1, 0)
    tracker.stop()
    assert (tracker.tracked, tracker.owed, tracker.lost) == (0, 0, 1)


@pytest.mark.parametrize("count", [500])
def test_many_at_once(jetstream: JetStream, count: int) -> None:
    tracker = new_tracker(jetstream)
    gevent.joinall([gevent.spawn(note, tracker, group_id="tracker-many") for _ in range(count)], raise_error=True)
    assert Log(jetstream).counts("tracker-many") == {"sent": count}
    assert tracker.lost == 0


def test_a_record_too_large_does_not_stop_the_others(jetstream: JetStream) -> None:
    tracker = new_tracker(jetstream)
    for _ in range(FAILURES_TO_SUSPEND + 1):
        note(tracker, group_id="x" * 1_100_000)
    assert tracker.lost == FAILURES_TO_SUSPEND + 1
    assert not tracker.off_reason
    note(tracker)
    assert tracker.tracked == 1


def test_a_stream_that_acknowledges_nothing_is_noticed_before_a_mail_waits(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]
) -> None:
    jetstream = JetStream(new_bus(new_nats_server().url))
    name = f"KV_{contract.RECIPIENTS_BUCKET}"
    subjects = [f"$KV.{contract.RECIPIENTS_BUCKET}.>"]
    jetstream.api(
        f"STREAM.CREATE.{name}", {"name": name, "subjects": subjects, "no_ack": True, "max_msgs_per_subject": 1}
    )
    tracker = new_tracker(jetstream)
    assert tracker.off_reason
    begun = time.monotonic()
    note(tracker)
    assert time.monotonic() - begun < ACK_SECONDS / 2
    tracker.stop()


def test_the_probe_stores_nothing(jetstream: JetStream) -> None:
    def sequences() -> list[int]:
        streams = (f"KV_{contract.RECIPIENTS_BUCKET}", contract.LOG_STREAM)
        return [int(jetstream.api(f"STREAM.INFO.{name}")["state"]["last_seq"]) for name in streams]

    new_tracker(jetstream)
    before = sequences()
    new_tracker(jetstream)
    assert sequences() == before


def test_an_old_nats_server_is_named_once(caplog: pytest.LogCaptureFixture, new_bus: Callable[[str], Bus]) -> None:
    def serve(sock: gevent.socket.socket, _address: object) -> None:
        sock.sendall(b'INFO {"server_id":"old","version":"2.10.29","headers":true,"max_payload":1048576}\r\n')
        while data := sock.recv(4096):
            if b"PING" in data:
                sock.sendall(b"PONG\r\n")

    server = StreamServer(("127.0.0.1", 0), serve)
    server.start()
    try:
        tracker = new_tracker(JetStream(new_bus(f"nats://127.0.0.1:{server.server_port}"), timeout_seconds=0.2))
        tracker.stop()
    finally:
        server.stop()
    named = [record.message for record in caplog.records if "nats-server 2.10.29 is older than 2.12" in record.message]
    assert len(named) == 1
