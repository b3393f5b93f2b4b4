"""What a caller of ``send_email`` is told: outcomes and refusals as the JSON of one reply. Pure.

The ids and ``error`` are the contract's. Beside them stand fields that older callers ignore: ``outcome``
(``refused``, ``failed``, ``deferred``, ``in_doubt``), ``retryable``, ``reply_code``, ``enhanced_code``, ``detail``; on
success ``message_id_header`` and ``remote_id``; ``recipients`` where a request named several, and ``duplicate`` where a
``request_id`` was answered before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson

from relay import contract
from relay.delivery.outcome import Outcome, State
from relay.errors import SubmissionRejected

NOTHING_SENT = orjson.dumps({"email_id": "", "group_id": ""})
"""On purpose: the recipient is filtered, or EMAIL_ENABLED is false. To the caller it is a success."""

WORST_FIRST = (State.IN_DOUBT, State.FAILED, State.DEFERRED)
"""Of several outcomes none of which is a success: what must not be tried again blindly, what cannot, what may."""


class Told(NamedTuple):
    """What a caller is told of one recipient."""

    address: str
    """As the caller wrote it."""
    email_id: str
    """Of the mail that was meant for it."""
    outcome: Outcome


def refused(error: str, detail: str = "", *, retryable: bool = False) -> bytes:
    """The relay itself does not take the request; nothing was sent."""
    reply: dict[str, Any] = {"error": error, "outcome": "refused", "retryable": retryable}
    if detail:
        reply["detail"] = detail
    return orjson.dumps(reply)


def rejected(refusal: SubmissionRejected) -> bytes:
    """The same, for what decoding and policy say."""
    return refused(refusal.error, refusal.detail)


def sent(email_id: str, group_id: str, message_id_header: str, remote_id: str) -> bytes:
    """The smarthost has the mail."""
    reply = {"email_id": email_id, "group_id": group_id, "message_id_header": message_id_header}
    if remote_id:
        reply["remote_id"] = remote_id
    return orjson.dumps(reply)


def not_sent(outcome: Outcome, email_id: str = "", group_id: str = "") -> bytes:
    """The smarthost does not have the mail, or it is in doubt: then it has a record, and the reply its id."""
    return orjson.dumps(_not_sent(outcome, email_id, group_id))


def sent_to_several(told: Sequence[Told], group_id: str, message_id_header: str) -> bytes:
    """A success when anyone was relayed, else the worst outcome; with what became of each.

    The ids beside ``recipients`` are those of the first whose outcome the reply as a whole has.
    """
    decisive = decisive_of(told)
    outcome = decisive.outcome
    reply: dict[str, Any]
    if outcome.state is State.RELAYED:
        reply = {"email_id": decisive.email_id, "group_id": group_id, "message_id_header": message_id_header}
        if outcome.remote_id:
            reply["remote_id"] = outcome.remote_id
    else:
        reply = _not_sent(outcome, decisive.email_id, group_id)
    reply["recipients"] = [_recipient(each) for each in told]
    return orjson.dumps(reply)


def decisive_of(told: Sequence[Told]) -> Told:
    """The first of those whose outcome is that of the request as a whole."""
    for state in (State.RELAYED, *WORST_FIRST):
        for each in told:
            if each.outcome.state is state:
                return each
    raise ValueError("a request has at least one recipient")


def _not_sent(outcome: Outcome, email_id: str, group_id: str) -> dict[str, Any]:
    reply: dict[str, Any] = {
        "error": contract.DELIVERY_FAILED,
        "outcome": outcome.state.value,
        "retryable": outcome.retryable,
        "detail": outcome.detail,
    }
    if outcome.reply_code is not None:
        reply["reply_code"] = outcome.reply_code
    if outcome.enhanced_code:
        reply["enhanced_code"] = outcome.enhanced_code
    if email_id and outcome.state is State.IN_DOUBT:
        reply["email_id"] = email_id
        reply["group_id"] = group_id
    return reply


def _recipient(told: Told) -> dict[str, Any]:
    return {
        "address": told.address,
        "outcome": told.outcome.state.value,
        "reply_code": told.outcome.reply_code,
        "enhanced_code": told.outcome.enhanced_code,
        "email_id": told.email_id,
    }
