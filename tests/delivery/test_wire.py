"""Commands and content as bytes: nothing in them becomes a command."""

from __future__ import annotations

import re
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.delivery.session import MAX_GROUP_BYTES
from relay.delivery.wire import (
    END_OF_CONTENT,
    PIECE_BYTES,
    are_plain_paths,
    dot_stuffed,
    dot_stuffed_pieces,
    is_safe_path,
    mail_command,
    plain_commands,
    rcpt_command,
)


def test_commands() -> None:
    assert mail_command("a@example.com", None, is_smtputf8=False) == b"MAIL FROM:<a@example.com>\r\n"
    assert mail_command("", 12, is_smtputf8=True) == b"MAIL FROM:<> SIZE=12 SMTPUTF8\r\n"
    assert rcpt_command("jürgen@example.com") == "RCPT TO:<jürgen@example.com>\r\n".encode()


@given(
    st.from_regex(r"[!#-;=?-~]{0,64}", fullmatch=True),
    st.from_regex(r"[!#-;=?-~]{0,64}", fullmatch=True),
    st.none() | st.integers(min_value=0),
)
def test_the_commands_of_a_plain_mail_are_the_same_in_one_write(
    reverse_path: str, forward_path: str, size_bytes: int | None
) -> None:
    mail = mail_command(reverse_path, size_bytes, is_smtputf8=False)
    assert plain_commands(reverse_path, forward_path, size_bytes) == mail + rcpt_command(forward_path) + b"DATA\r\n"


@given(st.lists(st.text(alphabet=st.sampled_from('ab<>"\\ \r\n@.é'), max_size=6), max_size=4))
def test_paths_are_plain_together_when_each_is(paths: list[str]) -> None:
    assert bool(are_plain_paths("".join(paths))) == all(map(are_plain_paths, paths))


def test_plain_paths_make_a_group_that_may_be_pipelined() -> None:
    paths = "x" * 100_000
    plain = next(length for length in range(len(paths)) if not are_plain_paths(paths[: length + 1]))
    assert len(plain_commands(paths[:plain], "", 10**18)) <= MAX_GROUP_BYTES


@given(st.text(alphabet=st.sampled_from('ab<>"\\ \r\n\x00@.é\u2028')))
def test_a_safe_path_never_ends_its_brackets(path: str) -> None:
    if are_plain_paths(path):
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


@given(PIECES.map(b"".join), st.integers(min_value=1, max_value=6))
def test_pieces_are_the_whole_with_its_dot_in_the_last(content: bytes, piece_bytes: int) -> None:
    pieces = list(dot_stuffed_pieces(content, piece_bytes))
    assert b"".join(pieces) == dot_stuffed(content)
    # Should only those before the last arrive, no receiver of any kind has seen an end.
    assert all(piece.endswith(b"\r\n") for piece in pieces)
    assert not re.search(rb"(\A|[\r\n])\.[\r\n]", b"".join(pieces[:-1]))
    assert pieces[-1].endswith(END_OF_CONTENT)


@pytest.mark.parametrize("line", [b"x" * 76, b"." * 76, b"", b".", b"x" * 998])
@pytest.mark.parametrize("line_end", [b"\r\n", b"\n", b"\r"])
def test_large_content_in_pieces(line: bytes, line_end: bytes) -> None:
    content = (line + line_end) * (3 * PIECE_BYTES // len(line + line_end)) + b"."
    pieces = list(dot_stuffed_pieces(content))
    assert b"".join(pieces) == dot_stuffed(content)
    # Lone CRs end no piece: such content is made ready as a whole.
    assert (len(pieces) > 1) == (line_end != b"\r")


def test_large_content_takes_no_more_memory_than_a_few_pieces() -> None:
    content = (b"x" * 76 + b"\r\n") * 100_000 + (b"." * 76 + b"\r\n") * 100_000
    tracemalloc.start()
    try:
        for _ in dot_stuffed_pieces(content):
            pass
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 5 * PIECE_BYTES < len(content) / 10


@pytest.mark.parametrize("stray", [b"\r", b"\n"])
def test_a_stray_line_end_is_found_anywhere(stray: bytes) -> None:
    # More than one block of whatever looks for it, and a stray one right at, before and after each line end.
    clean = (b"x" * 70 + b"\r\n") * 60
    for position in (0, 1, 69, 70, 72, 2000, len(clean) - 2, len(clean)):
        wire = dot_stuffed(clean[:position] + stray + clean[position:])
        assert len(wire) == len(clean) + 2 + 3
    assert dot_stuffed(clean) == clean + b".\r\n"
