"""Transfer encodings: the choice, the line ends, the limits, and the way back."""

from __future__ import annotations

import base64
import quopri
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.submission.body import encode_body, has_short_lines

BODIES = [
    # text, encoding, octets
    ("Hi", "7bit", b"Hi\r\n"),
    ("a\nb\rc\r\nd\n\re", "7bit", b"a\r\nb\r\nc\r\nd\r\n\r\ne\r\n"),
    ("\n", "7bit", b"\r\n\r\n"),
    ("\r\r\n\n", "7bit", b"\r\n\r\n\r\n\r\n"),
    (".\n.\r\n..", "7bit", b".\r\n.\r\n..\r\n"),
    ("From me \n\t", "7bit", b"From me \r\n\t\r\n"),
    ("x" * 998 + "\n" + "y" * 998, "7bit", b"x" * 998 + b"\r\n" + b"y" * 998 + b"\r\n"),
    (
        "caf\u00e9 = good, and more of the same\n",
        "quoted-printable",
        b"caf=C3=A9 =3D good, and more of the same\r\n\r\n",
    ),
    (
        "end of line \u00e9 \nand then some\t\n more",
        "quoted-printable",
        b"end of line =C3=A9=20\r\nand then some=09\r\n more\r\n",
    ),
    ("a nul \0 in some plain text", "quoted-printable", b"a nul =00 in some plain text\r\n"),
    ("\u65e5\u672c\n", "base64", b"5pel5pysDQo=\r\n"),
]


@pytest.mark.parametrize(("text", "encoding", "octets"), BODIES)
def test_the_choice(text: str, encoding: str, octets: bytes) -> None:
    assert encode_body(text) == (encoding, octets)


def test_a_line_of_999_is_not_7bit() -> None:
    for text in ("x" * 999, "a\n" + "x" * 999 + "\nb", "x" * 998 + "\n" + "y" * 999):
        assert encode_body(text)[0] == "quoted-printable"


def test_a_line_of_5000_comes_out_soft_broken() -> None:
    encoding, octets = encode_body("<p>" + "word " * 1000 + "</p>")
    assert encoding == "quoted-printable"
    assert octets.count(b"=\r\n") > 60
    check(octets, 76)


def check(octets: bytes, limit_bytes: int) -> None:
    assert octets.endswith(b"\r\n")
    lines = octets.split(b"\r\n")
    assert max(map(len, lines)) <= limit_bytes
    assert not any(b"\r" in line or b"\n" in line for line in lines)


def decoded(encoding: str, octets: bytes) -> str:
    if encoding == "base64":
        return base64.b64decode(octets).decode()
    body = octets.removesuffix(b"\r\n")
    return (quopri.decodestring(body) if encoding == "quoted-printable" else body).decode()


def canonical(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\r\n")


PIECES = [
    "a",
    "word ",
    " ",
    "\t",
    "=",
    ".",
    "\r",
    "\n",
    "\r\n",
    "\u00e9",
    "\U0001f600",
    "\0",
    "\x7f",
    "--",
    "x" * 70,
    "y" * 500,
]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join) | st.text(max_size=300))
def test_any_text_round_trips_in_lines_of_legal_length(text: str) -> None:
    encoding, octets = encode_body(text)
    check(octets, 998 if encoding == "7bit" else 76)
    assert octets.isascii()
    assert b"\0" not in octets
    assert decoded(encoding, octets) == canonical(text)


@pytest.mark.parametrize("blank", [" ", "\t", "  ", " \t"])
def test_blanks_at_the_end_of_a_line_of_any_length(blank: str) -> None:
    text = "\n".join("\u00e9" + "x" * length + blank for length in range(60, 90))
    encoding, octets = encode_body(text)
    assert encoding == "quoted-printable"
    check(octets, 76)
    assert not any(line.endswith((b" ", b"\t")) for line in octets.split(b"\r\n"))
    assert decoded(encoding, octets) == canonical(text)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["a", "\n", "x" * 500, "y" * 997, "z" * 998, "=" * 30]), max_size=12).map("".join))
def test_short_lines_are_told_from_long_ones(text: str) -> None:
    assert has_short_lines(text) == (max(map(len, text.split("\n"))) <= 998)


@settings(max_examples=200, deadline=None)
@given(st.text("ab\u00e9\u65e5\U0001f600=\n", max_size=400))
def test_the_shorter_encoding_wins(text: str) -> None:
    encoding, octets = encode_body(text)
    if encoding != "7bit":
        other = base64.encodebytes(canonical(text).encode()).replace(b"\n", b"\r\n")
        assert len(octets) <= len(other) + 2


@pytest.mark.parametrize(
    "text", ["x" * 1_000_000, "\u00e9\n" * 300_000, "a \n" * 300_000, "x\u00e9 " * 200_000, "\r" * 500_000]
)
def test_large_bodies_cost_little(text: str) -> None:
    started = time.process_time()
    encode_body(text)
    assert time.process_time() - started < 1
