"""The client against a responder that says what it is told to, on a real nats-server."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import nats
import nats.errors
import pytest
from nats.js.api import ObjectStoreConfig

from relay import contract
from relay.client import (
    Attachment,
    Deferred,
    Failed,
    InDoubt,
    InvalidMail,
    Mail,
    NoAnswer,
    NoResponders,
    NotConnected,
    NotFound,
    ObjectFailed,
    ObjectRef,
    QuestionFailed,
    Refused,
    RelayClient,
    RelayClientError,
    RequestTooLarge,
    Retry,
)
from tests.client.responder import DEFERRED, SENT, Responder, in_turn
from tests.support.lfx import written_record
from tests.support.nats_server import NatsServer, free_port

T = TypeVar("T")

MAIL = Mail(to="user@example.com", subject="Hello", html="<p>Hello.</p>", text="Hello.")
QUICK = Retry(total_timeout_seconds=3, try_timeout_seconds=0.3, first_pause_seconds=0.01, longest_pause_seconds=0.02)
NewResponder = Callable[..., Responder]


def with_client(url: str, work: Callable[[RelayClient], Awaitable[T]], retry: Retry = QUICK, **options: Any) -> T:
    async def run() -> T:
        async with RelayClient(url, retry=retry, **options) as client:
            return await work(client)

    return asyncio.run(run())


def test_a_mail_is_sent_under_a_request_id_of_its_own(nats_server: NatsServer, new_responder: NewResponder) -> None:
    responder = new_responder(in_turn(SENT))
    sent = with_client(nats_server.url, lambda client: client.send(MAIL))
    (request,) = responder.requests
    assert uuid.UUID(request["request_id"]).version == 4
    assert sent.request_id == request["request_id"]
    assert sent.email_id == "e-1"
    assert request["timeout_seconds"] == pytest.approx(0.225, abs=0.01), "three quarters of a short try"


def test_a_mail_as_keyword_arguments(nats_server: NatsServer, new_responder: NewResponder) -> None:
    responder = new_responder(in_turn(SENT))

    async def work(client: RelayClient) -> None:
        await client.send(to="a@example.com", subject="S", html="H", text="T", from_="f@example.org", request_id="mine")
        await client.send(MAIL, group_id="g", request_id=None)

    with_client(nats_server.url, work)
    first, second = responder.requests
    del first["timeout_seconds"]
    assert first == {
        "to": "a@example.com",
        "subject": "S",
        "html": "H",
        "text": "T",
        "from": "f@example.org",
        "request_id": "mine",
    }
    assert second == {
        "to": "user@example.com",
        "subject": "Hello",
        "html": "<p>Hello.</p>",
        "text": "Hello.",
        "group_id": "g",
    }, "without a request_id a plain mail stays plain"


def test_deferred_is_tried_again_under_the_same_request_id(
    nats_server: NatsServer, new_responder: NewResponder
) -> None:
    responder = new_responder(in_turn(DEFERRED, DEFERRED, SENT | {"duplicate": True}))
    sent = with_client(nats_server.url, lambda client: client.send(MAIL))
    assert sent.duplicate
    assert len(responder.requests) == 3
    assert {request["request_id"] for request in responder.requests} == {sent.request_id}


def test_deferred_is_tried_again_without_a_request_id_too(nats_server: NatsServer, new_responder: NewResponder) -> None:
    responder = new_responder(in_turn(DEFERRED, SENT))
    sent = with_client(nats_server.url, lambda client: client.send(MAIL, request_id=None))
    assert sent.request_id == ""
    assert [set(request) for request in responder.requests] == [{"to", "subject", "html", "text"}] * 2


def test_deferred_until_time_is_up(nats_server: NatsServer, new_responder: NewResponder) -> None:
    responder = new_responder(in_turn(DEFERRED))
    begun = time.monotonic()
    with pytest.raises(Deferred) as raised:
        with_client(nats_server.url, lambda client: client.send(MAIL), Retry(2, 2, 0.05, 0.1))
    assert time.monotonic() - begun < 5
    error = raised.value
    assert (error.retryable, error.outcome, error.detail, error.reply_code) == (True, "deferred", "overloaded", None)
    assert error.tries == len(responder.requests) > 2
    assert error.request_id == responder.requests[0]["request_id"]


@pytest.mark.parametrize(("outcome", "kind"), [("refused", Refused), ("failed", Failed), ("in_doubt", InDoubt)])
def test_what_is_final_is_not_tried_again(
    nats_server: NatsServer, new_responder: NewResponder, outcome: str, kind: type[RelayClientError]
) -> None:
    responder = new_responder(in_turn(DEFERRED | {"outcome": outcome, "retryable": False, "reply_code": 550}, SENT))
    with pytest.raises(kind) as raised:
        with_client(nats_server.url, lambda client: client.send(MAIL))
    assert (raised.value.reply_code, raised.value.retryable, raised.value.tries) == (550, False, 1)
    assert len(responder.requests) == 1


def test_an_unanswered_try_is_repeated_under_its_request_id(
    nats_server: NatsServer, new_responder: NewResponder
) -> None:
    responder = new_responder(in_turn(None, b"garbage", SENT | {"duplicate": True}))
    sent = with_client(nats_server.url, lambda client: client.send(MAIL))
    assert sent.duplicate
    assert len({request["request_id"] for request in responder.requests}) == 1
    assert len(responder.requests) == 3


@pytest.mark.parametrize("unanswered", [None, b"garbage", {"error": contract.DELIVERY_FAILED}])
def test_without_a_request_id_an_unanswered_try_is_never_repeated(
    nats_server: NatsServer, new_responder: NewResponder, unanswered: Any
) -> None:
    responder = new_responder(in_turn(unanswered, SENT))
    with pytest.raises(NoAnswer) as raised:
        with_client(nats_server.url, lambda client: client.send(MAIL, request_id=None))
    assert (raised.value.retryable, raised.value.outcome, raised.value.tries) == (False, "unknown", 1)
    assert len(responder.requests) == 1


@pytest.mark.parametrize("last", [DEFERRED, DEFERRED | {"detail": "in progress"}])
def test_that_the_last_try_sent_nothing_does_not_say_that_none_did(
    nats_server: NatsServer, new_responder: NewResponder, last: Any
) -> None:
    new_responder(in_turn(None, last))
    with pytest.raises(NoAnswer) as raised:
        with_client(nats_server.url, lambda client: client.send(MAIL), Retry(2, 0.5, 0.02, 0.02))
    assert (raised.value.outcome, raised.value.retryable) == ("unknown", True)
    assert isinstance(raised.value.__cause__, Deferred)
    assert raised.value.tries > 1
    assert raised.value.request_id


def test_nobody_serves_at_first(nats_server: NatsServer, new_responder: NewResponder) -> None:
    async def work(client: RelayClient) -> Any:
        sending = asyncio.create_task(client.send(MAIL))
        await asyncio.sleep(0.1)
        responder = await asyncio.to_thread(new_responder, in_turn(SENT))
        return await sending, responder.requests

    sent, requests = with_client(nats_server.url, work, Retry(20, 5, 0.05, 0.1))
    assert sent.email_id == "e-1"
    assert len(requests) == 1, "the others reached nobody"


@pytest.mark.parametrize("request_id", ["", None])
def test_nobody_serves(nats_server: NatsServer, request_id: str | None) -> None:
    with pytest.raises(NoResponders) as raised:
        with_client(nats_server.url, lambda client: client.send(MAIL, request_id=request_id), Retry(1, 1, 0.02, 0.02))
    assert (raised.value.retryable, raised.value.outcome) == (True, "deferred")
    assert raised.value.tries > 2


def test_total_time_is_bounded_whatever_a_try_may_take(nats_server: NatsServer, new_responder: NewResponder) -> None:
    responder = new_responder(in_turn(None))
    begun = time.monotonic()
    with pytest.raises(NoAnswer):
        with_client(nats_server.url, lambda client: client.send(MAIL), Retry(0.6, 30, 0.01, 0.01))
    assert time.monotonic() - begun < 5
    assert responder.requests[0]["timeout_seconds"] == pytest.approx(0.45, abs=0.02)


def test_a_mail_that_must_go_soon_is_not_tried_longer(nats_server: NatsServer, new_responder: NewResponder) -> None:
    responder = new_responder(in_turn(DEFERRED))
    with pytest.raises(Deferred):
        with_client(nats_server.url, lambda client: client.send(MAIL, timeout_seconds=0.4), Retry(60, 60, 0.05, 0.05))
    told = [request["timeout_seconds"] for request in responder.requests]
    assert told[0] == pytest.approx(0.4, abs=0.05)
    assert told == sorted(told, reverse=True), "what is left gets less with every try"
    assert len(told) > 2


def test_a_time_is_told_without_a_request_id_when_it_was_given(
    nats_server: NatsServer, new_responder: NewResponder
) -> None:
    responder = new_responder(in_turn(SENT))
    with_client(nats_server.url, lambda client: client.send(MAIL, request_id=None, timeout_seconds=0.1))
    assert responder.requests[0]["timeout_seconds"] == pytest.approx(0.1, abs=0.05)


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout_seconds": 0},
        {"timeout_seconds": -1.0},
        {"request_id": "ä"},
        {"attachments": [Attachment(filename="a")]},
    ],
)
def test_a_mail_that_is_none_never_leaves(nats_server: NatsServer, new_responder: NewResponder, wrong: Any) -> None:
    responder = new_responder(in_turn(SENT))
    with pytest.raises(InvalidMail) as raised:
        with_client(nats_server.url, lambda client: client.send(MAIL, **wrong))
    assert (raised.value.outcome, raised.value.retryable) == ("refused", False)
    assert responder.requests == []


def test_a_request_larger_than_nats_takes(
    new_nats_server: Callable[..., NatsServer], new_responder: NewResponder
) -> None:
    server = new_nats_server(config="max_payload: 4096")
    responder = new_responder(in_turn(SENT), url=server.url)

    async def work(client: RelayClient) -> None:
        with pytest.raises(RequestTooLarge, match="put_object"):
            await client.send(MAIL, attachments=[Attachment(filename="a", content=bytes(4096))])
        assert (await client.send(MAIL)).email_id == "e-1", "and the connection still serves"

    with_client(server.url, work)
    assert len(responder.requests) == 1


def test_attachments_and_mails_in_a_bucket(
    new_nats_server: Callable[..., NatsServer], new_responder: NewResponder, tmp_path: Path
) -> None:
    server = new_nats_server(config="max_payload: 200000")
    responder = new_responder(in_turn(SENT), url=server.url)
    content = bytes(range(256)) * 2000
    path = tmp_path / "large.bin"
    path.write_bytes(content)

    async def work(client: RelayClient) -> tuple[Any, ...]:
        nc = await nats.connect(server.url)
        store = await nc.jetstream().create_object_store("mails", config=ObjectStoreConfig(bucket="mails"))
        refs = [await client.put_object("mails", content), await client.put_object("mails", path, name="of-a-path")]
        stored = [(await store.get(ref.name)).data for ref in refs]
        await client.send(MAIL, attachments=[Attachment(filename="large.bin", object=refs[0])])
        large = await client.put_mail("mails", Mail(to="a@example.com", subject="S", html="H", text="x" * 300_000))
        sent = await client.send(large)
        whole = json.loads((await store.get(large.object.name)).data or b"")
        with pytest.raises(InvalidMail):
            await client.send(large, group_id="g")
        await client.delete_object(refs[0])
        await client.delete_object(refs[0])
        left = {info.name for info in await store.list() if not info.deleted}
        with pytest.raises(ObjectFailed, match="no such bucket") as raised:
            await client.put_object("nowhere", b"")
        assert not raised.value.retryable
        with pytest.raises(ObjectFailed) as raised:
            await client.put_object("mails", tmp_path / "missing")
        assert not raised.value.retryable
        await nc.close()
        return refs, stored, large, sent, whole, left

    refs, stored, large, sent, whole, left = with_client(server.url, work, Retry(20, 5))
    assert [hashlib.sha256(each).digest() for each in stored] == [hashlib.sha256(content).digest()] * 2
    assert refs[1] == ObjectRef("mails", "of-a-path")
    assert responder.requests[0]["attachments"][0]["object"] == {"bucket": "mails", "name": refs[0].name}
    assert responder.requests[1] == {"object": {"bucket": "mails", "name": large.object.name}}
    assert whole["request_id"] == large.request_id == sent.request_id
    assert len(whole["text"]) == 300_000
    assert left == {"of-a-path", large.object.name}


def test_questions(nats_server: NatsServer, new_responder: NewResponder) -> None:
    record = json.loads(written_record("e-1", "g-1"))

    def answer(request: dict[str, Any], number: int) -> Any:
        if number == 0:
            return None  # the first is lost, and asked again
        if number == 1:
            return {"error": contract.INTERNAL_ERROR}
        if "email_id" in request:
            return record if request["email_id"] == "e-1" else {"error": contract.NOT_FOUND}
        cursor = request.get("cursor")
        following = {None: "c-1", "c-1": "c-2", "c-2": None}[cursor]
        return {
            "records": [record | {"email_id": f"{cursor}-{n}"} for n in range(request["limit"])],
            "cursor": following,
        }

    status = new_responder(answer, contract.GET_EMAIL_STATUS)
    analytics = new_responder(in_turn({"group_id": "g-1", "total_sent": 3}), contract.GET_EMAIL_ENGAGEMENT_ANALYTICS)

    async def work(client: RelayClient) -> tuple[Any, ...]:
        one = await client.get_status("e-1")
        with pytest.raises(NotFound):
            await client.get_status("e-2")
        mails = [mail.email_id async for mail in client.mails("g-1", limit=2)]
        sizes = [len(page.records) async for page in client.pages("g-1", limit=1)]
        return one, mails, sizes, await client.get_analytics("g-1")

    one, mails, sizes, figures = with_client(nats_server.url, work)
    assert one.email_id == "e-1"
    assert mails == ["None-0", "None-1", "c-1-0", "c-1-1", "c-2-0", "c-2-1"]
    assert sizes == [1, 1, 1]
    assert figures.total_sent == 3
    assert status.requests[0] == status.requests[1] == {"email_id": "e-1"}
    assert status.requests[4] == {"group_id": "g-1", "limit": 2}
    assert status.requests[5] == {"group_id": "g-1", "limit": 2, "cursor": "c-1"}
    assert analytics.requests == [{"group_id": "g-1"}]


def test_a_question_that_is_never_answered(nats_server: NatsServer, new_responder: NewResponder) -> None:
    responder = new_responder(in_turn({"error": contract.INTERNAL_ERROR}), contract.GET_EMAIL_STATUS)
    with pytest.raises(QuestionFailed, match=contract.INTERNAL_ERROR) as raised:
        with_client(nats_server.url, lambda client: client.get_status("e"), Retry(1, 1, 0.02, 0.02))
    assert raised.value.retryable
    assert raised.value.tries == len(responder.requests) > 2


def test_a_lost_connection_ends_the_wait_and_the_try_is_repeated(
    new_nats_server: Callable[..., NatsServer], new_responder: NewResponder
) -> None:
    server = new_nats_server(jetstream=False)
    responder = new_responder(in_turn(None, SENT | {"duplicate": True}), url=server.url)

    async def work(client: RelayClient) -> Any:
        sending = asyncio.create_task(client.send(MAIL))
        await asyncio.to_thread(responder.wait_for, 1)
        await asyncio.to_thread(server.stop)
        await asyncio.to_thread(server.start)
        return await sending

    begun = time.monotonic()
    sent = with_client(server.url, work, Retry(60, 60, 0.05, 0.1), reconnect_time_wait=0.05)
    assert time.monotonic() - begun < 20, "not a whole try's time"
    assert sent.duplicate
    first, second = responder.requests
    assert first["request_id"] == second["request_id"]


def test_without_a_request_id_a_lost_connection_is_waited_out(
    new_nats_server: Callable[..., NatsServer], new_responder: NewResponder
) -> None:
    """The relay may answer over the next connection: the answer is worth more than an early doubt."""
    server = new_nats_server(jetstream=False)

    async def late(_request: dict[str, Any], _number: int) -> Any:
        await asyncio.sleep(1.5)
        return SENT

    responder = new_responder(lambda request, number: late(request, number), url=server.url)

    async def work(client: RelayClient) -> Any:
        sending = asyncio.create_task(client.send(MAIL, request_id=None))
        await asyncio.to_thread(responder.wait_for, 1)
        await asyncio.to_thread(server.stop)
        await asyncio.to_thread(server.start)
        return await sending

    sent = with_client(server.url, work, Retry(30, 30, 0.05, 0.1), reconnect_time_wait=0.05)
    assert sent.email_id == "e-1"
    assert len(responder.requests) == 1


def test_nats_is_away(new_nats_server: Callable[..., NatsServer], new_responder: NewResponder) -> None:
    server = new_nats_server(jetstream=False)
    new_responder(in_turn(SENT), url=server.url)

    async def work(client: RelayClient) -> Any:
        server.stop()
        with pytest.raises(RelayClientError) as raised:
            await client.send(MAIL, timeout_seconds=0.5)
        server.start()
        return raised.value, await client.send(MAIL)

    error, sent = with_client(server.url, work, Retry(20, 5, 0.05, 0.1), reconnect_time_wait=0.05)
    assert isinstance(error, NotConnected | NoAnswer), "the first try may have left before the loss was seen"
    assert error.retryable
    assert sent.email_id == "e-1"


def test_there_is_no_nats(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        client = RelayClient(
            f"nats://127.0.0.1:{free_port()}", retry=Retry(1, 1, 0.05, 0.1), connect_timeout_seconds=0.3
        )
        with pytest.raises(NotConnected) as raised:
            await client.connect()
        assert raised.value.retryable
        with pytest.raises(NotConnected):
            await client.send(MAIL)
        await client.close()

    begun = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - begun < 10
    assert "user@" not in caplog.text


def test_a_client_that_nats_closed_for_good_is_replaced(nats_server: NatsServer, new_responder: NewResponder) -> None:
    new_responder(in_turn(SENT))

    async def work(client: RelayClient) -> Any:
        await client.send(MAIL)
        nc = client._link._nc
        assert nc is not None
        await nc.close()  # as nats-py does on most errors that a server tells
        return await client.send(MAIL)

    assert with_client(nats_server.url, work).email_id == "e-1"


def test_closed_is_closed(nats_server: NatsServer, new_responder: NewResponder) -> None:
    responder = new_responder(in_turn(None))

    async def work(client: RelayClient) -> Any:
        sending = asyncio.create_task(client.send(MAIL))
        await asyncio.to_thread(responder.wait_for, 1)
        await client.close()
        with pytest.raises(NoAnswer, match="closed"):
            await sending
        with pytest.raises(NotConnected, match="closed") as raised:
            await client.send(MAIL)
        assert not raised.value.retryable

    with_client(nats_server.url, work, Retry(60, 60))


def test_a_connection_that_the_program_has(nats_server: NatsServer, new_responder: NewResponder) -> None:
    responder = new_responder(in_turn(SENT))

    async def run() -> None:
        nc = await nats.connect(nats_server.url, inbox_prefix="_INBOX.mine")
        async with RelayClient(connection=nc, retry=QUICK) as client:
            assert (await client.send(MAIL)).email_id == "e-1"
        assert nc.is_connected, "it is not closed with the client"
        async with RelayClient(connection=nc, retry=QUICK) as client:
            assert (await client.send(MAIL)).email_id == "e-1"
        await nc.close()

    asyncio.run(run())
    assert all(msg.reply.startswith("_INBOX.mine.") for msg in responder.msgs)


def test_the_callers_callbacks_are_called(new_nats_server: Callable[..., NatsServer]) -> None:
    server = new_nats_server(jetstream=False)
    called: list[str] = []

    def noting(name: str) -> Callable[..., Awaitable[None]]:
        async def callback(*_: object) -> None:
            called.append(name)

        return callback

    async def work(client: RelayClient) -> None:
        await asyncio.to_thread(server.stop)
        for _ in range(200):
            if "disconnected_cb" in called and "error_cb" in called:
                break
            await asyncio.sleep(0.02)

    names = ("error_cb", "closed_cb", "disconnected_cb")
    with_client(server.url, work, reconnect_time_wait=0.05, **{name: noting(name) for name in names})
    assert set(called) == set(names)


def test_many_at_once_get_each_its_own_answer(nats_server: NatsServer, new_responder: NewResponder) -> None:
    async def answer(request: dict[str, Any], number: int) -> Any:
        await asyncio.sleep(0.02 * (number % 5))
        return SENT | {"group_id": request["group_id"]}

    new_responder(lambda request, number: answer(request, number))

    async def work(client: RelayClient) -> list[str]:
        sent = await asyncio.gather(*[client.send(MAIL, group_id=f"g{n}") for n in range(200)])
        assert not client._link._asked, "nothing is left behind"
        return [each.group_id for each in sent]

    assert with_client(nats_server.url, work, Retry(20, 10)) == [f"g{n}" for n in range(200)]


def test_a_send_that_is_cancelled_leaves_nothing_behind(nats_server: NatsServer, new_responder: NewResponder) -> None:
    responder = new_responder(in_turn(None))

    async def work(client: RelayClient) -> None:
        sending = asyncio.create_task(client.send(MAIL))
        await asyncio.to_thread(responder.wait_for, 1)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert not client._link._asked

    with_client(nats_server.url, work, Retry(60, 60))


def test_no_address_is_logged(
    nats_server: NatsServer, new_responder: NewResponder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    new_responder(in_turn(DEFERRED | {"detail": "secret.person@example.com: 450 mailbox busy"}))
    with pytest.raises(Deferred) as raised:
        with_client(
            nats_server.url, lambda client: client.send(MAIL, to="secret.person@example.com"), Retry(1, 1, 0.02)
        )
    logging.getLogger("a service").warning("not sent", exc_info=raised.value)
    assert "mailbox busy" in caplog.text
    assert "secret.person" not in caplog.text


def test_importing_it_is_cheap_and_brings_nothing_of_the_workers() -> None:
    program = """
import time, sys
import relay.client
print(time.process_time())
print(sorted({name.split(".")[0] for name in sys.modules} & {"gevent", "boto3", "pydantic", "orjson", "click"}))
print(sorted(name for name in sys.modules if name.startswith("relay.") and not name.startswith("relay.client")))
"""
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        taken, foreign, ours = done.stdout.splitlines()
        assert foreign == "[]"
        assert ours == "['relay.contract', 'relay.redaction']"
        seconds.append(float(taken))
    assert min(seconds) <= 0.3, "CPU time of the whole process: what others use does not count"
