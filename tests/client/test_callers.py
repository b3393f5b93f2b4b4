"""Who may call: ``conf/nats/callers.conf`` on a real nats-server, and what the server says of who asked."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nats
import nats.errors
import pytest
from nats.js.api import ObjectStoreConfig

from relay import contract
from relay.client import Mail, NoResponders, NotPermitted, RelayClient, Retry
from tests.client.responder import SENT, Responder, in_turn
from tests.support.nats_server import NatsServer
from tests.support.relay_process import CatchingServer, RelayProcess

EXAMPLE = Path(__file__).parents[2] / "conf" / "nats" / "callers.conf"
MAIL = Mail(to="user@example.com", subject="Hello", html="<p>Hello.</p>", text="Hello.")
RETRY = Retry(1, 1, 0.02, 0.05)
SUBJECTS = (contract.SEND_EMAIL, contract.GET_EMAIL_STATUS, contract.GET_EMAIL_ENGAGEMENT_ANALYTICS)
HEADER = "Nats-Request-Info"


@pytest.fixture
def passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the example takes from the environment."""
    for name in ("RELAY", "BILLING", "NEWSLETTER"):
        monkeypatch.setenv(f"{name}_NATS_PASSWORD", name.lower())


@pytest.fixture
def server(passwords: None, new_nats_server: Callable[..., NatsServer]) -> NatsServer:
    """A nats-server with the example's accounts."""
    return new_nats_server(config=EXAMPLE.read_text())


@pytest.fixture
def responders(server: NatsServer, new_responder: Callable[..., Responder]) -> dict[str, Responder]:
    """A relay of sorts, in its account, that keeps what it gets."""
    return {
        nats_subject: new_responder(in_turn(SENT), nats_subject, url=server.url, user="relay", password="relay")
        for nats_subject in SUBJECTS
    }


BILLING: dict[str, Any] = {"user": "billing", "password": "billing", "inbox_prefix": "_INBOX.billing"}
EDITOR: dict[str, Any] = {"user": "editor", "password": "newsletter"}


def info_of(responder: Responder, number: int = -1) -> dict[str, Any]:
    """What the server says of who sent the request."""
    return dict(json.loads((responder.msgs[number].headers or {})[HEADER]))


def test_a_caller_who_may_only_send(server: NatsServer, responders: dict[str, Responder]) -> None:
    async def run() -> None:
        async with RelayClient(server.url, retry=RETRY, **BILLING) as client:
            assert (await client.send(MAIL)).email_id == "e-1"
            with pytest.raises(NotPermitted):
                await client.get_status("e-1")
            with pytest.raises(NotPermitted):
                await client.get_analytics("g-1")

    asyncio.run(run())
    assert len(responders[contract.SEND_EMAIL].payloads) == 1
    assert not responders[contract.GET_EMAIL_STATUS].payloads


REFUSED_TO_PUBLISH = (
    "lfx.email-service.get_email_status",
    "lfx.email-service.log.-.sent",
    "lfx.email-service.parked",
    f"$KV.{contract.RECIPIENTS_BUCKET}.e-1",
    "$KV.email-requests.anything",
    "$JS.API.STREAM.LIST",
    "$JS.API.STREAM.DELETE.EMAIL_LOG",
    "$O.newsletter-files.C.x",
    "$SRV.PING",
    "$SYS.REQ.SERVER.PING",
    "_INBOX.editor.1",
    "_R_.abc.def",
)
REFUSED_TO_HEAR = (
    ">",
    "_INBOX.>",
    "_INBOX.*",
    "_INBOX.editor.>",
    "_R_.>",
    "lfx.email-service.send_email",
    "lfx.email-service.>",
    "$KV.>",
    "$SRV.>",
)


def test_what_else_it_tries_is_refused(server: NatsServer, responders: dict[str, Responder]) -> None:
    async def run() -> list[str]:
        errors: list[str] = []

        async def on_error(error: Exception) -> None:
            errors.append(str(error).lower())

        nc = await nats.connect(server.url, error_cb=on_error, **BILLING)
        for nats_subject in REFUSED_TO_PUBLISH:
            await nc.publish(nats_subject, b"{}")
        for nats_subject in REFUSED_TO_HEAR:
            await nc.subscribe(nats_subject)
        await asyncio.sleep(0)
        await nc.flush()
        assert nc.is_connected
        await nc.close()
        return errors

    errors = asyncio.run(run())
    for nats_subject in REFUSED_TO_PUBLISH:
        assert any(f'publish to "{nats_subject.lower()}"' in error for error in errors), nats_subject
    for nats_subject in REFUSED_TO_HEAR:
        assert any(f'subscription to "{nats_subject.lower()}"' in error for error in errors), nats_subject
    assert not any(responder.payloads for responder in responders.values())


def test_what_its_account_does_not_import_is_not_there(server: NatsServer, responders: dict[str, Responder]) -> None:
    """Without permissions of its own, a user still reaches only what is exported to its account."""

    async def run() -> None:
        nc = await nats.connect(server.url, **EDITOR)
        for nats_subject in ("lfx.email-service.log.-.sent", "$KV.email-recipients.e-1", "RELAY.API.STREAM.LIST"):
            with pytest.raises(nats.errors.NoRespondersError):
                await nc.request(nats_subject, b"{}", timeout=2)
        streams = json.loads((await nc.request("$JS.API.STREAM.LIST", b"", timeout=2)).data)
        assert streams["error"]["err_code"] == 10039, "its own account has no JetStream, and Relay's is not asked"
        await nc.close()
        async with RelayClient(server.url, retry=RETRY, **EDITOR) as client:
            await client.get_analytics("g-1")

    asyncio.run(run())
    assert info_of(responders[contract.GET_EMAIL_ENGAGEMENT_ANALYTICS])["acc"] == "NEWSLETTER"


def test_who_has_no_password_has_nothing(server: NatsServer, responders: dict[str, Responder]) -> None:
    async def run() -> None:
        with pytest.raises(nats.errors.Error, match=r"(?i)authorization violation"):
            await nats.connect(server.url, allow_reconnect=False)
        with pytest.raises(nats.errors.Error, match=r"(?i)authorization violation"):
            await nats.connect(server.url, allow_reconnect=False, user="billing", password="wrong")

    asyncio.run(run())
    assert not responders[contract.SEND_EMAIL].payloads


def test_the_server_tells_who_asked(server: NatsServer, responders: dict[str, Responder]) -> None:
    """All of the header: what may scope a caller (``acc``, ``user``), its own words, and what changes each time."""
    responder = responders[contract.SEND_EMAIL]

    async def run() -> None:
        for options in (BILLING, EDITOR, EDITOR | {"user": "robot"}):
            async with RelayClient(server.url, retry=RETRY, name="a name of its choice", **options) as client:
                await client.send(MAIL)

    asyncio.run(run())
    assert [(info["acc"], info["user"]) for info in (info_of(responder, number) for number in range(3))] == [
        ("BILLING", "billing"),
        ("NEWSLETTER", "editor"),
        ("NEWSLETTER", "robot"),
    ]
    info = info_of(responder)
    assert {name: type(value) for name, value in info.items()} == {
        "start": str,
        "host": str,
        "id": int,
        "acc": str,
        "user": str,
        "name": str,
        "lang": str,
        "ver": str,
        "rtt": int,
        "server": str,
        "kind": str,
        "client_type": str,
    }
    assert (info["host"], info["kind"], info["client_type"]) == ("127.0.0.1", "Client", "nats")
    assert (info["name"], info["lang"]) == ("a name of its choice", "python3"), "the caller's own words: no identity"
    assert all(msg.reply.startswith("_R_.") for msg in responder.msgs), "the server answers in its place"


def send_raw(port: int, user: bytes, password: bytes, header_lines: bytes) -> None:
    """One request, its header section byte for byte; returns when the server has taken it."""
    with socket.create_connection(("127.0.0.1", port), 5) as client:
        block = b"NATS/1.0\r\n" + header_lines + b"\r\n"
        client.sendall(
            b'CONNECT {"verbose":false,"user":"%b","pass":"%b","headers":true}\r\n' % (user, password)
            + b"HPUB lfx.email-service.send_email %d %d\r\n%b{}\r\nPING\r\n" % (len(block), len(block) + 2, block)
        )
        received = b""
        while b"PONG\r\n" not in received:
            received += client.recv(65536) or pytest.fail("the server hung up")


FORGED = (
    b'Nats-Request-Info: {"acc":"EVIL"}\r\n',
    b'Nats-Request-Info:{"acc":"EVIL"}\r\nNats-Request-Info: {"acc":"EVIL"}\r\n',
    b'X-Other: a\r\nNats-Request-Info: {"acc":"EVIL"}\r\nX-Another: b\r\n',
    b'XNats-Request-Info: {"acc":"EVIL"}\r\nNats-Request-Info: {"acc":"EVIL"}\r\n',
    b'nats-request-info: {"acc":"EVIL"}\r\n',
    b'Nats-Request-Info : {"acc":"EVIL"}\r\n',
    b' Nats-Request-Info: {"acc":"EVIL"}\r\n',
    b'X-Other: a\nNats-Request-Info: {"acc":"EVIL"}\r\n',
    b'X-Other: a\rNats-Request-Info: {"acc":"EVIL"}\r\n',
)


def header_lines_at(server: NatsServer, user: str, password: str, forged: bytes) -> list[bytes]:
    """The header lines as they reach the relay's account when ``user`` sends ``forged`` ones."""

    async def run() -> bytes:
        nc = await nats.connect(server.url, user="relay", password="relay")
        seen: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        process = nc._process_msg

        async def note(sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
            if subject == contract.SEND_EMAIL.encode() and not seen.done():
                seen.set_result(bytes(headers))
            await process(sid, subject, reply, data, b"")

        nc._process_msg = note  # type: ignore[method-assign]
        await nc.subscribe(contract.SEND_EMAIL)
        await asyncio.sleep(0)
        await nc.flush()
        await asyncio.to_thread(send_raw, server.port, user.encode(), password.encode(), forged)
        found = await asyncio.wait_for(seen, 5)
        await nc.close()
        return found

    block = asyncio.run(run())
    assert block.startswith(b"NATS/1.0\r\n")
    assert block.endswith(b"\r\n\r\n")
    return block[len(b"NATS/1.0\r\n") : -len(b"\r\n\r\n")].split(b"\r\n")


@pytest.mark.parametrize("forged", FORGED, ids=[str(number) for number in range(len(FORGED))])
def test_over_an_import_the_servers_own_word_is_the_last_line(server: NatsServer, forged: bytes) -> None:
    """It takes away every line of exactly that name, and appends its own: look-alikes stay, before it."""
    lines = header_lines_at(server, "billing", "billing", forged)
    name, _, value = lines[-1].partition(b": ")
    assert name == HEADER.encode()
    assert json.loads(value)["acc"] == "BILLING"
    assert not [line for line in lines[:-1] if line.startswith(b"Nats-Request-Info:")]


def test_within_the_relays_account_the_header_is_anybodys_word(new_nats_server: Callable[..., NatsServer]) -> None:
    """Why nobody but Relay has a user there where the header is trusted."""
    server = new_nats_server(
        config="accounts { RELAY: { users: [ {user: relay, password: relay}, {user: insider, password: i} ] } }",
        jetstream=False,
    )
    lines = header_lines_at(server, "insider", "i", FORGED[0])
    assert lines == [FORGED[0].removesuffix(b"\r\n")]


def test_without_share_the_server_names_the_account_alone(new_nats_server: Callable[..., NatsServer]) -> None:
    server = new_nats_server(
        config=f"""
        accounts {{
          RELAY: {{ users: [ {{user: relay, password: relay}} ], exports: [ {{service: "{contract.SEND_EMAIL}"}} ] }}
          OTHER: {{ users: [ {{user: other, password: o}} ]
            imports: [ {{ service: {{account: RELAY, subject: "{contract.SEND_EMAIL}"}} }} ] }}
        }}""",
        jetstream=False,
    )
    *_, line = header_lines_at(server, "other", "o", b"X-Other: a\r\n")
    info = json.loads(line.removeprefix(b"Nats-Request-Info: "))
    assert info.pop("rtt", 0) >= 0
    assert info == {"acc": "OTHER"}


def test_attachments_in_the_callers_own_bucket(server: NatsServer, responders: dict[str, Responder]) -> None:
    content = bytes(range(256)) * 2000

    async def run() -> None:
        relay = await nats.connect(server.url, user="relay", password="relay")
        config = ObjectStoreConfig(bucket="newsletter-files")
        store = await relay.jetstream().create_object_store("newsletter-files", config=config)
        async with RelayClient(server.url, retry=Retry(20, 5), jetstream_prefix="RELAY.API", **EDITOR) as client:
            ref = await client.put_object("newsletter-files", content)
            assert (await store.get(ref.name)).data == content
            await client.delete_object(ref)
            assert not [info for info in await store.list() if not info.deleted]
        await relay.close()

    asyncio.run(run())


@pytest.fixture
def started_relay(passwords: None, server: NatsServer, smtp: CatchingServer) -> Iterator[RelayProcess]:
    """A relay in its account."""
    directory = Path(tempfile.mkdtemp(prefix="relay-t-"))
    url = server.url.replace("//", "//relay:relay@")
    made = RelayProcess(directory, url, smtp.port, RELAY_SEND_WORKERS="1")
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(directory, ignore_errors=True)


def test_a_real_relay_behind_an_import(server: NatsServer, started_relay: RelayProcess) -> None:
    async def run() -> None:
        async with RelayClient(server.url, retry=Retry(30, 10), **BILLING) as client:
            sent = await client.send(MAIL, group_id="invoices")
            assert sent.email_id
            with pytest.raises(NotPermitted):
                await client.get_status(sent.email_id)
        async with RelayClient(server.url, retry=Retry(30, 10), **EDITOR) as client:
            assert (await client.get_status(sent.email_id)).group_id == "invoices"
            assert [mail.email_id async for mail in client.mails("invoices")] == [sent.email_id]
            assert (await client.get_analytics("invoices")).total_sent == 1

    asyncio.run(run())


def test_nobody_serves_behind_the_import(server: NatsServer) -> None:
    """No responders are told over an import as well, so a caller need not wait."""

    async def run() -> None:
        async with RelayClient(server.url, retry=Retry(2, 5, 0.02, 0.05), **BILLING) as client:
            with pytest.raises(NoResponders):
                await client.send(MAIL)

    asyncio.run(run())
