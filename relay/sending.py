"""The job: one request → submission → delivery → tracking → one reply.

Read this file first: ``Sending.answer`` is the whole journey of a mail. It owns the order of the steps
and the words of the reply; what each step does is in the room of its name.

The reply's ids and its ``error`` are the contract's. Beside them stand fields that older callers ignore:
``outcome`` (``refused``, ``failed``, ``deferred``, ``in_doubt``), ``retryable``, ``reply_code``, ``enhanced_code``,
``detail``; on success ``message_id_header`` and ``remote_id``.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import orjson

from relay import contract
from relay.bus.service import Handler
from relay.delivery.outcome import SENT_STATES, Outcome, Phase, State
from relay.delivery.smarthost import Smarthost
from relay.errors import AddressInvalid, SubmissionRejected
from relay.redaction import without_addresses
from relay.submission.compose import compose, date_header, new_ids
from relay.submission.mail import Mail
from relay.submission.policy import Policy, Sender, judge
from relay.submission.request import SendRequest, decode_send_request
from relay.tracking.groups import tracking_id
from relay.tracking.record import rfc3339
from relay.tracking.tracker import HandedOver, Tracker

log = logging.getLogger("relay.sending")

RELAYED = "mail relayed"
RELAYED_FIELDS = ("email_id", "group_id", "outcome", "compose_ms", "smtp_ms", "tracking_ms")
"""The one line that every mail writes, which is why a program may give ``Sending`` a cheaper way to write it."""


def _log_relayed(*values: object) -> None:
    log.info(RELAYED, extra=dict(zip(RELAYED_FIELDS, values, strict=True)), stacklevel=2)


class Sending:
    """Answers ``send_email``. One for all requests of a worker; ``answer`` runs in a greenlet per request."""

    def __init__(
        self,
        *,
        policy: Policy,
        smarthost: Smarthost,
        tracker: Tracker,
        configuration_set: str,
        log_relayed: Callable[..., None] = _log_relayed,
        waited_in_vain: Callable[[], object] = lambda: None,
    ) -> None:
        """``log_relayed`` logs ``RELAYED`` with the values of ``RELAYED_FIELDS``; it is called once a mail.

        ``waited_in_vain`` is told of each mail that was deferred before it had a connection.
        """
        self._policy = policy
        self._smarthost = smarthost
        self._tracker = tracker
        self._configuration_set = configuration_set
        self._log_relayed = log_relayed
        self._waited_in_vain = waited_in_vain
        self.counts: Counter[str] = Counter()
        """How many requests ended how: the states of ``Outcome``, ``refused``, and ``not_sent`` on purpose."""
        self.last_error = ""
        """The detail of the last mail that was not relayed, with its time."""

    def answer(self, payload: bytes, deadline: float) -> bytes:
        """One request, one reply. ``deadline`` (``time.monotonic()``) bounds the attempt up to the final dot."""
        begun = perf_counter()
        try:
            request = decode_send_request(payload)
            sender = judge(request, self._policy)
        except SubmissionRejected as refusal:
            self.counts["refused"] += 1
            log.debug("request refused: %s", refusal.error)
            return _refused(refusal)
        except AddressInvalid as error:
            outcome = Outcome(State.FAILED, f"to: {error}")
            self.counts[State.FAILED] += 1
            self._note_failure(outcome, {"outcome": outcome.state.value})
            return _not_sent(outcome)
        if sender is None:
            return self._answer_unsent()
        mail = self._compose(request, sender)
        composed = perf_counter()
        (outcome,) = self._smarthost.relay(
            mail.reverse_path, mail.forward_paths, mail.content, deadline, partial(self._settle, mail)
        )
        handed_over = perf_counter()
        if outcome.phase is Phase.POOL and outcome.state is State.DEFERRED:
            self._waited_in_vain()
        elif outcome.state in SENT_STATES:
            self._tracker.note(_handed_over(mail, outcome))
        self._note(mail, outcome, composed - begun, handed_over - composed, perf_counter() - handed_over)
        return _sent(mail, outcome) if outcome.state is State.RELAYED else _not_sent(outcome, mail)

    def _answer_unsent(self) -> bytes:
        self.counts["not_sent"] += 1
        why = "its recipient is filtered" if self._policy.email_enabled else "EMAIL_ENABLED is false"
        log.info("mail not sent: %s", why)
        return _NOTHING_SENT

    def _compose(self, request: SendRequest, sender: Sender) -> Mail:
        email_id, message_id_header, boundary = new_ids(sender.from_address.domain)
        group_id = request.group_id or email_id
        content = compose(
            sender=sender,
            request=request,
            date_header=date_header(time.time()),
            message_id_header=message_id_header,
            tracking_id=tracking_id(group_id, email_id),
            email_id=email_id,
            configuration_set=self._configuration_set,
            boundary=boundary,
        )
        return Mail(
            email_id=email_id,
            group_id=group_id,
            reverse_path=sender.from_address.mailbox,
            forward_paths=(sender.recipient.mailbox,),
            content=content,
            to=request.to,
            subject_header=request.subject_header,
            message_id_header=message_id_header,
        )

    def _settle(self, mail: Mail, outcomes: list[Outcome]) -> None:
        """The smarthost has spoken of a mail whose caller was told that it is in doubt: the record says it from now on.

        It may happen before the record of the mail in doubt is written; ``Tracker.settle`` makes it then.
        """
        (outcome,) = outcomes
        fields = {"email_id": mail.email_id, "outcome": outcome.state.value, "reply_code": outcome.reply_code}
        if outcome.state is State.IN_DOUBT:
            log.warning("mail stays in doubt: %s", without_addresses(outcome.detail[:200]), extra=fields)
            return
        self.counts["settled"] += 1
        log.info("mail in doubt settled: %s", without_addresses(outcome.detail[:200]), extra=fields)
        self._tracker.settle(_handed_over(mail, outcome))

    def _note(self, mail: Mail, outcome: Outcome, compose_s: float, smtp_s: float, tracking_s: float) -> None:
        """Counts and logs: ids, what was said and how long each step took; never an address or content."""
        state = outcome.state
        self.counts[state] += 1
        values = (
            mail.email_id,
            without_addresses(mail.group_id[:128]),
            str(state),
            round(compose_s * 100_000) / 100,
            round(smtp_s * 100_000) / 100,
            round(tracking_s * 100_000) / 100,
        )
        if state is State.RELAYED:
            self._log_relayed(*values)
        else:
            self._note_failure(outcome, dict(zip(RELAYED_FIELDS, values, strict=True)))

    def _note_failure(self, outcome: Outcome, fields: dict[str, Any]) -> None:
        said = without_addresses(outcome.detail[:200])
        self.last_error = f"{rfc3339(time.time())} {said}"
        log.warning("mail not relayed: %s", said, extra=fields | {"reply_code": outcome.reply_code})


def _handed_over(mail: Mail, outcome: Outcome) -> HandedOver:
    """What the tracker is told of a mail that was handed over, or whose fate is known at last."""
    said = "" if outcome.state is State.RELAYED else outcome.state.value
    return HandedOver(mail.email_id, mail.group_id, mail.to, mail.subject_header, time.time(), said, outcome.remote_id)


def _refused(refusal: SubmissionRejected) -> bytes:
    reply: dict[str, Any] = {"error": refusal.error, "outcome": "refused", "retryable": False}
    if refusal.detail:
        reply["detail"] = refusal.detail
    return orjson.dumps(reply)


def _sent(mail: Mail, outcome: Outcome) -> bytes:
    reply = {"email_id": mail.email_id, "group_id": mail.group_id, "message_id_header": mail.message_id_header}
    if outcome.remote_id:
        reply["remote_id"] = outcome.remote_id
    return orjson.dumps(reply)


def _not_sent(outcome: Outcome, mail: Mail | None = None) -> bytes:
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
    if mail is not None and outcome.state is State.IN_DOUBT:
        reply["email_id"] = mail.email_id
        reply["group_id"] = mail.group_id
    return orjson.dumps(reply)


_NOTHING_SENT = orjson.dumps({"email_id": "", "group_id": ""})


def send_handler(sending: Sending) -> Handler:
    """``send_email`` as the bus serves it, with the replies to what never reaches ``answer``."""
    return Handler(
        answer=sending.answer,
        overloaded=_not_sent(Outcome(State.DEFERRED, "overloaded")),
        broken=_not_sent(Outcome(State.IN_DOUBT, "the relay met an error of its own; it may have sent the mail")),
        too_large=_not_sent(Outcome(State.IN_DOUBT, "the reply exceeds NATS max_payload; the mail may have been sent")),
    )
