"""One request over NATS from the command line."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import orjson

from relay.bus.client import Bus, Publication, without_password
from relay.errors import BusRefused, BusUnavailable

CONNECT_SECONDS = 3.0


def ask(url: str, nats_subject: str, request: Mapping[str, Any], timeout_seconds: float) -> Any:
    """Sends the request as JSON and gives the reply's JSON.

    Raises ``BusUnavailable`` and ``BusRefused``, each with what to do.
    """
    bus = Bus(url, "relayctl")
    bus.start()
    try:
        if not bus.wait_connected(CONNECT_SECONDS):
            raise BusUnavailable(
                f"NATS at {without_password(url)} cannot be reached ({bus.last_error or 'no answer'}); start it, or set"
                " NATS_URL"
            )
        try:
            answer = bus.request(Publication(nats_subject, orjson.dumps(request)), timeout_seconds)
        except BusRefused as error:
            if error.code == 503:
                raise BusRefused(f"no relay serves {nats_subject} on this NATS; `relayctl start` starts one") from error
            raise
        return orjson.loads(answer.payload)
    finally:
        bus.close()


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
