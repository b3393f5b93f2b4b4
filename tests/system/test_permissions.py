"""``conf/nats/relay.conf`` on a real nats-server: a relay with exactly these permissions does all it has to, and what
its callers and readers try beyond theirs is refused."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import nats
import nats.errors
import pytest

from relay import contract
from relay.bus.client import Bus, BusConfig
from relay.bus.jetstream import JetStream
from relay.ops.permissions import LOOKING, needs_of_operators, needs_of_workers
from tests.conftest import require
from tests.support.caller import GET_ANALYTICS, GET_EMAIL_STATUS, MAIL, SEND_EMAIL
from tests.support.moto_server import IS_THERE, MotoServer
from tests.support.nats_server import BINARY, NatsServer
from tests.support.relay_process import CatchingServer, RelayProcess, Worker
from tests.system.test_engagement import event, eventing, wait_until

T = TypeVar("T")

CONF = Path(__file__).parents[2] / "conf" / "nats"
USERS = ("relay", "operator", "reader", "billing")
RECORD = "$KV.email-recipients.e-1"
FACT = "lfx.email-service.log.-.sent"
STREAMS = ("KV_email-recipients", contract.LOG_STREAM, "KV_email-requests")

Errors = list[str]
Work = Callable[[nats.NATS, Errors], Awaitable[T]]


class Stage(NamedTuple):
    """A nats-server with the shipped users, and a relay's workers on it."""

    server: NatsServer
    relay: RelayProcess
    server_log: Path

    def as_user(self, user: str, work: Work[T], **options: Any) -> T:
        """Runs ``work`` with a plain nats-py client, and the list where the server's refusals arrive."""

        async def run() -> T:
            errors: Errors = []

            async def on_error(error: Exception) -> None:
                errors.append(str(error).lower())

            given = {"user": user, "password": user, "inbox_prefix": f"_INBOX.{user}", "allow_reconnect": False}
            nc = await nats.connect(self.server.url, error_cb=on_error, **(given | options))
            try:
                return await work(nc, errors)
            finally:
                await nc.close()

        return asyncio.run(run())

    def ask(self, user: str, nats_subject: str, request: Mapping[str, Any]) -> Any:
        """One request, one reply."""

        async def run(nc: nats.NATS, _errors: Errors) -> Any:
            return json.loads((await nc.request(nats_subject, json.dumps(request).encode(), timeout=10)).data)

        return self.as_user(user, run)

    def stored(self) -> list[int]:
        """The last sequence of each stream."""
        asked = [self.ask("operator", f"$JS.API.STREAM.INFO.{stream}", {}) for stream in STREAMS]
        return [int(each["state"]["last_seq"]) for each in asked]

    def relayctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """As the operator."""
        operator = RelayProcess(self.relay.state_dir, self.server.url, 1, **login("operator"))
        operator.settings["SMTP_PORT"] = self.relay.settings["SMTP_PORT"]
        return operator.relayctl(*arguments)


def login(user: str) -> dict[str, str]:
    """The settings of one of the shipped users."""
    return {"NATS_USER": user, "NATS_PASSWORD": user, "NATS_INBOX_PREFIX": f"_INBOX.{user}"}


def wait_until_served(url: str, **options: Any) -> None:
    """Returns when both workers answer the reader and the caller."""

    async def run() -> None:
        deadline = time.monotonic() + 30
        for user, nats_subject in (("billing", SEND_EMAIL), ("reader", GET_EMAIL_STATUS), ("reader", GET_ANALYTICS)):
            given = {"user": user, "password": user, "inbox_prefix": f"_INBOX.{user}"}
            nc = await nats.connect(url, **(given | options))
            while True:
                try:
                    await nc.request(nats_subject, b"{}", timeout=2)
                    break
                except (nats.errors.NoRespondersError, nats.errors.TimeoutError):
                    assert time.monotonic() < deadline, f"nobody serves {nats_subject}"
                    await asyncio.sleep(0.1)
            await nc.close()

    asyncio.run(run())


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, smtp: CatchingServer) -> Iterator[Stage]:
    """The shipped users, a send worker and a status worker."""
    require(BINARY.exists(), "nats-server")
    passwords = {f"{user.upper()}_NATS_PASSWORD": user for user in USERS}
    os.environ.update(passwords)
    store = tmp_path_factory.mktemp("permissions")
    server = NatsServer(store, config=f'include "{os.path.relpath(CONF / "relay.conf", store)}"')
    state_dir = Path(tempfile.mkdtemp(prefix="relay-t-"))
    workers: list[Worker] = []
    try:
        server.start()
        relay = RelayProcess(state_dir, server.url, smtp.port, **login("relay"))
        workers += [Worker(module, relay.settings) for module in ("send", "status")]
        wait_until_served(server.url)
        yield Stage(server, relay, store / "nats.log")
    finally:
        for worker in workers:
            worker.end()
        server.stop()
        for name in passwords:
            del os.environ[name]
        shutil.rmtree(state_dir, ignore_errors=True)


def violations(log: str, user: str) -> list[str]:
    """What the server has refused to a user, as it logged it."""
    return [line for line in log.splitlines() if "Violation" in line and re.search(f'/user:{user}"', line)]


# -- the contract, with these permissions ------------------------------------------------------------------------------
def test_callers_and_readers_get_all_that_the_contract_gives(stage: Stage, smtp: CatchingServer) -> None:
    before = smtp.count()
    reply = stage.ask("billing", SEND_EMAIL, MAIL | {"group_id": "spring"})
    assert reply["email_id"]
    twin = MAIL | {"group_id": "spring", "request_id": "once"}
    first, second = (stage.ask("billing", SEND_EMAIL, twin) for _ in range(2))
    assert second == first | {"duplicate": True}
    assert smtp.count() == before + 2
    record = stage.ask("reader", GET_EMAIL_STATUS, {"email_id": reply["email_id"]})
    assert record["outcome"] == "relayed" if "outcome" in record else record["sent_at"]
    assert len(stage.ask("reader", GET_EMAIL_STATUS, {"group_id": "spring"})) == 2
    assert stage.ask("reader", GET_ANALYTICS, {"group_id": "spring"})["total_sent"] == 2
    assert stage.ask("reader", GET_EMAIL_STATUS, {"email_id": "none"}) == {"error": contract.NOT_FOUND}


def test_events_are_folded_and_parked(stage: Stage, tmp_path: Path) -> None:
    require(IS_THERE, "moto's server")
    moto = MotoServer(tmp_path)
    queue_url = moto.new_queue("permissions")
    topic = moto.new_topic("permissions", queue_url, is_raw=False)
    worker = Worker("engagement", stage.relay.settings | eventing(moto.url, queue_url))
    try:
        email_id = stage.ask("billing", SEND_EMAIL, MAIL | {"group_id": "events"})["email_id"]
        moto.publish(topic, [event(email_id, "events", "Open"), "what nobody can read"])

        def is_known() -> bool:
            parked = stage.ask("operator", f"$JS.API.STREAM.INFO.{contract.PARKED_STREAM}", {})
            opened = stage.ask("reader", GET_EMAIL_STATUS, {"email_id": email_id}).get("opened")
            return bool(opened) and parked.get("state", {}).get("messages") == 1

        wait_until(is_known)
        assert stage.ask("reader", GET_ANALYTICS, {"group_id": "events"})["opened"] == 1
        for arguments in (("parked", "show", "1"), ("parked", "drop", "1", "--yes")):
            done = stage.relayctl(*arguments)
            assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
    finally:
        worker.end()
        moto.stop()


def test_the_operator_has_every_command(stage: Stage) -> None:
    mail = ("--to", "user@example.com", "--subject", "Hi", "--text", "Hi", "--group", "g")
    sent = stage.relayctl("send", *mail, "--json")
    assert sent.returncode == 0, sent.stderr
    email_id = json.loads(sent.stdout)["email_id"]
    for arguments in (
        ("track", email_id),
        ("track", "--group", "g"),
        ("analytics", "g"),
        ("events", "--group", "g"),
        ("export", "g"),
        ("buckets",),
        ("check",),
        ("repair", "g", "--yes", "--min-age", "0"),
        ("repair", "--scan", "--yes", "--min-age", "0"),
        ("erase", email_id, "--yes"),
        ("parked", "list"),
    ):
        done = stage.relayctl(*arguments)
        assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
    examined = json.loads(stage.relayctl("doctor", "--json").stdout)["findings"]
    told = [each["detail"] for each in examined if each["what"] == "permissions"]
    assert told == ["the NATS user operator is an operator's, not the workers': theirs were not looked at"]
    config = BusConfig(stage.server.url, user="operator", password="operator", inbox_prefix="_INBOX.operator")
    bus = Bus(config, "test")
    bus.start()
    try:
        assert bus.wait_connected(5), bus.last_error
        with JetStream(bus).follow(contract.LOG_STREAM, f"{contract.LOG_PREFIX}.>", from_sequence=1) as follower:
            assert next(follower).nats_subject.startswith(contract.LOG_PREFIX), "as `relayctl events --follow` does"
    finally:
        bus.close()


def test_the_workers_are_heard_by_relayctl(stage: Stage) -> None:
    async def stats(nc: nats.NATS, _errors: Errors) -> Any:
        return json.loads((await nc.request("$SRV.STATS.email-service", b"", timeout=5)).data)

    for user in ("operator", "relay"):
        assert stage.as_user(user, stats)["metadata"]["program"] in {"send", "status"}


# -- attacks -----------------------------------------------------------------------------------------------------------
PUBLISHED = (
    # writes a record, forges a fact, takes somebody's request_id
    RECORD,
    FACT,
    "$KV.email-requests.anything",
    "lfx.email-service.parked",
    # reads what others were sent
    "$JS.API.DIRECT.GET.KV_email-recipients",
    f"$JS.API.DIRECT.GET.KV_email-recipients.{RECORD}",
    "$JS.API.STREAM.MSG.GET.KV_email-recipients",
    "$JS.API.STREAM.MSG.GET.KV_email-requests",
    "$JS.API.DIRECT.GET.EMAIL_LOG",
    "$JS.API.CONSUMER.CREATE.KV_email-recipients",
    "$JS.API.CONSUMER.CREATE.KV_email-recipients.c1.>",
    "$JS.API.CONSUMER.DURABLE.CREATE.EMAIL_LOG.c1",
    "$JS.API.CONSUMER.MSG.NEXT.EMAIL_LOG.c1",
    # looks around, purges, deletes, copies elsewhere
    "$JS.API.INFO",
    "$JS.API.STREAM.NAMES",
    "$JS.API.STREAM.LIST",
    "$JS.API.STREAM.INFO.EMAIL_LOG",
    "$JS.API.STREAM.CREATE.MINE",
    "$JS.API.STREAM.UPDATE.EMAIL_LOG",
    "$JS.API.STREAM.PURGE.EMAIL_LOG",
    "$JS.API.STREAM.DELETE.KV_email-recipients",
    "$JS.API.STREAM.MSG.DELETE.EMAIL_LOG",
    "$JS.API.STREAM.SNAPSHOT.EMAIL_LOG",
    "$JS.ACK.EMAIL_LOG.c1.1.1.1.1.1",
    # answers in the relay's place, asks its workers
    "_INBOX.reader.1",
    "_INBOX.relay.1.1",
    "_R_.abc.1",
    "$SRV.PING",
    "$SRV.STATS.email-service",
    "$SYS.REQ.SERVER.PING",
)
HEARD = (
    ">",
    "*.>",
    "_INBOX.>",
    "_INBOX.*",
    "_INBOX.*.*",
    "_INBOX.relay.>",
    "_INBOX.operator.>",
    "_R_.>",
    SEND_EMAIL,
    GET_EMAIL_STATUS,
    "lfx.email-service.>",
    "lfx.email-service.log.>",
    "$KV.>",
    "$KV.email-recipients.>",
    "$KV.email-requests.*",
    "$SRV.>",
    "$SRV.PING",
    "$JS.API.>",
    "$JS.EVENT.ADVISORY.>",
    "$O.>",
    "$SYS.>",
)
JOINED = ((SEND_EMAIL, contract.QUEUE_GROUP), (SEND_EMAIL, "mine"), (GET_EMAIL_STATUS, contract.QUEUE_GROUP))


@pytest.mark.parametrize(
    ("user", "may_ask"), [("billing", {SEND_EMAIL}), ("reader", {GET_EMAIL_STATUS, GET_ANALYTICS})]
)
def test_what_callers_and_readers_try_beyond_theirs_is_refused(stage: Stage, user: str, may_ask: set[str]) -> None:
    other = {SEND_EMAIL, GET_EMAIL_STATUS, GET_ANALYTICS} - may_ask
    published = [each for each in (*PUBLISHED, *other) if not each.startswith(f"_INBOX.{user}.")]
    heard = [each for each in HEARD if each != f"_INBOX.{user}.>"]

    async def attack(nc: nats.NATS, errors: Errors) -> None:
        for nats_subject in published:
            await nc.publish(nats_subject, b'{"email_id":"e-1"}')
        for nats_subject in heard:
            await nc.subscribe(nats_subject)
        for nats_subject, queue_group in JOINED:
            await nc.subscribe(nats_subject, queue=queue_group)
        await settle(nc)
        assert nc.is_connected
        for nats_subject in published:
            assert any(f'publish to "{nats_subject.lower()}"' in error for error in errors), nats_subject
        for nats_subject in heard:
            assert any(f'subscription to "{nats_subject.lower()}"' in error for error in errors), nats_subject
        for nats_subject, queue_group in JOINED:
            told = f'subscription to "{nats_subject}" using queue "{queue_group}"'
            assert any(told in error for error in errors), told

    before = stage.stored()
    stage.as_user(user, attack)
    assert stage.stored() == before


async def settle(nc: nats.NATS) -> None:
    """Returns when the server has dealt with all that was sent."""
    await asyncio.sleep(0)
    await nc.flush()


NAMED = (RECORD, FACT, "$KV.email-requests.x", "$JS.API.STREAM.PURGE.EMAIL_LOG", SEND_EMAIL, "lfx.email-service.parked")


@pytest.mark.parametrize(("user", "nats_subject"), [("billing", SEND_EMAIL), ("reader", GET_EMAIL_STATUS)])
def test_the_relay_writes_nowhere_for_a_caller_who_names_its_subjects_as_inbox(
    stage: Stage, user: str, nats_subject: str
) -> None:
    """The server lets any reply subject through: this wall is Relay's own (RELAY_REPLY_PREFIXES)."""

    async def attack(nc: nats.NATS, errors: Errors) -> None:
        for reply_subject in NAMED:
            await nc.publish(nats_subject, b'{"email_id":"none"}', reply=reply_subject)
        # The relay answers in order: when it has answered this, it is done with the others.
        await nc.request(nats_subject, b"{}", timeout=5)
        assert not errors, "the server has nothing against it"

    before = stage.stored()
    stage.as_user(user, attack)
    assert stage.stored() == before
    assert not violations(stage.server_log.read_text(), "relay"), "and Relay has not even tried"


def test_within_an_account_a_reply_arrives_at_whatever_inbox_was_named(stage: Stage) -> None:
    """Not refused by anybody: docs/security.md says so, under what is not protected."""

    async def listen(nc: nats.NATS, _errors: Errors) -> dict[str, Any]:
        heard = await nc.subscribe("_INBOX.reader.known")
        await settle(nc)

        async def name_it(other: nats.NATS, errors: Errors) -> None:
            await other.publish(SEND_EMAIL, b'{"to":1}', reply="_INBOX.reader.known")
            await settle(other)
            assert not errors

        await asyncio.to_thread(stage.as_user, "billing", name_it)
        reply: dict[str, Any] = json.loads((await heard.next_msg(5)).data)
        return reply

    reply = stage.as_user("reader", listen)
    assert reply["error"], "Relay's own words, of a request it refused"


@pytest.mark.parametrize("destination", [RECORD, FACT, "$KV.email-requests.x"])
def test_a_trace_writes_nowhere(stage: Stage, destination: str) -> None:
    """nats-server tells a message's way to whatever subject its header names, if its sender may publish there."""

    async def attack(nc: nats.NATS, _errors: Errors) -> None:
        for header in ("Nats-Trace-Dest", "Nats-Trace-Only"):
            headers = {"Nats-Trace-Dest": destination} | ({header: "true"} if header == "Nats-Trace-Only" else {})
            await nc.publish(SEND_EMAIL, b"{}", headers=headers)
        await settle(nc)
        await nc.request(SEND_EMAIL, b"{}", timeout=5)

    before = stage.stored()
    stage.as_user("billing", attack)
    assert stage.stored() == before
    if destination == RECORD:
        stage.as_user("operator", attack)
        assert stage.stored() != before, "the operator may publish there, so it does write"


def test_nobody_hears_what_another_is_answered(stage: Stage) -> None:
    async def eavesdrop(nc: nats.NATS, errors: Errors) -> int:
        heard: list[object] = []

        async def keep(msg: object) -> None:
            heard.append(msg)

        await nc.subscribe("_INBOX.billing.>", cb=keep)  # its own
        await nc.subscribe("_INBOX.reader.>", cb=keep)
        await nc.subscribe("_INBOX.relay.>", cb=keep)
        await settle(nc)
        await asyncio.to_thread(stage.ask, "reader", GET_EMAIL_STATUS, {"email_id": "none"})
        await settle(nc)
        assert len(errors) == 2
        return len(heard)

    assert stage.as_user("billing", eavesdrop) == 0


def test_the_server_has_refused_the_relay_and_its_operator_nothing(stage: Stage) -> None:
    """All of the above went without a violation of theirs."""
    log = stage.server_log.read_text()
    assert violations(log, "billing"), "that is how the server logs one"
    assert not violations(log, "relay")
    assert not violations(log, "operator")


# -- why it is written like this ---------------------------------------------------------------------------------------
PLAIN_USERS = """
authorization { users: [
  { user: all, password: all }
  { user: answering, password: answering, permissions: {
      subscribe: ["ask q", "_INBOX.answering.>"], publish: { allow: ["else"], deny: ["$KV.>"] }
      allow_responses: true } }
  { user: deaf, password: deaf, permissions: { subscribe: { allow: [">"], deny: ["ask q", "plain"] } } }
  { user: curious, password: curious, permissions: {
      publish: ["$JS.API.STREAM.MSG.GET.STORE", "$JS.API.DIRECT.GET.STORE"], subscribe: ["_INBOX.curious.>"] } }
] }
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A nats-server with users of other ideas."""
    require(BINARY.exists(), "nats-server")
    store = tmp_path_factory.mktemp("plain")
    server = NatsServer(store, config=PLAIN_USERS).start()
    yield Stage(server, RelayProcess(store, server.url, 1), store / "nats.log")
    server.stop()


def test_allow_responses_outranks_deny(plain: Stage) -> None:
    """So Relay's user has `_INBOX.>` to publish instead: what a caller names is no permission there."""

    async def run(nc: nats.NATS, errors: Errors) -> int:
        async def answer(msg: Any) -> None:
            await nc.publish(msg.reply, b"the answer")

        await nc.subscribe("ask", queue="q", cb=answer)
        await settle(nc)
        heard = asyncio.Event()

        async def keep(_msg: object) -> None:
            heard.set()

        caller = await nats.connect(plain.server.url, user="all", password="all")
        await caller.subscribe("$KV.records.victim", cb=keep)
        await caller.publish("ask", b"", reply="$KV.records.victim")
        await asyncio.wait_for(heard.wait(), 5)
        await caller.close()
        await nc.publish("$KV.records.victim", b"unasked")
        await settle(nc)
        return len(errors)

    assert plain.as_user("answering", run) == 1, "denied only when nobody has named it"


def test_a_permission_with_a_queue_group_is_for_that_group_alone(plain: Stage) -> None:
    async def allowed(nc: nats.NATS, errors: Errors) -> list[str]:
        await nc.subscribe("ask")
        await nc.subscribe("ask", queue="other")
        await settle(nc)
        return list(errors)

    refused = plain.as_user("answering", allowed)
    assert len(refused) == 2
    assert 'using queue "other"' in refused[1]

    async def denied(nc: nats.NATS, errors: Errors) -> list[str]:
        await nc.subscribe("ask", queue="q")
        await nc.subscribe("ask", queue="other")
        await nc.subscribe("ask")
        await nc.subscribe("plain", queue="q")
        await settle(nc)
        return list(errors)

    refused = plain.as_user("deaf", denied)
    assert [error.partition("subscription to ")[2] for error in refused] == [
        '"ask" using queue "q"',
        '"plain" using queue "q"',
    ], "a deny with a queue group leaves every other way open"


def test_who_may_read_a_stream_may_have_it_written_anywhere(plain: Stage) -> None:
    """JetStream's answers are nobody's publications: they go where the asker says, whatever it may publish to."""

    async def make(nc: nats.NATS, _errors: Errors) -> None:
        for name, nats_subject in (("STORE", "store.>"), ("OTHER", "other.>")):
            config = {"name": name, "subjects": [nats_subject], "allow_direct": True}
            await nc.request(f"$JS.API.STREAM.CREATE.{name}", json.dumps(config).encode(), timeout=5)
        await nc.request("store.a", b"a fact", timeout=5)

    async def attack(nc: nats.NATS, errors: Errors) -> None:
        await nc.publish("$JS.API.DIRECT.GET.STORE", b'{"seq":1}', reply="other.forged")
        await nc.request("$JS.API.STREAM.MSG.GET.STORE", b'{"seq":1}', timeout=5)
        assert not errors

    async def look(nc: nats.NATS, _errors: Errors) -> int:
        info = json.loads((await nc.request("$JS.API.STREAM.INFO.OTHER", b"", timeout=5)).data)
        return int(info["state"]["messages"])

    plain.as_user("all", make)
    plain.as_user("curious", attack)
    assert plain.as_user("all", look) == 1, "so nobody but Relay and its operators gets anything of $JS.API"


# -- the file and the table --------------------------------------------------------------------------------------------
def permissions_in(name: str) -> set[str]:
    """What ``permissions.conf`` grants, as ``str(Need)`` writes it."""
    text = re.sub(r"^ *#.*$", "", (CONF / "permissions.conf").read_text(), flags=re.MULTILINE)
    block = text.partition(f"{name}: {{")[2].partition("\n}")[0]
    found = set()
    for verb in ("subscribe", "publish"):
        listed = block.partition(f"{verb}: {{")[2].partition("]")[0]
        found |= {f"{verb} {each}" for each in re.findall(r'"([^"]+)"', listed)}
    return found


def test_the_shipped_permissions_are_those_of_the_table() -> None:
    workers = needs_of_workers("_INBOX.relay", ("_INBOX", "_R_"), (), has_events=True)
    assert permissions_in("RELAY_PERMISSIONS") == set(map(str, (*workers, *LOOKING)))
    assert permissions_in("OPERATOR_PERMISSIONS") == set(map(str, needs_of_operators("_INBOX.operator")))
    assert len(set(map(str, workers))) == len(workers), "each once"
