"""A stand-in for Amazon's SES API v2: it says what it is told to, in the shapes of Amazon's reference."""

from __future__ import annotations

import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import orjson

HEALTHY: dict[str, Any] = {
    "EnforcementStatus": "HEALTHY",
    "ProductionAccessEnabled": True,
    "SendingEnabled": True,
    "SendQuota": {"Max24HourSend": 50_000.0, "MaxSendRate": 14.0, "SentLast24Hours": 100.0},
}
TO_SNS: dict[str, Any] = {
    "Name": "to-sns",
    "Enabled": True,
    "MatchingEventTypes": ["SEND", "DELIVERY", "BOUNCE", "COMPLAINT", "OPEN"],
    "SnsDestination": {"TopicArn": "arn:aws:sns:us-east-1:123456789012:events"},
}


class SesV2:
    """``answers`` by path below ``/v2/email/``: an object, or a pair of status and Amazon's error type."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {
            "account": HEALTHY,
            "identities/example.com": {"VerifiedForSendingStatus": True},
            "configuration-sets/relay": {"ConfigurationSetName": "relay", "SendingOptions": {"SendingEnabled": True}},
            "configuration-sets/relay/event-destinations": {"EventDestinations": [TO_SNS]},
        }
        self.asked: list[tuple[str, str]] = []
        """Method and path of each request."""
        self.clock_ahead_seconds = 0.0
        self.hangs = threading.Event()
        self.hangs.set()
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                double._answer(self)

            def log_message(self, *_: object) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        self.asked.append((request.command, request.path))
        self.hangs.wait(30)
        answer = self.answers.get(
            request.path.removeprefix("/v2/email/").replace("%40", "@"), (404, "NotFoundException")
        )
        status, body = 200, answer
        if isinstance(answer, tuple):
            status, body = answer[0], {"message": f"a test says {answer[1]}"}
        octets = orjson.dumps(body)
        request.send_response_only(status)
        request.send_header("Date", formatdate(time.time() + self.clock_ahead_seconds, usegmt=True))
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(octets)))
        if isinstance(answer, tuple):
            request.send_header("x-amzn-ErrorType", answer[1])
        request.end_headers()
        request.wfile.write(octets)

    def stop(self) -> None:
        """Ends the server and its thread."""
        self.hangs.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)
