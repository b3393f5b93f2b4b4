"""The bucket of records and the stream of facts: how they are made when they are missing.

What exists is used as it is: a bucket that lfx's chart made keeps its limits (``inspection`` says what they cost).
Made by us, the bucket has no limit on a value's size, both allow direct gets, and both say who made them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import gevent

from relay import __version__, contract
from relay.bus.client import Publication
from relay.bus.jetstream import (
    EXPECTED_STREAM,
    NOT_ENABLED,
    NOT_ENABLED_FOR_ACCOUNT,
    STREAM_NAME_IN_USE,
    STREAM_NOT_FOUND,
    WRONG_STREAM,
    JetStream,
)
from relay.errors import BusRefused, BusUnavailable

T = TypeVar("T")

DUPLICATE_WINDOW_SECONDS = 120
NANOSECONDS = 1_000_000_000
DAY_SECONDS = 86_400
RETRY_SECONDS = 1.0
PROBE_SECONDS = 2.0
NO_JETSTREAM_SECONDS = 10.0
NO_JETSTREAM = "JetStream is not enabled on the NATS server; start it with -js (and a store directory)"
NO_JETSTREAM_CODES = frozenset({NOT_ENABLED, NOT_ENABLED_FOR_ACCOUNT, 503})

PATIENCE_SECONDS = 30.0
"""For who reads much and is in no hurry: a NATS server takes some seconds to restart."""

MADE_BY = "made_by"
"""In a stream's metadata: who made it. What others made does not say so."""


class StorageConfig(NamedTuple):
    """How bucket and stream are made; settings TRACKING_*."""

    replicas: int = 1
    ttl_days: int = 0
    """The log's; records are kept a day longer, or a group's totals would pass 100 %. 0: for ever."""
    storage: str = "file"


def ensure_storage(jetstream: JetStream, config: StorageConfig) -> str:
    """Makes what is missing. '' when records and facts can be kept, else one sentence why they cannot.

    Asks each stream to store something that it must refuse, so that the answer shows that it would answer a write and
    nothing is stored. Raises ``BusUnavailable`` when JetStream does not answer.
    """
    try:
        for stream in (_bucket(config), _log(config)):
            ensure_stream(jetstream, stream)
            _probe_writing(jetstream, stream)
    except BusRefused as error:
        if error.code in NO_JETSTREAM_CODES:
            return NO_JETSTREAM
        return f"the tracking storage could not be made: {error}"
    return ""


def wait_for_storage(
    jetstream: JetStream, config: StorageConfig, say: Callable[[str], None], pause_seconds: float = 0.0
) -> None:
    """Blocks until records and facts can be kept; tries again every few seconds, for ever.

    ``say`` is told why not after each try, and '' at the end. ``pause_seconds`` before the first try.
    """
    gevent.sleep(pause_seconds)
    while True:
        why_not = why_unusable(jetstream, config)
        say(why_not)
        if not why_not:
            return
        gevent.sleep(NO_JETSTREAM_SECONDS if why_not == NO_JETSTREAM else RETRY_SECONDS)


def why_unusable(jetstream: JetStream, config: StorageConfig) -> str:
    """Tries once, as ``ensure_storage``, with its exceptions as the sentence that they are."""
    try:
        return ensure_storage(jetstream, config)
    except BusUnavailable as error:
        return str(error)


def patiently(question: Callable[[], T], patience_seconds: float = PATIENCE_SECONDS) -> T:
    """The answer to ``question``, which may be asked again: as long as NATS is away, but for so long at most.

    Raises the last ``BusUnavailable`` then; other errors at once.
    """
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            return question()
        except BusUnavailable:
            if time.monotonic() >= deadline:
                raise
        gevent.sleep(min(RETRY_SECONDS, max(0.0, deadline - time.monotonic())))


def ensure_stream(jetstream: JetStream, stream: Mapping[str, Any]) -> None:
    """Makes the stream unless there is one of that name, which is used as it is.

    Raises ``BusUnavailable`` and ``BusRefused``.
    """
    try:
        jetstream.api(f"STREAM.INFO.{stream['name']}")
    except BusRefused as error:
        if error.code != STREAM_NOT_FOUND:
            raise
        try:
            jetstream.api(f"STREAM.CREATE.{stream['name']}", stream)
        except BusRefused as refusal:
            if refusal.code != STREAM_NAME_IN_USE:  # another worker was first
                raise


def _probe_writing(jetstream: JetStream, stream: dict[str, Any]) -> None:
    nats_subject = stream["subjects"][0].replace("*", "probe").replace(">", "probe")
    (answer,) = jetstream.store([Publication(nats_subject, b"", {EXPECTED_STREAM: "none"})], PROBE_SECONDS)
    if isinstance(answer, BusUnavailable) or (isinstance(answer, BusRefused) and answer.code != WRONG_STREAM):
        raise answer


def _bucket(config: StorageConfig) -> dict[str, Any]:
    name = contract.RECIPIENTS_BUCKET
    return stream_config(
        config,
        name=f"KV_{name}",
        subjects=[f"$KV.{name}.>"],
        max_msgs_per_subject=1,
        discard="new",
        deny_delete=True,
        allow_rollup_hdrs=True,
        max_age=(config.ttl_days + 1) * DAY_SECONDS * NANOSECONDS if config.ttl_days else 0,
    )


def _log(config: StorageConfig) -> dict[str, Any]:
    return stream_config(
        config,
        name=contract.LOG_STREAM,
        subjects=[f"{contract.LOG_PREFIX}.*.*"],
        discard="old",
        max_age=config.ttl_days * DAY_SECONDS * NANOSECONDS,
    )


def stream_config(config: StorageConfig, **own: Any) -> dict[str, Any]:
    """A stream as Relay makes them; ``own`` is what this one has of its own, its name and subjects at least."""
    return {
        "retention": "limits",
        "storage": config.storage,
        "num_replicas": config.replicas,
        "allow_direct": True,
        "duplicate_window": DUPLICATE_WINDOW_SECONDS * NANOSECONDS,
        "metadata": {MADE_BY: f"Relay {__version__}"},
        **own,
    }
