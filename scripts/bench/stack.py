"""What is measured, as processes on loopback: nats-server, Postfix's smtp-sink, the send workers; and smtp-source."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from relay.ops.devstack import nats_server_binary

ROOT = Path(__file__).parents[2]
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
OURS = ("RELAY_", "SMTP_", "SES_", "NATS_", "TRACKING_", "DEFAULT_SMTP_", "LOG_", "SEND_", "BACKLOG_")


def cpu_seconds(pid: int) -> float:
    """CPU that a process has used so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


def resident_mb(pid: int) -> float:
    """Memory that a process holds now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def free_port() -> int:
    """A TCP port on loopback that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, timeout_seconds: float = 10.0) -> None:
    """Returns when something listens there; ``SystemExit`` when nothing does."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise SystemExit(f"nothing listens on 127.0.0.1:{port}")


def smtp_source_rate(port: int, size_bytes: int, mails: int) -> float:
    """Mails a second of Postfix's smtp-source over 20 persistent connections."""
    command = [find("smtp-source"), "-d", "-s", "20", "-l", str(size_bytes), "-m", str(mails)]
    command += ["-f", "a@example.com", "-t", "b@example.com", f"127.0.0.1:{port}"]
    begun = time.perf_counter()
    subprocess.run(command, check=True, timeout=300)
    return mails / (time.perf_counter() - begun)


def find(program: str) -> str:
    """A Postfix tool; ``SystemExit`` when it is not installed."""
    found = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin")
    if found is None:
        raise SystemExit(f"{program} is missing: install Postfix (Debian: apt-get install postfix)")
    return found


class Stack:
    """nats-server, smtp-sink and the workers, each ended by pid."""

    def __init__(self, directory: Path) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self._directory = directory
        self._log = (directory / "log").open("ab")

    def start(self, workers: int, tracked: bool) -> None:
        """Starts everything and returns when the workers are ready; ``SystemExit`` when they are not."""
        directory = self._directory
        self.nats_port, self.smtp_port = free_port(), free_port()
        config = directory / "nats.conf"
        jetstream = f'jetstream {{ store_dir: "{directory}/js" }}' if tracked else ""
        config.write_text(f"listen: 127.0.0.1:{self.nats_port}\n{jetstream}\n")
        sink = [find("smtp-sink")]
        if os.geteuid() == 0:
            sink += ["-u", "postfix"]
        self.nats = self._start([nats_server_binary(), "-c", str(config)])
        self.sink = self._start([*sink, f"127.0.0.1:{self.smtp_port}", "1000"])
        wait_for_port(self.nats_port)
        wait_for_port(self.smtp_port)
        self.url = f"nats://127.0.0.1:{self.nats_port}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)} | {
            "NATS_URL": self.url,
            "SMTP_HOST": "127.0.0.1",
            "SMTP_PORT": str(self.smtp_port),
            "EMAIL_ENABLED": "true",
            "RELAY_STATE_DIR": str(directory),
        }
        names = [f"send-{number + 1}" for number in range(workers)]
        self.workers = [self._start([sys.executable, "-m", "workers.send", name], environment) for name in names]
        deadline = time.monotonic() + 30
        while not all(b'"ready"' in _read(directory / "run" / f"{name}.json") for name in names):
            if time.monotonic() > deadline:
                raise SystemExit(
                    f"the workers are not ready:\n{_read(directory / 'log').decode(errors='replace')[-2000:]}"
                )
            time.sleep(0.05)

    def _start(self, command: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env=environment, cwd=ROOT)
        self.processes.append(process)
        return process

    def stop(self) -> None:
        """Ends everything that was started, and waits."""
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        self._log.close()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
