"""NATS's faults, each set up at a real server, and that looking changes nothing there."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest
from gevent import get_hub

from relay import __version__, contract
from relay.bus.client import Bus, Publication
from relay.bus.jetstream import JetStream
from relay.bus.micro import MicroService
from relay.ops.doctor.bus import NOTHING_RUNS, Programs, nats
from relay.ops.doctor.finding import Finding
from relay.settings import load_settings
from relay.tracking.inspection import FACTS, INDEX, RECORDS
from relay.tracking.record import rfc3339
from relay.tracking.storage import StorageConfig, ensure_storage, stream_config
from tests.support.lfx import written_record
from tests.support.nats_cluster import NatsCluster
from tests.support.nats_server import NatsServer, free_port

Ask = Callable[..., list[Finding]]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Ask:
    """The doctor's questions to a server, with some settings changed."""

    def run(url: str, running: Programs = NOTHING_RUNS, **changed: str) -> list[Finding]:
        for name, value in ({"NATS_URL": url} | changed).items():
            monkeypatch.setenv(name, value)
        settings = load_settings()
        # A thread has one bus at a time, and here the test has its own.
        found: list[Finding] = get_hub().threadpool.apply(lambda: list(nats(settings, may_make=False, running=running)))
        return found

    return run


def wrong(findings: list[Finding]) -> list[Finding]:
    """Those that are not well."""
    return [finding for finding in findings if not finding.ok]


@pytest.fixture
def stored(new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]) -> tuple[NatsServer, JetStream]:
    """A server of one's own with bucket and log."""
    server = new_nats_server()
    jetstream = JetStream(new_bus(server.url))
    assert ensure_storage(jetstream, StorageConfig()) == ""
    return server, jetstream


def test_a_server_on_which_no_relay_ever_ran(
    ask: Ask, new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]
) -> None:
    server = new_nats_server()
    found = ask(server.url)
    assert wrong(found) == []
    assert {finding.what for finding in found} == {"NATS", "clock", "permissions", "NATS max_payload", "JetStream"}
    assert "the first worker makes them: email-recipients, EMAIL_LOG, email-requests" in found[-1].detail
    assert JetStream(new_bus(server.url)).api("STREAM.NAMES")["streams"] is None, "nothing was made"


def test_looking_leaves_no_trace(ask: Ask, stored: tuple[NatsServer, JetStream]) -> None:
    server, jetstream = stored
    assert wrong(ask(server.url)) == []
    for stream in (RECORDS, FACTS):
        assert jetstream.stream_info(stream).last_sequence == 0
    assert jetstream.api("STREAM.NAMES")["streams"] == [FACTS, RECORDS]


# -- reaching it -------------------------------------------------------------------------------------------------
def test_nothing_listens(ask: Ask) -> None:
    (finding,) = ask(f"nats://127.0.0.1:{free_port()}")
    assert finding.level == "failed"
    assert "connection refused" in finding.detail
    assert finding.remedy.startswith("start it, or set NATS_URL")


def test_no_such_name(ask: Ask) -> None:
    (finding,) = ask(f"nats://{'x' * 64}.example.com:4222")
    assert "does not exist" in finding.detail
    assert "check the spelling in NATS_URL" in finding.remedy


def test_one_server_of_several(ask: Ask, nats_server: NatsServer) -> None:
    gone = free_port()
    found = ask(f"{nats_server.url},nats://127.0.0.1:{gone}")
    (finding,) = (each for each in found if each.what == "NATS servers")
    assert finding.level == "warning"
    assert f"nothing listens on port {gone}" in finding.detail


def test_a_wrong_password(ask: Ask, new_nats_server: Callable[..., NatsServer]) -> None:
    server = new_nats_server(config='authorization { user: "relay", password: "right" }')
    (finding,) = ask(server.url.replace("//", "//relay:hunter2@"))
    assert "password was refused" in finding.detail
    assert "hunter2" not in str(finding)
    assert finding.remedy


# -- permissions -------------------------------------------------------------------------------------------------
def with_user(permissions: str) -> str:
    """A server's file with one user who may do so much."""
    return f'authorization {{ users: [{{ user: "w", password: "w", permissions: {permissions} }}] }}'


@pytest.mark.parametrize("is_told", [True, False], ids=["the server tells", "each is tried"])
def test_a_permission_is_missing(ask: Ask, new_nats_server: Callable[..., NatsServer], is_told: bool) -> None:
    hidden = "" if is_told else '"$SYS.REQ.USER.INFO", '
    server = new_nats_server(config=with_user(f'{{ publish: {{ deny: [{hidden}"$KV.email-requests.>"] }} }}'))
    found = ask(server.url.replace("//", "//w:w@"))
    (finding,) = (each for each in found if each.what == "permissions")
    assert finding.level == "warning"
    assert "may not publish $KV.email-requests.> (who works on a request_id" in finding.detail
    assert ("the NATS user w" in finding.detail) == is_told


def test_requests_may_not_be_subscribed_to(ask: Ask, new_nats_server: Callable[..., NatsServer]) -> None:
    server = new_nats_server(config=with_user('{ subscribe: { allow: ["_INBOX.>", "$SRV.>"] } }'))
    found = ask(server.url.replace("//", "//w:w@"))
    (finding,) = (each for each in found if each.what == "permissions")
    assert finding.level == "failed"
    assert "subscribe lfx.email-service.send_email" in finding.detail
    assert "(no request arrives)" in finding.detail


def test_replies_may_not_be_published(ask: Ask, new_nats_server: Callable[..., NatsServer]) -> None:
    server = new_nats_server(config=with_user('{ publish: { deny: ["_R_.>"] } }'))
    found = ask(server.url.replace("//", "//w:w@"))
    (finding,) = (each for each in found if each.what == "permissions")
    assert finding.level == "failed"
    assert "may not publish _R_.> (callers get no reply)" in finding.detail


def test_a_relay_that_serves_may_lack_permissions_too(ask: Ask, new_nats_server: Callable[..., NatsServer]) -> None:
    server = new_nats_server(config=with_user('{ publish: { deny: ["$KV.email-requests.>"] } }'))
    found = ask(server.url.replace("//", "//w:w@"), {7: "send-1"})
    (finding,) = (each for each in found if each.what == "permissions")
    assert finding.level == "warning"


def test_who_logs_in_with_a_token_has_no_name(
    ask: Ask, new_nats_server: Callable[..., NatsServer], tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("hunter2\n")
    server = new_nats_server(config='authorization { token: "hunter2" }')
    (finding,) = (
        each for each in ask(server.url, NATS_TOKEN_FILE=str(tmp_path / "token")) if each.what == "permissions"
    )
    assert finding.detail == "this NATS user may do all that a relay does"


@pytest.mark.parametrize("user", ["relay", "operator"])
def test_the_users_that_we_ship(
    ask: Ask, new_nats_server: Callable[..., NatsServer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, user: str
) -> None:
    for name in ("RELAY", "OPERATOR", "READER", "BILLING"):
        monkeypatch.setenv(f"{name}_NATS_PASSWORD", "secret-enough")
    examples = Path(__file__).parents[3] / "conf" / "nats" / "relay.conf"
    # What is included is looked for beside the server's own file, whatever it begins with.
    server = new_nats_server(config=f'include "{os.path.relpath(examples, tmp_path / "nats0")}"')
    found = ask(server.url, NATS_USER=user, NATS_PASSWORD="secret-enough", NATS_INBOX_PREFIX=f"_INBOX.{user}")
    assert wrong(found) == []
    (finding,) = (each for each in found if each.what == "permissions")
    assert ("an operator's" in finding.detail) == (user == "operator")


# -- JetStream ---------------------------------------------------------------------------------------------------
def test_no_jetstream(ask: Ask, new_nats_server: Callable[..., NatsServer]) -> None:
    (finding,) = wrong(ask(new_nats_server(jetstream=False).url))
    assert "mail will go out untracked: JetStream is not enabled" in finding.detail
    assert "start nats-server with -js" in finding.remedy


def test_an_account_that_is_nearly_full(
    ask: Ask, new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]
) -> None:
    account = 'accounts { A { jetstream: { max_file: 2MB, max_mem: 1MB }, users: [{ user: "w", password: "w" }] } }'
    url = new_nats_server(config=account).url.replace("//", "//w:w@")
    jetstream = JetStream(new_bus(url))
    assert ensure_storage(jetstream, StorageConfig()) == ""
    records = [Publication(f"$KV.{contract.RECIPIENTS_BUCKET}.{n}", b"x" * 100_000) for n in range(19)]
    assert not [each for each in jetstream.store(records) if isinstance(each, Exception)]
    (finding,) = wrong(ask(url))
    assert finding.what == "JetStream limits"
    assert "the account has 2,097,152 bytes on disk for JetStream and uses 91%" in finding.detail


def test_remarks_on_streams_come_with_their_command(ask: Ask, stored: tuple[NatsServer, JetStream]) -> None:
    server, jetstream = stored
    config = dict(jetstream.stream_info(FACTS).config)
    jetstream.api(f"STREAM.UPDATE.{FACTS}", config | {"allow_direct": False, "max_age": 30 * 86_400 * 10**9})
    found = {finding.detail: finding for finding in wrong(ask(server.url))}
    assert len(found) == 2
    (direct,) = (each for each in found.values() if "allows no direct get" in each.detail)
    assert direct.remedy == "nats stream edit EMAIL_LOG --allow-direct --force"
    (age,) = (each for each in found.values() if "keeps what it has" in each.detail)
    assert age.detail == "EMAIL_LOG keeps what it has for 30d; TRACKING_TTL_DAYS says for ever"
    assert age.remedy == "nats stream edit EMAIL_LOG --max-age=0s --force"
    assert [each.detail for each in wrong(ask(server.url, TRACKING_TTL_DAYS="30"))] == [direct.detail]


def test_small_messages(ask: Ask, new_nats_server: Callable[..., NatsServer]) -> None:
    found = ask(new_nats_server(config="max_payload: 65536").url)
    (finding,) = (each for each in found if each.what == "NATS max_payload")
    assert finding.level == "warning"
    assert "takes messages of 65,536 bytes" in finding.detail


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[NatsCluster]:
    """Three servers; bucket and log have one copy each, on the third."""
    made = NatsCluster(tmp_path)
    yield made.start()
    made.stop()


def test_one_copy_in_a_cluster_then_its_server_hangs(ask: Ask, cluster: NatsCluster) -> None:
    (finding,) = (each for each in wrong(ask(cluster.url)) if "one copy" in each.detail)
    assert finding.level == "warning"
    assert "set TRACKING_REPLICAS=3" in finding.remedy
    cluster.freeze()
    begun = time.monotonic()
    (finding,) = (each for each in wrong(ask(cluster.url)) if each.what == "JetStream")
    assert time.monotonic() - begun < 8
    assert "mail will go out untracked: NATS did not answer within 2 s" in finding.detail
    assert "more than half of its servers must run" in finding.remedy


# -- other workers -----------------------------------------------------------------------------------------------
def start_worker(bus: Bus, version: str, host: str, pid: int) -> None:
    """What a worker says of itself."""
    MicroService(
        bus,
        version=version,
        program="send-1",
        metadata={"host": host, "pid": str(pid)},
        endpoints=(),
        figures=dict,
        reply_prefixes=("_INBOX",),
    ).start()


def test_workers_of_another_version(
    ask: Ask, new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]
) -> None:
    server = new_nats_server()
    bus = new_bus(server.url)
    start_worker(bus, "0.0.9", platform.node(), 7)
    start_worker(bus, __version__, platform.node(), 8)
    start_worker(bus, "0.0.8", "elsewhere.example.com", 7)
    here, elsewhere = wrong(ask(server.url, {7: "send-1", 8: "send-2"}))
    assert f"workers here run another version than this relayctl ({__version__}): send-1 0.0.9" in here.detail
    assert "`relayctl restart`" in here.remedy
    assert "other workers of the queue group run 0.0.8" in elsewhere.detail


# -- lfx's own service -------------------------------------------------------------------------------------------
def test_lfxs_poller_still_runs(ask: Ask, stored: tuple[NatsServer, JetStream]) -> None:
    server, jetstream = stored
    events = {
        "SES_EVENTING_ENABLED": "true",
        "SES_ENGAGEMENT_SQS_QUEUE_URL": "https://sqs.us-east-1.amazonaws.com/1/events",
    }
    index = stream_config(StorageConfig(), name=INDEX, subjects=[f"$KV.{contract.GROUP_INDEX_BUCKET}.>"])
    jetstream.api(f"STREAM.CREATE.{INDEX}", index)

    def keep(email_id: str, record: bytes) -> None:
        sent = orjson.dumps({"email_id": email_id, "at": rfc3339(time.time())})
        stored = jetstream.store(
            [
                Publication(f"{contract.LOG_PREFIX}.news.sent", sent),
                Publication(f"$KV.{contract.RECIPIENTS_BUCKET}.{email_id}", record),
            ]
        )
        assert not [each for each in stored if isinstance(each, Exception)]

    now = rfc3339(time.time())
    lately = {"delivered": True, "delivered_at": now}
    plain = orjson.loads(written_record("mail-1", "news"))
    # Relay's own: before an event, after one; and lfx's of long ago
    keep("mail-1", orjson.dumps(plain))
    keep("mail-2", orjson.dumps(plain | lately | {"email_id": "mail-2", "folded_at": {"e": now}}))
    keep("mail-3", orjson.dumps(plain | {"delivered": True, "delivered_at": "2024-01-01T00:00:00Z"}))
    # and what another than Relay wrote there: no fact, and one whose key would be everybody's
    for fact in (b"no JSON", b'{"email_id":">"}', b"{}"):
        jetstream.store([Publication(f"{contract.LOG_PREFIX}.news.sent", fact)])
    assert wrong(ask(server.url, **events)) == []
    # When lfx writes its index, and takes an event
    jetstream.store([Publication(f"$KV.{contract.GROUP_INDEX_BUCKET}.news", b'["mail-4"]')])
    keep("mail-4", orjson.dumps(plain | lately | {"email_id": "mail-4"}))
    found = ask(server.url, **events)
    assert any("lfx-v2-email-service sends mail beside this relay" in each.detail for each in found if each.ok)
    (finding,) = wrong(found)
    assert (finding.what, finding.level) == ("lfx's poller", "failed")
    assert "SES_EVENTING_ENABLED=false at lfx-v2-email-service" in finding.remedy
    # and where no events are handled here it is its own business
    assert wrong(ask(server.url, SES_EVENTING_ENABLED="false")) == []
