"""The bus against a real nats-server."""

from __future__ import annotations

from collections.abc import Callable

import gevent
import pytest

from relay.bus.client import Bus, Msg, Publication, is_plain_subject, without_password
from relay.errors import BusRefused, BusUnavailable
from tests.support.nats_server import NatsServer

NewBus = Callable[[str], Bus]
NewServer = Callable[..., NatsServer]


def echo(bus: Bus, nats_subject: str) -> int:
    """Serves a subject by sending back what comes."""

    def answer(msg: Msg) -> None:
        bus.publish(Publication(msg.reply_subject, msg.payload))

    return bus.subscribe(nats_subject, "q", answer)


@pytest.mark.parametrize("nats_subject", ["_INBOX.abc", "a", "a.b.c", "$KV.x", "_INBOX.ünïcode", "=" * 4000])
def test_plain_subjects(nats_subject: str) -> None:
    assert is_plain_subject(nats_subject)


@pytest.mark.parametrize(
    "nats_subject",
    [
        "",
        ".",
        "a.",
        ".a",
        "a..b",
        "*",
        ">",
        "a.*",
        "a.>",
        "a b",
        "a\tb",
        "a\r\nPUB x 0",
        "a\x00b",
        "x" * 4001,
        "ü" * 2001,
        "a*b",
    ],
)
def test_what_is_no_plain_subject(nats_subject: str) -> None:
    assert not is_plain_subject(nats_subject)


def test_a_request_is_answered(bus: Bus) -> None:
    echo(bus, "client.echo")
    assert bus.request(Publication("client.echo", b"hello"), 2).payload == b"hello"


def test_many_requests_at_once_keep_their_order(bus: Bus) -> None:
    echo(bus, "client.order")
    asked = [Publication("client.order", str(number).encode()) for number in range(2000)]
    answers = bus.request_all(asked, 5)
    assert [answer.payload for answer in answers if isinstance(answer, Msg)] == [each.payload for each in asked]


def test_nobody_listens(bus: Bus) -> None:
    with pytest.raises(BusRefused, match="nobody answers") as refusal:
        bus.request(Publication("client.nobody", b""), 2)
    assert refusal.value.code == 503


def test_no_answer_in_time(bus: Bus) -> None:
    bus.subscribe("client.silent", "", lambda _: None)
    with pytest.raises(BusUnavailable, match=r"0\.2 s"):
        bus.request(Publication("client.silent", b""), 0.2)
    assert not bus._pending, "a given-up request leaves nothing behind"


def test_headers_travel_but_the_callers_are_not_echoed(bus: Bus) -> None:
    seen: list[Msg] = []

    def answer(msg: Msg) -> None:
        seen.append(msg)
        bus.publish(Publication(msg.reply_subject, b"done"))

    bus.subscribe("client.headers", "", answer)
    reply = bus.request(Publication("client.headers", b"", {"Status": "503", "X-Own": "1"}), 2)
    assert seen[0].headers["X-Own"] == "1"
    assert not reply.headers


@pytest.mark.parametrize(
    "publication",
    [
        Publication("client.big", b"x" * 1_048_577),
        Publication("client.big", b"x" * 1_048_500, {"X-Pad": "y" * 100}),
    ],
    ids=["payload", "payload and headers"],
)
def test_too_large_a_message_is_refused_here_and_costs_no_connection(bus: Bus, publication: Publication) -> None:
    echo(bus, "client.big")
    with pytest.raises(BusRefused, match="max_payload"):
        bus.request(publication, 2)
    assert bus.request(Publication("client.big", b"still here"), 2).payload == b"still here"


def test_unsubscribe_hands_over_everything_the_server_had_sent(bus: Bus) -> None:
    seen: list[bytes] = []
    token = bus.subscribe("client.drain", "q", lambda msg: seen.append(msg.payload))
    for number in range(5000):
        bus.publish(Publication("client.drain", str(number).encode()))
    bus.flush()
    bus.unsubscribe(token)
    assert len(seen) == 5000
    bus.publish(Publication("client.drain", b"late"))
    bus.flush()
    assert len(seen) == 5000


def test_it_waits_for_a_server_that_is_not_there_yet(new_nats_server: NewServer) -> None:
    server = new_nats_server()
    server.stop()
    changes: list[tuple[bool, str]] = []
    bus = Bus(server.url, "test", lambda is_connected, why: changes.append((is_connected, why)))
    bus.start()
    try:
        assert not bus.wait_connected(0.3)
        assert "connection refused" in bus.last_error
        server.start()
        assert bus.wait_connected(5)
        assert changes[0] == (False, "connection refused")
        assert changes[-1] == (True, "")
    finally:
        bus.close()


def test_subscriptions_survive_a_server_restart(new_nats_server: NewServer, new_bus: NewBus) -> None:
    server = new_nats_server()
    bus = new_bus(server.url)
    echo(bus, "client.survives")
    server.stop()
    with gevent.Timeout(5):
        while bus.is_connected:
            gevent.sleep(0.02)
    with pytest.raises(BusUnavailable, match="not connected"):
        bus.request(Publication("client.survives", b""), 1)
    token = echo(bus, "client.while_away")
    assert token
    server.start()
    assert bus.wait_connected(5)
    assert bus.request(Publication("client.survives", b"1"), 2).payload == b"1"
    assert bus.request(Publication("client.while_away", b"2"), 2).payload == b"2"


def test_a_client_closed_for_good_is_replaced(new_nats_server: NewServer, new_bus: NewBus) -> None:
    bus = new_bus(new_nats_server().url)
    echo(bus, "client.replaced")
    closed = bus._nc
    bus._bridge.post(lambda: closed._transport.write(b"NO SUCH COMMAND\r\n"))
    with gevent.Timeout(5):
        while bus._nc is closed or not bus.is_connected:
            gevent.sleep(0.02)
    assert bus.request(Publication("client.replaced", b"back"), 2).payload == b"back"


def test_a_wrong_password_is_said_in_words(new_nats_server: NewServer) -> None:
    server = new_nats_server(config='authorization { user: "relay", password: "right" }')
    bus = Bus(server.url.replace("//", "//relay:wrong@"), "test")
    bus.start()
    try:
        assert not bus.wait_connected(0.5)
        assert "password was refused" in bus.last_error
    finally:
        bus.close()


def test_a_url_is_shown_without_its_password() -> None:
    assert without_password("nats://relay:secret@nats.example.com:4222") == "nats://nats.example.com:4222"
