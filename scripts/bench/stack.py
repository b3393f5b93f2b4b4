"""What is measured, as processes on loopback: nats-server, Postfix's smtp-sink, the send workers; and smtp-source."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from machine import free_port, wait_for_port

from relay.ops.devstack import nats_server_binary

ROOT = Path(__file__).parents[2]
OURS = ("RELAY_", "SMTP_", "SES_", "NATS_", "TRACKING_", "DEFAULT_SMTP_", "LOG_", "SEND_", "BACKLOG_")
PEERS = Path(__file__).with_name("peers")
CONNECTIONS = 20
"""Of smtp-source and of the SMTP layer alone."""
SINK_CONNECTIONS = 1000
READY_SECONDS = 60.0
RUN_SECONDS = 120.0
COUNT_SECONDS = 5.0
_COUNTED = re.compile(rb"mesg=(\d+)")


def find(program: str) -> str:
    """A Postfix tool; ``SystemExit`` when it is not installed."""
    found = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin")
    if found is None:
        raise SystemExit(f"{program} is missing: install Postfix (Debian: apt-get install postfix)")
    return found


def end(processes: Sequence[subprocess.Popen[Any]], timeout_seconds: float = 30.0) -> None:
    """Ends processes, the last first, and waits for all of them together."""
    for process in reversed(processes):
        process.terminate()
    deadline = time.monotonic() + timeout_seconds
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


class Sink:
    """An ``smtp-sink`` that counts."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.port = free_port()
        self._counts = directory / f"sink-{self.port}"
        command = [find("smtp-sink"), "-c", "-m", str(SINK_CONNECTIONS), *options]
        if os.geteuid() == 0:
            command += ["-u", "postfix"]
        with self._counts.open("wb") as out:
            self.process = subprocess.Popen([*command, f"127.0.0.1:{self.port}", "1000"], stdout=out)
        wait_for_port(self.port)

    def mails(self) -> int:
        """How many mails it has taken so far."""
        with self._counts.open("rb") as counts:
            counts.seek(max(0, self._counts.stat().st_size - 200))
            found = _COUNTED.findall(counts.read())
        return int(found[-1]) if found else 0

    def wait_for(self, expected: int) -> int:
        """How many it has taken, as soon as they are ``expected``, else after a while."""
        until = time.monotonic() + COUNT_SECONDS
        while (taken := self.mails()) < expected and time.monotonic() < until:
            time.sleep(0.01)
        return taken

    def check(self, expected: int, who: str) -> None:
        """``SystemExit`` when it did not take exactly so many mails."""
        if (taken := self.wait_for(expected)) != expected:
            raise SystemExit(f"{who} handed over {expected} mails and {taken} arrived: the rate says nothing")


class Rate(NamedTuple):
    """What a client of the sink did."""

    mails: int
    seconds: float

    @property
    def mails_per_second(self) -> float:
        return self.mails / self.seconds


def smtp_source(sink: Sink, size_bytes: int, mails: int) -> Rate:
    """Postfix's ``smtp-source`` over persistent connections."""
    command = [find("smtp-source"), "-d", "-s", str(CONNECTIONS), "-l", str(size_bytes), "-m", str(mails)]
    command += ["-f", "a@example.com", "-t", "b@example.com", f"127.0.0.1:{sink.port}"]
    before, begun = sink.mails(), time.perf_counter()
    subprocess.run(command, check=True, timeout=RUN_SECONDS)
    seconds = time.perf_counter() - begun
    sink.check(before + mails, "smtp-source")
    return Rate(mails, seconds)


def smtp_layer(sink: Sink, size_bytes: int, mails: int) -> Rate:
    """Relay's SMTP layer alone, in one process, over as many connections."""
    command = [sys.executable, str(PEERS / "ours.py"), "--port", str(sink.port), "--mails", str(mails)]
    command += ["--connections", str(CONNECTIONS), "--size", str(size_bytes)]
    before = sink.mails()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=RUN_SECONDS, cwd=ROOT)
    sink.check(before + mails, "Relay's SMTP layer")
    return Rate(mails, json.loads(done.stdout)["seconds"])


def bare_transactions(sink: Sink, size_bytes: int, count: int) -> list[float]:
    """Seconds of each of so many SMTP transactions by nothing but a socket, one after another, pipelined."""
    commands = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n"
    content = (b"%b\r\n" % (b"x" * 68)) * (size_bytes // 70) + b".\r\n"
    taken = []
    with socket.create_connection(("127.0.0.1", sink.port), 10) as sock, sock.makefile("rb") as replies:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def expect(*codes: bytes) -> None:
            for code in codes:
                line = replies.readline()
                while line[3:4] == b"-":
                    line = replies.readline()
                if not line.startswith(code):
                    raise SystemExit(f"the sink said {line!r} instead of {code!r}")

        expect(b"220")
        sock.sendall(b"EHLO bench.example.com\r\n")
        expect(b"250")
        for _ in range(count):
            begun = time.perf_counter()
            sock.sendall(commands)
            expect(b"250", b"250", b"354")
            sock.sendall(content)
            expect(b"250")
            taken.append(time.perf_counter() - begun)
        sock.sendall(b"QUIT\r\n")
        expect(b"221")
    return taken


class Stack:
    """A nats-server and send workers that hand their mails to a sink; each is ended by pid."""

    def __init__(
        self,
        directory: Path,
        sink: Sink,
        *,
        workers: int = 2,
        tracked: bool = True,
        settings: Mapping[str, str] | None = None,
        worker_command: Sequence[str] = ("-m", "workers.send"),
    ) -> None:
        """Starts everything; ``wait_ready`` returns when it can be used."""
        directory.mkdir(parents=True)
        self._directory = directory
        self._log = (directory / "log").open("ab")
        self._processes: list[subprocess.Popen[bytes]] = []
        port = free_port()
        config = directory / "nats.conf"
        jetstream = f'jetstream {{ store_dir: "{directory}/js" }}' if tracked else ""
        config.write_text(f"listen: 127.0.0.1:{port}\n{jetstream}\n")
        self.url = f"nats://127.0.0.1:{port}"
        self.nats = self._start([nats_server_binary(), "-c", str(config)])
        try:
            wait_for_port(port)
            environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)} | {
                "NATS_URL": self.url,
                "SMTP_HOST": "127.0.0.1",
                "SMTP_PORT": str(sink.port),
                "EMAIL_ENABLED": "true",
                "RELAY_STATE_DIR": str(directory),
            }
            self._names = [f"send-{number + 1}" for number in range(workers)]
            self.workers = [
                self._start([sys.executable, *worker_command, name], environment | dict(settings or {}))
                for name in self._names
            ]
        except BaseException:
            self.stop()
            raise

    def wait_ready(self) -> None:
        """Returns when every worker serves; ``SystemExit`` when one does not."""
        deadline = time.monotonic() + READY_SECONDS
        while not all(b'"ready"' in _read(self._directory / "run" / f"{name}.json") for name in self._names):
            if time.monotonic() > deadline or any(worker.poll() is not None for worker in self.workers):
                said = _read(self._directory / "log").decode(errors="replace")[-2000:]
                raise SystemExit(f"the workers are not ready:\n{said}")
            time.sleep(0.05)

    @property
    def pids(self) -> list[int]:
        """Of everything that was started."""
        return [process.pid for process in self._processes]

    def _start(self, command: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env=environment, cwd=ROOT)
        self._processes.append(process)
        return process

    def stop(self) -> None:
        """Ends everything that was started, and waits."""
        end(self._processes)
        self._log.close()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
