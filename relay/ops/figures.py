"""A worker's figures as they travel over NATS: what ``relayctl status`` shows of it.

Owns the shape (``docs/cli.md`` documents it; a schema test holds it). The numbers are the parts' own.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from relay import __version__
from relay.bus.micro import MicroService
from relay.bus.service import Gate, Service
from relay.ops.catalogue import CLAIMS, SQS_STEPS
from relay.ops.process import Context
from relay.ops.readings import engagement_reading, send_reading, status_reading

# A worker loads only the parts that it has: another's cost it time to start, and memory (boto3: 20 MB).
if TYPE_CHECKING:
    from relay.delivery.smarthost import Smarthost
    from relay.engagement import Engagement
    from relay.idempotency.claims import Claims
    from relay.ops.polling import Polling
    from relay.sending import Sending
    from relay.submission.admission import Admission
    from relay.tracking.tracker import Tracker

POLLED = (*SQS_STEPS, "receive_failures")
OUTCOMES = ("relayed", "failed", "deferred", "in_doubt", "settled", "refused", "not_sent")


def send_service(
    context: Context,
    sending: Sending,
    service: Service,
    gate: Admission,
    smarthost: Smarthost,
    tracker: Tracker,
    claims: Claims,
) -> MicroService:
    """A send worker as a NATS micro service, not started; from now on its file tells what it counts, too."""
    parts = (sending, service, gate, smarthost, tracker, claims)
    context.measuring.add(lambda: send_reading(context.settings, *parts))
    return micro_service(context, [service], lambda: send_figures(*parts))


def engagement_service(context: Context, engagement: Engagement, polling: Polling) -> MicroService:
    """The same of an engagement worker."""
    parts = (engagement, polling, context.settings.engagement_pollers)
    context.measuring.add(lambda: engagement_reading(*parts))
    return micro_service(context, [], lambda: engagement_figures(*parts))


def status_service(context: Context, services: Sequence[Service], off_reason: Callable[[], str]) -> MicroService:
    """The same of a status worker."""
    context.measuring.add(lambda: status_reading(services, off_reason()))
    return micro_service(context, services, lambda: status_figures(services, off_reason()))


def micro_service(
    context: Context, endpoints: Sequence[Service], figures: Callable[[], dict[str, Any]]
) -> MicroService:
    """This worker as a NATS micro service. Not started."""
    return MicroService(
        context.bus,
        version=__version__,
        program=context.program,
        metadata={"host": platform.node(), "pid": str(os.getpid())},
        endpoints=endpoints,
        figures=lambda: {**_process(context), **figures()},
        reply_prefixes=context.settings.relay_reply_prefixes,
    )


def _process(context: Context) -> dict[str, Any]:
    return {
        "program": context.program,
        "pid": os.getpid(),
        "host": platform.node(),
        "stage": context.presence.stage.value,
        "nats_server": context.bus.server_version,
    }


def send_figures(
    sending: Sending, service: Service, gate: Gate, smarthost: Smarthost, tracker: Tracker, claims: Claims
) -> dict[str, Any]:
    """A send worker's own: what it holds, what became of its mails, its pool, its circuit, its tracking."""
    pool = dict(smarthost.figures())
    circuit = {"state": pool.pop("circuit"), "reason": pool.pop("circuit_reason")}
    return {
        "in_flight": service.in_hand,
        "backlog": max(0, gate.backlog - int(pool["busy"])),
        **{outcome: sending.counts[outcome] for outcome in OUTCOMES},
        "overloaded": service.refused,
        "dropped": service.dropped,
        "last_error": sending.last_error,
        "pool": pool,
        "circuit": circuit,
        "tracking": {
            "off_reason": tracker.off_reason,
            "tracked": tracker.tracked,
            "lost": tracker.lost,
            "owed": tracker.owed,
            "unsettled": tracker.unsettled,
        },
        "request_ids": dict.fromkeys(CLAIMS, 0) | claims.figures(),
    }


def engagement_figures(engagement: Engagement, polling: Polling, pollers: int) -> dict[str, Any]:
    """An engagement worker's own: what it holds, what became of events, its pollers, the queue as last seen."""
    backlog = polling.backlog
    return {
        "in_flight": polling.in_hand,
        **{name: polling.counts[name] for name in POLLED},
        "events": dict(sorted(engagement.counts.items())),
        "last_error": polling.last_error,
        "pollers": {"idle": polling.idle, "max": pollers},
        "queue": {
            "problem": polling.problem,
            "waiting": None if backlog is None else backlog.waiting,
            "in_flight": None if backlog is None else backlog.in_flight,
            "delayed": None if backlog is None else backlog.delayed,
        },
    }


def status_figures(services: Sequence[Service], off_reason: str) -> dict[str, Any]:
    """A status worker's own."""
    return {
        "in_flight": sum(each.in_hand for each in services),
        "answered": sum(each.answered for each in services),
        "overloaded": sum(each.refused for each in services),
        "dropped": sum(each.dropped for each in services),
        "last_error": next((each.last_error for each in services if each.last_error), ""),
        "tracking": {"off_reason": off_reason},
    }
