"""The line to NATS: what a user may not do is said at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from relay import contract
from relay.client import Mail, NotPermitted, RelayClient, Retry
from tests.client.responder import SENT, Responder, in_turn
from tests.support.nats_server import NatsServer

MAIL = Mail(to="user@example.com", subject="Hello", html="<p>Hello.</p>", text="Hello.")
PERMISSIONS = """
authorization {
  users: [
    { user: relay, password: relay }
    { user: sender, password: s
      permissions: { publish: ["lfx.email-service.send_email"], subscribe: ["_INBOX.sender.>"] } }
    { user: deaf, password: d
      permissions: { publish: ["lfx.email-service.send_email"], subscribe: ["nothing"] } }
  ]
}
"""


@pytest.fixture
def server(new_nats_server: Callable[..., NatsServer], new_responder: Callable[..., Responder]) -> NatsServer:
    """A server with users, and a relay of sorts."""
    made = new_nats_server(config=PERMISSIONS, jetstream=False)
    for nats_subject in (contract.SEND_EMAIL, contract.GET_EMAIL_STATUS):
        new_responder(in_turn(SENT), nats_subject, url=made.url, user="relay", password="relay")
    return made


def test_a_user_who_may_only_send(server: NatsServer) -> None:
    async def run() -> float:
        options: dict[str, Any] = {"user": "sender", "password": "s", "inbox_prefix": "_INBOX.sender"}
        async with RelayClient(server.url, retry=Retry(60, 60), **options) as client:
            assert (await client.send(MAIL)).email_id == "e-1"
            begun = time.monotonic()
            with pytest.raises(NotPermitted, match=contract.GET_EMAIL_STATUS) as raised:
                await client.get_status("e-1")
            assert (raised.value.retryable, raised.value.tries) == (False, 1)
            assert (await client.send(MAIL)).email_id == "e-1", "and may go on"
            return time.monotonic() - begun

    assert asyncio.run(run()) < 10, "it is not waited for"


def test_a_user_who_may_not_hear_the_answer(server: NatsServer) -> None:
    async def run() -> float:
        async with RelayClient(server.url, retry=Retry(60, 60), user="deaf", password="d") as client:
            begun = time.monotonic()
            for _ in range(2):
                with pytest.raises(NotPermitted, match="_inbox"):
                    await client.send(MAIL)
            return time.monotonic() - begun

    assert asyncio.run(run()) < 10, "it is not waited for"


def test_it_shows_itself_without_secrets(server: NatsServer) -> None:
    async def run() -> None:
        async with RelayClient(server.url.replace("//", "//relay:relay@")) as client:
            assert repr(client._link) == "<Link: connected, 0 unanswered>"
        assert repr(client._link) == "<Link: closed, 0 unanswered>"

    asyncio.run(run())
