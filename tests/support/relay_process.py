"""A relay as an operator runs it: ``relayctl`` in processes of its own, against servers it did not start."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from relay.ops.catcher import Catcher, CaughtMail, caught_mails
from relay.ops.supervision import ProgramStatus, Supervision
from tests.support.nats_server import free_port

RELAYCTL = Path(sysconfig.get_path("scripts")) / "relayctl"
OURS = (
    "RELAY_",
    "SMTP_",
    "SES_",
    "NATS_",
    "TRACKING_",
    "DEFAULT_SMTP_",
    "EMAIL_",
    "LOG_",
    "SEND_",
    "DRAIN_",
    "BACKLOG_",
    "ENGAGEMENT_",
    "AWS_",
    "OBJECT_STORE_",
    "REQUEST_ID_",
    "OTEL_",
)


def clean_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """This environment without settings of Relay, and with ``settings``."""
    return {name: value for name, value in os.environ.items() if not name.startswith(OURS) and name != "PORT"} | dict(
        settings
    )


class RelayProcess:
    """One relay: its settings, its state directory, and ``relayctl`` to drive it."""

    def __init__(self, state_dir: Path, nats_url: str, smtp_port: int, **settings: str) -> None:
        self.state_dir = state_dir
        self.nats_url = nats_url
        self.http_port = free_port()
        self.settings = {
            "NATS_URL": nats_url,
            "SMTP_HOST": "127.0.0.1",
            "SMTP_PORT": str(smtp_port),
            "EMAIL_ENABLED": "true",
            "PORT": str(self.http_port),
            "RELAY_HTTP_HOST": "127.0.0.1",
            "RELAY_SEND_WORKERS": "2",
            "RELAY_STATE_DIR": str(state_dir),
            **settings,
        }
        self.supervision = Supervision(state_dir)

    def relayctl(self, *arguments: str, timeout_seconds: float = 90.0) -> subprocess.CompletedProcess[str]:
        """Runs relayctl; never raises for its exit code."""
        return subprocess.run(
            [str(RELAYCTL), *arguments],
            env=clean_environment(self.settings),
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )

    def start(self, *arguments: str) -> None:
        """Starts and expects to be ready."""
        done = self.relayctl("start", *arguments)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

    def stop(self) -> None:
        """Stops it when it runs, also without its supervisord."""
        if self.supervision.is_running() or self.supervision.orphans():
            done = self.relayctl("stop")
            assert done.returncode == 0, done.stderr

    def program(self, name: str) -> ProgramStatus:
        """One program's status."""
        return next(status for status in self.supervision.statuses() if status.name == name)

    def wait_until_ready(self, name: str, *, other_pid_than: int, timeout_seconds: float) -> float:
        """Seconds until the program is ready as another process."""
        begun = time.monotonic()
        while time.monotonic() - begun < timeout_seconds:
            status = self.program(name)
            if status.is_ready and status.pid != other_pid_than:
                return time.monotonic() - begun
            time.sleep(0.02)
        raise TimeoutError(f"{name} is not back within {timeout_seconds:g} s: {self.program(name)}")

    def wait_until_not_ready(self, name: str, timeout_seconds: float = 10.0) -> None:
        """The program has noticed that it lacks something."""
        ends_at = time.monotonic() + timeout_seconds
        while self.program(name).is_ready:
            assert time.monotonic() < ends_at, f"{name} has noticed nothing"
            time.sleep(0.02)

    def log(self, program: str) -> list[dict[str, Any]]:
        """A program's log, parsed; what is no JSON is left out."""
        lines = []
        for line in self.supervision.log_path(program).read_bytes().splitlines():
            try:
                lines.append(orjson.loads(line))
            except orjson.JSONDecodeError:
                continue
        return lines


class Worker:
    """One worker process without a supervisor, for tests of its life and exit codes."""

    def __init__(self, module: str, settings: Mapping[str, str]) -> None:
        self.state_dir = Path(settings["RELAY_STATE_DIR"])
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"workers.{module}"],
            env=clean_environment(settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(__file__).parents[2],
        )

    def output(self, timeout_seconds: float = 20.0) -> str:
        """What it printed until it ended."""
        return self.process.communicate(timeout=timeout_seconds)[0]

    def end(self) -> None:
        """Ends it if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=10)


class CatchingServer:
    """An SMTP server of the test's own that keeps what it gets."""

    def __init__(self, directory: Path, port: int = 0) -> None:
        self.port = port or free_port()
        self._directory = directory
        self._catcher = Catcher(directory, self.port)
        self._catcher.start()

    def count(self) -> int:
        """How many mails it got in all; it keeps only the newest 1,000."""
        return max((mail.number for mail in self.mails()), default=0)

    def mails(self) -> list[CaughtMail]:
        """What it got, oldest first."""
        return list(caught_mails(self._directory))

    def stop(self) -> None:
        """Stops listening."""
        self._catcher.stop()
