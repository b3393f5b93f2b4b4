"""Header fields: what went in comes out of the standard library's parser, and nothing else gets in."""

from __future__ import annotations

import contextlib
import email
import email.policy
import re
import time
from email.headerregistry import AddressHeader
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import AddressInvalid
from relay.submission import header
from relay.submission.address import Address, parse_address

ADDRESS = Address("", "a", "example.com")

LINES = [
    # value, the whole field
    ("Hello", "Subject: Hello"),
    ("Hello  world, 100% (sure) = yes", "Subject: Hello  world, 100% (sure) = yes"),
    ("", "Subject: "),
    ("a\r\nBcc: b@example.com", "Subject: aBcc: b@example.com"),
    ("a\nb\rc\0d\x1be\x7ff\tg", "Subject: abcdef g"),
    ("\r\n", "Subject: "),
    (" a", "Subject: =?utf-8?q?_a?="),
    ("a ", "Subject: =?utf-8?q?a_?="),
    ("=?utf-8?q?a?=", "Subject: =?utf-8?b?PT91dGYtOD9xP2E/PQ==?="),
    ("Gr\u00fc\u00dfe", "Subject: =?utf-8?b?R3LDvMOfZQ==?="),
    ("Gr\u00fc\u00dfe an alle, die dies lesen", "Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe_an_alle=2C_die_dies_lesen?="),
    ("\u65e5\u672c", "Subject: =?utf-8?b?5pel5pys?="),
    ("a\x85b\u00e9", "Subject: =?utf-8?q?ab=C3=A9?="),
    ("x" * 989, "Subject: " + "x" * 989),
]


@pytest.mark.parametrize(("value", "line"), LINES)
def test_free_text(value: str, line: str) -> None:
    assert header.unstructured("Subject", value) == line


def lines_of(field: str) -> list[bytes]:
    raw = field.encode("utf-8")
    assert b"\r" not in raw.replace(b"\r\n", b"")
    assert b"\n" not in raw.replace(b"\r\n", b"")
    lines = raw.split(b"\r\n")
    assert all(line[:1] == b" " and line.strip() for line in lines[1:]), "every further line continues the field"
    assert all(len(line) <= 998 for line in lines)
    assert all(len(line) <= 76 for line in lines if b"=?utf-8" in line)
    return lines


def parsed(field: str) -> email.message.EmailMessage:
    return email.message_from_bytes(field.encode() + b"\r\n\r\n", policy=email.policy.SMTP)


def without_controls(text: str) -> str:
    return re.sub("[\x00-\x1f\x7f-\x9f]", "", text.replace("\t", " "))


# The parser under comparison breaks lines also at these, and takes halves of surrogate pairs for octets.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2028\u2029"), max_size=200)


@settings(max_examples=300, deadline=None)
@given(TEXT | st.text("a =?_\u00e9\U0001f600\r\n\t", max_size=300))
def test_any_subject_round_trips(subject: str) -> None:
    field = header.unstructured("Subject", subject)
    lines_of(field)
    message = parsed(field)
    assert message.keys() == ["Subject"]
    assert str(message["Subject"]) == without_controls(subject)


@settings(max_examples=300, deadline=None)
@given(TEXT | st.text('a "\\,<>@=?\u00e9\r\n', max_size=40))
def test_any_display_name_round_trips(name: str) -> None:
    field = header.mailbox("From", name, ADDRESS)
    lines_of(field)
    message = parsed(field)
    assert message.keys() == ["From"]
    (address,) = cast(AddressHeader, message["From"]).addresses
    assert address.addr_spec == "a@example.com"
    assert parse_address(field.removeprefix("From: ").replace("\r\n", "")).display_name == without_controls(name)


@pytest.mark.parametrize(
    "subject", ["x" * 990, "x y " * 1000, "\u00fc" * 3000, "\U0001f600 " * 2000, "x\u00fc" * 500_000]
)
def test_long_subjects_are_folded(subject: str) -> None:
    started = time.process_time()
    field = header.unstructured("Subject", subject)
    assert time.process_time() - started < 2
    lines_of(field)
    if len(subject) < 5000:
        assert str(parsed(field)["Subject"]) == subject


AS_GIVEN = [
    # text, the field
    ("a@example.com", "To: a@example.com"),
    ("  Ann (x) <a@Example.com>", "To:   Ann (x) <a@Example.com>"),
    ('"Cee, Ann" <a@example.com>', 'To: "Cee, Ann" <a@example.com>'),
    ("=?utf-8?q?a=0D=0ABcc=3A?= <a@example.com>", 'To: "aBcc:" <a@example.com>'),
    ("=?utf-8?q?J=C3=B6rg?= <a@example.com>", "To: =?utf-8?q?J=C3=B6rg?= <a@example.com>"),
    (
        "=?utf-8?q?J=C3=B6rg?= =?utf-8?b?w7w=?= <a@b.example>",
        "To: =?utf-8?q?J=C3=B6rg?= =?utf-8?b?w7w=?= <a@b.example>",
    ),
    ("=?utf-8?q?a=0D=0A b?= <a@example.com>", "To: =?utf-8?b?PT91dGYtOD9xP2E9MEQ9MEEgYj89?= <a@example.com>"),
    ('"=?utf-8?q?a=0D=0A?=" <a@example.com>', "To: =?utf-8?b?PT91dGYtOD9xP2E9MEQ9MEE/PQ==?= <a@example.com>"),
    ("Ann (=?utf-8?q?a=0D=0A?=) <a@example.com>", 'To: "Ann" <a@example.com>'),
    ("=?utf-8?q?a=0D=0A?=: a@example.com;", "To: <a@example.com>"),
    ("a@example.com (=?utf-8?q?a?=)", 'To: "a" <a@example.com>'),
    ("Ann\tCee <a@example.com>", 'To: "Ann Cee" <a@example.com>'),
    ("J\u00f6rg <a@example.com>", "To: =?utf-8?b?SsO2cmc=?= <a@example.com>"),
    ("a@b\u00fccher.example", "To: <a@xn--bcher-kva.example>"),
    ("j\u00f6rg@example.com", "To: <j\u00f6rg@example.com>"),
    (f"{'n' * 1200} <a@example.com>", None),
    (f"Ann ({'x' * 1200}) <a@example.com>", 'To: "Ann" <a@example.com>'),
]


@pytest.mark.parametrize(("text", "field"), AS_GIVEN)
def test_addresses_stay_as_given_where_they_can(text: str, field: str | None) -> None:
    written = header.mailbox_as_given("To", text, parse_address(text))
    assert written == field or field is None
    lines_of(written)
    assert parse_address(written.removeprefix("To: ").replace("\r\n", "")).mailbox == parse_address(text).mailbox


def test_a_name_that_just_does_not_fit_is_encoded() -> None:
    address = parse_address("\u65e5" * 21 + "@" + "x" * 60 + ".example")
    for length in range(800, 1000):
        lines_of(header.mailbox("From", "n" * length, address))
        lines_of(header.mailbox("From", '"' * (length // 2), address))


TOKENS = [
    ("batch-1/abc", "batch-1/abc"),
    ("a b\r\nBcc: x", "a bBcc: x"),
    ("a\0\x7f\u00e9b", "ab"),
    ("g" * 5000 + "/abc", "g" * 896 + "/abc"),
]


@pytest.mark.parametrize(("value", "expected"), TOKENS)
def test_tokens(value: str, expected: str) -> None:
    assert header.token(value) == expected


LENGTHS = st.sampled_from([0, 1, 2, 300, 899, 900, 901])


@settings(max_examples=500, deadline=None)
@given(st.lists(st.text("ab é\r\n\x00=?", max_size=6) | LENGTHS.map("x".__mul__), max_size=4))
def test_tokens_taken_together_are_those_taken_one_by_one(values: list[str]) -> None:
    assert header.tokens(*values) == tuple(map(header.token, values))


TEXTS = st.text('ab =?"\\<>()@.,é\r\n\t\x7f', max_size=12) | LENGTHS.map("x".__mul__)


@settings(max_examples=1000, deadline=None)
@given(TEXTS)
def test_what_is_plain_is_written_as_the_full_way_writes_it(text: str) -> None:
    given_ = [text, f"{text}<a@example.com>", f'"{text}" <a@example.com>', f"a@example.com ({text})"]
    addresses = []
    for each in given_:
        with contextlib.suppress(AddressInvalid):
            addresses.append((each, parse_address(each)))

    def written() -> list[str]:
        fields = [header.mailbox_as_given("Reply-To", each, address) for each, address in addresses]
        return [*fields, header.unstructured("Subject", text)]

    at_once = written()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(header, "_PLAIN", re.compile("(?!)"))  # nothing is
        assert at_once == written()
