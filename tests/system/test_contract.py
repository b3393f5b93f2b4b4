"""The contract as callers meet it: ``relayctl start`` against a NATS and an SMTP server that it did not start."""

from __future__ import annotations

import email
import email.policy
import http.client
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest

from relay import contract
from tests.support.caller import (
    GET_ANALYTICS,
    GET_EMAIL_STATUS,
    MAIL,
    SEND_EMAIL,
    ask,
    publish_with_reply_to,
    send,
    with_nats,
)
from tests.support.nats_server import NatsServer
from tests.support.relay_process import CatchingServer, RelayProcess


@pytest.fixture(scope="module")
def relay(nats_server: NatsServer, smtp: CatchingServer) -> Iterator[RelayProcess]:
    """One started relay for all tests of this file."""
    directory = Path(tempfile.mkdtemp(prefix="relay-t-"))
    made = RelayProcess(directory, nats_server.url, smtp.port, SMTP_ALLOWED_REPLY_TO_DOMAINS="linuxfoundation.org")
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(directory, ignore_errors=True)


def stored(url: str) -> tuple[int, int]:
    """The last sequences of the bucket and of the log: they tell whether anything was written."""

    async def ask_both(nc: Any) -> tuple[int, int]:
        jetstream = nc.jetstream()
        streams = (f"KV_{contract.RECIPIENTS_BUCKET}", contract.LOG_STREAM)
        bucket, log = [(await jetstream.stream_info(name)).state.last_seq for name in streams]
        return bucket, log

    return with_nats(url, ask_both)


def test_a_mail_all_the_way(relay: RelayProcess, smtp: CatchingServer) -> None:
    # When a mail is sent
    reply = send(
        relay.nats_url,
        subject="Grüße 🚀",
        group_id="all-the-way",
        text="Zeile\n.\nEnde\n",
        reply_to="a@linuxfoundation.org",
    )
    # Then the reply has its ids
    assert reply["group_id"] == "all-the-way"
    email_id = reply["email_id"]
    # … the SMTP server has the mail
    mail = smtp.mails()[-1]
    assert mail.reverse_path == "noreply@lfx.linuxfoundation.org"
    assert mail.forward_paths == ["user@example.com"]
    parsed = email.message_from_bytes(mail.content, policy=email.policy.default)
    assert isinstance(parsed, EmailMessage)
    assert parsed["Subject"] == "Grüße 🚀"
    assert parsed["From"] == "LFX Self Serve <noreply@lfx.linuxfoundation.org>"
    assert parsed["Reply-To"] == "a@linuxfoundation.org"
    assert parsed["X-LFX-TRACKING-ID"] == f"all-the-way/{email_id}"
    assert parsed["Message-ID"] == reply["message_id_header"]
    part = parsed.get_body(("plain",))
    assert part is not None
    assert part.get_content().replace("\r\n", "\n") == "Zeile\n.\nEnde\n"
    # … and status and analytics know it
    record = ask(relay.nats_url, GET_EMAIL_STATUS, {"email_id": email_id})
    assert record["to"] == "user@example.com"
    assert record["subject"] == "Grüße 🚀"
    assert (record["delivered"], record["opened"], record["open_count"], record["failed"]) == (False, False, 0, False)
    assert ask(relay.nats_url, GET_EMAIL_STATUS, {"group_id": "all-the-way"}) == [record]
    assert ask(relay.nats_url, GET_EMAIL_STATUS, {"group_id": "all-the-way", "limit": 10}) == {
        "records": [record],
        "cursor": None,
    }
    assert ask(relay.nats_url, GET_ANALYTICS, {"group_id": "all-the-way"}) == {
        "group_id": "all-the-way",
        "total_sent": 1,
        "delivered": 0,
        "opened": 0,
        "unique_opened": 0,
        "failed": 0,
        "clicked": 0,
        "unique_clicked": 0,
        "bounced": 0,
        "complained": 0,
        "delayed": 0,
        "rejected": 0,
        "first_sent_at": record["sent_at"],
    }


def test_without_a_group_the_mail_is_its_own_group(relay: RelayProcess) -> None:
    reply = send(relay.nats_url)
    assert reply["group_id"] == reply["email_id"]
    (record,) = ask(relay.nats_url, GET_EMAIL_STATUS, {"group_id": reply["group_id"]})
    assert record["email_id"] == reply["email_id"]
    assert ask(relay.nats_url, GET_ANALYTICS, {"group_id": reply["group_id"]})["total_sent"] == 1


REFUSED = [
    (b"", contract.INVALID_REQUEST_PAYLOAD),
    (b"{", contract.INVALID_REQUEST_PAYLOAD),
    (b"[]", contract.INVALID_REQUEST_PAYLOAD),
    (b'"text"', contract.INVALID_REQUEST_PAYLOAD),
    (b"\xff\xfe", contract.INVALID_REQUEST_PAYLOAD),
    (MAIL | {"to": 1}, contract.INVALID_REQUEST_PAYLOAD),
    (MAIL | {"to": {}}, contract.INVALID_REQUEST_PAYLOAD),
    (MAIL | {"html": ["<p>"]}, contract.INVALID_REQUEST_PAYLOAD),
    (MAIL | {"subject": ["Hello"]}, contract.INVALID_REQUEST_PAYLOAD),
    # With lfx any list was an invalid payload; here `to` may be one, and then these are what is wrong with it.
    (MAIL | {"to": []}, contract.REQUIRED_FIELDS_MISSING),
    (MAIL | {"to": ["no address"]}, contract.INVALID_REQUEST_PAYLOAD),
    (MAIL | {"to": ["user@example.com", 1]}, contract.INVALID_REQUEST_PAYLOAD),
    (b"null", contract.REQUIRED_FIELDS_MISSING),
    ({}, contract.REQUIRED_FIELDS_MISSING),
    (MAIL | {"to": ""}, contract.REQUIRED_FIELDS_MISSING),
    (MAIL | {"subject": None}, contract.REQUIRED_FIELDS_MISSING),
    (MAIL | {"from": "no address"}, contract.INVALID_FROM),
    (MAIL | {"from": "a@example.com"}, contract.FROM_DOMAIN_NOT_ALLOWED),
    (MAIL | {"from": "a@sub.lfx.linuxfoundation.org"}, contract.FROM_DOMAIN_NOT_ALLOWED),
    (MAIL | {"reply_to": "@"}, contract.INVALID_REPLY_TO),
    (MAIL | {"reply_to": "a@example.com"}, contract.REPLY_TO_DOMAIN_NOT_ALLOWED),
    (MAIL | {"to": "no address"}, contract.DELIVERY_FAILED),
    (MAIL | {"to": "a@" + "x" * 300 + ".example.com"}, contract.DELIVERY_FAILED),
    (MAIL | {"to": "a@example.com>\r\nRCPT TO:<b@example.com"}, contract.DELIVERY_FAILED),
]


@pytest.mark.parametrize(("request_", "error"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_what_is_refused(relay: RelayProcess, smtp: CatchingServer, request_: Any, error: str) -> None:
    mails_before, stored_before = len(smtp.mails()), stored(relay.nats_url)
    reply = ask(relay.nats_url, SEND_EMAIL, request_)
    assert reply["error"] == error
    assert reply["retryable"] is False
    assert reply["outcome"] == ("failed" if error == contract.DELIVERY_FAILED else "refused")
    assert len(smtp.mails()) == mails_before, "nothing is sent"
    assert stored(relay.nats_url) == stored_before, "nothing is recorded"


def test_a_list_of_recipients_is_taken_where_lfx_refused_it(relay: RelayProcess, smtp: CatchingServer) -> None:
    reply = send(relay.nats_url, to=["user@example.com"])
    assert set(reply) == {"email_id", "group_id", "message_id_header", "remote_id"}, "as for a string"
    assert smtp.mails()[-1].forward_paths == ["user@example.com"]


QUESTIONS = [
    (GET_EMAIL_STATUS, b"{", contract.INVALID_REQUEST_PAYLOAD),
    (GET_EMAIL_STATUS, {}, contract.EMAIL_ID_OR_GROUP_ID_REQUIRED),
    (GET_EMAIL_STATUS, {"email_id": "a", "group_id": "b"}, contract.ONLY_ONE_OF_EMAIL_ID_OR_GROUP_ID),
    (GET_EMAIL_STATUS, {"email_id": "550e8400-e29b-41d4-a716-446655440000"}, contract.NOT_FOUND),
    (GET_EMAIL_STATUS, {"email_id": ">"}, contract.NOT_FOUND),
    (GET_EMAIL_STATUS, {"email_id": "*"}, contract.NOT_FOUND),
    (GET_EMAIL_STATUS, {"email_id": "a.b"}, contract.NOT_FOUND),
    (GET_EMAIL_STATUS, {"email_id": "x" * 5000}, contract.NOT_FOUND),
    (GET_EMAIL_STATUS, {"email_id": "\r\nPUB x 0\r\n"}, contract.NOT_FOUND),
    (GET_EMAIL_STATUS, {"group_id": "nobody"}, contract.NOT_FOUND),
    (GET_EMAIL_STATUS, {"group_id": ">"}, contract.NOT_FOUND),
    (GET_EMAIL_STATUS, {"group_id": "*"}, contract.NOT_FOUND),
    (GET_EMAIL_STATUS, {"group_id": "-"}, contract.NOT_FOUND),
    (GET_EMAIL_STATUS, {"group_id": "x" * 5000}, contract.NOT_FOUND),
    (GET_EMAIL_STATUS, {"group_id": "somebody", "limit": 0}, contract.INVALID_LIMIT),
    (GET_EMAIL_STATUS, {"group_id": "somebody", "limit": 1001}, contract.INVALID_LIMIT),
    (GET_EMAIL_STATUS, {"group_id": "somebody", "limit": "10"}, contract.INVALID_LIMIT),
    (GET_EMAIL_STATUS, {"group_id": "somebody", "cursor": "forged"}, contract.INVALID_CURSOR),
    (GET_EMAIL_STATUS, {"group_id": "somebody", "cursor": 7}, contract.INVALID_REQUEST_PAYLOAD),
    (GET_EMAIL_STATUS, {"group_id": "nobody", "limit": 10}, contract.NOT_FOUND),
    (GET_ANALYTICS, b"[]", contract.INVALID_REQUEST_PAYLOAD),
    (GET_ANALYTICS, {}, contract.GROUP_ID_REQUIRED),
    (GET_ANALYTICS, {"group_id": "nobody"}, contract.NOT_FOUND),
    (GET_ANALYTICS, {"group_id": "*"}, contract.NOT_FOUND),
    (GET_ANALYTICS, {"group_id": "-"}, contract.NOT_FOUND),
]


@pytest.mark.parametrize(("nats_subject", "question", "error"), QUESTIONS, ids=[str(n) for n in range(len(QUESTIONS))])
def test_questions_without_an_answer(relay: RelayProcess, nats_subject: str, question: Any, error: str) -> None:
    assert send(relay.nats_url, group_id="somebody")["email_id"], "there is something that could be found"
    assert ask(relay.nats_url, nats_subject, question) == {"error": error}
    assert send(relay.nats_url)["email_id"], "and nobody is harmed"


@pytest.mark.parametrize("group_id", ["*", ">", "a.b", " ", "-", "=", "🚀", "x" * 10_000, "a\r\nb"])
def test_any_group_id_is_tracked_and_found_again(relay: RelayProcess, group_id: str) -> None:
    reply = send(relay.nats_url, group_id=group_id)
    assert reply["group_id"] == group_id
    (record,) = ask(relay.nats_url, GET_EMAIL_STATUS, {"group_id": group_id})
    assert record["email_id"] == reply["email_id"]
    assert ask(relay.nats_url, GET_ANALYTICS, {"group_id": group_id})["total_sent"] == 1


@pytest.mark.parametrize(
    "reply_subject",
    [
        f"$KV.{contract.RECIPIENTS_BUCKET}.x",
        f"{contract.LOG_PREFIX}.group.sent",
        "_INBOX.*",
        "_INBOX.>",
        "$JS.API.STREAM.PURGE.EMAIL_LOG",
    ],
)
@pytest.mark.parametrize("nats_subject", [SEND_EMAIL, GET_EMAIL_STATUS, GET_ANALYTICS])
def test_a_hostile_reply_subject_changes_nothing(
    relay: RelayProcess, smtp: CatchingServer, nats_subject: str, reply_subject: str
) -> None:
    mails_before, stored_before = len(smtp.mails()), stored(relay.nats_url)
    publish_with_reply_to(relay.nats_url, nats_subject, json.dumps(MAIL | {"group_id": "g"}).encode(), reply_subject)
    assert stored(relay.nats_url) == stored_before
    assert len(smtp.mails()) == mails_before
    assert send(relay.nats_url)["email_id"], "the relay goes on"


@pytest.mark.parametrize(
    "field", ["to", "subject", "html", "text", "from", "from_display_name", "reply_to", "group_id"]
)
def test_no_field_injects_a_header_or_a_command(relay: RelayProcess, smtp: CatchingServer, field: str) -> None:
    mails_before = len(smtp.mails())
    injected = "x\r\nBcc: injected@example.com\r\nX-Injected: yes\r\n\r\n.\r\nMAIL FROM:<evil@example.com>\r\n\x00"
    reply = send(relay.nats_url, **{field: injected})
    mails = smtp.mails()[mails_before:]
    if "error" in reply:
        assert not mails
        return
    (mail,) = mails
    assert mail.forward_paths == ["user@example.com"]
    parsed = email.message_from_bytes(mail.content, policy=email.policy.default)
    assert parsed["Bcc"] is None
    assert parsed["X-Injected"] is None
    assert not parsed.defects


def test_a_payload_at_max_payload_is_sent(relay: RelayProcess, smtp: CatchingServer) -> None:
    room = 1_048_576 - len(json.dumps(MAIL | {"html": ""}).encode())
    reply = send(relay.nats_url, html="x" * room)
    assert reply["email_id"]
    assert len(smtp.mails()[-1].content) > room


def test_a_group_too_large_for_one_reply_says_so(relay: RelayProcess) -> None:
    # 600 records of about 2 KB exceed the server's max_payload of 1 MiB
    async def send_many(nc: Any) -> None:
        payload = json.dumps(MAIL | {"group_id": "large", "subject": "x" * 2000}).encode()
        for _ in range(600):
            await nc.request(SEND_EMAIL, payload, timeout=10)

    with_nats(relay.nats_url, send_many)
    assert ask(relay.nats_url, GET_EMAIL_STATUS, {"group_id": "large"}) == {"error": contract.RESPONSE_TOO_LARGE}
    assert ask(relay.nats_url, GET_ANALYTICS, {"group_id": "large"})["total_sent"] == 600
    # … and its pages, cut where the reply is full, hold every record once
    seen: list[str] = []
    cursor: dict[str, str] = {}
    for _ in range(600):
        page = ask(relay.nats_url, GET_EMAIL_STATUS, {"group_id": "large", "limit": 1000, **cursor})
        seen += [record["email_id"] for record in page["records"]]
        if page["cursor"] is None:
            break
        cursor = {"cursor": page["cursor"]}
    assert len(seen) == len(set(seen)) == 600


@pytest.mark.parametrize(("path", "status"), [("/livez", 200), ("/readyz", 200), ("/", 404)])
def test_the_health_page(relay: RelayProcess, path: str, status: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", relay.http_port, timeout=5)
    try:
        connection.request("GET", path)
        assert connection.getresponse().status == status
    finally:
        connection.close()


def test_relayctl_send(relay: RelayProcess, smtp: CatchingServer) -> None:
    mail = ("send", "--to", "user@example.com", "--subject", "From the shell", "--text", "a < b", "--group", "cli")
    done = relay.relayctl(*mail, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["group_id"] == "cli"
    assert b"a &lt; b" in smtp.mails()[-1].content
    refused = relay.relayctl("send", "--to", "nobody", "--subject", "s", "--text", "t")
    assert refused.returncode == 1
    assert contract.DELIVERY_FAILED in refused.stdout


def test_relayctl_status(relay: RelayProcess) -> None:
    done = relay.relayctl("status")
    assert done.returncode == 0
    for name in ("send-1", "send-2", "status"):
        assert name in done.stdout
    assert done.stdout.count("ready") == 3


def test_logs_hold_no_address_and_no_content(relay: RelayProcess) -> None:
    send(relay.nats_url, to="private.person@" + "x" * 70 + ".example.com")
    reply = send(
        relay.nats_url,
        to="private.person@example.com",
        subject="secret subject",
        text="secret text",
        group_id="mails to private.person@example.com",
    )
    # supervisord writes what the worker has said in its own time.
    deadline = time.monotonic() + 10
    lines: list[dict[str, Any]] = []
    while not lines and time.monotonic() < deadline:
        time.sleep(0.05)
        lines = [line for each in ("send-1", "send-2") for line in relay.log(each)]
        lines = [line for line in lines if line.get("email_id") == reply["email_id"]]
    (line,) = lines
    logged = b"".join(relay.supervision.log_path(name).read_bytes() for name in ("send-1", "send-2"))
    assert all(line[stage] >= 0 for stage in ("compose_ms", "smtp_ms", "tracking_ms"))
    for secret in (b"private.person", b"secret"):
        assert secret not in logged
