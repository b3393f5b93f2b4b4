"""Address syntax. The expected answers of both tables were taken from Go's net/mail, but for the last group."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import AddressInvalid
from relay.submission.address import parse_address

ACCEPTED = [
    # text, display name, mailbox
    ("a@example.com", "", "a@example.com"),
    ("First.Last+tag@Example.COM", "", "First.Last+tag@example.com"),
    ("!#$%&'*+-/=?^_`{|}~@example.com", "", "!#$%&'*+-/=?^_`{|}~@example.com"),
    ("a=?b?=@example.com", "", "a=?b?=@example.com"),
    ("a@localhost", "", "a@localhost"),
    ("a@under_score.example", "", "a@under_score.example"),
    ("a@b!c.example", "", "a@b!c.example"),
    ("  a@example.com\t ", "", "a@example.com"),
    ("a@ example.com", "", "a@example.com"),
    ("<a@example.com>", "", "a@example.com"),
    ("< a@example.com>", "", "a@example.com"),
    ("Ann <a@example.com>", "Ann", "a@example.com"),
    ("Ann<a@example.com>", "Ann", "a@example.com"),
    ("Ann B. Cee <a@example.com>", "Ann B. Cee", "a@example.com"),
    ('"Cee, Ann" <a@example.com>', "Cee, Ann", "a@example.com"),
    ('"A \\"B\\" \\\\" <a@example.com>', 'A "B" \\', "a@example.com"),
    ('"" <a@example.com>', "", "a@example.com"),
    ("J\u00f6rg <a@example.com>", "J\u00f6rg", "a@example.com"),
    ("=?utf-8?q?J=C3=B6rg_B?= <a@example.com>", "J\u00f6rg B", "a@example.com"),
    ("=?UTF-8?B?SsO2cmc=?= <a@example.com>", "J\u00f6rg", "a@example.com"),
    ("=?utf-8?q?a?= =?utf-8?q?b?= c <a@example.com>", "ab c", "a@example.com"),
    ("=?iso-8859-1?q?=E9?= <a@example.com>", "\u00e9", "a@example.com"),
    ("=?us-ascii?q?a=FF?= <a@example.com>", "a\ufffd", "a@example.com"),
    ("=?utf-8?q?=4?= <a@example.com>", "=?utf-8?q?=4?=", "a@example.com"),
    ("=?utf-8?b?!?= <a@example.com>", "=?utf-8?b?!?=", "a@example.com"),
    ("Ann =?koi8-r?q?x?= <a@example.com>", "Ann", "a@example.com"),
    ("a@example.com (Ann  Cee)", "Ann Cee", "a@example.com"),
    ("a@example.com (=?utf-8?q?J=C3=B6rg?= (x) \\))", "J\u00f6rg (x) )", "a@example.com"),
    ("Ann (comment (nested)) <a@example.com> (more)", "Ann", "a@example.com"),
    ("group: Ann <a@example.com>;", "Ann", "a@example.com"),
    ("group : a@example.com ; (x)", "", "a@example.com"),
    ('"a b"@example.com', "", '"a b"@example.com'),
    ('"ab"@example.com', "", "ab@example.com"),
    ('"a.b"@example.com', "", "a.b@example.com"),
    ('"a..b"@example.com', "", '"a..b"@example.com'),
    ('"a\\"\\\\b"@example.com', "", '"a\\"\\\\b"@example.com'),
    ('"a@b"@example.com', "", '"a@b"@example.com'),
    ('"<>"@example.com', "", '"<>"@example.com'),
    ("j\u00f6rg@example.com", "", "j\u00f6rg@example.com"),
    ("\u65e5\u672c@example.com", "", "\u65e5\u672c@example.com"),
    ("a@B\u00dcCHER.example", "", "a@xn--bcher-kva.example"),
    ("a@fa\u00df.example", "", "a@xn--fa-hia.example"),
    ("a@\u4f8b\u3048\u3002example", "", "a@xn--r8jz45g.example"),
    ("a@xn--bcher-kva.example", "", "a@xn--bcher-kva.example"),
    ("a@[127.0.0.1]", "", "a@[127.0.0.1]"),
    ("a@[::FFFF:1]", "", "a@[IPv6:::ffff:1]"),
    ("a" * 64 + "@example.com", "", "a" * 64 + "@example.com"),
    ("a@" + "b" * 63 + ".example", "", "a@" + "b" * 63 + ".example"),
    ("a@" + "b." * 125 + "cc", "", "a@" + "b." * 125 + "cc"),
]

REFUSED = [
    "",
    " ",
    "a",
    "@",
    "a@",
    "@example.com",
    "a@b@example.com",
    "a b@example.com",
    ".a@example.com",
    "a.@example.com",
    "a..b@example.com",
    "a@.example.com",
    "a@example.com.",
    "a@example..com",
    "a@exam ple.com",
    "a @example.com",
    '""@example.com',
    '"a@example.com',
    '"a" b@example.com',
    "a@example.com, b@example.com",
    "a@example.com b@example.com",
    "a@example.com;",
    "Ann a@example.com",
    "Ann <a@example.com",
    "Ann a@example.com>",
    "Ann <a@example.com >",
    "Ann <>",
    "Ann <<a@example.com>>",
    "<a@example.com> Ann",
    "Ann, Cee <a@example.com>",
    "=?koi8-r?q?x?= <a@example.com>",
    "group:;",
    "group: a@example.com, b@example.com;",
    "group: a@example.com",
    "outer: inner: a@example.com;;",
    "a@example.com (open",
    "(open a@example.com",
    "a@[127.0.0.1",
    "a@[127.0.0.01]",
    "a@[fe80::1%eth0]",
    "a@[IPv6:::1]",
    "a@[example.com]",
    "a@[]",
    # what would be a second line, or a second command
    "a@example.com\r\nRCPT TO:<b@example.com>",
    "a@example.com\n",
    "a\r@example.com",
    "a\0@example.com",
    "a@exam\0ple.com",
    "\x7f@example.com",
    '"a\r\nb"@example.com',
    '"a\0b"@example.com',
    "Ann\r\nBcc: b@example.com <a@example.com>",
    '"Ann\r\n" <a@example.com>',
    # net/mail takes these; no server must ever get them
    '"a\tb"@example.com',
    "a\x85b@example.com",
    "a\u2028b@example.com",
    "a" * 65 + "@example.com",
    "\u00e9" * 33 + "@example.com",
    '"' + " " * 63 + '"@example.com',
    "a@" + "b" * 64 + ".example",
    "a@" + "b." * 125 + "ccc",
    "a@" + "b." * 127 + "c",
    "a@" + "\u00fc" * 63 + ".example",
    "a@\u2665.example",
    "a@\uff20.example",
    "a@example.com\u3002",
    "a@\u200d.example",
    "=?utf-8?q?b=40attacker.test=3E?=@example.com",
    "=?utf-8?q?=0D=0A?=@example.com",
    '"=?utf-8?b?DQo=?="@example.com',
    "a@=?utf-8?q?=2C?=.example",
    "=?utf-8?q?a@b?=.example",
    "Ann <=?us-ascii?q?=0A?=\u00e9@example.com>",
]


@pytest.mark.parametrize(("text", "display_name", "mailbox"), ACCEPTED)
def test_accepted(text: str, display_name: str, mailbox: str) -> None:
    address = parse_address(text)
    assert (address.display_name, address.mailbox) == (display_name, mailbox)


@pytest.mark.parametrize("text", REFUSED)
def test_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(AddressInvalid) as refusal:
        parse_address(text)
    sentence = str(refusal.value)
    assert sentence
    assert "\n" not in sentence
    assert "example" not in sentence, "the address itself must not get into logs"


@pytest.mark.parametrize(
    "text", ["(" * 1_000_000, "a" * 1_000_000, "a@" + "\u00fc" * 1_000_000, "a@" + "\u00fc." * 120 + "x"]
)
def test_long_texts_cost_little(text: str) -> None:
    started = time.process_time()
    with pytest.raises(AddressInvalid):
        parse_address(text)
    assert time.process_time() - started < 1


# fmt: off
PIECES = st.sampled_from([
    "a", "b.c", "@", "<", ">", '"', "(", ")", "\\", " ", "\t", ",", ";", ":", ".", "example.com", "[1.2.3.4]", "[::1]",
    "-", "=?utf-8?q?=C3=B6?=", "=?x?q?y?=", "\0", "\r\n", "\x7f", "\u00f6", "\u3002", "\ud800", "xn--a", "\u0660",
])
# fmt: on


@settings(max_examples=500, deadline=None)
@given(st.lists(PIECES, max_size=9).map("".join) | st.text(max_size=20).map(lambda text: f"{text}@example.com"))
def test_whatever_comes_out_is_fit_for_the_wire(text: str) -> None:
    try:
        address = parse_address(text)
    except AddressInvalid:
        return
    mailbox = address.mailbox
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in mailbox)
    assert address.domain.isascii()
    assert address.domain == address.domain.lower() or address.domain.startswith("[IPv6:")
    if not address.local_part.startswith('"'):
        assert not set(address.local_part) & set(' <>()[]:;@\\,"')
    assert len(mailbox.encode()) <= 254
    if not address.domain.startswith("[IPv6:"):  # as SMTP writes it; callers may not
        assert parse_address(mailbox)[1:] == address[1:]
