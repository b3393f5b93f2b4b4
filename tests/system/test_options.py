"""Requests with options over NATS, with a real relay: objects, large mails, deadlines, the client, callers by name."""

from __future__ import annotations

import asyncio
import base64
import email
import email.policy
import json
import random
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from pathlib import Path
from typing import Any, NamedTuple

import nats
import pytest
from nats.js.api import ObjectStoreConfig

from relay import contract
from relay.client import Attachment, BlockingRelayClient, Deferred, InDoubt, Mail, Refused, RelayClient, Retry
from tests.conftest import require
from tests.support.caller import GET_EMAIL_STATUS, MAIL, SEND_EMAIL, ask, with_nats
from tests.support.nats_server import BINARY, NatsServer
from tests.support.scripted_smtp import Action, ReceivedMail, say, stall
from tests.support.workers import Moment, SmtpThread, Workers, kill

BUCKET = "mail-files"
CALLERS = Path(__file__).parents[2] / "conf" / "nats" / "callers.conf"
RETRY = Retry(40, 10)
LARGE_MAIL_BYTES = 25_000_000
ATTACHED_BYTES = LARGE_MAIL_BYTES * 54 // 74 // 3 * 3
"""What base64 in lines of 76 and CRLF makes a mail of that size of, or nearly."""


class Stack(NamedTuple):
    """A relay of one send worker and a status worker, its NATS and its smarthost."""

    server: NatsServer
    smtp: SmtpThread
    workers: Workers

    @property
    def url(self) -> str:
        return self.server.url

    def send(self, **fields: Any) -> dict[str, Any]:
        """The usual mail with ``fields`` changed; the reply."""
        reply = ask(self.url, SEND_EMAIL, MAIL | fields)
        assert isinstance(reply, dict)
        return reply

    def record(self, email_id: str) -> dict[str, Any]:
        """Of a mail."""
        record = ask(self.url, GET_EMAIL_STATUS, {"email_id": email_id})
        assert isinstance(record, dict)
        return record

    def put(self, name: str, content: bytes, bucket: str = BUCKET) -> dict[str, str]:
        """An object, in a bucket that is made when it is missing; what a request says to mean it."""

        async def run(nc: nats.NATS) -> None:
            jetstream = nc.jetstream()
            store = await jetstream.create_object_store(bucket, config=ObjectStoreConfig(bucket=bucket))
            await store.put(name, content)

        with_nats(self.url, run)
        return {"bucket": bucket, "name": name}


NewStack = Callable[..., Stack]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One with a bucket for objects, for all tests that need no other."""
    require(BINARY.exists(), "nats-server")
    server, smtp, workers = NatsServer(tmp_path_factory.mktemp("nats")).start(), SmtpThread(), Workers()
    settings = {"OBJECT_STORE_BUCKETS": f"{BUCKET},not-made"}
    try:
        workers.start(server.url, smtp.port, **settings)
        workers.start(server.url, smtp.port, module="status")
        yield Stack(server, smtp, workers)
    finally:
        workers.stop()
        smtp.stop()
        server.stop()


@pytest.fixture
def new_stack(new_nats_server: Callable[..., NatsServer]) -> Iterator[NewStack]:
    """Makes others, without their workers."""
    made: list[Stack] = []

    def make(**options: Any) -> Stack:
        made.append(Stack(new_nats_server(**options), SmtpThread(), Workers()))
        return made[-1]

    yield make
    for each in made:
        each.workers.stop()
        each.smtp.stop()


def parsed(mail: ReceivedMail) -> EmailMessage:
    """As the standard library reads it."""
    found = email.message_from_bytes(mail.content, policy=email.policy.default)
    assert isinstance(found, EmailMessage)
    return found


def attached(mail: ReceivedMail) -> dict[str | None, bytes]:
    """File names and contents."""
    return {part.get_filename(): part.get_payload(decode=True) for part in parsed(mail).iter_attachments()}  # type: ignore[misc]


# -- objects -----------------------------------------------------------------------------------------------------------
def test_an_attachment_in_an_object(stack: Stack) -> None:
    content = random.Random(1).randbytes(3_000_000)  # more than NATS takes in a message
    reference = stack.put("report.bin", content)
    file = {"filename": "report.bin", "content_type": "application/octet-stream", "object": reference}
    assert stack.send(attachments=[file])["email_id"]
    assert attached(stack.smtp.mails[-1]) == {"report.bin": content}


def test_a_whole_request_in_an_object(stack: Stack) -> None:
    content = random.Random(2).randbytes(2_000_000)
    file = {
        "filename": "a.bin",
        "content_type": "application/octet-stream",
        "content": base64.b64encode(content).decode(),
    }
    request = MAIL | {"to": ["ann@example.com", "bob@example.com"], "attachments": [file], "request_id": "object-1"}
    reference = stack.put("whole.json", json.dumps(request).encode())
    before = len(stack.smtp.mails)
    reply = ask(stack.url, SEND_EMAIL, {"object": reference})
    assert [each["outcome"] for each in reply["recipients"]] == ["relayed", "relayed"]
    assert attached(stack.smtp.mails[-1]) == {"a.bin": content}
    assert ask(stack.url, SEND_EMAIL, {"object": reference}) == reply | {"duplicate": True}
    assert len(stack.smtp.mails) == before + 1


def as_attachment(reference: dict[str, str]) -> dict[str, Any]:
    return MAIL | {"attachments": [{"filename": "f", "content_type": "text/plain", "object": reference}]}


def as_request(reference: dict[str, str]) -> dict[str, Any]:
    return {"object": reference}


@pytest.mark.parametrize("request_with", [as_attachment, as_request])
@pytest.mark.parametrize(
    ("bucket", "name", "detail"),
    [
        ("secrets", "f", "OBJECT_STORE_BUCKETS"),
        ("not-made", "f", "no such object store bucket"),
        (BUCKET, "nothing.here", "no such object"),
    ],
)
def test_an_object_that_cannot_be_had(
    stack: Stack, request_with: Callable[..., dict[str, Any]], bucket: str, name: str, detail: str
) -> None:
    stack.put("there", b"there")
    before = len(stack.smtp.mails)
    reply = ask(stack.url, SEND_EMAIL, request_with({"bucket": bucket, "name": name}))
    assert (reply["error"], reply["outcome"], reply["retryable"]) == (
        contract.INVALID_REQUEST_PAYLOAD,
        "refused",
        False,
    )
    assert detail in reply["detail"]
    assert len(stack.smtp.mails) == before


@pytest.mark.parametrize("request_with", [as_attachment, as_request])
def test_no_object_is_read_unless_its_bucket_is_set(
    new_stack: NewStack, request_with: Callable[..., dict[str, Any]]
) -> None:
    stack = new_stack()
    stack.workers.start(stack.url, stack.smtp.port)
    reply = ask(stack.url, SEND_EMAIL, request_with(stack.put("f", json.dumps(MAIL).encode())))
    assert (reply["error"], reply["outcome"]) == (contract.INVALID_REQUEST_PAYLOAD, "refused")
    assert "OBJECT_STORE_BUCKETS" in reply["detail"]
    assert not stack.smtp.mails


@pytest.mark.parametrize("request_with", [as_attachment, as_request])
def test_an_object_that_is_too_large(new_stack: NewStack, request_with: Callable[..., dict[str, Any]]) -> None:
    stack = new_stack()
    limits = {"OBJECT_STORE_BUCKETS": BUCKET, "SMTP_MAX_MESSAGE_BYTES": "100000"}
    stack.workers.start(stack.url, stack.smtp.port, **limits)
    reply = ask(stack.url, SEND_EMAIL, request_with(stack.put("large", bytes(300_000))))
    assert (reply["error"], reply["outcome"]) == (contract.INVALID_REQUEST_PAYLOAD, "refused")
    assert "300000 bytes" in reply["detail"]
    assert not stack.smtp.mails


def memory_bytes(pid: int, name: str) -> int:
    """``VmRSS``, or ``VmHWM``: the most since it was reset."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def large_attachment(stack: Stack, content: bytes) -> dict[str, Any]:
    return as_attachment(stack.put("large.bin", content)) | {"request_id": "large-1"}


def large_request(stack: Stack, content: bytes) -> dict[str, Any]:
    file = {"filename": "f", "content_type": "text/plain", "content": base64.b64encode(content).decode()}
    request = MAIL | {"attachments": [file], "request_id": "large-2"}
    return as_request(stack.put("large.json", json.dumps(request).encode()))


@pytest.mark.parametrize("made", [large_attachment, large_request])
def test_a_mail_of_25_mb_takes_four_times_its_size_of_memory_at_most(
    new_stack: NewStack, made: Callable[..., dict[str, Any]]
) -> None:
    require(Path("/proc/self/clear_refs").exists(), "the peak of a process's memory, as Linux tells it,")
    stack = new_stack()
    worker = stack.workers.start(stack.url, stack.smtp.port, OBJECT_STORE_BUCKETS=BUCKET)
    content = random.Random(3).randbytes(ATTACHED_BYTES)
    small, large = as_attachment(stack.put("small.bin", bytes(1000))), made(stack, content)
    assert "error" not in ask(stack.url, SEND_EMAIL, small), "what the first one needs is loaded"
    pid = worker.process.pid
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    before = memory_bytes(pid, "VmRSS")
    reply = ask(stack.url, SEND_EMAIL, large, 60)
    peak = memory_bytes(pid, "VmHWM")
    assert reply["email_id"], reply
    mail = stack.smtp.mails[-1]
    assert 0.97 * LARGE_MAIL_BYTES < len(mail.content) < 1.03 * LARGE_MAIL_BYTES
    assert attached(mail) == {"f": content}
    assert peak > before + len(mail.content), "it was measured"
    assert peak - before <= 4 * LARGE_MAIL_BYTES, f"{(peak - before) / LARGE_MAIL_BYTES:.2f} times"


# -- deadlines ---------------------------------------------------------------------------------------------------------
def ask_by(url: str, at: str, request: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The reply to a request with a deadline in its header, and how long it took."""

    async def run(nc: nats.NATS) -> tuple[dict[str, Any], float]:
        begun = time.monotonic()
        headers = {contract.DEADLINE_HEADER: at}
        msg = await nc.request(SEND_EMAIL, json.dumps(request).encode(), timeout=20, headers=headers)
        return json.loads(msg.data), time.monotonic() - begun

    return with_nats(url, run)


def in_seconds(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


@pytest.mark.parametrize("fields", [{}, {"request_id": "by-1"}])
def test_the_deadline_in_a_header(new_stack: NewStack, fields: dict[str, Any]) -> None:
    stack = new_stack()
    stack.workers.start(stack.url, stack.smtp.port)
    reply, _ = ask_by(stack.url, in_seconds(-1), MAIL | fields)
    assert (reply["outcome"], reply["retryable"], reply["detail"]) == ("deferred", True, "deadline exceeded")
    stack.smtp.server.change({"mail": [stall()]})
    reply, took_seconds = ask_by(stack.url, in_seconds(0.7), MAIL | fields)
    assert (reply["outcome"], reply["retryable"]) == ("deferred", True)
    assert reply["detail"].startswith("deadline exceeded: ")
    assert 0.5 < took_seconds < 2
    assert not stack.smtp.mails
    reply, _ = ask_by(stack.url, in_seconds(20), MAIL | fields)
    assert reply["email_id"]
    assert len(stack.smtp.mails) == 1
    reply, _ = ask_by(stack.url, "next week", MAIL | fields)
    assert (reply["error"], reply["outcome"]) == (contract.INVALID_REQUEST_PAYLOAD, "refused")
    assert contract.DEADLINE_HEADER in reply["detail"]


# -- the client --------------------------------------------------------------------------------------------------------
FULL = Mail(
    to=("Ann <ann@example.com>", "bob@example.com"),
    cc="carol@example.com",
    bcc=("dan@example.com",),
    subject="Grüße",
    html='<p>Hello. <img src="cid:logo"></p>',
    text="Hello.",
    in_reply_to="<theirs@example.com>",
    references=("<root@example.com>", "<theirs@example.com>"),
    headers={"X-Campaign": "spring"},
    tags={"campaign": "spring"},
    attachments=(
        Attachment(filename="Grüße.txt", content="Grüße".encode()),
        Attachment(filename="logo.png", content=b"\x89PNG", content_id="logo", disposition="inline"),
    ),
)


def hold_full(mail: ReceivedMail) -> None:
    """All of ``FULL`` has arrived."""
    assert mail.forward_paths == ("ann@example.com", "bob@example.com", "carol@example.com", "dan@example.com")
    found = parsed(mail)
    assert [found[name] for name in ("To", "Cc", "Bcc", "Subject", "X-Campaign", "In-Reply-To", "References")] == [
        "Ann <ann@example.com>, bob@example.com",
        "carol@example.com",
        None,
        "Grüße",
        "spring",
        "<theirs@example.com>",
        "<root@example.com> <theirs@example.com>",
    ]
    contents = {part.get_filename(): part.get_payload(decode=True) for part in found.walk() if part.get_filename()}
    assert contents == {"Grüße.txt": "Grüße".encode(), "logo.png": b"\x89PNG"}
    (logo,) = [part for part in found.walk() if part.get_content_type() == "image/png"]
    assert logo["Content-ID"] == "<logo>"


def test_the_client_for_asyncio(stack: Stack) -> None:
    stack.put("there", b"there")
    content = random.Random(4).randbytes(1_500_000)
    before = len(stack.smtp.mails)

    async def run() -> None:
        async with RelayClient(stack.url, retry=RETRY) as client:
            sent = await client.send(FULL, request_id="async-1")
            assert [each.outcome for each in sent.recipients] == ["relayed"] * 4
            assert sent.duplicate is False
            again = await client.send(FULL, request_id="async-1")
            assert (again.email_id, again.duplicate) == (sent.email_id, True)
            assert (await client.get_status(sent.email_id)).email_id == sent.email_id
            with pytest.raises(Refused, match="different payload"):
                await client.send(FULL, request_id="async-1", subject="Another")
            ref = await client.put_object(BUCKET, content)
            await client.send(FULL, attachments=[Attachment(filename="l.bin", object=ref)])
            await client.delete_object(ref)
            with pytest.raises(Refused, match="no such object"):
                await client.send(FULL, attachments=[Attachment(filename="l.bin", object=ref)])
            stored = await client.put_mail(BUCKET, FULL)
            first = await client.send(stored)
            second = await client.send(stored)
            assert (second.email_id, second.duplicate) == (first.email_id, True)

    asyncio.run(run())
    one, with_object, from_object = stack.smtp.mails[before:]
    hold_full(one)
    hold_full(from_object)
    assert attached(with_object) == {"l.bin": content}


def test_the_blocking_client(stack: Stack) -> None:
    before = len(stack.smtp.mails)
    with BlockingRelayClient(stack.url, retry=RETRY) as client:
        sent = client.send(FULL, request_id="blocking-1")
        again = client.send(FULL, request_id="blocking-1")
        each = client.send(FULL, cc=(), bcc=(), recipients_as="individual", group_id="blocking")
        assert sorted(mail.email_id for mail in client.mails("blocking")) == sorted(
            str(one.email_id) for one in each.recipients
        )
        with pytest.raises(Deferred, match="deadline exceeded"):
            client.send(FULL, timeout_seconds=0.001)
    assert (again.email_id, again.duplicate) == (sent.email_id, True)
    assert len(stack.smtp.mails) == before + 3
    hold_full(stack.smtp.mails[before])


def test_the_clients_own_retry_after_a_killed_worker_gives_one_mail(new_stack: NewStack) -> None:
    """Of two calls one worker is killed: one before its content, one after its final dot."""
    stack = new_stack()
    before_content, after_dot = Moment(), Moment()
    stack.smtp.server.change({"mail": in_turn(None, before_content), "dot": in_turn(after_dot)})
    worker = stack.workers.start(stack.url, stack.smtp.port)

    async def run() -> list[Any]:
        async with RelayClient(stack.url, retry=Retry(60, 2.0)) as client:
            first = asyncio.create_task(client.send(FULL, subject="first", request_id="retried-1"))
            await asyncio.to_thread(after_dot.wait)
            second = asyncio.create_task(client.send(FULL, subject="second"))
            await asyncio.to_thread(before_content.wait)
            kill(worker)
            await asyncio.to_thread(stack.workers.start, stack.url, stack.smtp.port)
            return await asyncio.gather(first, second, return_exceptions=True)

    first, second = asyncio.run(run())
    assert isinstance(first, InDoubt)
    assert (first.retryable, first.request_id) == (False, "retried-1")
    assert (second.duplicate, second.is_skipped) == (False, False)
    assert [parsed(mail)["Subject"] for mail in stack.smtp.mails] == ["first", "second"]
    assert f"/{first.email_id}\r\n".encode() in stack.smtp.mails[0].content
    assert f"/{second.email_id}\r\n".encode() in stack.smtp.mails[1].content


def in_turn(*moments: Moment | None) -> Callable[[], Action | None]:
    """A phase that is as usual, or is reached and stalls; one after the other, then as usual."""
    left = list(moments)

    def act() -> Action | None:
        moment = left.pop(0) if left else None
        return moment.then_stall() if moment is not None else None

    return act


# -- callers -----------------------------------------------------------------------------------------------------------
BILLING: dict[str, Any] = {"user": "billing", "password": "billing", "inbox_prefix": "_INBOX.billing"}
EDITOR: dict[str, Any] = {"user": "editor", "password": "newsletter"}
ROBOT: dict[str, Any] = {"user": "robot", "password": "newsletter"}


@pytest.fixture
def behind_import(new_stack: NewStack, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stack]:
    """Makes a stack with the accounts of the example, and its workers in the relay's."""

    def make(**settings: str) -> Stack:
        for name in ("RELAY", "BILLING", "NEWSLETTER"):
            monkeypatch.setenv(f"{name}_NATS_PASSWORD", name.lower())
        stack = new_stack(config=CALLERS.read_text())
        url = stack.url.replace("//", "//relay:relay@")
        stack.workers.start(url, stack.smtp.port, **settings)
        stack.workers.start(url, stack.smtp.port, module="status")
        return stack

    return make


async def send_as(stack: Stack, caller: dict[str, Any], **fields: Any) -> Any:
    async with RelayClient(stack.url, retry=RETRY, **caller) as client:
        return await client.send(Mail(to="user@example.com", subject="Hello", html="<p>H</p>", text="H", **fields))


async def caller_of(stack: Stack, email_id: str) -> str:
    """As the record names it, which the relay keeps and shows to operators."""
    nc = await nats.connect(stack.url, user="relay", password="relay")
    try:
        bucket = await nc.jetstream().key_value(contract.RECIPIENTS_BUCKET)
        record = json.loads((await bucket.get(email_id)).value or b"")
        return str(record.get("caller", ""))
    finally:
        await nc.close()


def test_request_ids_are_each_callers_own_over_an_import(behind_import: Callable[..., Stack]) -> None:
    stack = behind_import(NATS_TRUST_REQUEST_INFO="true")

    async def run() -> None:
        sent = {}
        for name, caller in (("BILLING/billing", BILLING), ("NEWSLETTER/editor", EDITOR), ("NEWSLETTER/robot", ROBOT)):
            first = await send_as(stack, caller, request_id="invoice-1")
            again = await send_as(stack, caller, request_id="invoice-1")
            assert (first.duplicate, again.duplicate, again.email_id) == (False, True, first.email_id)
            assert await caller_of(stack, first.email_id) == name
            sent[name] = first.email_id
        assert len(set(sent.values())) == 3
        # also a mail without any option says who asked
        plain = await send_as(stack, BILLING, request_id=None)
        assert await caller_of(stack, plain.email_id) == "BILLING/billing"

    asyncio.run(run())
    assert len(stack.smtp.mails) == 4


def test_without_trust_request_ids_are_one_namespace(behind_import: Callable[..., Stack]) -> None:
    stack = behind_import()

    async def run() -> None:
        first = await send_as(stack, BILLING, request_id="invoice-1")
        other = await send_as(stack, EDITOR, request_id="invoice-1")
        assert (other.duplicate, other.email_id) == (True, first.email_id)
        with pytest.raises(Refused, match="different payload"):
            await send_as(stack, EDITOR, request_id="invoice-1", group_id="other")
        assert await caller_of(stack, first.email_id) == ""

    asyncio.run(run())
    assert len(stack.smtp.mails) == 1


# -- a rule that changes -----------------------------------------------------------------------------------------------
def test_under_an_allowlist_that_changed_meanwhile_nobody_gets_anothers_answer(new_stack: NewStack) -> None:
    """The places in a stored claim are those of who got it then."""
    stack = new_stack()
    stack.smtp.server.change({"rcpt": [say("250 ok"), say("450 4.2.1 later")]})
    request = MAIL | {"to": ["ann@example.com", "bob@example.org"], "request_id": "rule-1"}
    worker = stack.workers.start(stack.url, stack.smtp.port)
    reply = ask(stack.url, SEND_EMAIL, request)
    assert [each["outcome"] for each in reply["recipients"]] == ["relayed", "deferred"]
    kill(worker)
    worker = stack.workers.start(stack.url, stack.smtp.port, SMTP_ALLOWED_RECIPIENT_DOMAINS="example.org")
    reply = ask(stack.url, SEND_EMAIL, request)
    assert (reply["error"], reply["retryable"]) == (contract.REQUEST_ID_REUSED, False)
    assert len(stack.smtp.mails) == 1
    kill(worker)
    stack.workers.start(stack.url, stack.smtp.port)
    reply = ask(stack.url, SEND_EMAIL, request)
    assert [each["outcome"] for each in reply["recipients"]] == ["relayed", "relayed"]
    assert [mail.forward_paths for mail in stack.smtp.mails] == [("ann@example.com",), ("bob@example.org",)]
