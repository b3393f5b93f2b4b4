"""What each kind of worker counts, by the names of ``catalogue``: read off its parts once a second.

Nothing here costs a mail anything: the parts count for themselves. Each function gives a ``Reading``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from relay.bus.client import Bus
from relay.bus.service import Service
from relay.ops.catalogue import ANSWERS, CLAIMS, EVENT_TYPES, OUTCOMES, REPLY_CLASSES, RESULTS, SQS_STEPS
from relay.settings import Settings

# A worker loads only the parts that it has.
if TYPE_CHECKING:
    from relay.delivery.smarthost import Smarthost
    from relay.engagement import Engagement
    from relay.histogram import Histogram
    from relay.idempotency.claims import Claims
    from relay.ops.polling import Polling
    from relay.sending import Sending
    from relay.submission.admission import Admission
    from relay.tracking.tracker import Tracker

Numbers = dict[str, float]
"""By label values, joined by commas; '' where there is no label."""


class Reading(NamedTuple):
    """What a worker has counted so far, and how things stand with it now; by metric."""

    counters: dict[str, Numbers]
    gauges: dict[str, Numbers]
    histograms: dict[str, Histogram] = {}


def send_reading(
    settings: Settings,
    sending: Sending,
    service: Service,
    gate: Admission,
    smarthost: Smarthost,
    tracker: Tracker,
    claims: Claims,
) -> Reading:
    """A send worker's."""
    pool, claimed = smarthost.figures(), claims.figures()
    outcomes = sending.counts | Counter(overloaded=service.refused, dropped=service.dropped, broken=service.broken)
    replies = dict(sending.reply_classes)
    known: Numbers = {name: replies.pop(name, 0) for name in REPLY_CLASSES}
    known["other"] += sum(replies.values())
    counters: dict[str, Numbers] = {
        "relay_requests_total": _of(outcomes, OUTCOMES),
        "relay_settled_mails_total": {"": sending.counts["settled"]},
        "relay_request_ids_total": _of(claimed, CLAIMS),
        "relay_smtp_replies_total": known,
        "relay_smtp_connections_opened_total": {"": pool["connections_opened"]},
        "relay_smtp_stale_replaced_total": {"": pool["stale_replaced"]},
        "relay_smtp_retries_total": {"": pool["retried"]},
        "relay_smtp_throttled_total": {"": pool["throttled"]},
        "relay_tracking_records_total": {"written": tracker.tracked, "lost": tracker.lost},
        "relay_tracking_unsettled_total": {"": tracker.unsettled},
    }
    gauges: dict[str, Numbers] = {
        "relay_requests_in_flight": {"": service.in_hand},
        "relay_backlog_requests": {"": gate.backlog},
        "relay_backlog_limit_requests": {"": settings.backlog_limit},
        "relay_backlog_bytes": {"": gate.backlog_bytes},
        "relay_backlog_limit_bytes": {"": settings.backlog_limit_bytes},
        "relay_request_ids_waiting": {"": claimed["waiting"]},
        "relay_request_ids_to_store": {"": claimed["to_store"]},
        "relay_request_ids_off_workers": {"": bool(claimed["off_reason"])},
        "relay_smtp_connections": _of(pool, ("idle", "busy", "dialling")),
        "relay_smtp_connections_max": {"": pool["max"]},
        "relay_smtp_connections_allowed": {"": pool["limit"]},
        "relay_smtp_pool_waiting": {"": pool["waiting"]},
        "relay_smtp_awaiting_reply": {"": pool["awaiting_dot"]},
        "relay_smtp_circuit_open_workers": {"": pool["circuit"] != "closed"},
        "relay_smtp_hosts_set_aside": {"": sum(bool(host["set_aside"]) for host in pool["hosts"])},
        "relay_smtp_rate_lowered_workers": {"": pool["rate_lowered"]},
        "relay_smtp_rate_waiting": {"": pool["rate_waiting"]},
        "relay_tracking_off_workers": {"send": bool(tracker.off_reason)},
        "relay_tracking_records_owed": {"": tracker.owed},
    }
    if pool["rate_per_second"] is not None:
        gauges["relay_smtp_recipients_per_second_allowed"] = {"": pool["rate_per_second"]}
    histograms = {
        "relay_send_duration_seconds": sending.send_seconds,
        "relay_smtp_pool_wait_seconds": smarthost.pool_wait_seconds,
        "relay_smtp_transaction_duration_seconds": smarthost.transaction_seconds,
        "relay_tracking_write_duration_seconds": tracker.write_seconds,
    }
    return Reading(counters, gauges, histograms)


def engagement_reading(engagement: Engagement, polling: Polling, pollers: int) -> Reading:
    """An engagement worker's."""
    became: Numbers = {}
    for what, count in engagement.counts.items():
        result = what.partition(":")[0].replace(" ", "_")  # "dropped: foreign", "put off"
        became[result] = became.get(result, 0) + count
    gauges: dict[str, Numbers] = {
        "relay_sqs_pollers": {"idle": polling.idle, "busy": max(0, pollers - polling.idle)},
        "relay_events_in_flight": {"": polling.in_hand},
        "relay_events_stopped_workers": {"": bool(polling.problem)},
    }
    if (backlog := polling.backlog) is not None:
        gauges["relay_sqs_queue_messages"] = {
            "waiting": backlog.waiting,
            "in_flight": backlog.in_flight,
            "delayed": backlog.delayed,
        }
    counters: dict[str, Numbers] = {
        "relay_sqs_messages_total": _of(polling.counts, SQS_STEPS),
        "relay_sqs_receive_failures_total": {"": polling.counts["receive_failures"]},
        "relay_events_total": _of(engagement.counts, EVENT_TYPES),
        "relay_notifications_total": _of(became, RESULTS),
    }
    return Reading(counters, gauges)


def status_reading(services: Sequence[Service], off_reason: str) -> Reading:
    """A status worker's."""
    answers: Numbers = {}
    for each in services:
        question = each.nats_subject.rpartition(".")[2]
        figures = (each.answered - each.broken, each.refused, each.dropped, each.broken)
        answers |= {f"{question},{result}": count for result, count in zip(ANSWERS, figures, strict=True)}
    gauges: dict[str, Numbers] = {
        "relay_questions_in_flight": {"": sum(each.in_hand for each in services)},
        "relay_tracking_off_workers": {"status": bool(off_reason)},
    }
    return Reading({"relay_questions_total": answers}, gauges)


def bus_reading(kind: str, bus: Bus) -> Reading:
    """Every worker's."""
    return Reading(
        {"relay_nats_dropped_publications_total": {kind: bus.dropped}},
        {"relay_nats_connected_workers": {kind: bus.is_connected}},
    )


def _of(counts: Mapping[str, Any], names: Sequence[str]) -> Numbers:
    return {name: counts.get(name, 0) for name in names}
