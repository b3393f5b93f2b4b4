"""Threads, header fields and tags: what is taken, what is refused and why, and how it stands in the mail."""

from __future__ import annotations

import email
import email.policy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay import contract
from relay.errors import SubmissionRejected
from relay.submission import fields
from relay.submission.fields import DEFAULT_ALLOWED_HEADERS


def lines_of(field: str) -> list[str]:
    lines = field.split("\r\n")
    assert all(line.startswith(" ") and line.strip() for line in lines[1:])
    assert all(len(line) <= 998 for line in lines)
    assert not any("\r" in line or "\n" in line for line in lines)
    return lines


def parsed(field: str) -> email.message.EmailMessage:
    return email.message_from_bytes(field.encode() + b"\r\n\r\n", policy=email.policy.SMTP)


def refusal(judge: Any, *arguments: Any) -> SubmissionRejected:
    with pytest.raises(SubmissionRejected) as caught:
        judge(*arguments)
    assert caught.value.error == contract.INVALID_REQUEST_PAYLOAD
    return caught.value


# -- message ids ------------------------------------------------------------------------------------------------------

GOOD_IDS = ["<a@b>", "<a.b+c$d%e=f@example.com>", "<1@[192.0.2.1]>", "<1@[IPv6:2001:db8::1]>", f"<{'a' * 896}@b>"]
FOREIGN_IDS = ["<a@b@c>", "<a..b@c>", "<no-at-sign>", '<"q"@x>', "<[x]:y@z,>", "<a@b.>"]
NO_IDS = [
    "a@b",
    "<a@b",
    "a@b>",
    "<>",
    "<a b@c>",
    "<a@b> x",
    "<a@b>\r\nBcc: x@example.com",
    "<a\r\n@b>",
    "<a\0@b>",
    "<ä@b>",
    "<<a@b>>",
    "<=?utf-8?q?=0D=0A?=@b>",
    f"<{'a' * 897}@b>",
]


@pytest.mark.parametrize("text", GOOD_IDS)
def test_a_message_id(text: str) -> None:
    assert fields.check_message_id("message_id_header", text) == text
    assert fields.check_message_ids("references", text) == (text,)


@pytest.mark.parametrize("text", NO_IDS + FOREIGN_IDS + ["<a@b><c@d>", " <a@b>", "<a@b>\n", ""])
def test_what_is_no_message_id(text: str) -> None:
    caught = refusal(fields.check_message_id, "message_id_header", text)
    assert (caught.field, caught.detail[:26]) == ("message_id_header", "message_id_header must be ")


@pytest.mark.parametrize("text", FOREIGN_IDS)
def test_ids_of_others_are_taken_as_they_are(text: str) -> None:
    assert fields.check_message_ids("in_reply_to", text) == (text,)


@pytest.mark.parametrize("text", [*NO_IDS, "", " ", "<a@b>," * 2, "<a@b>" * 4000])
def test_what_are_no_message_ids(text: str) -> None:
    caught = refusal(fields.check_message_ids, "references", text)
    assert caught.field == "references"
    assert caught.detail.startswith("references ")


def test_several_message_ids() -> None:
    expected = ("<a@b>", "<c@d>", "<e@f>", "<g@h>")
    assert fields.check_message_ids("references", " <a@b><c@d>\r\n\t<e@f> <g@h>\r\n") == expected


def test_references_are_folded() -> None:
    ids = [f"<{number}.{'x' * 20}@example.com>" for number in range(50)]
    field = fields.message_ids_field("References", ids)
    lines = lines_of(field)
    assert len(lines) > 10
    assert all(len(line) <= 78 for line in lines)
    assert str(parsed(field)["References"]).split(" ") == ids
    assert fields.message_ids_field("References", ["<a@b>"]) == "References: <a@b>"


def test_the_longest_message_ids_fit_their_lines() -> None:
    ids = fields.check_message_ids("references", " ".join(f"<{'a' * 896}@{number}>" for number in range(9)))
    assert len(lines_of(fields.message_ids_field("References", ids))) == 9


# -- header fields ----------------------------------------------------------------------------------------------------

REFUSED_HEADERS = [
    # name, value, what is said
    ("", "x", "a name must be"),
    ("X A", "x", "a name must be"),
    ("X:A", "x", "a name must be"),
    ("X-A\r\nBcc", "x", "a name must be"),
    ("X-Ä", "x", "a name must be"),
    ("-X", "x", "a name must be"),
    ("X-" + "a" * 75, "x", "a name must be"),
    ("X-A", "", "headers.X-A is empty"),
    ("X-A", "a\r\nBcc: x@example.com", "headers.X-A has a line end"),
    ("X-A", "a\nb", "headers.X-A has a line end"),
    ("X-A", "a\rb", "headers.X-A has a line end"),
    ("X-A", "a\0b", "headers.X-A has a line end"),
    ("X-A", "a\tb", "headers.X-A has a line end"),
    ("X-A", "a\x85b", "headers.X-A has a line end"),
    ("X-A", "a\u2028b", "headers.X-A has a line end"),
    ("X-A", "a" * 4001, "headers.X-A is longer"),
    ("List-Id", "Grüße <a.example.com>", "headers.List-Id must be ASCII"),
    ("List-Id", "=?utf-8?q?a?= <a.example.com>", "headers.List-Id must be ASCII"),
    ("Precedence", " bulk", "headers.Precedence must be ASCII"),
    ("auto-submitted", "no ", "headers.auto-submitted must be ASCII"),
    ("List-Unsubscribe", "<https://example.com/" + "a" * 1000 + ">", "headers.List-Unsubscribe has no space"),
    ("List-Unsubscribe", "a b <https://example.com/" + "a" * 1000 + ">", "headers.List-Unsubscribe has no space"),
]


@pytest.mark.parametrize(("name", "value", "said"), REFUSED_HEADERS)
def test_a_header_field_that_cannot_be_one(name: str, value: str, said: str) -> None:
    caught = refusal(fields.check_header, name, value)
    assert caught.field == "headers"
    assert said in caught.detail
    assert not value or value not in caught.detail


NEVER = [
    *("From", "sender", "Reply-To", "TO", "Cc", "bcc", "Subject", "Date", "Message-ID", "In-Reply-To", "References"),
    *("MIME-Version", "Content-Type", "Content-Anything", "Resent-To", "Return-Path", "Received", "DKIM-Signature"),
    *("ARC-Seal", "Authentication-Results", "X-SES-CONFIGURATION-SET", "x-ses-anything", "X-LFX-TRACKING-ID", "X-Bcc"),
]


@pytest.mark.parametrize("name", NEVER)
@pytest.mark.parametrize("allowed", [DEFAULT_ALLOWED_HEADERS, ("*",)])
def test_what_callers_may_never_set(name: str, allowed: tuple[str, ...]) -> None:
    caught = refusal(fields.judge_headers, [(name, "x")], allowed)
    assert caught.detail.startswith(f"headers.{name} is never taken")


def test_the_allowed_names() -> None:
    taken = ["List-Unsubscribe", "list-id", "X-Campaign", "x-mailer", "AUTO-SUBMITTED", "Precedence"]
    fields.judge_headers([(name, "x") for name in taken], DEFAULT_ALLOWED_HEADERS)
    fields.judge_headers([("Organization", "x")], ("organization",))
    fields.judge_headers([("Organization", "x")], ("*",))
    for name in ("Organization", "Precedence-Not", "List", "Xfoo"):
        assert "SMTP_ALLOWED_HEADERS" in refusal(fields.judge_headers, [(name, "x")], DEFAULT_ALLOWED_HEADERS).detail
    refusal(fields.judge_headers, [("X-A", "x")], ())


def test_fields_of_lists_stand_once() -> None:
    fields.judge_headers([("X-A", "1"), ("x-a", "2"), ("X-A", "3")], DEFAULT_ALLOWED_HEADERS)
    caught = refusal(fields.judge_headers, [("List-Id", "<a>"), ("LIST-ID", "<b>")], DEFAULT_ALLOWED_HEADERS)
    assert caught.detail == "headers.LIST-ID stands twice; a mail may have it once"


def test_the_patterns_of_the_setting() -> None:
    assert fields.header_patterns(["List-*", " X-* ", "", "Auto-Submitted", "Precedence"]) == DEFAULT_ALLOWED_HEADERS
    assert fields.header_patterns([]) == ()
    assert fields.header_patterns(["*"]) == ("*",)
    for bad in ("X-*-Y", "X Y", "To", "Content-*", "X-SES-*", "x-lfx-tracking-id", "Ä"):
        with pytest.raises(ValueError, match=r"is no name|is never taken"):
            fields.header_patterns(["X-A", bad])


FIELDS = [
    ("X-A", "b", "X-A: b"),
    ("X-A", "b  c", "X-A: b  c"),
    ("X-A", "é", "X-A: =?utf-8?b?w6k=?="),
    ("X-A", " b", "X-A: =?utf-8?q?_b?="),
    ("X-A", "=?utf-8?q?b?=", "X-A: =?utf-8?b?PT91dGYtOD9xP2I/PQ==?="),
    ("X-A", "w:" * 36 + " b", "X-A: " + "w:" * 36 + "\r\n b"),
    ("List-Unsubscribe", "<https://example.com/" + "u" * 200 + ">, <mailto:a@example.com>",
     "List-Unsubscribe: <https://example.com/" + "u" * 200 + ">,\r\n <mailto:a@example.com>"),
    ("X-A", "w" * 993, "X-A: " + "w" * 993),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "expected"), FIELDS)
def test_a_field_in_the_mail(name: str, value: str, expected: str) -> None:
    fields.check_header(name, value)
    assert fields.header_field(name, value) == expected


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029"), min_size=1)


@settings(max_examples=300, deadline=None)
@given(TEXT | st.text("a :=?_é", min_size=1, max_size=2000))
def test_any_value_round_trips(value: str) -> None:
    fields.check_header("X-Anything", value)
    field = fields.header_field("X-Anything", value)
    assert all(len(line) <= 76 for line in lines_of(field) if "=?utf-8?" in line)
    message = parsed(field)
    assert message.keys() == ["X-Anything"]
    assert str(message["X-Anything"]) == value


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30), st.text(st.sampled_from("a\r\n\0\t :\x85\u2028")))
def test_nothing_gets_in_even_unchecked(start: str, rest: str) -> None:
    field = fields.header_field("X-A", f"{start}{rest}\r\nBcc: x@example.com")
    lines_of(field)
    assert parsed(field).keys() == ["X-A"]


# -- tags -------------------------------------------------------------------------------------------------------------

REFUSED_TAGS = [
    ((("a b", "c"),), "tags: a name must be"),
    ((("", "c"),), "tags: a name must be"),
    ((("a=b", "c"),), "tags: a name must be"),
    ((("a" * 257, "c"),), "tags: a name must be"),
    ((("a\n", "c"),), "tags: a name must be"),
    ((("a", ""),), "tags.a must be"),
    ((("a", "b, c=d"),), "tags.a must be"),
    ((("a", "b\r\nBcc: x@example.com"),), "tags.a must be"),
    ((("a", "é"),), "tags.a must be"),
    ((("a", "b" * 257),), "tags.a must be"),
    ((("email_id", "b"),), "tags.email_id is the relay's own"),
    ((("Email_ID", "b"),), "tags.Email_ID is the relay's own"),
    (tuple((f"a{number}", "b") for number in range(50)), "tags are 50; SES takes 49"),
]


@pytest.mark.parametrize(("tags", "said"), REFUSED_TAGS)
def test_tags_that_ses_would_not_take(tags: Any, said: str) -> None:
    caught = refusal(fields.check_tags, tags)
    assert caught.field == "tags"
    assert caught.detail.startswith(said)


def test_the_tags_in_the_mail() -> None:
    assert fields.tags_field((), "id-1") == "X-SES-MESSAGE-TAGS: email_id=id-1"
    assert fields.tags_field((("a", "b"), ("c", "d")), "id-1") == "X-SES-MESSAGE-TAGS: email_id=id-1, a=b, c=d"


def test_the_most_tags_are_one_field_of_several_lines() -> None:
    tags = tuple((f"{number:0256}", "v" * 256) for number in range(49))
    fields.check_tags(tags)
    field = fields.tags_field(tags, "id-1")
    assert len(lines_of(field)) > 10
    shown = dict(pair.split("=") for pair in str(parsed(field)["X-SES-MESSAGE-TAGS"]).split(", "))
    assert shown == {"email_id": "id-1", **dict(tags)}
