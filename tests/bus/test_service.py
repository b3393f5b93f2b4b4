"""Serving a subject: one reply to every request, and only where replies may go."""

from __future__ import annotations

import time
from collections.abc import Callable

import gevent
import pytest

from relay.bus.client import Bus, Msg, Publication
from relay.bus.service import Handler, Service
from relay.submission.admission import Admission
from tests.support.bus_caller import publish_with_reply_to

NATS_SUBJECT = "service.under.test"


def shout(msg: Msg, _deadline: float, step_aside: Callable[[Msg], None]) -> bytes:
    """Answers in capitals; has a bug, a slow and a talkative side."""
    payload = msg.payload
    if payload == b"aside":
        step_aside(msg)
        step_aside(msg)
        gevent.sleep(0.8)
    if payload == b"bug":
        raise RuntimeError("a bug")
    if payload == b"slow":
        gevent.sleep(0.8)
    return b"x" * 1_048_577 if payload == b"too much" else payload.upper()


@pytest.fixture
def service(bus: Bus) -> Service:
    """A started service with room for four requests."""
    made = Service(
        bus,
        nats_subject=NATS_SUBJECT,
        queue_group="q",
        handler=Handler(shout, overloaded=b"overloaded", broken=b"broken", too_large=b"too large"),
        gate=Admission(limit=4, limit_bytes=10_000_000, busy_above=10),
        patience_seconds=5,
        reply_prefixes=("_INBOX", "_R_"),
    )
    made.start()
    return made


def test_who_steps_aside_gives_up_its_place_and_is_answered_all_the_same(bus: Bus, service: Service) -> None:
    inbox = f"_INBOX.{NATS_SUBJECT}.aside"
    seen = replies_on(bus, f"{inbox}.*")
    with gevent.Timeout(5):
        for number in range(8):  # twice as many as there are places
            bus.publish(Publication(NATS_SUBJECT, b"aside"), f"{inbox}.{number}")
            while service.in_hand <= number:
                gevent.sleep(0.01)
    assert service._gate.backlog == 0
    bus.publish(Publication(NATS_SUBJECT, b"hello"), f"{inbox}.8")
    with gevent.Timeout(5):
        while len(seen) < 9:
            gevent.sleep(0.01)
    assert [msg.payload for msg in seen] == [b"HELLO", *[b"ASIDE"] * 8]
    assert (service._gate.backlog, service.refused, service.in_hand) == (0, 0, 0)


def replies_on(bus: Bus, nats_subject: str) -> list[Msg]:
    """Everything published on a subject from now on."""
    seen: list[Msg] = []
    bus.subscribe(nats_subject, "", seen.append)
    return seen


def ask_with_reply_to(bus: Bus, reply_subject: str, payload: bytes = b"hello") -> None:
    """A request whose reply subject the caller chose; returns when the service has had its turn."""
    publish_with_reply_to(bus, NATS_SUBJECT, payload, reply_subject)
    gevent.sleep(0.02)
    bus.flush()
    gevent.sleep(0.05)
    bus.flush()


@pytest.fixture
def other_inbox(bus: Bus) -> str:
    """An inbox that is not the bus's own."""
    del bus
    return "_INBOX.someone.else"


@pytest.mark.parametrize(
    ("payload", "reply"),
    [(b"hello", b"HELLO"), (b"", b""), (b"bug", b"broken"), (b"too much", b"too large")],
)
@pytest.mark.usefixtures("service")
def test_every_request_gets_one_reply(bus: Bus, other_inbox: str, payload: bytes, reply: bytes) -> None:
    seen = replies_on(bus, other_inbox)
    ask_with_reply_to(bus, other_inbox, payload)
    assert [msg.payload for msg in seen] == [reply]


@pytest.mark.parametrize(
    "reply_subject",
    [
        "$KV.email-recipients.x",
        "lfx.email-service.log.-.sent",
        "lfx.email-service.send_email",
        "_INBOX",
        "_INBOXES.x",
        "_INBOX.*",
        "_INBOX.>",
        "_INBOX.a..b",
        "$JS.API.STREAM.DELETE.EMAIL_LOG",
        ">",
        "*",
    ],
)
def test_a_reply_goes_nowhere_else(bus: Bus, service: Service, reply_subject: str) -> None:
    seen = replies_on(bus, ">")
    ask_with_reply_to(bus, reply_subject)
    assert service.dropped == 1
    assert service.answered == 0
    replies = {msg.nats_subject for msg in seen if not msg.nats_subject.startswith("$JS.EVENT.")}  # the server's own
    assert replies <= {NATS_SUBJECT}


def test_a_reply_never_goes_to_our_own_inbox(bus: Bus, service: Service) -> None:
    ask_with_reply_to(bus, f"{bus.inbox_prefix}.1")
    assert service.dropped == 1


def test_a_request_without_a_reply_subject_is_served(bus: Bus, service: Service) -> None:
    bus.publish(Publication(NATS_SUBJECT, b"fire and forget"))
    with gevent.Timeout(2):
        while not service.answered:
            gevent.sleep(0.01)


def test_what_does_not_fit_is_answered_overloaded_at_once(bus: Bus, service: Service, other_inbox: str) -> None:
    seen = replies_on(bus, other_inbox)
    for _ in range(6):
        ask_with_reply_to(bus, other_inbox, b"slow")
    assert service.wait_answered(2) == 0
    bus.flush()
    gevent.sleep(0.02)
    assert sorted(msg.payload for msg in seen) == [b"SLOW"] * 4 + [b"overloaded"] * 2
    assert service.refused == 2


def test_stopping_answers_what_was_sent(bus: Bus, service: Service, other_inbox: str) -> None:
    seen = replies_on(bus, other_inbox)
    for _ in range(3):
        ask_with_reply_to(bus, other_inbox, b"slow")
    service.stop()
    assert service.wait_answered(2) == 0
    bus.flush()
    gevent.sleep(0.02)
    assert [msg.payload for msg in seen] == [b"SLOW"] * 3
    ask_with_reply_to(bus, other_inbox)
    assert [msg.status for msg in seen] == ["", "", "", "503"], "a stopped service serves nothing"


def test_waiting_for_answers_has_a_deadline(bus: Bus, service: Service, other_inbox: str) -> None:
    ask_with_reply_to(bus, other_inbox, b"slow")
    begun = time.monotonic()
    assert service.wait_answered(0.05) == 1
    assert time.monotonic() - begun < 0.5
