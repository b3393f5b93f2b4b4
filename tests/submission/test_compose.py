"""The whole mail, as the standard library's parser reads it."""

from __future__ import annotations

import email
import email.policy
import locale
import re
import uuid
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import parsedate_to_datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay import contract
from relay.submission import header
from relay.submission.address import Address, parse_address
from relay.submission.compose import compose, date_header, new_ids
from relay.submission.policy import Sender
from relay.submission.request import SendRequest

BOUNDARY = "=_0123456789abcdef01234567"
REQUEST = SendRequest("user@example.com", "Hello", "<p>Hi</p>", "Hi", "", "", "", "")
SENDER = Sender(parse_address("noreply@example.org"), "Example Service", None, parse_address("user@example.com"))


def mail(request: SendRequest = REQUEST, sender: Sender = SENDER, **changes: str) -> bytes:
    values: dict[str, Any] = {
        "message_id_header": "<1@example.org>",
        "date_header": "Sun, 22 Nov 2026 01:02:03 +0000",
        "tracking_id": "batch/id-1",
        "email_id": "id-1",
        "configuration_set": "",
    }
    return compose(request=request, sender=sender, **values | changes)


def parsed(content: bytes) -> EmailMessage:
    return email.message_from_bytes(content, policy=email.policy.SMTP)


def check_lines(content: bytes) -> None:
    assert content.endswith(b"\r\n")
    lines = content.split(b"\r\n")
    assert all(len(line) <= 998 for line in lines)
    assert not any(b"\r" in line or b"\n" in line or b"\0" in line for line in lines)


def parts(content: bytes) -> list[str]:
    return [part.get_payload(decode=True).decode() for part in parsed(content).iter_parts()]  # type: ignore[union-attr]


def canonical(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\r\n")


def test_the_bytes_of_a_plain_mail() -> None:
    content = mail()
    boundary = re.search(rb'boundary="([^"]+)"', content)
    assert boundary is not None
    assert content.replace(boundary[1], b"B").decode().split("\r\n") == [
        'From: "Example Service" <noreply@example.org>',
        "To: user@example.com",
        "Subject: Hello",
        "Date: Sun, 22 Nov 2026 01:02:03 +0000",
        "Message-ID: <1@example.org>",
        "X-LFX-TRACKING-ID: batch/id-1",
        "MIME-Version: 1.0",
        'Content-Type: multipart/alternative; boundary="B"',
        "",
        "--B",
        "Content-Type: text/plain; charset=utf-8",
        "Content-Transfer-Encoding: 7bit",
        "",
        "Hi",
        "--B",
        "Content-Type: text/html; charset=utf-8",
        "Content-Transfer-Encoding: 7bit",
        "",
        "<p>Hi</p>",
        "--B--",
        "",
    ]


def test_reply_to_and_the_ses_fields_stand_only_when_asked_for() -> None:
    content = mail(
        REQUEST._replace(reply_to="Help <help@example.org>"),
        SENDER._replace(reply_to=parse_address("Help <help@example.org>")),
        configuration_set="set-1",
    )
    assert parsed(content).keys() == [
        "From",
        "To",
        "Reply-To",
        "Subject",
        "Date",
        "Message-ID",
        "X-SES-CONFIGURATION-SET",
        "X-SES-MESSAGE-TAGS",
        "X-LFX-TRACKING-ID",
        "MIME-Version",
        "Content-Type",
    ]
    assert b"\r\nReply-To: Help <help@example.org>\r\n" in content
    assert b"\r\nX-SES-CONFIGURATION-SET: set-1\r\nX-SES-MESSAGE-TAGS: email_id=id-1\r\n" in content


INJECTION = "x\r\nBcc: evil@example.com\nBcc: evil@example.com\rBcc: evil@example.com\0\x0b\x0c\x85\u2028\r\n\r\nBody"


@pytest.mark.parametrize(
    "field", ["message_id_header", "date_header", "tracking_id", "email_id", "configuration_set", "subject", "from"]
)
def test_nothing_gets_in_through_a_field(field: str) -> None:
    request, sender, changes = REQUEST, SENDER, {"configuration_set": "set-1"}
    if field == "subject":
        request = REQUEST._replace(subject_header=INJECTION)
    elif field == "from":
        sender = SENDER._replace(from_display_name=INJECTION)
    else:
        changes[field] = INJECTION
    content = mail(request, sender, **changes)
    check_lines(content)
    message = parsed(content)
    assert len(message.keys()) == 10
    assert "Bcc" not in message
    assert b"\nBcc" not in content
    assert parts(content) == ["Hi", "<p>Hi</p>"]


@pytest.mark.parametrize("name", ["to", "reply_to"])
def test_nothing_gets_in_through_an_address_field(name: str) -> None:
    # No such text parses; were one to, its own words would still not reach the header.
    content = mail(
        REQUEST._replace(to=INJECTION, reply_to=INJECTION),
        SENDER._replace(reply_to=Address("N\r\nBcc: x", "r", "example.org")),
    )
    check_lines(content)
    assert b"\r\nTo: <user@example.com>\r\n" in content
    assert b"\nBcc" not in content


def test_international_mail() -> None:
    to = "J\u00f6rg <info@b\u00fccher.example>"
    content = mail(
        REQUEST._replace(
            to=to,
            subject_header="\U0001f389 Gr\u00fc\u00dfe",
            html="<p>\u65e5\u672c</p>" * 99,
            text="caf\u00e9 and more",
        ),
        SENDER._replace(recipient=parse_address(to)),
    )
    check_lines(content)
    assert content.isascii()
    message = parsed(content)
    assert message["To"] == "J\u00f6rg <info@xn--bcher-kva.example>"
    assert message["Subject"] == "\U0001f389 Gr\u00fc\u00dfe"
    assert [part["Content-Transfer-Encoding"] for part in message.iter_parts()] == ["quoted-printable", "base64"]
    assert parts(content) == ["caf\u00e9 and more", "<p>\u65e5\u672c</p>" * 99]


def test_a_utf8_local_part_stays_utf8() -> None:
    content = mail(
        REQUEST._replace(to="j\u00f6rg@example.com"), SENDER._replace(recipient=parse_address("j\u00f6rg@example.com"))
    )
    assert "\r\nTo: <j\u00f6rg@example.com>\r\n".encode() in content


def test_a_text_that_holds_the_boundary_of_an_earlier_mail_stays_whole() -> None:
    boundary = re.search(r'boundary="([^"]+)"', mail().decode())
    assert boundary is not None
    text = f"\r\n--{boundary[1]}\r\n\r\nx\r\n--{boundary[1]}--\r\n"
    assert parts(mail(REQUEST._replace(text=text))) == [text, "<p>Hi</p>"]


PIECES = [
    "a",
    "word ",
    "\r",
    "\n",
    "\r\n",
    "\r\n.\r\n",
    "\n.\n",
    "\r.\r",
    ".",
    "--",
    "=_",
    "\u00e9",
    "\U0001f600",
    "\0",
    "z" * 600,
    " ",
]
BODY = st.lists(st.sampled_from(PIECES), min_size=1, max_size=25).map("".join) | st.text(min_size=1, max_size=100)


@settings(max_examples=300, deadline=None)
@given(text=BODY, html=BODY, subject=st.text(max_size=120), name=st.text(max_size=60), tracking_id=st.text(max_size=40))
def test_any_mail_comes_out_as_it_went_in(text: str, html: str, subject: str, name: str, tracking_id: str) -> None:
    content = mail(
        REQUEST._replace(text=text, html=html, subject_header=subject),
        SENDER._replace(from_display_name=name),
        tracking_id=tracking_id,
    )
    check_lines(content)
    assert content.isascii()
    assert parts(content) == [canonical(text), canonical(html)]
    message = parsed(content)
    assert len(message.keys()) == 8
    assert [part.get_content_type() for part in message.iter_parts()] == ["text/plain", "text/html"]
    # As it stands on the wire: Python's parser would decode what looks like an encoded word, which SES does not.
    raw = email.message_from_bytes(content, policy=email.policy.compat32)[contract.TRACKING_HEADER]
    assert raw == re.sub("[^ -~]", "", tracking_id).lstrip()
    assert not message.defects


def test_lone_surrogates_do_not_stop_a_mail() -> None:
    check_lines(mail(REQUEST._replace(text="a\ud800", html="\udfff", subject_header="\ud83d")))


def test_email_ids_are_random_uuids() -> None:
    email_ids = {new_ids("example.org")[0] for _ in range(500)}
    assert len(email_ids) == 500
    for email_id in email_ids:
        parsed_id = uuid.UUID(email_id)
        assert str(parsed_id) == email_id
        assert (parsed_id.version, parsed_id.variant) == (4, uuid.RFC_4122)


def test_what_is_random_in_a_mail_differs_in_every_part() -> None:
    mails = [new_ids("example.org") for _ in range(500)]
    for _, message_id_header, boundary in mails:
        assert re.fullmatch(r"<[0-9a-f]{32}@example\.org>", message_id_header)
        assert re.fullmatch(r"=_[0-9a-f]{24}", boundary)
    for position in range(36):
        found = {email_id[position] for email_id, _, _ in mails}
        fixed = {8: 1, 13: 1, 14: 1, 18: 1, 23: 1, 19: 4}
        assert len(found) == fixed.get(position, 16)
    for position in range(32):
        assert len({message_id_header[1 + position] for _, message_id_header, _ in mails}) == 16
    for position in range(24):
        assert len({boundary[2 + position] for _, _, boundary in mails}) == 16


@pytest.mark.parametrize("field", ["text", "html"])
def test_a_boundary_that_a_body_holds_is_not_taken(field: str) -> None:
    body = f"Hi\n--{BOUNDARY}--\n"
    content = mail(REQUEST._replace(**{field: body}), boundary=BOUNDARY)
    assert content.count(BOUNDARY.encode()) == 1
    assert canonical(body) in parts(content)
    assert f'boundary="{BOUNDARY}"'.encode() in mail(boundary=BOUNDARY)


def test_a_kept_from_field_is_the_one_of_its_sender() -> None:
    other = parse_address("other@example.org")
    names = ["Example Service", "Grüße", 'A "quoted" name', "", "n" * 998, "n" * 999, "n" * 5000]
    for _ in range(2):
        for sender in [SENDER._replace(from_display_name=name) for name in names]:
            for address in (sender.from_address, other):
                content = mail(sender=sender._replace(from_address=address))
                field = header.mailbox("From", sender.from_display_name, address)
                assert content.startswith(f"{field}\r\nTo: ".encode())


def test_the_date() -> None:
    assert date_header(0) == "Thu, 01 Jan 1970 00:00:00 +0000"
    assert date_header(1_795_309_323.999) == "Sun, 22 Nov 2026 01:02:03 +0000"
    for epoch_seconds in range(0, 2_000_000_000, 77_777_777):
        assert parsedate_to_datetime(date_header(epoch_seconds)) == datetime.fromtimestamp(epoch_seconds, UTC)


def test_the_date_is_english_in_any_locale() -> None:
    before = locale.setlocale(locale.LC_TIME)
    try:
        locale.setlocale(locale.LC_TIME, "")
        assert date_header(86_400 * 59 + 0.5) == "Sun, 01 Mar 1970 00:00:00 +0000"
    finally:
        locale.setlocale(locale.LC_TIME, before)
