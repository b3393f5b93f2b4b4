"""Preflight: can a relay with these settings run here? The quick questions, for scripts and before a start.

Asks this host, NATS, JetStream, the smarthost and the queue of events as the workers would, and changes nothing but for
making the buckets and the log when they are missing (as the first worker would), and that one message of the queue may
count as received once more. The questions are ``relay.ops.doctor``'s, which asks more of them, and of a running relay.
"""

from __future__ import annotations

from collections.abc import Iterator

from relay.ops.doctor.advice import known_names
from relay.ops.doctor.amazon import events
from relay.ops.doctor.bus import nats
from relay.ops.doctor.finding import Finding
from relay.ops.doctor.host import this_host
from relay.ops.doctor.smtp import smarthost
from relay.settings import Settings

__all__ = ["Finding", "findings"]


def findings(settings: Settings) -> Iterator[Finding]:
    """Every answer, as it is found. Takes up to about 40 s where nothing answers."""
    yield known_names()
    yield from this_host(settings)
    yield from nats(settings)
    yield from smarthost(settings)
    if settings.ses_eventing_enabled:
        yield from events(settings)
