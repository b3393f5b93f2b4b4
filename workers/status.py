"""The status worker: answers questions about mails and groups. The first of them serves the health page on PORT."""

from gevent import monkey

monkey.patch_all()

import time
from typing import Any

import gevent

from relay import contract
from relay.bus.jetstream import JetStream
from relay.ops.figures import status_service
from relay.ops.health import HealthServer
from relay.ops.metrics import Metrics
from relay.ops.parts import service
from relay.ops.process import Context, run
from relay.ops.waiting import serve_when_tracked
from relay.reporting import Reporting, status_gate, status_handler

HEALTH_PROGRAM = "status"


class StatusWorker:
    """Serves the health page at once, the questions as soon as there is a bucket and a log."""

    def __init__(self, context: Context) -> None:
        settings = context.settings
        self._context = context
        self._jetstream = JetStream(context.bus)
        self._off_reason = "not connected yet"
        self._serving = gevent.Greenlet()
        reporting = Reporting(self._jetstream, lambda: context.bus.max_payload_bytes)
        gate = status_gate(settings.backlog_limit, settings.backlog_limit_bytes)
        answers = {
            contract.GET_EMAIL_STATUS: reporting.status,
            contract.GET_EMAIL_ENGAGEMENT_ANALYTICS: reporting.analytics,
        }
        self._services = [
            service(context, nats_subject, status_handler(answer), gate) for nats_subject, answer in answers.items()
        ]
        self._micro_service = status_service(context, self._services, lambda: self._off_reason)
        self._health: HealthServer | None = None
        if context.program == HEALTH_PROGRAM:
            page = Metrics(settings.relay_state_dir).page
            self._health = HealthServer(settings.relay_http_host, settings.port, self._readiness, page)
            self._health.start()

    def start(self) -> None:
        self._micro_service.start()
        self._serving = serve_when_tracked(self._context, self._services, self._jetstream, self._say)

    def _say(self, why_off: str) -> None:
        self._off_reason = why_off
        self._context.presence.note(
            "tracking", f"status and analytics cannot be answered: {why_off}" if why_off else ""
        )

    def _readiness(self) -> tuple[bool, dict[str, Any]]:
        bus = self._context.bus
        facts: dict[str, Any] = {"nats": "connected" if bus.is_connected else bus.last_error}
        facts["tracking"] = self._off_reason or self._jetstream.server_problem or "on"
        return bus.is_connected, facts

    def stop_taking(self, timeout_seconds: float) -> None:
        self._serving.kill(timeout=timeout_seconds / 4)
        for each in self._services:
            each.stop(timeout_seconds / 4)

    def finish(self, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        for each in self._services:
            each.wait_answered(max(0.0, deadline - time.monotonic()))
        if self._health is not None:
            self._health.stop()


if __name__ == "__main__":
    run("status", StatusWorker)
