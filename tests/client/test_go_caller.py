"""A caller written in Go against lfx's ``pkg/api``: byte for byte what it sends, and its way of reading the replies.

The requests below are what Go's ``json.Marshal`` makes of lfx's structs (go 1.26; field order of the structs,
``omitempty``, HTML characters and U+2028 escaped, a byte that is no UTF-8 as ``\\ufffd``).
"""

from __future__ import annotations

import email
import email.policy
import json
from collections.abc import Callable
from datetime import datetime
from email.message import EmailMessage
from typing import Any

import nats
import pytest

from relay import contract
from tests.support.caller import with_nats
from tests.support.lfx import RFC3339
from tests.support.relay_process import CatchingServer, RelayProcess

FULL = (
    rb'{"to":"user@example.com","subject":"You \u0026 \u003cme\u003e: \"Gr' + 'üße\\" 🚀 '.encode() + rb"\u2028 a\\b"
    rb'","html":"\u003cp\u003eHello \u0026amp; \t\r\n\u003c/p\u003e","text":"Hello\n","from":"newsletter@lfx.linux'
    rb'foundation.org","from_display_name":"LFX Newsletter","reply_to":"support@linuxfoundation.org","group_id":'
    rb'"my-batch-id"}'
)
SHORT = rb'{"to":"user@example.com","subject":"S","html":"H","text":"T"}'
NOT_UTF_8 = rb'{"to":"user@example.com","subject":"bad \ufffd","html":"H","text":"T"}'
NOTHING = rb'{"to":"","subject":"","html":"","text":""}'
BAD_FROM = rb'{"to":"user@example.com","subject":"S","html":"H","text":"T","from":"a@example.com"}'


def time_(value: Any) -> datetime:
    """Go's ``time.Time``."""
    assert isinstance(value, str)
    assert RFC3339.fullmatch(value), value
    return datetime.fromisoformat(value)


def opens(value: Any) -> list[Any]:
    """Go's ``[]OpenEvent``."""
    assert isinstance(value, list)
    return [as_go(OPEN_EVENT, json.dumps(each).encode()) for each in value]


OPEN_EVENT: dict[str, Any] = {"event_id": str, "opened_at": time_}
SEND_RESPONSE: dict[str, Any] = {"email_id": str, "group_id": str}
ERROR_RESPONSE: dict[str, Any] = {"error": str}
RECORD: dict[str, Any] = {
    "group_id": str,
    "email_id": str,
    "to": str,
    "subject": str,
    "sent_at": time_,
    "delivered": bool,
    "delivered_at": time_,
    "opened": bool,
    "open_count": int,
    "opened_at_list": opens,
    "last_opened_at": time_,
    "failed": bool,
    "failed_at": time_,
}
ANALYTICS: dict[str, Any] = {
    name: str if name == "group_id" else int
    for name in ("group_id", "total_sent", "delivered", "opened", "unique_opened", "failed")
}


def as_go(struct: dict[str, Any], payload: bytes) -> dict[str, Any]:
    """``json.Unmarshal`` into a struct: names exact or else in any case, unknown ones ignored, types strict."""
    decoded = json.loads(payload.decode("utf-8"), object_pairs_hook=list)
    assert isinstance(decoded, list), payload
    found: dict[str, Any] = {}
    for name, value in decoded:
        field = name if name in struct else name.lower()
        if field not in struct or value is None:
            continue
        kind = struct[field]
        if isinstance(kind, type):
            assert type(value) is kind, f"Go could not read {name} of type {type(value).__name__}"
            found[field] = value
        else:
            found[field] = kind([dict(each) for each in value] if isinstance(value, list) else value)
    return found


def ask(relay: RelayProcess, nats_subject: str, payload: bytes) -> bytes:
    """One request as Go sends it: the payload, and no header."""

    async def run(nc: nats.NATS) -> bytes:
        return (await nc.request(nats_subject, payload, timeout=10)).data

    return with_nats(relay.nats_url, run)


def error_in(reply: bytes) -> str:
    """How lfx's README tells an error from an answer."""
    try:
        return str(as_go(ERROR_RESPONSE, reply).get("error", ""))
    except (AssertionError, ValueError, TypeError):
        return ""  # json.Unmarshal failed: an array, for example


def test_a_mail_and_all_questions(relay: RelayProcess, smtp: CatchingServer) -> None:
    reply = ask(relay, contract.SEND_EMAIL, FULL)
    assert not error_in(reply)
    sent = as_go(SEND_RESPONSE, reply)
    assert sent["group_id"] == "my-batch-id"
    mail = email.message_from_bytes(smtp.mails()[-1].content, policy=email.policy.default)
    assert isinstance(mail, EmailMessage)
    assert str(mail["Subject"]).replace("\u2028", " ").split() == ["You", "&", "<me>:", '"Grüße"', "🚀", "a\\b"]
    assert mail["From"] == "LFX Newsletter <newsletter@lfx.linuxfoundation.org>"
    assert mail["Reply-To"] == "support@linuxfoundation.org"
    html = mail.get_body(("html",))
    assert html is not None
    assert html.get_content().replace("\r\n", "\n").rstrip("\n") == "<p>Hello &amp; \t\n</p>"

    reply = ask(relay, contract.GET_EMAIL_STATUS, b'{"email_id":"%b"}' % sent["email_id"].encode())
    assert not error_in(reply)
    record = as_go(RECORD, reply)
    assert set(record) >= {"group_id", "email_id", "to", "subject", "sent_at", "delivered", "opened", "failed"}
    assert (record["email_id"], record["to"], record["open_count"]) == (sent["email_id"], "user@example.com", 0)
    assert record["subject"] == 'You & <me>: "Grüße" 🚀 \u2028 a\\b'

    reply = ask(relay, contract.GET_EMAIL_STATUS, rb'{"group_id":"my-batch-id"}')
    assert not error_in(reply)
    records = [as_go(RECORD, json.dumps(each).encode()) for each in json.loads(reply)]
    assert records == [record]

    reply = ask(relay, contract.GET_EMAIL_ENGAGEMENT_ANALYTICS, rb'{"group_id":"my-batch-id"}')
    assert not error_in(reply)
    assert as_go(ANALYTICS, reply) == {
        "group_id": "my-batch-id",
        "total_sent": 1,
        "delivered": 0,
        "opened": 0,
        "unique_opened": 0,
        "failed": 0,
    }


@pytest.mark.parametrize("payload", [SHORT, NOT_UTF_8], ids=["short", "not UTF-8"])
def test_short_mails(relay: RelayProcess, payload: bytes) -> None:
    reply = ask(relay, contract.SEND_EMAIL, payload)
    assert not error_in(reply)
    sent = as_go(SEND_RESPONSE, reply)
    assert sent["email_id"]
    assert sent["group_id"]


@pytest.mark.parametrize(
    ("nats_subject", "payload", "error"),
    [
        (contract.SEND_EMAIL, NOTHING, contract.REQUIRED_FIELDS_MISSING),
        (contract.SEND_EMAIL, BAD_FROM, contract.FROM_DOMAIN_NOT_ALLOWED),
        (contract.GET_EMAIL_STATUS, b"{}", contract.EMAIL_ID_OR_GROUP_ID_REQUIRED),
        (contract.GET_EMAIL_STATUS, b'{"email_id":"nobody"}', contract.NOT_FOUND),
        (contract.GET_EMAIL_ENGAGEMENT_ANALYTICS, b'{"group_id":""}', contract.GROUP_ID_REQUIRED),
        (contract.GET_EMAIL_ENGAGEMENT_ANALYTICS, b'{"group_id":"nobody"}', contract.NOT_FOUND),
    ],
)
def test_errors(relay: RelayProcess, nats_subject: str, payload: bytes, error: str) -> None:
    assert error_in(ask(relay, nats_subject, payload)) == error


@pytest.mark.parametrize(
    ("payload", "is_read"), [(b'{"Email_ID":"a","new":[1]}', True), (b'{"email_id":7}', False), (b"[]", False)]
)
def test_what_go_would_not_read_fails_here(payload: bytes, is_read: bool) -> None:
    """The reader above can fail."""

    def read(decode: Callable[[dict[str, Any], bytes], dict[str, Any]]) -> bool:
        try:
            return bool(decode(SEND_RESPONSE, payload))
        except AssertionError:
            return False

    assert read(as_go) is is_read
