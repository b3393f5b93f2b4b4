"""LUCI's mailer, row by row: what it does, and that Relay does the same, better, or leaves it out on purpose.

Each test names its row of the README's table "Beside LUCI's mailer", and shows the one thing that the row says; the
whole of it is tested where the part's own tests are.
"""

from __future__ import annotations

import asyncio
import email
import email.policy
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent.event import Event

from relay import contract
from relay.bus.client import Bus
from relay.bus.jetstream import JetStream
from relay.bus.kv import Bucket
from relay.client import Mail, NotConnected, RelayClient, Retry
from relay.delivery.dialling import Dialler, OpeningFailed
from relay.delivery.outcome import State
from relay.delivery.readiness import PAUSE_SECONDS, TRIES, wait_for_smtp
from relay.delivery.smarthost import Smarthost
from relay.idempotency.claim import Progress, claim_key
from relay.idempotency.claims import Claim, Claims, ClaimsConfig
from relay.sending import Sending
from relay.settings import Settings
from relay.submission.policy import Policy
from relay.tracking.storage import StorageConfig
from relay.tracking.tracker import Tracker
from tests.client.responder import DEFERRED, SENT, Responder, in_turn
from tests.client.test_callers import EXAMPLE
from tests.delivery.conftest import config_for
from tests.support.caller import MAIL
from tests.support.nats_server import NatsServer, free_port
from tests.support.scripted_smtp import ScriptedSmtp, drop, eventually, say, stall
from tests.support.sending import ask, extras_for

README = Path(__file__).parents[1] / "README.md"
PATIENCE_SECONDS = 2.0
DEFAULT_FROM = "noreply@example.org"
VERDICTS = ("same", "better", "left out")

ROWS: list[str] = []
Test = Callable[..., None]


def row(name: str) -> Callable[[Test], Test]:
    """Names the row of the table that the test holds."""
    ROWS.append(name)
    return lambda test: test


def test_each_row_of_the_table_has_its_test() -> None:
    table = README.read_text().partition("## Beside LUCI's mailer")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?): .+ \|$", table, re.M)
    assert [name for name, _ in rows] == ROWS
    assert {verdict for _, verdict in rows} == set(VERDICTS)


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    with gevent.Timeout(30, AssertionError("not finished after 30 s")):
        yield


class Relay:
    """The job with its real parts, and the SMTP server behind it."""

    def __init__(self, jetstream: JetStream, *, trusts_request_info: bool = False, pool_size: int = 4) -> None:
        self.jetstream = jetstream
        self.smtp = ScriptedSmtp().__enter__()
        self.smarthost = Smarthost(
            config_for(self.smtp, pool_size=pool_size, mail_seconds=0.5), default_sender=DEFAULT_FROM
        )
        tracker = Tracker(jetstream, StorageConfig(), 1.0, on_change=lambda _: None)
        tracker.start()
        self.extras = extras_for(jetstream, PATIENCE_SECONDS, trusts_request_info=trusts_request_info)
        self._sending = Sending(
            policy=Policy(True, DEFAULT_FROM, "Relay", ("example.org",), ("example.org",), ()),
            smarthost=self.smarthost,
            tracker=tracker,
            configuration_set="",
            extras=self.extras,
        )

    def send(self, *, nats_headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
        """One request: the usual mail with ``fields``; its reply."""
        return ask(self._sending, MAIL | fields, PATIENCE_SECONDS, nats_headers)

    @property
    def last_mail(self) -> email.message.EmailMessage:
        """What the SMTP server got last."""
        parsed = email.message_from_bytes(self.smtp.mails[-1].content, policy=email.policy.default)
        assert isinstance(parsed, email.message.EmailMessage)
        return parsed

    def close(self) -> None:
        self.smarthost.close(time.monotonic() + 0.2)
        self.extras.claims.close(1)
        self.smtp.__exit__(None, None, None)


@pytest.fixture
def new_relay(jetstream: JetStream) -> Iterator[Callable[..., Relay]]:
    made: list[Relay] = []

    def make(**options: Any) -> Relay:
        made.append(Relay(jetstream, **options))
        return made[-1]

    yield make
    for relay in made:
        relay.close()


@pytest.fixture
def relay(new_relay: Callable[..., Relay]) -> Relay:
    return new_relay()


@pytest.fixture
def new_responder(nats_server: NatsServer) -> Iterator[Callable[..., Responder]]:
    made: list[Responder] = []

    def make(*answers: Any) -> Responder:
        made.append(Responder(nats_server.url, in_turn(*answers)))
        return made[-1]

    yield make
    for responder in made:
        responder.stop()


def new_id() -> str:
    return f"luci-{uuid.uuid4()}"


# -- fields -----------------------------------------------------------------------------------------------------------
@row("`request_id`: 36 ASCII characters by its documentation, nothing is checked")
def test_request_id(relay: Relay) -> None:
    assert relay.send(request_id=new_id().ljust(128, "x"))["email_id"]
    for wrong in ("x" * 129, "ü", "a\nb"):
        assert relay.send(request_id=wrong)["error"] == contract.INVALID_REQUEST_PAYLOAD


@row("`sender`, required; any that its documentation says the caller is authorised for")
def test_sender(relay: Relay) -> None:
    assert relay.send(**{"from": "billing@example.org"})["email_id"]
    assert relay.last_mail["From"].addresses[0].addr_spec == "billing@example.org"
    assert relay.send(**{"from": "billing@example.com"})["error"] == contract.FROM_DOMAIN_NOT_ALLOWED


@row("`reply_to`")
def test_reply_to(relay: Relay) -> None:
    relay.send(reply_to="Help <help@example.org>")
    assert relay.last_mail["Reply-To"] == "Help <help@example.org>"


@row("`to`, `cc`, `bcc`: lists; one of the three by its documentation")
def test_lists(relay: Relay) -> None:
    relay.send(to=["a@example.com", "b@example.com"], cc=["c@example.com"], bcc=["d@example.com"])
    (mail,) = relay.smtp.mails
    assert mail.forward_paths == ("a@example.com", "b@example.com", "c@example.com", "d@example.com")
    assert b"d@example.com" not in mail.content
    assert relay.send(to=[], cc=["c@example.com"])["error"] == contract.REQUIRED_FIELDS_MISSING


@row("`subject`, required")
def test_subject(relay: Relay) -> None:
    assert relay.send(subject="")["error"] == contract.REQUIRED_FIELDS_MISSING
    relay.send(subject="Grüße")
    assert relay.last_mail["Subject"] == "Grüße"


@row("`text_body`, `html_body`: one of them")
def test_bodies(relay: Relay) -> None:
    assert relay.send(html="")["error"] == contract.REQUIRED_FIELDS_MISSING
    assert relay.send(html="", allow_single_part=True)["email_id"]
    assert relay.last_mail.get_content_type() == "text/plain"


@row("`in_reply_to`, `references`: put into the header as they come")
def test_threads(relay: Relay) -> None:
    relay.send(in_reply_to="<b@example.com>", references=["<a@example.com>", "<b@example.com>"])
    assert relay.last_mail["References"] == "<a@example.com> <b@example.com>"
    assert relay.last_mail["In-Reply-To"] == "<b@example.com>"
    assert relay.send(in_reply_to="x\r\nBcc: e@example.com")["outcome"] == "refused"


@row("Reply: the Message-ID; the server's own id is not to be had")
def test_message_id(relay: Relay) -> None:
    relay.smtp.change({"dot": say("250 Ok 0100018c-ses-id-000001")})
    reply = relay.send()
    assert reply["message_id_header"] == relay.last_mail["Message-ID"]
    assert reply["remote_id"] == "0100018c-ses-id-000001"


@row("The reply comes when the mail server has taken the mail")
def test_reply_when_taken(relay: Relay) -> None:
    reply = relay.send()
    assert relay.smtp.mails[0].is_accepted
    assert "error" not in reply


@row("Callers: members of a group, by ID token")
def test_callers(new_nats_server: Callable[..., NatsServer], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RELAY", "BILLING", "NEWSLETTER"):
        monkeypatch.setenv(f"{name}_NATS_PASSWORD", "secret")
    server = new_nats_server(config=EXAMPLE.read_text())

    async def connect(**options: Any) -> None:
        await RelayClient(server.url, connect_timeout_seconds=1, **options).connect()

    with pytest.raises(NotConnected):
        asyncio.run(connect())
    asyncio.run(connect(user="billing", password="secret", inbox_prefix="_INBOX.billing"))


# -- dedup ------------------------------------------------------------------------------------------------------------
@row("Key: caller and `request_id`")
def test_key(new_relay: Callable[..., Relay]) -> None:
    relay, request_id = new_relay(trusts_request_info=True), new_id()
    for caller in ("A", "B", "A"):
        relay.send(request_id=request_id, nats_headers={contract.REQUEST_INFO_HEADER: json.dumps({"acc": caller})})
    assert len(relay.smtp.mails) == 2
    assert claim_key("A/", request_id) != claim_key("B/", request_id)


@row("Remembered for an hour")
def test_remembered(relay: Relay) -> None:
    kept = relay.jetstream.stream_info(f"KV_{contract.REQUESTS_BUCKET}").config["max_age"]
    assert kept == 24 * 3600 * 10**9
    assert Settings.model_fields["request_id_ttl_hours"].default == 24


@row("Without a `request_id` no dedup")
def test_without_request_id(relay: Relay) -> None:
    assert relay.send()["email_id"] != relay.send()["email_id"]
    assert len(relay.smtp.mails) == 2


@row("The cache cannot be read: `INTERNAL`, nothing is sent")
def test_unreadable(relay: Relay) -> None:
    request_id = new_id()
    Bucket(relay.jetstream, contract.REQUESTS_BUCKET).put(claim_key("", request_id), b"of a later version")
    reply = relay.send(request_id=request_id)
    assert (reply["outcome"], reply["retryable"], reply["detail"]) == ("deferred", True, "deduplication unavailable")
    assert not relay.smtp.mails


@row("The cache cannot be written after sending: ignored, and a retry is a second copy")
def test_unwritable(relay: Relay) -> None:
    claim = relay.extras.claims.claim(new_id(), "f", "g", [Progress("id")], time.monotonic() + 2)
    assert isinstance(claim, Claim)
    with claim:
        subject = f"$KV.{contract.REQUESTS_BUCKET}.{claim.key}"
        relay.jetstream.api(f"STREAM.PURGE.KV_{contract.REQUESTS_BUCKET}", {"filter": subject})
        assert not claim.commit([0]), "what cannot be written before the content keeps the content from being sent"


@row("No cache configured: a warning, and no dedup")
def test_no_store(new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]) -> None:
    server = new_nats_server(jetstream=False)
    relay = Relay(JetStream(new_bus(server.url)))
    try:
        reply = relay.send(request_id=new_id())
        assert (reply["outcome"], reply["detail"]) == ("deferred", "deduplication unavailable")
        assert not relay.smtp.mails
        assert relay.send()["email_id"], "mail without a request_id goes out"
    finally:
        relay.close()


@row("Two equal requests at the same time: both are sent")
def test_twins(relay: Relay) -> None:
    request_id = new_id()
    twins = [gevent.spawn(relay.send, request_id=request_id) for _ in range(2)]
    gevent.joinall(twins, raise_error=True)
    assert len(relay.smtp.mails) == 1
    assert sorted("duplicate" in twin.value for twin in twins) == [False, True]


@row("A failure is not remembered: a retry sends again")
def test_failures(relay: Relay) -> None:
    relay.smtp.change({"rcpt": say("550 5.1.1 unknown")})
    request_id = new_id()
    failed = relay.send(request_id=request_id)
    relay.smtp.change({})
    assert relay.send(request_id=request_id) == failed | {"duplicate": True}
    relay.smtp.change({"rcpt": [say("450 4.2.1 later")]})
    request_id = new_id()
    assert relay.send(request_id=request_id)["outcome"] == "deferred"
    assert relay.send(request_id=request_id)["email_id"]
    assert len(relay.smtp.mails) == 1


@row("The same id for another mail: the first one's id, and nothing is sent")
def test_another_mail(relay: Relay) -> None:
    request_id = new_id()
    relay.send(request_id=request_id)
    assert relay.send(request_id=request_id, subject="Another")["error"] == contract.REQUEST_ID_REUSED


@row("The server dies between sending and remembering: a retry is a second copy")
def test_death(jetstream: JetStream) -> None:
    key = new_id()
    dying, other = (Claims(jetstream, ClaimsConfig(settling_seconds=0.2), name) for name in ("dying", "other"))
    for claims in (dying, other):
        claims.start()
    claim = dying.claim(key, "f", "g", [Progress("id")], time.monotonic() + 0.5)
    assert isinstance(claim, Claim)
    assert claim.commit([0])  # and no more is heard of it
    again = other.claim(key, "f", "g", [Progress("id")], time.monotonic() + 5)
    assert isinstance(again, Claim)
    with again:
        assert (again.found_in_doubt, again.unsent) == ((0,), ())


# -- errors -----------------------------------------------------------------------------------------------------------
@row("The deadline has passed: `DEADLINE_EXCEEDED`")
def test_deadline_passed(relay: Relay) -> None:
    at = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    reply = relay.send(nats_headers={contract.DEADLINE_HEADER: at})
    assert (reply["outcome"], reply["detail"]) == ("deferred", "deadline exceeded")
    assert not relay.smtp.connections


@row("No connection within the deadline: `DEADLINE_EXCEEDED`")
def test_no_connection(new_relay: Callable[..., Relay]) -> None:
    relay = new_relay(pool_size=1)
    relay.smtp.change({"dot": [stall()]})
    holder = gevent.spawn(relay.send)
    eventually(lambda: bool(relay.smtp.mails))
    reply = relay.send(timeout_seconds=0.3)
    assert (reply["outcome"], reply["detail"]) == ("deferred", "deadline exceeded: no connection in time")
    holder.join()


@row("The pool is closed: `INTERNAL`")
def test_pool_closed(relay: Relay) -> None:
    relay.smarthost.close(time.monotonic())
    reply = relay.send()
    assert (reply["outcome"], reply["retryable"], reply["detail"]) == ("deferred", True, "shutting down")


@row("SMTP reply of 500 or more: `INVALID_ARGUMENT`, not to be tried again")
def test_permanent(relay: Relay) -> None:
    relay.smtp.change({"rcpt": say("550 5.1.1 unknown")})
    reply = relay.send()
    assert (reply["outcome"], reply["retryable"], reply["reply_code"]) == ("failed", False, 550)


@row("SMTP reply below 500: `INTERNAL`, try again with the same `request_id`")
def test_temporary(relay: Relay) -> None:
    relay.smtp.change({"rcpt": say("450 4.2.1 later")})
    reply = relay.send()
    assert (reply["outcome"], reply["retryable"], reply["reply_code"]) == ("deferred", True, 450)


@row("The connection is lost: `INTERNAL`, sent or not")
def test_lost(relay: Relay) -> None:
    relay.smtp.change({"data": drop()})
    assert relay.send()["outcome"] == "deferred"
    relay.smtp.change({"dot": drop()})
    reply = relay.send()
    assert (reply["outcome"], reply["retryable"]) == ("in_doubt", False)


@row("An address that is none: `INTERNAL`, try again")
def test_no_address(relay: Relay) -> None:
    assert [relay.send(to=to)["retryable"] for to in ("nobody", ["nobody"])] == [False, False]
    assert not relay.smtp.connections


@row("The deadline bounds waiting for a connection, not the SMTP dialogue")
def test_deadline_bounds_the_dialogue(relay: Relay) -> None:
    relay.smtp.change({"data": stall()})
    begun = time.monotonic()
    assert relay.send(timeout_seconds=0.3)["detail"].startswith("deadline exceeded")
    assert time.monotonic() - begun < 1.5


@row("10 s where the caller sets no deadline")
def test_default_deadline() -> None:
    assert Settings.model_fields["send_timeout_seconds"].default == 30


# -- pool -------------------------------------------------------------------------------------------------------------
def handed_over(smarthost: Smarthost, *forward_paths: str) -> list[State]:
    """One mail to these; the states of its outcomes."""
    paths = forward_paths or ("a@example.com",)
    outcomes = smarthost.relay(DEFAULT_FROM, paths, b"Subject: s\r\n\r\ntext\r\n", time.monotonic() + 5)
    return [outcome.state for outcome in outcomes]


@pytest.fixture
def smtp() -> Iterator[ScriptedSmtp]:
    with ScriptedSmtp() as server:
        yield server


@pytest.fixture
def new_smarthost(smtp: ScriptedSmtp) -> Iterator[Callable[..., Smarthost]]:
    made: list[Smarthost] = []

    def make(**config: Any) -> Smarthost:
        made.append(Smarthost(config_for(smtp, **config), default_sender=DEFAULT_FROM))
        return made[-1]

    yield make
    for smarthost in made:
        smarthost.close(time.monotonic() + 0.2)


NewSmarthost = Callable[..., Smarthost]


@row("100 connections at the most")
def test_bound(smtp: ScriptedSmtp, new_smarthost: NewSmarthost) -> None:
    smarthost = new_smarthost(pool_size=3)
    gevent.joinall([gevent.spawn(handed_over, smarthost) for _ in range(20)], raise_error=True)
    assert smtp.peak_connections == 3
    assert len(smtp.mails) == 20


@row("Connections are opened when needed; idle ones are used in turn")
def test_lazy(smtp: ScriptedSmtp, new_smarthost: NewSmarthost) -> None:
    smarthost = new_smarthost()
    assert not smtp.connections
    for _ in range(3):
        handed_over(smarthost)
    assert len(smtp.connections) == 1


@row("Whoever waits is told why a connection could not be opened")
def test_dial_error(smtp: ScriptedSmtp, new_smarthost: NewSmarthost) -> None:
    smarthost = new_smarthost()
    smtp.change({"banner": say("554 5.3.2 closed today")})
    for _ in range(2):
        (outcome,) = smarthost.relay(DEFAULT_FROM, ("a@example.com",), b"", time.monotonic() + 5)
        assert outcome.state is State.DEFERRED
        assert "closed today" in outcome.detail


@row("A connection is kept after an SMTP reply and RSET, up to 4 errors; else discarded")
def test_reuse(smtp: ScriptedSmtp, new_smarthost: NewSmarthost) -> None:
    smarthost = new_smarthost()
    smtp.change({"rcpt": say("550 5.1.1 unknown")})
    assert [handed_over(smarthost) for _ in range(6)] == [[State.FAILED]] * 6
    assert len(smtp.connections) == 1
    smtp.change({"mail": [drop()]})
    assert handed_over(smarthost) == [State.RELAYED]
    assert len(smtp.connections) == 2


@row("No idle limit and no look at an idle connection: the first mail after the server hung up fails")
def test_idle(smtp: ScriptedSmtp, new_smarthost: NewSmarthost) -> None:
    smarthost = new_smarthost()
    handed_over(smarthost)
    smtp.drop_connections()
    assert handed_over(smarthost) == [State.RELAYED]
    assert smtp.connections[0][-1] == "DATA", "the dead one was not even tried"


@row("No limit on a connection's age and mails")
def test_worn_out(smtp: ScriptedSmtp, new_smarthost: NewSmarthost) -> None:
    smarthost = new_smarthost(max_messages=2)
    for _ in range(4):
        handed_over(smarthost)
    assert len(smtp.connections) == 2


@row("No time limit on reading and writing")
def test_time_limits(smtp: ScriptedSmtp, new_smarthost: NewSmarthost) -> None:
    smarthost = new_smarthost(mail_seconds=0.1)
    smtp.change({"mail": stall()})
    begun = time.monotonic()
    assert handed_over(smarthost) == [State.DEFERRED]
    assert time.monotonic() - begun < 2


@row("One refused recipient ends the mail for all")
def test_one_refused(smtp: ScriptedSmtp, new_smarthost: NewSmarthost) -> None:
    smarthost = new_smarthost()
    smtp.change({"rcpt": [say("550 5.1.1 unknown"), say("250 ok")]})
    assert handed_over(smarthost, "a@example.com", "b@example.com") == [State.FAILED, State.RELAYED]


@row("STARTTLS when it is offered")
def test_starttls(smtp: ScriptedSmtp) -> None:
    with pytest.raises(OpeningFailed):
        Dialler(config_for(smtp, tls="starttls", username="user", password="secret")).dial()
    assert not any(command.startswith("AUTH") for command in smtp.commands), "no password in clear"


@row("AUTH is skipped without a word when it is not offered")
def test_auth(smtp: ScriptedSmtp) -> None:
    with pytest.raises(OpeningFailed, match="AUTH"):
        Dialler(config_for(smtp, username="user", password="secret")).dial()


@row("The envelope's sender is the From address")
def test_envelope(relay: Relay) -> None:
    relay.send(**{"from": "Billing <billing@example.org>"})
    relay.send()
    assert [mail.reverse_path for mail in relay.smtp.mails] == ["billing@example.org", DEFAULT_FROM]


@row("Closing refuses what is new, waits for every connection, and says QUIT")
def test_closing(smtp: ScriptedSmtp, new_smarthost: NewSmarthost) -> None:
    smarthost = new_smarthost(pool_size=2)
    handed_over(smarthost)
    smtp.change({"dot": [stall()]})
    holder = gevent.spawn(handed_over, smarthost)
    eventually(lambda: len(smtp.mails) == 2)
    begun = time.monotonic()
    smarthost.close(begun + 0.3)
    assert time.monotonic() - begun < 2, "a server that hangs does not keep it"
    assert handed_over(smarthost) == [State.DEFERRED]
    assert holder.get() == [State.IN_DOUBT]


# -- start-up and client ----------------------------------------------------------------------------------------------
@row("At start: 11 tries to connect and NOOP, 2 s apart, then it fails")
def test_start_up(smtp: ScriptedSmtp) -> None:
    assert (TRIES, PAUSE_SECONDS) == (11, 2.0)
    smtp.change({"banner": [drop()]})
    failures: list[int] = []
    assert wait_for_smtp(config_for(smtp), lambda number, _: failures.append(number), Event(), pause_seconds=0.01)
    assert failures == [1]
    assert "NOOP" in smtp.commands


@row("Shutting down ends that wait")
def test_stopped_at_start(smtp: ScriptedSmtp) -> None:
    smtp.change({"banner": drop()})
    stop = Event()
    begun = time.monotonic()
    assert not wait_for_smtp(config_for(smtp), lambda *_: stop.set(), stop, pause_seconds=10)
    assert time.monotonic() - begun < 5


USUAL = Mail(to="user@example.com", subject="s", text="t", html="h")


@row("Client: a new UUID as `request_id`, kept over its tries")
def test_client_request_id(nats_server: NatsServer, new_responder: Callable[..., Responder]) -> None:
    responder = new_responder(DEFERRED, SENT)

    async def run() -> None:
        async with RelayClient(nats_server.url, retry=Retry(5, 1, 0.01, 0.02)) as client:
            await client.send(USUAL)

    asyncio.run(run())
    first, second = (request["request_id"] for request in responder.requests)
    assert first == second
    assert uuid.UUID(first).version == 4


@row("Client: 10 s a try, back-off from 50 ms, 20 s in all")
def test_client_back_off() -> None:
    retry = Retry()
    assert (retry.try_timeout_seconds, retry.total_timeout_seconds) == (35, 90)
    assert [retry.pause_seconds(tries, lambda: 1.0) for tries in (1, 2, 3, 20)] == [0.1, 0.2, 0.4, 5.0]
    assert retry.pause_seconds(20, lambda: 0.0) == 0


@row("Client: without a server to call it logs, and drops the mail with success")
def test_client_without_server() -> None:
    async def run() -> None:
        await RelayClient(
            f"nats://127.0.0.1:{free_port()}", retry=Retry(0.5, 0.5, 0.01, 0.02), connect_timeout_seconds=0.2
        ).send(USUAL)

    with pytest.raises(NotConnected):
        asyncio.run(run())


@row("Client: puts in a default sender")
def test_default_sender(relay: Relay) -> None:
    relay.send()
    assert relay.last_mail["From"] == f"Relay <{DEFAULT_FROM}>"
    assert "from" not in json.loads(USUAL.encode(""))
