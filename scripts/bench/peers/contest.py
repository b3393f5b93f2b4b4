"""What all contestants of ``smtp.py`` have in common: the options, the mail, and what they print.

Each is a process of its own, is given ``--port``, ``--mails`` and ``--connections`` and prints one JSON object:
``seconds`` and ``cpu_seconds`` from before the first connection until the last mail's outcome, and ``relayed``, the
mails that the server took. Starting the interpreter and importing are not counted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import NamedTuple

REVERSE_PATH = "a@example.com"
FORWARD_PATH = "b@example.com"
MAIL_SECONDS = 60.0
"""How long one mail may take: far more than any does."""


class Task(NamedTuple):
    """What a contestant has to do."""

    port: int
    mails: int
    connections: int
    content: bytes


def content_of(size_bytes: int) -> bytes:
    """A composed mail of exactly so many bytes, with CRLF line ends."""
    head = (
        f"From: <{REVERSE_PATH}>\r\nTo: <{FORWARD_PATH}>\r\nSubject: A mail of the benchmark\r\n"
        "Date: Sun, 22 Nov 2026 02:26:59 +0000\r\nMessage-ID: <bench@example.com>\r\n"
        "MIME-Version: 1.0\r\nContent-Type: text/plain; charset=us-ascii\r\n\r\n"
    ).encode()
    line = b"All work and no play makes a dull mail, and this is one of its lines.\r\n"
    body = line * (size_bytes // len(line) + 1)
    return head + body[: size_bytes - len(head) - 2].rstrip(b"\r") + b"\r\n"


def run(description: str, contestant: Callable[[Task], int]) -> None:
    """Parses options, lets ``contestant`` send (it returns how many were taken), prints."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--mails", type=int, required=True)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--size", type=int, required=True, help="bytes of the content")
    options = parser.parse_args()
    task = Task(options.port, options.mails, options.connections, content_of(options.size))
    begun, cpu_begun = time.perf_counter(), time.process_time()
    relayed = contestant(task)
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu_begun
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "relayed": relayed}))
