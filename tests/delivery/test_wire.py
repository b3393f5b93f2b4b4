"""Commands and content as bytes: nothing in them becomes a command."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.delivery.wire import dot_stuffed, is_plain_path, is_safe_path, mail_command, rcpt_command


def test_commands() -> None:
    assert mail_command("a@example.com", None, is_smtputf8=False) == b"MAIL FROM:<a@example.com>\r\n"
    assert mail_command("", 12, is_smtputf8=True) == b"MAIL FROM:<> SIZE=12 SMTPUTF8\r\n"
    assert rcpt_command("jürgen@example.com") == "RCPT TO:<jürgen@example.com>\r\n".encode()


@given(st.text(alphabet=st.sampled_from('ab<>"\\ \r\n\x00@.é\u2028')))
def test_a_safe_path_never_ends_its_brackets(path: str) -> None:
    if is_plain_path(path):
        assert path.isascii()
        assert is_safe_path(path)
    if is_safe_path(path):
        assert not set(path) & set("\r\n\x00\u2028")
        if not path.startswith('"'):
            assert not set(path) & set('<>" ')


@pytest.mark.parametrize(
    ("content", "on_the_wire"),
    [
        (b"a\r\n", b"a\r\n.\r\n"),
        (b"a", b"a\r\n.\r\n"),
        (b"", b"\r\n.\r\n"),
        (b".\r\n", b"..\r\n.\r\n"),
        (b".", b"..\r\n.\r\n"),
        (b"a\r\n.\r\nb\r\n", b"a\r\n..\r\nb\r\n.\r\n"),
        (b"a\r\n..b\r\n.\r\n", b"a\r\n...b\r\n..\r\n.\r\n"),
        (b"a\n.\nb\r\n", b"a\r\n..\r\nb\r\n.\r\n"),
        (b"a\n.\r\nb\r\n", b"a\r\n..\r\nb\r\n.\r\n"),
        (b"a\r\n.\rb\r\n", b"a\r\n..\r\nb\r\n.\r\n"),
        (b"a\r.\rb\r\n", b"a\r\n..\r\nb\r\n.\r\n"),
        (b"a\r.\r\nb\r\n", b"a\r\n..\r\nb\r\n.\r\n"),
        (b"a\r\n.\nb\r\n", b"a\r\n..\r\nb\r\n.\r\n"),
        (b"a\rb\r\n", b"a\r\nb\r\n.\r\n"),
        (b"a\nb\r\n", b"a\r\nb\r\n.\r\n"),
        (b"a\n\rb\r\n", b"a\r\n\r\nb\r\n.\r\n"),
        (b"a\r\r\nb\r\n", b"a\r\n\r\nb\r\n.\r\n"),
        (b"a\n", b"a\r\n.\r\n"),
        (b"a\r", b"a\r\n.\r\n"),
        (b"a.\r\nb.\r\n", b"a.\r\nb.\r\n.\r\n"),
    ],
)
def test_dot_stuffing(content: bytes, on_the_wire: bytes) -> None:
    assert dot_stuffed(content) == on_the_wire


LINE_ENDS = st.sampled_from([b"\r", b"\n", b"\r\n"])
PIECES = st.lists(LINE_ENDS | st.sampled_from([b".", b"a", b"\x0b", b"\x85", b"\xe2\x80\xa8"]), max_size=30)


@given(st.binary(max_size=40) | PIECES.map(b"".join))
def test_content_ends_once_and_only_at_its_end(content: bytes) -> None:
    wire = dot_stuffed(content)
    assert (b"\r\n" + wire).endswith(b"\r\n.\r\n")
    assert (b"\r\n" + wire).index(b"\r\n.\r\n") == len(wire) - 3
    # Nor for a receiver that takes a lone LF or a lone CR for a line end: there is none.
    assert not re.search(rb"\r(?!\n)|(?<!\r)\n", wire)


@given(PIECES.map(b"".join))
def test_content_is_its_lines(content: bytes) -> None:
    lines = re.split(rb"\r\n|\r|\n", content)
    if len(lines) > 1 and not lines[-1]:
        lines.pop()
    stuffed = [b"." + line if line.startswith(b".") else line for line in lines]
    assert dot_stuffed(content) == b"".join(line + b"\r\n" for line in [*stuffed, b"."])


@pytest.mark.parametrize("stray", [b"\r", b"\n"])
def test_a_stray_line_end_is_found_anywhere(stray: bytes) -> None:
    # More than one block of whatever looks for it, and a stray one right at, before and after each line end.
    clean = (b"x" * 70 + b"\r\n") * 60
    for position in (0, 1, 69, 70, 72, 2000, len(clean) - 2, len(clean)):
        wire = dot_stuffed(clean[:position] + stray + clean[position:])
        assert len(wire) == len(clean) + 2 + 3
    assert dot_stuffed(clean) == clean + b".\r\n"
