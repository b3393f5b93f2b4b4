"""Preflight: what people meet first, provoked for real, each with its remedy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gevent
import pytest
from gevent.server import StreamServer

from relay.ops.preflight import Finding, findings
from relay.settings import load_settings
from tests.support.moto_server import aws_environment
from tests.support.nats_server import NatsServer, free_port
from tests.support.scripted_smtp import ScriptedSmtp, make_certificate, say
from tests.support.sqs_double import SqsDouble

Found = dict[str, Finding]
Check = Callable[..., Found]


@pytest.fixture
def check(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Check:
    """Runs the preflight with some settings changed; the findings by what they are about."""
    defaults = {
        "NATS_URL": nats_server.url,
        "SMTP_HOST": "127.0.0.1",
        "SMTP_PORT": "1",
        "EMAIL_ENABLED": "true",
        "PORT": str(free_port()),
        "RELAY_HTTP_HOST": "127.0.0.1",
        "RELAY_STATE_DIR": str(tmp_path / "state"),
        "SMTP_HELO_NAME": "relay.example.org",
    }

    def run(**changed: object) -> Found:
        for name, value in (defaults | changed).items():
            monkeypatch.setenv(name, str(value))
        return {finding.what: finding for finding in findings(load_settings())}

    return run


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for another name than 127.0.0.1."""
    return make_certificate(tmp_path_factory.mktemp("certificate"), "mail.example.com")


def test_all_is_well(check: Check) -> None:
    with ScriptedSmtp() as smtp:
        found = check(SMTP_PORT=smtp.port)
    assert all(finding.ok for finding in found.values()), found
    assert list(found) == ["settings", "state directory", "port", "NATS", "JetStream", "request ids", "SMTP"]


def test_a_smarthost_that_is_not_there(check: Check) -> None:
    finding = check()["SMTP"]
    assert not finding.ok
    assert "check SMTP_HOST and SMTP_PORT" in finding.remedy


def test_a_smarthost_that_refuses(check: Check) -> None:
    with ScriptedSmtp({"banner": say("554 5.7.1 go away")}) as smtp:
        finding = check(SMTP_PORT=smtp.port)["SMTP"]
    assert not finding.ok
    assert "go away" in finding.detail


def test_of_several_smarthosts_one_is_enough(check: Check) -> None:
    gone = free_port()
    with ScriptedSmtp() as smtp:
        found = check(SMTP_HOST=f"127.0.0.1:{gone},127.0.0.1:{smtp.port}")
    finding = found[f"SMTP 127.0.0.1:{gone}"]
    assert (finding.ok, finding.is_warning) == (False, True)
    assert found[f"SMTP 127.0.0.1:{smtp.port}"].ok


def test_of_several_smarthosts_none_is_too_few(check: Check) -> None:
    ports = [free_port(), free_port()]
    found = check(SMTP_HOST=",".join(f"127.0.0.1:{port}" for port in ports))
    assert [found[f"SMTP 127.0.0.1:{port}"].is_warning for port in ports] == [False, False]


def test_a_wrong_password(check: Check) -> None:
    with ScriptedSmtp(credentials=("relay", "right")) as smtp:
        finding = check(SMTP_PORT=smtp.port, SMTP_USERNAME="relay", SMTP_PASSWORD="hunter2")["SMTP"]
    assert not finding.ok
    assert "check SMTP_USERNAME and SMTP_PASSWORD" in finding.remedy
    assert "hunter2" not in finding.detail


def test_a_certificate_for_another_name(check: Check, certificate: tuple[Path, Path]) -> None:
    with ScriptedSmtp(tls="starttls", certificate=certificate) as smtp:
        finding = check(SMTP_PORT=smtp.port, SMTP_CA_FILE=certificate[0], SMTP_TLS="starttls")["SMTP"]
    assert not finding.ok
    assert "is for another name" in finding.detail


def test_no_nats(check: Check) -> None:
    finding = check(NATS_URL=f"nats://127.0.0.1:{free_port()}")["NATS"]
    assert not finding.ok
    assert "connection refused" in finding.detail
    assert finding.remedy.startswith("start it, or set NATS_URL")


def test_a_wrong_nats_password(check: Check, new_nats_server: Callable[..., NatsServer]) -> None:
    server = new_nats_server(config='authorization { user: "relay", password: "right" }')
    finding = check(NATS_URL=server.url.replace("//", "//relay:hunter2@"))["NATS"]
    assert not finding.ok
    assert "password was refused" in finding.detail
    assert "hunter2" not in finding.detail


def test_no_jetstream(check: Check, new_nats_server: Callable[..., NatsServer]) -> None:
    finding = check(NATS_URL=new_nats_server(jetstream=False).url)["JetStream"]
    assert (finding.ok, finding.is_warning) == (False, True)
    assert "start it with -js" in finding.detail


def test_no_permission_for_jetstream(check: Check, new_nats_server: Callable[..., NatsServer]) -> None:
    user = 'user: "w", password: "w", permissions: { publish: { deny: ["$JS.>", "$KV.>"] } }'
    server = new_nats_server(config=f"authorization {{ users: [{{ {user} }}] }}")
    finding = check(NATS_URL=server.url.replace("//", "//w:w@"))["JetStream"]
    assert (finding.ok, finding.is_warning) == (False, True)
    assert "mail will go out untracked" in finding.detail


def test_no_bucket_for_request_ids(check: Check, new_nats_server: Callable[..., NatsServer]) -> None:
    user = 'user: "w", password: "w", permissions: { publish: { deny: ["$JS.API.STREAM.CREATE.KV_email-requests"] } }'
    server = new_nats_server(config=f"authorization {{ users: [{{ {user} }}] }}")
    found = check(NATS_URL=server.url.replace("//", "//w:w@"))
    assert found["JetStream"].ok
    finding = found["request ids"]
    assert (finding.ok, finding.is_warning) == (False, True)
    assert finding.detail.startswith("mail with a request_id will be deferred: ")
    assert "$JS.API.STREAM.CREATE.KV_email-requests" in finding.detail


def test_a_taken_port(check: Check) -> None:
    port = free_port()
    server = StreamServer(("127.0.0.1", port), lambda sock, _: sock.close())
    server.start()
    try:
        finding = check(PORT=port)["port"]
    finally:
        server.stop()
    assert not finding.ok
    assert finding.remedy == "end what listens there, or set PORT"


def test_a_directory_that_cannot_be_written(check: Check, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finding = check(RELAY_STATE_DIR=tmp_path / "file" / "state")["state directory"]
    assert not finding.ok
    assert "set RELAY_STATE_DIR" in finding.remedy


def test_a_misspelt_setting_is_a_warning(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMTP_PROT", "25")
    finding = check()["settings"]
    assert finding.is_warning
    assert "SMTP_PROT" in finding.detail


@pytest.fixture
def old_nats_server() -> Iterator[str]:
    """The URL of what says that it is a nats-server 2.10 without JetStream."""

    def serve(sock: gevent.socket.socket, _address: object) -> None:
        sock.sendall(b'INFO {"server_id":"old","version":"2.10.29","headers":true,"max_payload":1048576}\r\n')
        while data := sock.recv(4096):
            if b"PING" in data:
                sock.sendall(b"PONG\r\n")

    server = StreamServer(("127.0.0.1", 0), serve)
    server.start()
    yield f"nats://127.0.0.1:{server.server_port}"
    server.stop()


def test_an_old_nats_server(check: Check, old_nats_server: str) -> None:
    finding = check(NATS_URL=old_nats_server)["NATS version"]
    assert not finding.ok
    assert "nats-server 2.10.29 is older than 2.12" in finding.detail
    assert finding.remedy == "update the server"


@pytest.fixture
def queue() -> Iterator[SqsDouble]:
    """A queue of events."""
    double = SqsDouble(visibility_seconds=60)
    yield double.start()
    double.stop()


def with_events(queue: SqsDouble, **changed: str) -> dict[str, str]:
    """Settings of a relay that reads the queue."""
    return {
        **aws_environment(queue.url),
        "AWS_MAX_ATTEMPTS": "1",
        "SES_EVENTING_ENABLED": "true",
        "SES_ENGAGEMENT_SQS_QUEUE_URL": queue.queue_url,
        "SES_CONFIGURATION_SET": "relay",
        **changed,
    }


def test_a_queue_of_events_that_is_well(check: Check, queue: SqsDouble) -> None:
    queue.max_receives = 20
    queue.add("an event")
    found = check(**with_events(queue))
    assert [what for what in found if "S" in what and "SMTP" not in what] == ["NATS", "JetStream", "SQS"]
    assert found["SQS"].ok
    assert "nothing else may poll it, lfx's own poller least of all" in found["SQS"].detail
    (left,) = queue.left
    assert left.visible_at <= time.monotonic(), "nothing was taken"


def test_a_queue_that_is_not_there(check: Check, queue: SqsDouble) -> None:
    finding = check(**with_events(queue, SES_ENGAGEMENT_SQS_QUEUE_URL=f"{queue.url}/1/missing"))["SQS"]
    assert (finding.ok, finding.is_warning) == (False, False)
    assert "check SES_ENGAGEMENT_SQS_QUEUE_URL" in finding.remedy


def test_a_queue_that_cannot_be_asked(check: Check, queue: SqsDouble) -> None:
    queue.stop()
    finding = check(**with_events(queue))["SQS"]
    assert not finding.ok
    assert "Could not connect" in finding.detail


def test_credentials_that_are_missing(check: Check, queue: SqsDouble) -> None:
    finding = check(**with_events(queue, AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY=""))["SQS"]
    assert not finding.ok
    assert "no AWS credentials were found" in finding.detail


def test_credentials_that_may_too_little(check: Check, queue: SqsDouble) -> None:
    queue.denied = {"DeleteMessageBatch", "ChangeMessageVisibilityBatch"}
    finding = check(**with_events(queue))["SQS"]
    assert not finding.ok
    assert "may not sqs:DeleteMessage, sqs:ChangeMessageVisibility" in finding.detail


def test_a_queue_set_up_so_that_events_come_twice_or_get_lost(check: Check, queue: SqsDouble) -> None:
    queue.visibility_seconds, queue.max_receives = 5, 3
    found = check(**with_events(queue, SES_CONFIGURATION_SET=""))
    for what, said in {
        "SQS visibility": "visibility timeout is 5 s",
        "SQS redrive": "after 3 receives",
        "SES events": "SES_CONFIGURATION_SET is empty",
    }.items():
        assert (found[what].ok, found[what].is_warning) == (False, True)
        assert said in found[what].detail
    assert found["SQS"].ok


def test_somebody_else_polls_the_queue(check: Check, queue: SqsDouble) -> None:
    queue.add("an event")
    queue.left[0].visible_at = time.monotonic() + 60
    finding = check(**with_events(queue))["SQS pollers"]
    assert finding.is_warning
    assert "1 messages of the queue are in somebody's hands" in finding.detail
    assert "lfx's own poller, which must be off" in finding.detail
