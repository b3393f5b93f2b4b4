"""Replies: where they end, what they say, and what is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.delivery.reply import (
    MAX_LINE_BYTES,
    MAX_REPLY_BYTES,
    MAX_TEXT_CHARACTERS,
    Extensions,
    Reply,
    ReplyBuffer,
    parse_extensions,
    plain_250,
    remote_id_in,
)
from relay.errors import ProtocolViolation


def take_all(*chunks: bytes) -> list[Reply]:
    buffer = ReplyBuffer()
    replies = []
    for chunk in chunks:
        buffer.feed(chunk)
        while (reply := buffer.take()) is not None:
            replies.append(reply)
    return replies


@pytest.mark.parametrize(
    ("data", "reply"),
    [
        (b"250 Ok\r\n", Reply(250, ("Ok",))),
        (b"250\r\n", Reply(250, ("",))),
        (b"250 \r\n", Reply(250, ("",))),
        (b"250 Ok\n", Reply(250, ("Ok",))),
        (b"250 2.1.0 Ok\r\n", Reply(250, ("Ok",), "2.1.0")),
        (b"550 5.1.1 <a@example.com>: unknown\r\n", Reply(550, ("<a@example.com>: unknown",), "5.1.1")),
        (b"550 5.1.1\r\n", Reply(550, ("",), "5.1.1")),
        (b"550 4.1.1 contradicts\r\n", Reply(550, ("4.1.1 contradicts",))),
        (b"550 5.1.1234 no code\r\n", Reply(550, ("5.1.1234 no code",))),
        (b"250-one\r\n250-two\r\n250 three\r\n", Reply(250, ("one", "two", "three"))),
        (b"250-one\r\n250\r\n", Reply(250, ("one", ""))),
        (b"550-5.7.1 one\r\n550 5.7.1 two\r\n", Reply(550, ("one", "two"), "5.7.1")),
        (b"354 go on\r\n", Reply(354, ("go on",))),
        (b"250 caf\xc3\xa9 \xff\r\n", Reply(250, ("café \ufffd",))),
    ],
)
def test_a_reply_is_understood_whole_and_in_pieces(data: bytes, reply: Reply) -> None:
    assert take_all(data) == [reply]
    assert take_all(*(data[i : i + 1] for i in range(len(data)))) == [reply]
    assert take_all(data + data) == [reply, reply]


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n",
        b"\r\n",
        b"25 Ok\r\n",
        b"2500 Ok\r\n",
        b"150 Ok\r\n",
        b"650 Ok\r\n",
        b"250_Ok\r\n",
        b" 250 Ok\r\n",
        b"250-one\r\n251 two\r\n",
        b"250-one\r\nwhat\r\n",
        b"250 a\rb\r\n",
        b"\x00\xff\r\n",
        b"250 " + b"x" * MAX_LINE_BYTES + b"\r\n",
        b"250 " + b"x" * MAX_LINE_BYTES,
        b"x" * (MAX_REPLY_BYTES + 1),
        b"250-\r\n" * (MAX_REPLY_BYTES // 6 + 1),
    ],
)
def test_what_is_no_reply_is_a_violation(data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        take_all(data)


def test_a_reply_without_end_is_bounded_also_when_it_trickles() -> None:
    with pytest.raises(ProtocolViolation):
        take_all(*[b"250-more\r\n"] * (MAX_REPLY_BYTES // 10 + 1))


@given(st.binary(max_size=300), st.integers(min_value=1, max_value=50))
def test_any_bytes_are_replies_or_a_violation_however_they_are_cut(data: bytes, step: int) -> None:
    def result(chunks: list[bytes]) -> list[Reply] | None:
        try:
            return take_all(*chunks)
        except ProtocolViolation:
            return None

    pieces = [data[i : i + step] for i in range(0, len(data), step)]
    assert result(pieces) == result([data])


@pytest.mark.parametrize(
    ("data", "enhanced_code_and_text"),
    [
        (b"250 2.0.0 Ok\r\n", ("2.0.0", "Ok")),
        (b"250 Ok 0100018f-3c6e\r\n", ("", "Ok 0100018f-3c6e")),
        (b"250 2.0.0 Ok: queued as 4XyZ12345\r\n", ("2.0.0", "Ok: queued as 4XyZ12345")),
    ],
)
def test_the_usual_250_is_known_at_a_glance(data: bytes, enhanced_code_and_text: tuple[str, str]) -> None:
    assert plain_250(data) == enhanced_code_and_text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"250 2.0.0 Ok",
        b"250 2.0.0 Ok\n",
        b"250-2.0.0 Ok\r\n",
        b"250 2.0.0 Ok\r\n2",
        b"250 2.0.0 Ok\r\n250 2.0.0 Ok\r\n",
        b"250-one\r\n250 two\r\n",
        b"251 2.0.0 Ok\r\n",
        b"550 5.0.0 Ok\r\n",
        b"250 2.0.0 caf\xc3\xa9\r\n",
        b"250 2.0.0 a\rb\r\n",
        b"250 2.0.0 a\x00b\r\n",
        b"250 Ok " + b"x" * MAX_TEXT_CHARACTERS + b"\r\n",
    ],
)
def test_any_other_reply_is_looked_at_closely(data: bytes) -> None:
    assert plain_250(data) is None


REPLY_PIECES = [
    "2",
    "250",
    " ",
    "-",
    ".",
    "2.0.0",
    "4.1.1",
    "2.0.1234",
    "Ok",
    "id=1",
    "\r\n",
    "\r",
    "\t",
    "\xe9",
    "\x00",
]


@given(
    st.lists(st.sampled_from(REPLY_PIECES), max_size=8).map(lambda pieces: f"250 {''.join(pieces)}\r\n")
    | st.from_regex(r"250 (2\.[0-9]{1,4}\.[0-9]{1,4})? ?[ -~]{0,9}\r\n", fullmatch=True)
)
def test_the_glance_sees_what_the_close_look_does(line: str) -> None:
    data = line.encode("latin-1")
    seen = plain_250(data)
    if seen is not None:
        [reply] = take_all(data)
        assert (reply.code, reply.enhanced_code, reply.text) == (250, *seen)
        assert reply.remote_id == remote_id_in(seen[1])


def test_left_over_bytes_show() -> None:
    buffer = ReplyBuffer()
    buffer.feed(b"250 Ok\r\n250-mo")
    assert buffer.take() == Reply(250, ("Ok",))
    assert buffer.take() is None
    assert not buffer.is_empty
    buffer.feed(b"re\r\n")
    assert buffer.take() is None
    assert not buffer.is_empty
    buffer.feed(b"250 end\r\n")
    assert buffer.take() == Reply(250, ("more", "end"))
    assert buffer.is_empty


@pytest.mark.parametrize(
    ("code", "kinds"), [(250, "p"), (354, "i"), (421, "t"), (499, "t"), (500, "x"), (554, "x"), (299, "p")]
)
def test_the_class_of_a_code(code: int, kinds: str) -> None:
    reply = Reply(code, ("",))
    flags = {"p": reply.is_positive, "i": reply.is_intermediate, "t": reply.is_transient, "x": reply.is_permanent}
    assert {kind for kind, is_set in flags.items() if is_set} == set(kinds)


@pytest.mark.parametrize(
    ("line", "remote_id"),
    [
        (b"250 Ok 0100018f-3c6e-4d8b-a1b2-000000000000-000000", "0100018f-3c6e-4d8b-a1b2-000000000000-000000"),
        (b"250 2.0.0 Ok: queued as 4XyZ12345", "4XyZ12345"),
        (b"250 2.0.0 ok queued as 4XyZ12345", "4XyZ12345"),
        (b"250 OK id=1tAbCd-000123-4x", "1tAbCd-000123-4x"),
        (b"250 2.0.0 Ok", ""),
        (b"250 Ok accepted", ""),
        (b"250 Ok 12 messages", ""),
        (b"250 Ok <script>1", ""),
        (b"250 Message 12 accepted", ""),
        (b"250 Ok " + b"1" * 300, ""),
        (b"550 Ok 123", ""),
    ],
)
def test_the_remote_id(line: bytes, remote_id: str) -> None:
    assert take_all(line + b"\r\n")[0].remote_id == remote_id


def test_the_text_is_one_printable_bounded_line() -> None:
    assert Reply(550, ("a\x1b[31m", "", "b\x00")).text == "a [31m b "
    assert len(Reply(550, ("x" * 4000,)).text) == MAX_TEXT_CHARACTERS


@pytest.mark.parametrize(
    ("lines", "extensions"),
    [
        (("host",), Extensions()),
        (
            ("host", "PIPELINING", "size 1000", "AUTH PLAIN LOGIN", "STARTTLS", "SMTPUTF8", "8BITMIME", ""),
            Extensions(True, True, True, True, True, 1000, frozenset({"PLAIN", "LOGIN"})),
        ),
        (("host", "SIZE"), Extensions(size=True)),
        (("host", "SIZE 0"), Extensions(size=True)),
        (("host", "SIZE -5"), Extensions(size=True)),
        (("host", "AUTH=LOGIN", "AUTH PLAIN"), Extensions(auth=frozenset({"LOGIN", "PLAIN"}))),
        (("PIPELINING", "x"), Extensions()),
    ],
)
def test_extensions(lines: tuple[str, ...], extensions: Extensions) -> None:
    assert parse_extensions(Reply(250, lines)) == extensions
