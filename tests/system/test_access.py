"""A whole relay that logs in with JWTs, over TLS, with exactly the permissions of ``relay.ops.permissions``."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import nats
import pytest

from relay.errors import EXIT_CONFIG
from relay.ops.permissions import LOOKING, Need, needs_of_operators, needs_of_workers
from tests.support.caller import MAIL, SEND_EMAIL
from tests.support.identities import Authority, Operator, new_key
from tests.support.nats_server import NatsServer
from tests.support.relay_process import RelayProcess, Worker

WORKERS = (*needs_of_workers("_INBOX.relay", ("_INBOX", "_R_"), (), has_events=False), *LOOKING)


def allowed(needs: Iterable[Need]) -> dict[str, Any]:
    """Permissions as a JWT has them."""
    subjects: dict[str, list[str]] = {"publish": [], "subscribe": []}
    for need in needs:
        subjects[need.verb].append(f"{need.subject} {need.queue_group}".strip())
    return {"pub": {"allow": subjects["publish"]}, "sub": {"allow": subjects["subscribe"]}}


class Secured:
    """A nats-server that trusts an operator and speaks TLS alone, and files for who may come in."""

    def __init__(self, directory: Path, new_nats_server: Callable[..., NatsServer]) -> None:
        self.directory = directory
        self.operator = Operator()
        self.authority = Authority(directory)
        files = self.authority.issue("server", "127.0.0.1")
        tls = f'tls {{ cert_file: "{files.cert}", key_file: "{files.key}", timeout: 5 }}\n'
        self.server = new_nats_server(config=tls + self.operator.config())
        self.url = self.server.url.replace("nats:", "tls:")

    def creds(self, name: str, **claims: Any) -> str:
        """A new user's file."""
        path = self.directory / f"{name}.creds"
        path.write_text(self.operator.creds(new_key(), **claims))
        path.chmod(0o600)
        return str(path)

    def settings(self, name: str, **claims: Any) -> dict[str, str]:
        """What Relay or its operator sets."""
        creds = self.creds(name, **claims)
        return {"NATS_CREDS": creds, "NATS_CA": str(self.authority.file), "NATS_INBOX_PREFIX": f"_INBOX.{name}"}

    def send(self, creds: str) -> Any:
        """A mail, as a caller sends it."""

        async def run() -> Any:
            context = ssl.create_default_context(cafile=str(self.authority.file))
            nc = await nats.connect(self.url, tls=context, user_credentials=creds, inbox_prefix="_INBOX.billing")
            reply = await nc.request(SEND_EMAIL, json.dumps(MAIL).encode(), timeout=10)
            await nc.close()
            return json.loads(reply.data)

        return asyncio.run(run())


@pytest.fixture
def secured(tmp_path: Path, new_nats_server: Callable[..., NatsServer]) -> Secured:
    """Such a server."""
    return Secured(tmp_path, new_nats_server)


def test_a_relay_with_creds_over_tls(secured: Secured, new_relay: Callable[..., RelayProcess]) -> None:
    relay = new_relay(nats_url=secured.url, **secured.settings("relay", **allowed(WORKERS)))
    relay.start()
    caller = secured.creds("billing", pub={"allow": [SEND_EMAIL]}, sub={"allow": ["_INBOX.billing.>"]})
    assert secured.send(caller)["email_id"]

    # A shell that knows the state directory alone asks with the workers' own login.
    own = dict(relay.settings)
    for name in ("NATS_URL", "NATS_CREDS", "NATS_CA", "NATS_INBOX_PREFIX"):
        del relay.settings[name]
    status = json.loads(relay.relayctl("status", "--json").stdout)
    del status["nats"]["server_version"]
    assert status["nats"] == {"url": secured.url, "connected": True, "problem": ""}
    assert status["ready"], status

    # An operator adds a login of its own, and nothing else: the URL and the CA are the relay's.
    operator = secured.settings("operator", **allowed(needs_of_operators("_INBOX.operator")))
    relay.settings |= {name: operator[name] for name in ("NATS_CREDS", "NATS_INBOX_PREFIX")}
    for arguments in (
        ("send", "--to", "user@example.com", "--subject", "Hi", "--text", "Hi"),
        ("buckets",),
        ("check",),
    ):
        done = relay.relayctl(*arguments)
        assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
    assert json.loads(relay.relayctl("status", "--json").stdout)["nats"]["connected"]

    # New credentials while it runs: read at the next connection.
    relay.settings = own
    Path(own["NATS_CREDS"]).write_text(secured.operator.creds(new_key(), **allowed(WORKERS)))
    pids = {status.name: status.pid for status in relay.supervision.statuses()}
    secured.server.stop()
    relay.wait_until_not_ready("send-1")
    secured.server.start()
    relay.wait_until_ready("send-1", other_pid_than=0, timeout_seconds=10)
    assert secured.send(caller)["email_id"]
    assert {status.name: status.pid for status in relay.supervision.statuses()} == pids, "and no process was replaced"
    for program in ("send-1", "status"):
        assert "violation" not in relay.supervision.log_path(program).read_text().lower()


def test_a_file_that_is_missing_at_start_is_exit_78(state_dir: Path, nats_server: NatsServer) -> None:
    relay = RelayProcess(state_dir, nats_server.url, 1, NATS_CREDS="/nowhere/relay.creds")
    worker = Worker("send", relay.settings)
    said = worker.output()
    assert worker.process.returncode == EXIT_CONFIG
    assert "NATS_CREDS: /nowhere/relay.creds cannot be read: No such file or directory" in said
    done = relay.relayctl("start")
    assert done.returncode == EXIT_CONFIG
    assert "/nowhere/relay.creds cannot be read" in done.stderr


def test_what_nats_refuses_is_said(secured: Secured, new_relay: Callable[..., RelayProcess]) -> None:
    """The worker waits, says why, and goes on as soon as it can."""
    settings = secured.settings("relay", expires_seconds=-60, **allowed(WORKERS))
    relay = new_relay(nats_url=secured.url, **settings)
    started = relay.relayctl("start", "--timeout", "5")
    assert started.returncode == 1
    assert "its JWT expired at" in started.stderr
    Path(settings["NATS_CREDS"]).write_text(secured.operator.creds(new_key(), **allowed(WORKERS)))
    relay.wait_until_ready("send-1", other_pid_than=0, timeout_seconds=10)
    whole = Path(settings["NATS_CREDS"]).read_text()
    os.truncate(settings["NATS_CREDS"], 0)
    done = relay.relayctl("check")
    assert done.returncode == EXIT_CONFIG
    assert "must hold a user's JWT and its seed" in done.stderr
    Path(settings["NATS_CREDS"]).write_text(whole)
