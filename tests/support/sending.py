"""The job by itself: what it needs besides policy, smarthost and tracker, and one request to it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from relay import contract
from relay.bus.jetstream import JetStream
from relay.bus.messages import Msg
from relay.extended import Extras
from relay.idempotency.claims import Claims, ClaimsConfig
from relay.sending import Sending
from relay.submission.policy import Policy


def extras_for(jetstream: JetStream, patience_seconds: float, worker: str = "send-1", **more: Any) -> Extras:
    """Requests with options as the worker takes them by default; their bucket is there. ``more`` is ``Extras``'."""
    claims = Claims(jetstream, ClaimsConfig(settling_seconds=2.0), worker)
    claims.start()
    return Extras(claims=claims, jetstream=jetstream, patience_seconds=patience_seconds, **more)


def policy_for(**rules: Any) -> Policy:
    """Mail goes out, from example.org to anybody; ``rules`` are ``Policy``'s."""
    usual: dict[str, Any] = {
        "email_enabled": True,
        "default_from": "noreply@example.org",
        "default_from_display_name": "Relay",
        "allowed_from_domains": ("example.org",),
        "allowed_reply_to_domains": ("example.org",),
        "allowed_recipient_domains": (),
    }
    return Policy(**(usual | rules))


def ask(
    sending: Sending,
    request: Any,
    patience_seconds: float,
    headers: dict[str, str] | None = None,
    step_aside: Callable[[Msg], None] = lambda _: None,
) -> dict[str, Any]:
    """One request to the job itself, as JSON or as bytes that are to be it; the reply."""
    payload = request if isinstance(request, bytes) else json.dumps(request).encode()
    msg = Msg(contract.SEND_EMAIL, "_INBOX.test.1", payload, headers or {})
    reply = json.loads(sending.answer(msg, time.monotonic() + patience_seconds, step_aside))
    assert isinstance(reply, dict)
    return reply
