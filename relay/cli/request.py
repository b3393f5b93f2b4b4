"""NATS from the command line: one connection a command, one request, and errors that say what to do."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import orjson

from relay import contract
from relay.bus.client import Bus, BusConfig, Publication
from relay.bus.jetstream import STREAM_NOT_FOUND, JetStream
from relay.cli.terminal import fail, say
from relay.errors import BusRefused, BusUnavailable
from relay.tracking.storage import NO_JETSTREAM, NO_JETSTREAM_CODES

CONNECT_SECONDS = 3.0


@contextlib.contextmanager
def connected(config: BusConfig, on_change: Callable[[bool, str], None] | None = None) -> Iterator[Bus]:
    """A connection for one command. Raises ``BusUnavailable``, with what to do."""
    bus = Bus(config, "relayctl", on_change)
    bus.start()
    try:
        if not bus.wait_connected(CONNECT_SECONDS):
            raise BusUnavailable(
                f"NATS at {config.shown} cannot be reached ({bus.last_error or 'no answer'}); start it, or set NATS_URL"
            )
        yield bus
    finally:
        bus.close()


@contextlib.contextmanager
def tracking_storage(config: BusConfig, on_change: Callable[[bool, str], None] | None = None) -> Iterator[JetStream]:
    """JetStream for one command. What stops it is one sentence and exit code 1; an old server is named."""
    try:
        with connected(config, on_change) as bus:
            jetstream = JetStream(bus)
            if jetstream.server_problem:
                say(f"warning: {jetstream.server_problem}")
            yield jetstream
    except BusRefused as error:
        fail(BusRefused(_what_to_do(error), error.code))
    except BusUnavailable as error:
        fail(error)


def _what_to_do(error: BusRefused) -> str:
    if error.code in NO_JETSTREAM_CODES:
        return NO_JETSTREAM
    if error.code == STREAM_NOT_FOUND:
        return (
            f"there is no bucket {contract.RECIPIENTS_BUCKET} or no log {contract.LOG_STREAM} on this NATS; the first"
            " worker makes them, and so does `relayctl check`"
        )
    return str(error)


def ask(config: BusConfig, nats_subject: str, request: Mapping[str, Any], timeout_seconds: float) -> Any:
    """Sends the request as JSON and gives the reply's JSON.

    Raises ``BusUnavailable`` and ``BusRefused``, each with what to do.
    """
    with connected(config) as bus:
        try:
            answer = bus.request(Publication(nats_subject, orjson.dumps(request)), timeout_seconds)
        except BusRefused as error:
            if error.code == 503:
                raise BusRefused(f"no relay serves {nats_subject} on this NATS; `relayctl start` starts one") from error
            raise
        return orjson.loads(answer.payload)


def text_or_file(given: str) -> str:
    """The text itself, or with a leading ``@`` the content of that file."""
    if not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(f"cannot read {given[1:]}: {error}") from error


def escaped_html(text: str) -> str:
    """The plain text as an HTML body."""
    return f"<pre>{html.escape(text)}</pre>"
