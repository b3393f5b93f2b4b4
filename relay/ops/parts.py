"""From settings to the parts and their configurations: the one place that knows both."""

from __future__ import annotations

import platform

from relay import contract
from relay.bus.service import Gate, Handler, Service
from relay.delivery.config import SmarthostConfig
from relay.ops.process import Context
from relay.settings import Settings
from relay.submission.policy import Policy
from relay.tracking.storage import StorageConfig


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


def smarthost_config(settings: Settings) -> SmarthostConfig:
    """The smarthost and its connections."""
    return SmarthostConfig(
        host=settings.smtp_host,
        port=settings.smtp_port,
        username=settings.smtp_username,
        password=settings.smtp_password.get_secret_value(),
        helo_name=settings.smtp_helo_name or platform.node() or "localhost",
        tls=settings.smtp_tls,
        tls_verify=settings.smtp_tls_verify,
        ca_file=settings.smtp_ca_file,
        pool_size=settings.smtp_pool_size,
        idle_seconds=settings.smtp_idle_seconds,
        max_age_seconds=settings.smtp_max_connection_age_seconds,
        max_messages=settings.smtp_max_messages_per_connection,
        connect_timeout_seconds=settings.smtp_connect_timeout_seconds,
        command_timeout_seconds=settings.smtp_command_timeout_seconds,
        content_timeout_seconds=settings.smtp_content_timeout_seconds,
        dot_timeout_seconds=settings.smtp_dot_timeout_seconds,
    )


def storage_config(settings: Settings) -> StorageConfig:
    """How bucket and log are made when they are missing."""
    return StorageConfig(settings.tracking_replicas, settings.tracking_ttl_days, settings.tracking_storage)


def service(context: Context, nats_subject: str, handler: Handler, gate: Gate) -> Service:
    """One subject, served as a member of the contract's queue group. Not started."""
    return Service(
        context.bus,
        nats_subject=nats_subject,
        queue_group=contract.QUEUE_GROUP,
        handler=handler,
        gate=gate,
        patience_seconds=context.settings.send_timeout_seconds,
        reply_prefixes=context.settings.relay_reply_prefixes,
    )
