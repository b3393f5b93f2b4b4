"""The client and a started relay: what the contract has."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from relay import contract
from relay.client import (
    BlockingRelayClient,
    Failed,
    Mail,
    NotFound,
    QuestionFailed,
    Refused,
    RelayClient,
    Retry,
)
from tests.support.relay_process import CatchingServer, RelayProcess

MAIL = Mail(to="user@example.com", subject="Hello", html="<p>Hello.</p>", text="Hello.")
RETRY = Retry(40, 10)


def test_a_mail_and_what_became_of_it(relay: RelayProcess, smtp: CatchingServer) -> None:
    async def run() -> tuple[Any, ...]:
        async with RelayClient(relay.nats_url, retry=RETRY) as client:
            sent = await client.send(MAIL, subject="Grüße 🚀", group_id="client-async")
            record = await client.get_status(sent.email_id)
            return (
                sent,
                record,
                [mail async for mail in client.mails("client-async")],
                await client.get_analytics("client-async"),
            )

    sent, record, mails, figures = asyncio.run(run())
    assert (sent.group_id, sent.duplicate, sent.is_skipped) == ("client-async", False, False)
    assert sent.message_id_header.startswith("<")
    assert sent.remote_id
    assert (record.email_id, record.to, record.subject) == (sent.email_id, "user@example.com", "Grüße 🚀")
    assert (record.delivered, record.opened, record.failed, record.outcome) == (False, False, False, "")
    assert record.sent_at is not None
    assert mails == [record]
    assert (figures.total_sent, figures.first_sent_at) == (1, record.sent_at)
    assert sent.message_id_header.encode() in smtp.mails()[-1].content


def test_all_eight_fields_and_no_request_id(relay: RelayProcess, smtp: CatchingServer) -> None:
    with BlockingRelayClient(relay.nats_url, retry=RETRY) as client:
        sent = client.send(
            to="user@example.com",
            subject="S",
            html="<p>H</p>",
            text="T",
            from_="news@lfx.linuxfoundation.org",
            from_display_name="News",
            reply_to="help@linuxfoundation.org",
            group_id="client-blocking",
            request_id=None,
        )
    content = smtp.mails()[-1].content
    assert sent.message_id_header.encode() in content
    assert b'From: "News" <news@lfx.linuxfoundation.org>' in content
    assert b"Reply-To: help@linuxfoundation.org" in content


@pytest.mark.parametrize(
    ("changed", "kind", "error"),
    [
        ({"from_": "no address"}, Refused, contract.INVALID_FROM),
        ({"from_": "a@example.com"}, Refused, contract.FROM_DOMAIN_NOT_ALLOWED),
        ({"reply_to": "a@example.com"}, Refused, contract.REPLY_TO_DOMAIN_NOT_ALLOWED),
        ({"text": ""}, Refused, contract.REQUIRED_FIELDS_MISSING),
        ({"to": "no address"}, Refused, contract.INVALID_REQUEST_PAYLOAD),
        ({"to": "no address", "request_id": None}, Failed, contract.DELIVERY_FAILED),
    ],
)
def test_what_the_relay_refuses(relay: RelayProcess, changed: Any, kind: Any, error: str) -> None:
    with BlockingRelayClient(relay.nats_url, retry=RETRY) as client, pytest.raises(kind) as raised:
        client.send(MAIL, **changed)
    assert type(raised.value) is kind
    assert (raised.value.error, raised.value.retryable, raised.value.tries) == (error, False, 1)


def test_many_and_pages(relay: RelayProcess) -> None:
    mails = [
        Mail(to=f"u{n}@example.com", subject=str(n), html="H", text="T", group_id="client-many") for n in range(120)
    ]

    async def run() -> tuple[Any, ...]:
        async with RelayClient(relay.nats_url, retry=RETRY) as client:
            results = [result async for result in client.send_many(mails, ordered=True)]
            sizes = [len(page.records) async for page in client.pages("client-many", limit=50)]
            records = [mail async for mail in client.mails("client-many", limit=50)]
            return results, sizes, records, await client.get_analytics("client-many")

    results, sizes, records, figures = asyncio.run(run())
    assert all(result.is_sent for result in results)
    assert sizes == [50, 50, 20]
    assert {record.email_id: record.subject for record in records} == {
        result.sent.email_id: str(result.position) for result in results
    }
    assert figures.total_sent == 120


def test_questions_without_an_answer(relay: RelayProcess) -> None:
    with BlockingRelayClient(relay.nats_url, retry=RETRY) as client:
        with pytest.raises(NotFound):
            client.get_status("550e8400-e29b-41d4-a716-446655440000")
        with pytest.raises(NotFound):
            client.get_analytics("nobody-knows")
        with pytest.raises(QuestionFailed, match="limit") as raised:
            client.get_page("client-many", limit=0)
        assert (raised.value.error, raised.value.retryable) == (contract.INVALID_LIMIT, False)
