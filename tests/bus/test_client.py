"""The bus against a real nats-server."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import gevent
import pytest

from relay.bus.client import Bus, Msg, Publication, is_plain_subject, without_password
from relay.errors import BusRefused, BusUnavailable
from tests.bus.freezing import frozen
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
    assert not bus.waiting, "a given-up request leaves nothing behind"


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


def test_a_server_that_hangs_with_bytes_unsent_is_left_for_another(
    new_nats_server: NewServer, new_bus: NewBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.bus.connection.PING_INTERVAL_SECONDS", 0.5)
    servers = [new_nats_server(), new_nats_server()]
    bus = new_bus(",".join(server.url for server in servers))
    assert bus.wait_connected(5)
    connected = next(server for server in servers if str(server.port) in str(bus._nc.connected_url))
    with frozen(connected):
        for _ in range(20):
            bus.publish(Publication("client.unsent", b"x" * 1_000_000))
        gevent.sleep(0.1)
        assert bus._nc._transport is not None
        assert bus._nc._transport._io_writer.transport.get_write_buffer_size() > 0  # type: ignore[attr-defined]
        with gevent.Timeout(10):
            while str(connected.port) in str(bus._nc.connected_url) or not bus.is_connected:
                gevent.sleep(0.02)
        echo(bus, "client.moved")
        assert bus.request(Publication("client.moved", b"1"), 2).payload == b"1"


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


@pytest.mark.parametrize("secret", ["relay:secret", "relay:se@cret", "relay:1/secret", "token"])
def test_a_url_is_shown_without_its_password(secret: str) -> None:
    url = f"nats://{secret}@a.example.com:4222,nats://{secret}@b.example.com"
    assert without_password(url) == "nats://a.example.com:4222,nats://b.example.com"


@pytest.mark.parametrize(
    "line",
    [
        b"PUB client.hostile _INBOX.\xff 2\r\nhi\r\n",
        b"HPUB client.hostile _INBOX.x 18 20\r\nNATS/1.0 \xff\xff\xff\r\n\r\n\r\nhi\r\n",
        b"HPUB client.hostile _INBOX.x 19 21\r\nNATS/1.0\r\nA: \xff\xff\r\n\r\nhi\r\n",
        b"HPUB client.hostile _INBOX.x 1 3\r\nNhi\r\n",
        b"PUB client.hostile _INBOX.\x0b.x 2\r\nhi\r\n",
        b"PUB client.hostile _INBOX.\x0c 2\r\nhi\r\n",
    ],
    ids=["reply subject", "status line", "header value", "short header", "vertical tab", "form feed"],
)
def test_bytes_that_are_no_text_cost_only_their_own_message(bus: Bus, nats_server: NatsServer, line: bytes) -> None:
    echo(bus, "client.hostile")
    with socket.create_connection(("127.0.0.1", nats_server.port), timeout=5) as hostile:
        hostile.recv(65536)
        hostile.sendall(b'CONNECT {"verbose":false,"headers":true,"no_responders":true}\r\n' + line + b"PING\r\n")
        assert b"PONG" in hostile.recv(65536)
    assert bus.request(Publication("client.hostile", b"still here"), 1).payload == b"still here"


def test_a_reader_that_ended_without_a_word_is_noticed(nats_server: NatsServer, new_bus: NewBus) -> None:
    bus = new_bus(nats_server.url)
    echo(bus, "client.reader")
    bus._bridge.post(lambda: bus._nc._reading_task.cancel())
    with gevent.Timeout(5):
        while True:
            try:
                assert bus.request(Publication("client.reader", b"x"), 0.3).payload == b"x"
                break
            except (BusUnavailable, BusRefused):
                continue


def test_a_subscription_ended_while_nats_was_away_stays_ended(new_nats_server: NewServer, new_bus: NewBus) -> None:
    server = new_nats_server()
    bus = new_bus(server.url)
    token = echo(bus, "client.ended")
    server.stop()
    with gevent.Timeout(5):
        while bus.is_connected:
            gevent.sleep(0.02)
    bus.unsubscribe(token)
    server.start()
    assert bus.wait_connected(5)
    with pytest.raises(BusRefused, match="nobody answers"):
        bus.request(Publication("client.ended", b""), 1)


def test_a_refused_subscription_is_told(new_nats_server: NewServer) -> None:
    server = new_nats_server(
        config='authorization { users: [{user: "w", password: "w", permissions: {subscribe: {deny: "denied.>"}}}] }'
    )
    told: list[tuple[bool, str]] = []
    bus = Bus(server.url.replace("//", "//w:w@"), "test", lambda is_connected, why: told.append((is_connected, why)))
    bus.start()
    try:
        assert bus.wait_connected(5)
        echo(bus, "denied.subject")
        bus.subscribe("denied.other", "", lambda _: None)
        with gevent.Timeout(5):
            while len(told) < 2:
                gevent.sleep(0.02)
        assert told[-1] == (False, "this user may not subscribe to denied.subject; grant it in NATS")
    finally:
        bus.close()


@pytest.mark.parametrize(
    ("nats_subject", "words"),
    [
        ("_INBOX.Billing.1", "this user may not publish to _INBOX.>; grant it in NATS"),
        ("lfx.email-service.log.spring.sent", ""),
        ("lfx.email-service.parked", ""),
        ("$KV.email-recipients.e-1", ""),
    ],
)
def test_a_refused_publication(new_nats_server: NewServer, nats_subject: str, words: str) -> None:
    """Without replies nobody is served; where only tracking is refused, mail goes out."""
    denied = f'publish: {{deny: "{nats_subject}"}}'
    server = new_nats_server(
        config=f'authorization {{ users: [{{user: "w", password: "w", permissions: {{{denied}}}}}] }}'
    )
    told: list[tuple[bool, str]] = []
    bus = Bus(server.url.replace("//", "//w:w@"), "test", lambda is_connected, why: told.append((is_connected, why)))
    bus.start()
    try:
        assert bus.wait_connected(5)
        bus.publish(Publication(nats_subject, b""))
        with gevent.Timeout(5):
            while "Violation" not in bus.last_error:
                gevent.sleep(0.02)
        assert nats_subject in bus.last_error
        assert told[-1] == ((False, words) if words else (True, ""))
    finally:
        bus.close()


def test_closing_has_a_deadline_also_when_nats_is_frozen(new_nats_server: NewServer, new_bus: NewBus) -> None:
    server = new_nats_server()
    bus = new_bus(server.url)
    with frozen(server):
        begun = time.monotonic()
        bus.close(1.0)
        assert time.monotonic() - begun < 2.0
