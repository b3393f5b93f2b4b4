"""From settings to the parts and their configurations: the one place that knows both."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import TYPE_CHECKING

from relay import contract
from relay.bus.config import BusConfig
from relay.bus.jetstream import JetStream
from relay.bus.service import Gate, Handler, Service
from relay.delivery.config import Host, SmarthostConfig, Timeouts
from relay.ops.logs import frequent_line
from relay.settings import Settings
from relay.submission.policy import Policy
from relay.tracking.storage import StorageConfig

if TYPE_CHECKING:
    from relay.aws.sqs import QueueConfig
    from relay.engagement import EngagementConfig
    from relay.extended import Extras
    from relay.ops.process import Context
    from relay.tracking.tracker import Tracker


def bus_config(settings: Settings) -> BusConfig:
    """Where NATS is, and how to log in there."""
    return BusConfig(
        url=settings.nats_url,
        creds_file=settings.nats_creds,
        nkey_seed_file=settings.nats_nkey_seed_file,
        user=settings.nats_user,
        password=settings.nats_password.get_secret_value(),
        password_file=settings.nats_password_file,
        token_file=settings.nats_token_file,
        ca_file=settings.nats_ca,
        cert_file=settings.nats_cert,
        key_file=settings.nats_key,
        tls_first=settings.nats_tls_first,
        inbox_prefix=settings.nats_inbox_prefix,
    )


def policy(settings: Settings) -> Policy:
    """The domain rules and the default sender."""
    return Policy(
        email_enabled=settings.email_enabled,
        default_from=settings.sender,
        default_from_display_name=settings.default_smtp_from_display_name,
        allowed_from_domains=settings.smtp_allowed_from_domains,
        allowed_reply_to_domains=settings.smtp_allowed_reply_to_domains,
        allowed_recipient_domains=settings.smtp_allowed_recipient_domains,
    )


def smarthost_config(settings: Settings, send_workers: int = 0) -> SmarthostConfig:
    """The smarthost and its connections; so many workers share its rate (0: RELAY_SEND_WORKERS)."""
    return SmarthostConfig(
        hosts=tuple(Host(name, port) for name, port in settings.smtp_hosts),
        username=settings.smtp_username,
        password=settings.smtp_secret,
        helo_name=settings.smtp_helo_name or platform.node() or "localhost",
        tls=settings.smtp_tls,
        tls_verify=settings.smtp_tls_verify,
        ca_file=settings.smtp_ca_file,
        pool_size=settings.smtp_pool_size,
        idle_seconds=settings.smtp_idle_seconds,
        max_age_seconds=settings.smtp_max_connection_age_seconds,
        max_messages=settings.smtp_max_messages_per_connection,
        # Every send worker of this host has its share: the queue group hands requests out evenly.
        max_recipients_per_second=settings.smtp_max_recipients_per_second
        / (send_workers or settings.relay_send_workers),
        timeouts=Timeouts(
            connect_seconds=settings.smtp_connect_timeout_seconds,
            banner_seconds=settings.smtp_banner_timeout_seconds,
            ehlo_seconds=settings.smtp_ehlo_timeout_seconds,
            starttls_seconds=settings.smtp_starttls_timeout_seconds,
            auth_seconds=settings.smtp_auth_timeout_seconds,
            mail_seconds=settings.smtp_mail_timeout_seconds,
            rcpt_seconds=settings.smtp_rcpt_timeout_seconds,
            data_seconds=settings.smtp_data_timeout_seconds,
            content_seconds=settings.smtp_content_timeout_seconds,
            dot_seconds=settings.smtp_dot_timeout_seconds,
            rset_seconds=settings.smtp_rset_timeout_seconds,
            quit_seconds=settings.smtp_quit_timeout_seconds,
        ),
    )


def storage_config(settings: Settings) -> StorageConfig:
    """How bucket and log are made when they are missing."""
    return StorageConfig(settings.tracking_replicas, settings.tracking_ttl_days, settings.tracking_storage)


def tracker(context: Context, jetstream: JetStream) -> Tracker:
    """What keeps records and facts of what is sent, and says on the status page when it cannot. Not started."""
    # Here, as below: what sends mail is of no use to the other workers.
    from relay.tracking.tracker import Tracker

    def note(why: str) -> None:
        context.presence.note("tracking", f"tracking is off: {why}" if why else "")

    settings = context.settings
    return Tracker(
        jetstream, storage_config(settings), settings.tracking_ack_seconds, on_change=note, follower=context.tracing
    )


def extras(context: Context, jetstream: JetStream) -> Extras:
    """What requests with options need."""
    from relay.extended import Extras
    from relay.idempotency.claims import Claims, ClaimsConfig

    settings = context.settings
    worker = f"{context.program}@{platform.node()}"
    claims = Claims(jetstream, ClaimsConfig(settings.request_id_ttl_hours, storage_config(settings)), worker)
    return Extras(
        claims=claims,
        jetstream=jetstream,
        patience_seconds=settings.send_timeout_seconds,
        max_recipients=settings.smtp_max_recipients,
        max_message_bytes=settings.smtp_max_message_bytes,
        allowed_headers=settings.smtp_allowed_headers,
        object_buckets=settings.object_store_buckets,
        trusts_request_info=settings.nats_trust_request_info,
    )


def log_relayed(context: Context) -> Callable[..., None]:
    """The line of a relayed mail, at the price of a line that is written for every mail."""
    from relay import bookkeeping

    if context.tracing is None:
        return frequent_line(bookkeeping.log, bookkeeping.RELAYED, bookkeeping.RELAYED_FIELDS)
    ids = context.tracing.ids
    line = frequent_line(bookkeeping.log, bookkeeping.RELAYED, (*bookkeeping.RELAYED_FIELDS, "trace_id", "span_id"))
    return lambda *values: line(*values, *ids())


def engagement_config(settings: Settings) -> EngagementConfig:
    """How events are handled."""
    # Here, as below: what understands and folds events is of no use to the other workers.
    from relay.engagement import EngagementConfig

    return EngagementConfig(settings.engagement_early_seconds, storage_config(settings))


def queue_config(settings: Settings) -> QueueConfig:
    """The queue of events, and how it is polled."""
    # Here, since boto3 costs 20 MB: the other workers do without.
    from relay.aws.sqs import QueueConfig

    return QueueConfig(settings.ses_engagement_sqs_queue_url, settings.aws_region, settings.engagement_pollers)


def service(context: Context, nats_subject: str, handler: Handler, gate: Gate) -> Service:
    """One subject, served as a member of the contract's queue group. Not started."""
    if context.tracing is not None:
        handler = context.tracing.traced(handler, nats_subject, contract.QUEUE_GROUP)
    return Service(
        context.bus,
        nats_subject=nats_subject,
        queue_group=contract.QUEUE_GROUP,
        handler=handler,
        gate=gate,
        patience_seconds=context.settings.send_timeout_seconds,
        reply_prefixes=context.settings.relay_reply_prefixes,
    )
