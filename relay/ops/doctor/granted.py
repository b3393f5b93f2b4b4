"""Which of the permissions that a relay needs its NATS user lacks, found out without a trace.

The server tells a user its own permissions (``$SYS.REQ.USER.INFO``) where it may ask. Where not, each publication is
tried so that nothing comes of it: reads; writes to a stream that is told to refuse them (``Nats-Expected-Stream``);
requests that are no JSON. A subscription is not tried: it would take requests away from workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from relay.bus.client import Bus, Publication
from relay.bus.jetstream import DENIED, EXPECTED_STREAM
from relay.errors import BusRefused, BusUnavailable
from relay.ops.permissions import Need
from relay.tracking.inspection import covers

USER_INFO = "$SYS.REQ.USER.INFO"
NO_USER = "[REDACTED]"
"""Who logs in with a token has no name."""
ASK_SECONDS = 2.0


class UserInfo(NamedTuple):
    """What the server tells a user of itself."""

    user: str
    account: str
    permissions: Mapping[str, Any]
    """``publish`` and ``subscribe`` with ``allow`` and ``deny``, ``responses``; what is absent is not limited."""
    server_time: str


def user_info(bus: Bus) -> UserInfo | None:
    """None where the server does not tell."""
    try:
        told = orjson.loads(bus.request(Publication(USER_INFO, b""), ASK_SECONDS).payload)
        data, server = told["data"], told["server"]
        return UserInfo(
            "" if (user := str(data.get("user", ""))) == NO_USER else user,
            str(data.get("account_name") or data.get("account", "")),
            data.get("permissions") or {},
            str(server.get("time", "")),
        )
    except (BusRefused, BusUnavailable, orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return None


def lacking(permissions: Mapping[str, Any], wanted: Iterable[Need]) -> list[Need]:
    """Those that these permissions do not grant, or only in part."""
    return [need for need in wanted if not _is_granted(permissions, need)]


def refused(bus: Bus, wanted: Sequence[Need]) -> list[Need]:
    """Those publications among ``wanted`` that the server refuses, as they are tried. Nothing comes of them."""
    tried = [need for need in wanted if need.verb == "publish"]
    answers = bus.request_all([_harmless(need.subject) for need in tried], ASK_SECONDS)
    return [
        need
        for need, answer in zip(tried, answers, strict=True)
        if isinstance(answer, BusRefused) and answer.code == DENIED
    ]


def _harmless(pattern: str) -> Publication:
    nats_subject = pattern.replace("*", "relayctl-doctor").replace(">", "relayctl-doctor")
    if nats_subject.startswith("$JS."):
        return Publication(nats_subject, b"{" if ".CREATE." in nats_subject else b"")
    return Publication(nats_subject, b"", {EXPECTED_STREAM: "none"})


def _is_granted(permissions: Mapping[str, Any], need: Need) -> bool:
    limits = permissions.get(need.verb) or {}
    if "RELAY_REPLY_PREFIXES" in need.settings and permissions.get("responses"):
        return True
    allow, deny = limits.get("allow") or [], limits.get("deny") or []
    # One that is denied in part is lacking too; a queue group that is denied leaves the others alone.
    if any(_grants(each, need) or (" " not in each and covers(need.subject, each)) for each in deny):
        return False
    return not allow or any(_grants(each, need) for each in allow)


def _grants(entry: str, need: Need) -> bool:
    """Whether an entry covers it; one of a subscription may name a queue group behind its subject."""
    pattern, _, queue_group = entry.partition(" ")
    return covers(pattern, need.subject) and (not queue_group or covers(queue_group, need.queue_group))
