"""Send workers that a test may kill, and what they talk to: processes and threads of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import gevent

from relay.ops.presence import read_presence
from tests.support.relay_process import RelayProcess, Worker
from tests.support.scripted_smtp import Action, ReceivedMail, Script, ScriptedSmtp, stall

READY_SECONDS = 20.0
REACHED_SECONDS = 15.0


class SmtpThread:
    """A scripted SMTP server in a thread of its own: the test's waits for processes."""

    def __init__(self, script: Script | None = None) -> None:
        self._script = script or {}
        self._is_over = False
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        assert self._started.wait(10)

    def _serve(self) -> None:
        with ScriptedSmtp(self._script, extensions=("ENHANCEDSTATUSCODES",)) as self.server:
            self._started.set()
            while not self._is_over:
                gevent.sleep(0.02)

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def mails(self) -> list[ReceivedMail]:
        """Those whose final dot came."""
        return self.server.mails

    def stop(self) -> None:
        self._is_over = True
        self._thread.join(10)
        assert not self._thread.is_alive()


class Moment:
    """A point that a request reaches."""

    def __init__(self) -> None:
        self._reached = threading.Event()

    def reach(self) -> None:
        self._reached.set()

    def wait(self) -> None:
        assert self._reached.wait(REACHED_SECONDS), "the request does not get there"

    def then_stall(self) -> Action:
        """For a script: there it stays."""
        self.reach()
        return stall()


class Workers:
    """Send workers without a supervisor, each with its state directory."""

    def __init__(self) -> None:
        self._made: list[tuple[Worker, Path]] = []

    def start(self, nats_url: str, smtp_port: int, module: str = "send", **settings: str) -> Worker:
        """One that is ready."""
        directory = Path(tempfile.mkdtemp(prefix="relay-t-"))
        worker = Worker(module, RelayProcess(directory, nats_url, smtp_port, **settings).settings)
        self._made.append((worker, directory))
        deadline = time.monotonic() + READY_SECONDS
        while (report := read_presence(directory, module, worker.process.pid)) is None or report.reason:
            assert time.monotonic() < deadline, report
            assert worker.process.poll() is None, worker.output()
            time.sleep(0.02)
        return worker

    def stop(self) -> None:
        for worker, directory in self._made:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.process.pid, signal.SIGCONT)
            worker.end()
            shutil.rmtree(directory, ignore_errors=True)


def kill(worker: Worker) -> None:
    """As nobody expects it."""
    worker.process.kill()
    worker.process.wait(10)
