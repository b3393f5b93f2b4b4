"""The job: one request → submission → delivery → tracking → one reply.

Read this file first: ``Sending.answer`` is the whole journey of a mail. It owns the order of the steps; what each step
does is in the room of its name: the words of the reply are ``answers``', what is kept of a mail ``bookkeeping``'s. A
request that asks for more than the contract takes the longer way through ``extended``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from time import perf_counter

from relay import answers
from relay.bookkeeping import Books, log_relayed_line
from relay.bus.messages import Msg
from relay.bus.service import Handler
from relay.delivery.outcome import Outcome, State
from relay.delivery.smarthost import Smarthost
from relay.errors import AddressInvalid, SubmissionRejected
from relay.extended import Asked, Extended, Extras
from relay.histogram import Histogram
from relay.journey import Follower
from relay.submission.attachment import ObjectRef
from relay.submission.compose import compose, date_header, new_ids
from relay.submission.mail import Mail
from relay.submission.policy import Policy, Sender, judge
from relay.submission.request import SendRequest, decode_request_object, decode_send_request
from relay.tracking.groups import tracking_id
from relay.tracking.tracker import HandedOver, Tracker


class Sending:
    """Answers ``send_email``. One for all requests of a worker; ``answer`` runs in a greenlet per request."""

    def __init__(
        self,
        *,
        policy: Policy,
        smarthost: Smarthost,
        tracker: Tracker,
        configuration_set: str,
        extras: Extras,
        log_relayed: Callable[..., None] = log_relayed_line,
        waited_in_vain: Callable[[], object] = lambda: None,
        follower: Follower | None = None,
    ) -> None:
        """``log_relayed``, ``waited_in_vain`` and ``follower`` are ``Books``'."""
        self._policy = policy
        self._smarthost = smarthost
        self._configuration_set = configuration_set
        self._books = Books(tracker, log_relayed, waited_in_vain, follower)
        self._extended = Extended(
            policy=policy,
            smarthost=smarthost,
            books=self._books,
            configuration_set=configuration_set,
            extras=extras,
        )

    @property
    def counts(self) -> Counter[str]:
        """How many requests ended how."""
        return self._books.counts

    @property
    def last_error(self) -> str:
        """The detail of the last mail that was not relayed, with its time."""
        return self._books.last_error

    @property
    def send_seconds(self) -> Histogram:
        """From a request that is attempted to its reply."""
        return self._books.send_seconds

    @property
    def reply_classes(self) -> Counter[str]:
        """What the smarthost said last of each mail: ``2xx``, ``4xx``, ``5xx``, ``none``."""
        return self._books.reply_classes

    def wait_amended(self, timeout_seconds: float) -> None:
        """After the last answer: lets the records that are still to be amended come to it."""
        self._books.wait_amended(timeout_seconds)

    def answer(self, msg: Msg, deadline: float, step_aside: Callable[[Msg], None]) -> bytes:
        """One request, one reply. ``deadline`` (``time.monotonic()``) bounds the attempt up to the final dot.

        ``step_aside`` is told when the request waits for something that is no work of the relay's.
        """
        begun = perf_counter()
        try:
            request = _decode(msg.payload)
            if (
                isinstance(request, ObjectRef)
                or request.options is not None
                or (msg.headers and self._extended.heeds(msg.headers))
            ):
                on_wait = partial(step_aside, msg)
                return self._extended.answer(request, Asked(msg.headers, len(msg.payload), deadline, on_wait, begun))
            sender = judge(request, self._policy)
        except SubmissionRejected as refusal:
            self._books.note_refused(refusal.error)
            return answers.rejected(refusal)
        except AddressInvalid as error:
            outcome = Outcome(State.FAILED, f"to: {error}")
            self._books.note_unattempted(outcome)
            return answers.not_sent(outcome)
        if sender is None:
            self._books.note_unsent(
                "its recipient is filtered" if self._policy.email_enabled else "EMAIL_ENABLED is false"
            )
            return answers.NOTHING_SENT
        mail = self._compose(request, sender)
        composed = perf_counter()
        (outcome,) = self._smarthost.relay(
            mail.reverse_path, mail.forward_paths, mail.content, deadline, partial(self._settle, mail)
        )
        handed_over = perf_counter()
        self._books.record(_handed_over(mail, outcome), outcome)
        tracked = perf_counter()
        self._books.note(
            mail.email_id, mail.group_id, outcome, composed - begun, handed_over - composed, tracked - handed_over
        )
        self._books.send_seconds.observe(tracked - begun)
        if outcome.state is State.RELAYED:
            return answers.sent(mail.email_id, mail.group_id, mail.message_id_header, outcome.remote_id)
        return answers.not_sent(outcome, mail.email_id, mail.group_id)

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
        """The smarthost has spoken of a mail whose caller was told that it is in doubt."""
        (outcome,) = outcomes
        self._books.settle(_handed_over(mail, outcome), outcome)


def _decode(payload: bytes) -> SendRequest | ObjectRef:
    """The request, or where it lies."""
    try:
        return decode_send_request(payload)
    except SubmissionRejected:
        if (reference := decode_request_object(payload)) is None:
            raise
    return reference


def _handed_over(mail: Mail, outcome: Outcome) -> HandedOver:
    """What the tracker is told of a mail that was handed over, or whose fate is known at last."""
    said = "" if outcome.state is State.RELAYED else outcome.state.value
    return HandedOver(mail.email_id, mail.group_id, mail.to, mail.subject_header, time.time(), said, outcome.remote_id)


def send_handler(sending: Sending) -> Handler:
    """``send_email`` as the bus serves it, with the replies to what never reaches ``answer``."""
    return Handler(
        answer=sending.answer,
        overloaded=answers.not_sent(Outcome(State.DEFERRED, "overloaded")),
        broken=answers.not_sent(
            Outcome(State.IN_DOUBT, "the relay met an error of its own; it may have sent the mail")
        ),
        too_large=answers.not_sent(
            Outcome(State.IN_DOUBT, "the reply exceeds NATS max_payload; the mail may have been sent")
        ),
    )
