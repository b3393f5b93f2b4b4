"""This process as a NATS micro service (ADR-32): answers ``$SRV.PING``, ``INFO`` and ``STATS``.

``nats micro ls`` and ``nats micro stats`` see every worker, and so does ``relayctl status``: the figures travel over
NATS, in the ``data`` of the first endpoint's stats. nats-py's own implementation is not used: it answers with
``msg.respond``, which echoes the caller's headers.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from relay.bus.client import Bus, Msg, Publication
from relay.bus.messages import ReplyRule
from relay.bus.service import Service

NAME: Final = "email-service"
VERBS: Final = ("PING", "INFO", "STATS")
NO_ENDPOINT: Final[dict[str, Any]] = {
    "name": "none",
    "subject": "",
    "queue_group": "",
    **dict.fromkeys(("num_requests", "num_errors", "processing_time", "average_processing_time"), 0),
    "last_error": "",
}
"""The stats of a worker that serves no subject: its figures have to stand somewhere."""


class MicroService:
    """Answers for the subjects that a worker serves, if any. ``figures()`` gives the worker's own numbers."""

    def __init__(
        self,
        bus: Bus,
        *,
        version: str,
        program: str,
        metadata: dict[str, str],
        endpoints: Sequence[Service],
        figures: Callable[[], dict[str, Any]],
        reply_prefixes: tuple[str, ...],
    ) -> None:
        self._bus = bus
        self._identity = {
            "name": NAME,
            "id": secrets.token_hex(11),
            "version": version,
            "metadata": {"program": program, **metadata},
        }
        self._endpoints = endpoints
        self._figures = figures
        self._reply_rule = ReplyRule(reply_prefixes, bus.inbox_prefix)
        self._started = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")

    def start(self) -> None:
        """Subscribes to every form of each verb: all services, those of our name, this one."""
        answers = {"PING": self._ping, "INFO": self._info, "STATS": self._stats}
        for verb in VERBS:
            for suffix in ("", f".{NAME}", f".{NAME}.{self._identity['id']}"):
                self._bus.subscribe(f"$SRV.{verb}{suffix}", "", self._answering(answers[verb]))

    def _answering(self, answer: Callable[[], dict[str, Any]]) -> Callable[[Msg], None]:
        def on_msg(msg: Msg) -> None:
            if self._reply_rule.allows(msg.reply_subject):
                payload = orjson.dumps(self._identity | answer(), default=str)
                self._bus.publish(Publication(msg.reply_subject, payload))

        return on_msg

    def _ping(self) -> dict[str, Any]:
        return {"type": "io.nats.micro.v1.ping_response"}

    def _info(self) -> dict[str, Any]:
        return {
            "type": "io.nats.micro.v1.info_response",
            "description": "Transactional e-mail relay",
            "endpoints": [_endpoint(each) | {"metadata": {}} for each in self._endpoints],
        }

    def _stats(self) -> dict[str, Any]:
        endpoints = [_endpoint(each) | each.stats() for each in self._endpoints] or [dict(NO_ENDPOINT)]
        endpoints[0]["data"] = self._figures()
        return {"type": "io.nats.micro.v1.stats_response", "started": self._started, "endpoints": endpoints}


def _endpoint(service: Service) -> dict[str, Any]:
    return {
        "name": service.nats_subject.rpartition(".")[2],
        "subject": service.nats_subject,
        "queue_group": service.queue_group,
    }
