"""The client without asyncio."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import nats
import pytest
from nats.js.api import ObjectStoreConfig

from relay import contract
from relay.client import (
    Attachment,
    BlockingRelayClient,
    Mail,
    NoAnswer,
    NotConnected,
    NotFound,
    Refused,
    Retry,
)
from tests.client.responder import DEFERRED, SENT, Responder, in_turn
from tests.support.caller import with_nats
from tests.support.lfx import written_record
from tests.support.nats_server import NatsServer, free_port

MAIL = Mail(to="user@example.com", subject="Hello", html="<p>Hello.</p>", text="Hello.")
RETRY = Retry(20, 5, 0.01, 0.05)


def relay_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "relay-client"]


def test_a_mail(nats_server: NatsServer, new_responder: Callable[..., Responder]) -> None:
    responder = new_responder(in_turn(DEFERRED, SENT, {"error": contract.INVALID_FROM, "outcome": "refused"}))
    with BlockingRelayClient(nats_server.url, retry=RETRY) as client:
        sent = client.send(MAIL)
        with pytest.raises(Refused):
            client.send(to="a@example.com", subject="S", html="H", text="T")
    assert sent.email_id == "e-1"
    assert sent.request_id == responder.requests[0]["request_id"] == responder.requests[1]["request_id"]
    assert not relay_threads(), "its thread has ended"


def test_questions_and_objects(nats_server: NatsServer, new_responder: Callable[..., Responder]) -> None:
    record = json.loads(written_record("e-1", "g-1"))

    def answer(request: dict[str, Any], _number: int) -> Any:
        if "email_id" in request:
            return record if request["email_id"] == "e-1" else {"error": contract.NOT_FOUND}
        return {"records": [record], "cursor": None if request.get("cursor") else "c-1"}

    new_responder(answer, contract.GET_EMAIL_STATUS)
    new_responder(in_turn({"group_id": "g-1", "total_sent": 3}), contract.GET_EMAIL_ENGAGEMENT_ANALYTICS)
    responder = new_responder(in_turn(SENT))

    async def make_bucket(nc: nats.NATS) -> None:
        await nc.jetstream().create_object_store("files", config=ObjectStoreConfig(bucket="files"))

    with_nats(nats_server.url, make_bucket)
    with BlockingRelayClient(nats_server.url, retry=RETRY) as client:
        assert client.get_status("e-1").email_id == "e-1"
        with pytest.raises(NotFound):
            client.get_status("e-2")
        assert [mail.email_id for mail in client.mails("g-1")] == ["e-1", "e-1"]
        assert [page.cursor for page in client.pages("g-1", limit=1)] == ["c-1", None]
        assert client.get_page("g-1").cursor == "c-1"
        assert client.get_analytics("g-1").total_sent == 3
        ref = client.put_object("files", b"content")
        assert client.send(MAIL, attachments=[Attachment(filename="a", object=ref)]).email_id == "e-1"
        assert client.send(client.put_mail("files", MAIL)).email_id == "e-1"
        client.delete_object(ref)
    assert responder.requests[0]["attachments"][0]["object"]["name"] == ref.name


def test_many_threads_share_one(nats_server: NatsServer, new_responder: Callable[..., Responder]) -> None:
    new_responder(lambda request, _number: SENT | {"group_id": request["group_id"]})
    client = BlockingRelayClient(nats_server.url, retry=RETRY)
    with ThreadPoolExecutor(16) as pool:
        sent = list(pool.map(lambda number: client.send(MAIL, group_id=f"g{number}"), range(100)))
        assert len(relay_threads()) == 1
    assert [each.group_id for each in sent] == [f"g{number}" for number in range(100)]
    client.close()
    client.close()
    with pytest.raises(NotConnected, match="closed"):
        client.send(MAIL)


def test_closing_tells_the_threads_that_wait(nats_server: NatsServer, new_responder: Callable[..., Responder]) -> None:
    responder = new_responder(in_turn(None))
    client = BlockingRelayClient(nats_server.url, retry=Retry(60, 60))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.send, MAIL)
        responder.wait_for(1)
        begun = time.monotonic()
        client.close()
        with pytest.raises(NoAnswer, match="closed"):
            waiting.result(10)
    assert time.monotonic() - begun < 5


def test_there_is_no_nats() -> None:
    url = f"nats://127.0.0.1:{free_port()}"
    with pytest.raises(NotConnected), BlockingRelayClient(url, connect_timeout_seconds=0.3):
        pytest.fail("it is not connected")
    assert not relay_threads()


def test_it_is_made_without_anything_being_started() -> None:
    client = BlockingRelayClient("nats://127.0.0.1:1")
    assert not relay_threads()
    client.close()


FORKED = """
import os, sys
from relay.client import BlockingRelayClient, NotConnected
client = BlockingRelayClient(sys.argv[1])
client.connect()
child = os.fork()
if child == 0:
    try:
        client.send(to="a@example.com", subject="S", html="H", text="T")
    except NotConnected as error:
        os._exit(7 if "each process" in str(error) else 1)
    os._exit(2)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
client.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_is_told_instead_of_waiting_for_ever(nats_server: NatsServer) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED, nats_server.url], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "7"
