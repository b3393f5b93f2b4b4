"""A real nats-server for tests: its own port, its own store, ended by pid."""

from __future__ import annotations

import socket
import subprocess
import sysconfig
import time
from pathlib import Path

BINARY = Path(sysconfig.get_path("scripts")) / "nats-server"


def free_port() -> int:
    """A TCP port on loopback that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, timeout_seconds: float = 10.0) -> None:
    """Returns when something listens on the port of 127.0.0.1; ``TimeoutError`` when nothing does."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise TimeoutError(f"nothing listens on 127.0.0.1:{port}")


class NatsServer:
    """One nats-server process. ``stop`` and ``start`` keep port and store, so clients see a restart."""

    def __init__(self, store: Path, *, jetstream: bool = True, config: str = "", max_file_store: str = "1GB") -> None:
        self.port = free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        self._store = store
        self._config = store / "nats.conf"
        store.mkdir(parents=True, exist_ok=True)
        lines = [f"listen: 127.0.0.1:{self.port}", config]
        if jetstream:
            lines.append(f'jetstream {{ store_dir: "{store / "jetstream"}", max_file_store: {max_file_store} }}')
        self._config.write_text("\n".join(lines) + "\n")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> NatsServer:
        """Starts the server and returns when it listens."""
        with (self._store / "nats.log").open("ab") as log:
            self.process = subprocess.Popen([str(BINARY), "-c", str(self._config)], stdout=log, stderr=log)
        wait_for_port(self.port)
        return self

    def stop(self) -> None:
        """Ends the server and waits for it."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        self.process = None

    def kill(self) -> None:
        """Ends the server as a crash does: nothing is written out, nobody is told."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
        self.process = None
