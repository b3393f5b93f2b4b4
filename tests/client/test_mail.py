"""Mails as requests."""

from __future__ import annotations

import base64
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from relay import contract
from relay.client import Attachment, InvalidMail, Mail, MailFields, ObjectRef, StoredMail
from relay.client.mail import as_mail, with_timeout
from relay.submission.request import decode_send_request

PLAIN = {"to": "user@example.com", "subject": "Hello", "html": "<p>Hello.</p>", "text": "Hello."}


def encoded(mail: Mail) -> dict[str, Any]:
    return dict(json.loads(mail.encode(mail.own_request_id())))


def test_a_plain_mail_without_a_request_id_is_the_contracts_eight_fields() -> None:
    mail = Mail(
        **PLAIN, from_="a@example.org", from_display_name="A", reply_to="b@example.org", group_id="g", request_id=None
    )
    assert encoded(mail) == PLAIN | {
        "from": "a@example.org",
        "from_display_name": "A",
        "reply_to": "b@example.org",
        "group_id": "g",
    }
    assert set(encoded(mail)) == set(contract.SEND_EMAIL_FIELDS)
    assert decode_send_request(mail.encode("")).from_ == "a@example.org"


def test_what_is_not_given_is_left_out() -> None:
    assert encoded(Mail(**PLAIN, request_id=None)) == PLAIN


def test_every_field() -> None:
    mail = Mail(
        to=["a@example.com", "Bea <b@example.com>"],
        subject="Grüße 🚀",
        html="<p>",
        cc="c@example.com",
        bcc=("d@example.com",),
        recipients_as="individual",
        request_id="invoice-7",
        message_id_header="<m@example.org>",
        in_reply_to="<n@example.org>",
        references=["<n@example.org>", "<o@example.org>"],
        headers={"List-Id": "x", "X-Two": ["1", "2"]},
        tags={"kind": "invoice"},
        attachments=[
            Attachment(filename="ä.pdf", content=b"\x00\xff"),
            Attachment(
                filename="logo.png",
                object=ObjectRef("files", "logo"),
                content_type="image/png",
                content_id="logo",
                disposition="inline",
            ),
            Attachment(filename="empty", content=b""),
        ],
        allow_single_part=True,
    )
    assert encoded(mail) == {
        "to": ["a@example.com", "Bea <b@example.com>"],
        "subject": "Grüße 🚀",
        "html": "<p>",
        "cc": "c@example.com",
        "bcc": ["d@example.com"],
        "recipients_as": "individual",
        "request_id": "invoice-7",
        "message_id_header": "<m@example.org>",
        "in_reply_to": "<n@example.org>",
        "references": ["<n@example.org>", "<o@example.org>"],
        "headers": {"List-Id": "x", "X-Two": ["1", "2"]},
        "tags": {"kind": "invoice"},
        "attachments": [
            {"filename": "ä.pdf", "content_type": "application/pdf", "content": base64.b64encode(b"\x00\xff").decode()},
            {
                "filename": "logo.png",
                "content_type": "image/png",
                "object": {"bucket": "files", "name": "logo"},
                "content_id": "logo",
                "disposition": "inline",
            },
            {"filename": "empty", "content_type": "application/octet-stream", "content": ""},
        ],
        "allow_single_part": True,
    }


def test_the_keyword_arguments_are_the_fields_of_a_mail() -> None:
    assert [each.name for each in fields(Mail)] == list(MailFields.__annotations__)


def test_the_time_is_one_field_more() -> None:
    request = with_timeout(Mail(**PLAIN).encode("id-1"), 12.3456)
    assert json.loads(request) == PLAIN | {"request_id": "id-1", "timeout_seconds": 12.346}


def test_a_stored_mail_is_a_reference() -> None:
    stored = StoredMail(ObjectRef("mails", "m-1"), "id-1")
    assert json.loads(stored.encode()) == {"object": {"bucket": "mails", "name": "m-1"}}


def test_request_ids() -> None:
    automatic = {Mail(**PLAIN).own_request_id() for _ in range(3)}
    assert len(automatic) == 3
    assert Mail(**PLAIN, request_id="mine 1").own_request_id() == "mine 1"
    assert Mail(**PLAIN, request_id=None).own_request_id() == ""
    for wrong in ("ä", "a\n", "x" * 129):
        with pytest.raises(InvalidMail, match="request_id"):
            Mail(**PLAIN, request_id=wrong).own_request_id()


def test_half_a_surrogate_pair_travels() -> None:
    request = Mail(**PLAIN | {"subject": "a\ud800b", "text": "ü"}).encode("")
    assert decode_send_request(request).subject_header == "a\ufffdb"
    assert decode_send_request(request).text == "ü"


@pytest.mark.parametrize(
    "wrong", [{"tags": {"a": object()}}, {"headers": {"X-A": b"bytes"}}, {"subject": float("nan")}]
)
def test_what_json_has_no_word_for(wrong: Any) -> None:
    with pytest.raises(InvalidMail):
        Mail(**PLAIN | wrong).encode("")


def test_an_attachment_is_content_or_object() -> None:
    for wrong in (Attachment(filename="a"), Attachment(filename="a", content=b"", object=ObjectRef("a", "b"))):
        with pytest.raises(InvalidMail, match="either"):
            Mail(**PLAIN, attachments=[wrong]).encode("")


def test_an_attachment_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "report.csv"
    path.write_bytes(b"a;b\n")
    attachment = Attachment.from_path(path)
    assert attachment.members() == {"filename": "report.csv", "content_type": "text/csv", "content": "YTtiCg=="}
    assert (
        Attachment.from_path(str(path), filename="r.txt", disposition="inline").members()["content_type"]
        == "text/plain"
    )


def test_a_mail_with_some_fields_changed() -> None:
    mail = Mail(**PLAIN, tags={"a": "b"})
    assert as_mail(mail, {"group_id": "g"}) == Mail(**PLAIN, tags={"a": "b"}, group_id="g")
    assert as_mail(mail, {}) is mail
    for wrong in ({"recipient": "a"}, {"to": "a@example.com"}):
        with pytest.raises(InvalidMail, match=r"recipient|subject"):
            as_mail(None, wrong)  # type: ignore[arg-type]


def test_a_mail_is_shown_without_what_it_says_and_to_whom() -> None:
    shown = repr(Mail(**PLAIN, request_id="id-1", attachments=[Attachment(filename="secret.pdf", content=b"")]))
    assert shown == "Mail(request_id='id-1')"
    assert "secret" not in repr(Attachment(filename="secret.pdf", content=b""))
