"""moto's server, fit for a queue of thousands: safe while it is written to and read at once, and not a hundred times
slower than with ten messages.

    python -m scripts.drills.moto PORT

moto puts a message into a queue under a lock, and deletes by making the list of messages anew without it, so that
what is put meanwhile is lost: a queue that loses messages proves nothing about who reads it. And for each message that
comes or goes it looks through all of them, mostly for the time.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.support.moto_server import MotoServer
from tests.support.nats_server import free_port, wait_for_port

START_SECONDS = 30.0


class SteadyMoto(MotoServer):
    """moto's server as this module runs it, from the outside."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        with (directory / "moto.log").open("wb") as log:
            command = [sys.executable, "-W", "ignore", "-m", "scripts.drills.moto", str(self.port)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=Path(__file__).parents[2])
        wait_for_port(self.port, START_SECONDS)


def main() -> None:
    """Serves until it is ended."""
    models: Any = importlib.import_module("moto.sqs.models")
    delete = models.Queue.delete_message

    def delete_alone(queue: Any, receipt_handle: str) -> None:
        with queue._messages_lock:
            delete(queue, receipt_handle)

    models.Queue.delete_message = delete_alone
    # Whether a message is too old it asks of each that is received; theirs are minutes old.
    models.SQSBackend.is_message_valid_based_on_retention_period = lambda *_: True
    # Its own takes a detour by a datetime.
    models.unix_time_millis = lambda: time.time() * 1000
    importlib.import_module("moto.server").main(["-H", "127.0.0.1", "-p", sys.argv[1]])


if __name__ == "__main__":
    main()
