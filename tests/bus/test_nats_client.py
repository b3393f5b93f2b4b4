"""What is mended in nats-py's client: its parser reads what a server may send, however it is cut into pieces."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

import gevent
import nats.errors
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.bus.client import Bus, Msg, Publication
from relay.bus.messages import FixedHeaders
from relay.bus.nats_client import LONGEST_LINE_BYTES, READ_BYTES, TamedClient
from relay.errors import BusRefused, BusUnavailable
from tests.support.nats_server import NatsServer

SUBJECTS = st.text(st.characters(codec="utf-8", exclude_characters=" \r\n\t"), min_size=1, max_size=20)
MESSAGES = st.lists(
    st.tuples(
        SUBJECTS,
        st.none() | SUBJECTS | st.sampled_from(["12", "0", "_INBOX.\x0b"]),
        st.none() | st.dictionaries(st.sampled_from(["A", "Nats-Sequence"]), st.sampled_from(["1", "ü"]), min_size=1),
        st.binary(max_size=60) | st.sampled_from([b"MSG a 1 2\r\nhi\r\n", b"\r\n", b"\r\n\r\n"]),
    ),
    max_size=8,
)


def on_the_wire(nats_subject: str, reply: str | None, headers: dict[str, str] | None, payload: bytes) -> bytes:
    """A message as the server sends it."""
    words = [nats_subject, "7", *([reply] if reply else [])]
    block = b""
    if headers:
        block = "".join(["NATS/1.0\r\n", *(f"{name}: {value}\r\n" for name, value in headers.items()), "\r\n"]).encode()
        words.append(str(len(block)))
    words.append(str(len(block) + len(payload)))
    return b"%b %b\r\n%b%b\r\n" % (b"HMSG" if headers else b"MSG", " ".join(words).encode(), block, payload)


def handed_over(pieces: Iterable[bytes]) -> list[Msg]:
    """What a handler of subscription 7 gets when the pieces are read one after the other."""
    client = TamedClient()
    seen: list[Msg] = []
    client.hand_over(7, seen.append)

    async def read() -> None:
        for piece in pieces:
            await client._ps.parse(piece)

    asyncio.run(read())
    return seen


@settings(deadline=None)  # a loop is made for each, on a busy machine
@given(MESSAGES, st.data())
def test_messages_arrive_whole_and_in_order_however_they_are_cut(
    messages: list[tuple[str, str | None, dict[str, str] | None, bytes]], data: st.DataObject
) -> None:
    stream = b"+OK\r\n".join([on_the_wire(*message) for message in messages])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    pieces = [stream[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    expected = [Msg(subject, reply or "", payload, headers or {}) for subject, reply, headers, payload in messages]
    assert handed_over(pieces) == expected


@settings(deadline=None)  # a loop is made for each, on a busy machine
@given(MESSAGES)
def test_the_short_way_gives_what_the_full_way_gives(
    messages: list[tuple[str, str | None, dict[str, str] | None, bytes]],
) -> None:
    """A message without header fields goes past ``_process_msg``."""
    client = TamedClient()
    seen: list[Msg] = []
    client.hand_over(7, seen.append)

    async def process() -> None:
        for nats_subject, reply, _, payload in messages:
            await client._process_msg(7, nats_subject.encode(), (reply or "").encode(), payload, b"")

    asyncio.run(process())
    assert handed_over([on_the_wire(subject, reply, None, payload) for subject, reply, _, payload in messages]) == seen


@pytest.mark.parametrize(
    "line",
    [
        b"MSG",
        b"MSG ",
        b"MSG a",
        b"MSG a 7",
        b"MSG a x 0",
        b"MSG a 7 -5",
        b"MSG a 7 +5",
        b"MSG a 7 r x",
        b"MSG a 7 r 1 0",
        b"MSG a  7 0",
        b"HMSG a 7 0",
        b"HMSG a 7 r x 0",
        b"HMSG a 7 r r 0 0",
        b"HMSG a 7 5 4",
    ],
)
def test_a_malformed_line_ends_the_connection(line: bytes) -> None:
    with pytest.raises(nats.errors.ProtocolError):
        handed_over([line + b"\r\n"])


def test_a_line_without_an_end_ends_the_connection() -> None:
    with pytest.raises(nats.errors.ProtocolError):
        handed_over([b"MSG " + b"a" * LONGEST_LINE_BYTES])


def test_a_handler_that_breaks_and_bytes_that_are_no_text_cost_one_message(caplog: pytest.LogCaptureFixture) -> None:
    client = TamedClient()
    seen: list[bytes] = []

    def handler(msg: Msg) -> None:
        if msg.payload == b"bug":
            raise RuntimeError("a bug")
        seen.append(msg.payload)

    client.hand_over(7, handler)
    with caplog.at_level(logging.WARNING, "relay.bus"):
        asyncio.run(
            client._ps.parse(b"MSG a 7 3\r\nbug\r\nMSG a 7 \xff 1\r\nx\r\nMSG \xff 7 1\r\nx\r\nMSG a 7 1\r\n1\r\n")
        )
    assert seen == [b"1"]
    assert [record.getMessage().partition(" that ")[0] for record in caplog.records] == [
        "a message on b'a' could not be handed over",
        "dropped a message on b'a'",
        r"dropped a message on b'\xff'",
    ]


def test_it_reads_large_pieces(bus: Bus) -> None:
    assert bus._nc._transport._io_reader._limit == READ_BYTES


@pytest.mark.parametrize(
    "publication",
    [
        Publication("nats.client", b"", {"A": "b\r\nC: d"}),
        Publication("nats.client", b"", {"A\n": "b"}),
        Publication("nats.client", b"", {"A": "\ud800"}),
        Publication("nats.\ud800", b""),
    ],
    ids=["line end in a value", "line end in a name", "surrogate in a value", "surrogate in the subject"],
)
def test_what_is_no_text_is_refused_and_nothing_of_it_written(bus: Bus, publication: Publication) -> None:
    came: list[bytes] = []
    bus.subscribe("nats.>", "", lambda msg: came.append(msg.payload))
    (answer,) = bus.request_all([publication], 2)
    assert isinstance(answer, BusRefused)
    assert answer.code == 400
    bus.publish(Publication("nats.client", b"after", FixedHeaders({"A": "b"})))
    bus.flush()
    with gevent.Timeout(2):
        while not came:
            gevent.sleep(0.001)
    assert came == [b"after"]


def test_what_was_put_before_the_connection_was_lost_is_not_for_the_next(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]
) -> None:
    server = new_nats_server()
    bus = new_bus(server.url)
    client = bus._connection.nc
    client.put(Publication("nats.client.stale", b"stale"), "")  # and never sent
    server.stop()
    with gevent.Timeout(5):
        while bus.is_connected:
            gevent.sleep(0.01)
    assert client.send() == 1
    server.start()
    assert bus.wait_connected(5)
    came: list[bytes] = []
    bus.subscribe("nats.client.stale", "", lambda msg: came.append(msg.payload))
    bus.publish(Publication("nats.client.stale", b"fresh"))
    bus.flush()
    with gevent.Timeout(2):
        while not came:
            gevent.sleep(0.001)
    assert came == [b"fresh"]


def test_without_a_connection_nothing_is_put() -> None:
    with pytest.raises(BusUnavailable, match="not connected"):
        TamedClient().put(Publication("nats.client", b""), "")
