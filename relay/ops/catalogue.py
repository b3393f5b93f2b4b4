"""Every metric that ``/metrics`` shows: its name, type, labels with their values, and what it tells. Pure.

Names keep Prometheus's rules (https://prometheus.io/docs/practices/naming/): ``relay_``, base units, counters end in
``_total``. Label values are only those listed here, and the names of programs: whatever stands in a worker's file, the
number of series is bounded. ``docs/metrics.md`` shows this table; a test holds the two together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple


class Type(StrEnum):
    """Prometheus's types, as far as they are used here."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Merge(StrEnum):
    """What becomes of the figures that several workers tell."""

    SUM = "sum"
    """Added up; 0 where nobody tells any."""
    SUM_OF_TOLD = "sum of those told"
    """Added up; no series where nobody tells any."""
    MOST = "most"
    """The largest: all of them look at the same thing. No series where nobody tells any."""


class Metric(NamedTuple):
    """One metric."""

    name: str
    type: Type
    help: str
    labels: tuple[str, ...] = ()
    values: tuple[tuple[str, ...], ...] = ()
    """Of each label. Empty with the label ``program``, whose values are the names of programs."""
    merge: Merge = Merge.SUM

    def series(self) -> Iterator[tuple[str, ...]]:
        """The label values of every series that it can have, but for those by program."""
        return itertools.product(*self.values)


KINDS = ("send", "status", "engagement")
STAGES = ("ready", "waiting", "draining", "silent")
OUTCOMES = (
    "relayed",
    "failed",
    "deferred",
    "in_doubt",
    "refused",
    "not_sent",
    "overloaded",
    "dropped",
    "broken",
)
REPLY_CLASSES = ("2xx", "4xx", "5xx", "other", "none")
CLAIMS = (
    "claimed",
    "taken_over",
    "repeated",
    "payload_differs",
    "in_progress",
    "unavailable",
    "overloaded",
    "uncommitted",
    "unsettled",
    "lost",
)
QUESTIONS = ("get_email_status", "get_email_engagement_analytics")
ANSWERS = ("answered", "overloaded", "dropped", "broken")
SQS_STEPS = ("received", "deleted", "undeleted", "left", "extended", "broken")
EVENT_TYPES = (
    "Send",
    "Delivery",
    "Bounce",
    "Complaint",
    "Reject",
    "Open",
    "Click",
    "Rendering Failure",
    "DeliveryDelay",
    "Subscription",
)
RESULTS = (
    "folded",
    "repeated",
    "rebuilt",
    "unknown",
    "dropped",
    "parked",
    "early",
    "put_off",
    "conflict",
    "late",
    "refused",
)

_COUNTER, _GAUGE, _HISTOGRAM = Type.COUNTER, Type.GAUGE, Type.HISTOGRAM

COUNTED: tuple[Metric, ...] = (
    # -- mail ------------------------------------------------------------------------------
    Metric(
        "relay_requests_total",
        _COUNTER,
        "Send requests by what became of them; one that becomes several mails counts once for each.",
        ("outcome",),
        (OUTCOMES,),
    ),
    Metric(
        "relay_settled_mails_total",
        _COUNTER,
        "Mails in doubt of which the smarthost told later what became of them.",
    ),
    Metric(
        "relay_send_duration_seconds",
        _HISTOGRAM,
        "From a send request that is attempted to its reply.",
    ),
    Metric("relay_requests_in_flight", _GAUGE, "Send requests that were taken and are not answered yet."),
    Metric("relay_backlog_requests", _GAUGE, "What counts against BACKLOG_LIMIT: send requests in hand."),
    Metric("relay_backlog_limit_requests", _GAUGE, "BACKLOG_LIMIT, of all send workers together."),
    Metric("relay_backlog_bytes", _GAUGE, "What counts against BACKLOG_LIMIT_BYTES."),
    Metric("relay_backlog_limit_bytes", _GAUGE, "BACKLOG_LIMIT_BYTES, of all send workers together."),
    Metric(
        "relay_request_ids_total",
        _COUNTER,
        "Requests with a request_id by how its claim ended, and claims that were not stored as they should.",
        ("result",),
        (CLAIMS,),
    ),
    Metric("relay_request_ids_waiting", _GAUGE, "Requests that wait for another one with the same request_id."),
    Metric("relay_request_ids_to_store", _GAUGE, "Claims whose outcome is still to be stored."),
    Metric("relay_request_ids_off_workers", _GAUGE, "Send workers that can take no request_id now."),
    # -- smarthost -------------------------------------------------------------------------
    Metric(
        "relay_smtp_replies_total",
        _COUNTER,
        "Mails by the class of what the smarthost said last of them; none: it said nothing.",
        ("class",),
        (REPLY_CLASSES,),
    ),
    Metric(
        "relay_smtp_pool_wait_seconds",
        _HISTOGRAM,
        "How long mails waited for a connection, and for their turn at the sending rate.",
    ),
    Metric(
        "relay_smtp_transaction_duration_seconds",
        _HISTOGRAM,
        "How long SMTP transactions took, from MAIL to the last reply.",
    ),
    Metric(
        "relay_smtp_connections",
        _GAUGE,
        "Connections to the smarthost by state.",
        ("state",),
        (("idle", "busy", "dialling"),),
    ),
    Metric("relay_smtp_connections_max", _GAUGE, "SMTP_POOL_SIZE, of all send workers together."),
    Metric(
        "relay_smtp_connections_allowed",
        _GAUGE,
        "How many connections may be open now: SMTP_POOL_SIZE, or fewer while the smarthost wants it so.",
    ),
    Metric("relay_smtp_connections_opened_total", _COUNTER, "Connections to the smarthost that were opened."),
    Metric("relay_smtp_pool_waiting", _GAUGE, "Mails that wait for a connection."),
    Metric("relay_smtp_awaiting_reply", _GAUGE, "Mails in doubt whose connection still waits for the last reply."),
    Metric("relay_smtp_circuit_open_workers", _GAUGE, "Send workers that defer all mail: the smarthost is set aside."),
    Metric(
        "relay_smtp_hosts_set_aside",
        _GAUGE,
        "Hosts of SMTP_HOST that are set aside since they do not work, added up over the send workers.",
    ),
    Metric(
        "relay_smtp_stale_replaced_total",
        _COUNTER,
        "Connections that the smarthost had closed and that were replaced.",
    ),
    Metric("relay_smtp_retries_total", _COUNTER, "Attempts at a mail after the first one."),
    Metric("relay_smtp_throttled_total", _COUNTER, "Refusals for sending too fast."),
    Metric(
        "relay_smtp_recipients_per_second_allowed",
        _GAUGE,
        "The sending rate, of all send workers that have a limit; no series when none has.",
        merge=Merge.SUM_OF_TOLD,
    ),
    Metric("relay_smtp_rate_lowered_workers", _GAUGE, "Send workers that the smarthost takes less from than was set."),
    Metric("relay_smtp_rate_waiting", _GAUGE, "Mails that wait for their turn at the sending rate."),
    # -- tracking --------------------------------------------------------------------------
    Metric(
        "relay_tracking_records_total",
        _COUNTER,
        "Mails by whether their record was written; lost: they went out without a complete record.",
        ("result",),
        (("written", "lost"),),
    ),
    Metric(
        "relay_tracking_unsettled_total",
        _COUNTER,
        "Mails in doubt whose record does not say what became of them although the smarthost did.",
    ),
    Metric("relay_tracking_records_owed", _GAUGE, "Mails that went out and whose record is still to be written."),
    Metric(
        "relay_tracking_write_duration_seconds",
        _HISTOGRAM,
        "How long mails waited until JetStream had fact and record, or until that was given up.",
    ),
    Metric(
        "relay_tracking_off_workers",
        _GAUGE,
        "Workers that cannot write or read records now.",
        ("kind",),
        (("send", "status"),),
    ),
    Metric(
        "relay_questions_total",
        _COUNTER,
        "Questions about mails and groups, by what became of them.",
        ("question", "result"),
        (QUESTIONS, ANSWERS),
    ),
    Metric("relay_questions_in_flight", _GAUGE, "Questions that are not answered yet."),
    # -- events ----------------------------------------------------------------------------
    Metric(
        "relay_sqs_messages_total",
        _COUNTER,
        "Messages of the queue of events, by what was done with them; one passes through several of these.",
        ("step",),
        (SQS_STEPS,),
    ),
    Metric("relay_sqs_receive_failures_total", _COUNTER, "Times that the queue of events could not be asked."),
    Metric(
        "relay_sqs_queue_messages",
        _GAUGE,
        "Messages in the queue of events as last seen, by state; no series while it is not known.",
        ("state",),
        (("waiting", "in_flight", "delayed"),),
        merge=Merge.MOST,
    ),
    Metric(
        "relay_sqs_pollers",
        _GAUGE,
        "Pollers; idle: they wait for messages, busy: they handle some, or pause after a failure.",
        ("state",),
        (("idle", "busy"),),
    ),
    Metric("relay_events_total", _COUNTER, "Events of mails of ours, by SES's type.", ("type",), (EVENT_TYPES,)),
    Metric("relay_notifications_total", _COUNTER, "Notifications by what became of them.", ("result",), (RESULTS,)),
    Metric("relay_events_in_flight", _GAUGE, "Messages that were received and are not settled yet."),
    Metric("relay_events_stopped_workers", _GAUGE, "Engagement workers that can handle no events now."),
    # -- processes -------------------------------------------------------------------------
    Metric("relay_nats_connected_workers", _GAUGE, "Workers that are connected to NATS.", ("kind",), (KINDS,)),
    Metric(
        "relay_nats_dropped_publications_total",
        _COUNTER,
        "Replies and other publications that could not be handed to NATS.",
        ("kind",),
        (KINDS,),
    ),
)
"""What the workers count themselves and tell in their files."""

SEEN: tuple[Metric, ...] = (
    Metric(
        "relay_workers",
        _GAUGE,
        "Running workers by stage; silent: it runs, and has told nothing for 10 seconds.",
        ("kind", "stage"),
        (KINDS, STAGES),
    ),
    Metric("relay_workers_expected", _GAUGE, "Workers that should run.", ("kind",), (KINDS,)),
    Metric("relay_worker_starts_total", _COUNTER, "Starts of a worker.", ("program",)),
    Metric("relay_process_cpu_seconds_total", _COUNTER, "CPU time of a worker since it was started.", ("program",)),
    Metric("relay_process_resident_memory_bytes", _GAUGE, "Resident memory of a worker.", ("program",)),
    Metric("relay_process_virtual_memory_bytes", _GAUGE, "Virtual memory of a worker.", ("program",)),
    Metric("relay_process_open_fds", _GAUGE, "Open file descriptors of a worker.", ("program",)),
    Metric("relay_process_max_fds", _GAUGE, "How many file descriptors a worker may open.", ("program",)),
    Metric(
        "relay_process_start_time_seconds", _GAUGE, "When a worker was started, in seconds since 1970.", ("program",)
    ),
    Metric("relay_figures_unreadable", _GAUGE, "Files of figures that could not be read."),
    Metric("relay_build_info", _GAUGE, "Always 1; which Relay and Python this is.", ("version", "python")),
)
"""What whoever makes the page sees of the workers from outside."""

ALL = COUNTED + SEEN
BY_NAME = {metric.name: metric for metric in ALL}
SERIES = {metric.name: {",".join(series): series for series in metric.series()} for metric in COUNTED}
"""By metric the label values that its series may have, and how they stand in a worker's file."""
