"""The job for a request that asks for more than the contract: one request → one or several mails → one reply.

``Extended.answer`` is that journey: who gets it, until when, claim the request_id, fetch what lies in an Object Store,
compose, hand over, record, settle the claim, reply. A plain request never comes here (``sending``).

Owns the order of the steps, the caller's own deadline and whom a request_id belongs to. What a claim is and what
is left of it when a process dies at any point is ``idempotency``'s; the words of the reply are ``answers``'.
"""

from __future__ import annotations

import contextvars
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from time import perf_counter
from typing import NamedTuple

import gevent
import orjson
from gevent.lock import BoundedSemaphore
from gevent.pool import Pool

from relay import answers, contract
from relay.answers import Told
from relay.bookkeeping import Books
from relay.bus.jetstream import JetStream
from relay.bus.objects import ObjectUnusable, read_object
from relay.delivery.outcome import SENT_STATES, Outcome, Phase, State
from relay.delivery.smarthost import Smarthost
from relay.errors import BusRefused, BusUnavailable, SubmissionRejected
from relay.idempotency.claim import claim_key, fingerprint_of
from relay.idempotency.claims import Claim, Claims, Progress, Reason, Refused, Settled
from relay.submission import fields, mime
from relay.submission.attachment import ObjectRef
from relay.submission.compose import compose, date_header, new_ids
from relay.submission.options import Options
from relay.submission.policy import Policy, Sender, judge
from relay.submission.recipients import Recipient, Recipients, judge_options
from relay.submission.request import SendRequest, decode_send_request
from relay.tracking.groups import tracking_id
from relay.tracking.record import RecipientOutcome, parse_time
from relay.tracking.tracker import HandedOver

log = logging.getLogger("relay.sending")

INDIVIDUAL_AT_ONCE = 10
"""Mails of one request that are under way at the same time: it has no more than its share of the pool."""
INDIVIDUAL_BYTES_AT_ONCE = 40_000_000
"""Of their contents, unless one alone has more."""
OBJECT_MAILS_AT_ONCE = 4
"""Requests of one worker with something from an Object Store: more than a few that are read at the same time would fill
its connection to NATS, and its memory."""
LONGEST_ADDRESS_BYTES = 254
"""In replies and records of mails to several: of a longer text with a name only the mailbox is told."""

NOT_IN_FINGERPRINT = frozenset({"request_id", "timeout_seconds", "options"})
"""The same mail again may have less time left."""


class Extras(NamedTuple):
    """What requests with options need besides what every mail needs."""

    claims: Claims
    jetstream: JetStream
    patience_seconds: float
    """SEND_TIMEOUT_SECONDS: what lies between a request's arrival and the deadline that comes with it."""
    max_recipients: int = 50
    max_message_bytes: int = 40_000_000
    allowed_headers: tuple[str, ...] = fields.DEFAULT_ALLOWED_HEADERS
    object_buckets: tuple[str, ...] = ()
    """Object Store buckets that callers may refer to."""
    trusts_request_info: bool = False
    """Whether ``Nats-Request-Info`` says who calls: only where every caller comes through a service import."""


class Asked(NamedTuple):
    """A request as it came over the bus."""

    headers: Mapping[str, str]
    size_bytes: int
    deadline: float
    """On ``time.monotonic()``."""
    on_wait: Callable[[], None]
    """To be called before the request waits for another one's answer, which holds nothing of the relay."""
    begun: float
    """On ``time.perf_counter()``."""


class _Order(NamedTuple):
    """A permitted request: everything that its mails share."""

    request: SendRequest
    options: Options
    sender: Sender
    everyone: tuple[Recipient, ...]
    letters: tuple[_Letter, ...]
    deadline: float
    has_own_deadline: bool
    caller: str


class _Letter(NamedTuple):
    """One mail of an order."""

    recipients: Recipients
    """As its header section shows them."""
    places: tuple[int, ...]
    """Of those who get it, among ``everyone``."""


class _Unclaimed:
    """Stands for a claim where there is no request_id: this attempt is the only one."""

    found_in_doubt: tuple[int, ...] = ()
    attempt = 1

    def __init__(self, group_id: str, recipients: Sequence[Progress]) -> None:
        self.group_id = group_id
        self.recipients = tuple(recipients)
        self.unsent = tuple(range(len(recipients)))

    def note(self, index: int, result: Progress) -> None:
        """Nobody asks."""

    def settle(self, results: Mapping[int, Progress], reply: bytes) -> None:
        """Nobody asks."""


class _Place:
    """One of the places for what comes from an Object Store: that is large, and nothing else counts it."""

    def __init__(self, places: BoundedSemaphore) -> None:
        self._places = places
        self._is_taken = False

    def take(self, deadline: float) -> None:
        """Waits for one, until ``deadline``; again is harmless. Raises ``BusUnavailable``."""
        if not self._is_taken:
            self._is_taken = self._places.acquire(timeout=max(0.0, deadline - time.monotonic()))
            if not self._is_taken:
                raise BusUnavailable("too many others are being read")

    def give_back(self) -> None:
        """Again is harmless."""
        if self._is_taken:
            self._is_taken = False
            self._places.release()


class Extended:
    """Answers requests with options. ``answer`` runs in the request's greenlet."""

    def __init__(
        self, *, policy: Policy, smarthost: Smarthost, books: Books, configuration_set: str, extras: Extras
    ) -> None:
        self._policy = policy
        self._smarthost = smarthost
        self._books = books
        self._configuration_set = configuration_set
        self._extras = extras
        self._places = BoundedSemaphore(OBJECT_MAILS_AT_ONCE)

    def heeds(self, headers: Mapping[str, str]) -> bool:
        """Whether a plain request with these headers is no plain one after all."""
        return contract.DEADLINE_HEADER in headers or (
            self._extras.trusts_request_info and contract.REQUEST_INFO_HEADER in headers
        )

    def answer(self, request: SendRequest | ObjectRef, asked: Asked) -> bytes:
        """One request, one reply. Raises ``SubmissionRejected``, and ``AddressInvalid`` for a plain ``to``."""
        place = _Place(self._places)
        try:
            if isinstance(request, ObjectRef):
                place.take(asked.deadline)
                # Base64 and JSON make of a mail what base64 alone makes of it in SMTP, and there is the mail's text.
                payload = self._read_object("object", request, 2 * self._extras.max_message_bytes, asked.deadline)
                asked = asked._replace(size_bytes=len(payload))
                request = decode_send_request(payload)
                del payload
            return self._answer(request, asked, place)
        except (BusUnavailable, BusRefused) as error:
            return self._deferred(f"the Object Store cannot be read: {error}")
        finally:
            place.give_back()

    def _answer(self, request: SendRequest, asked: Asked, place: _Place) -> bytes:
        order = self._permit(request, asked)
        if order is None:
            self._books.note_unsent(
                "its recipients are filtered" if self._policy.email_enabled else "EMAIL_ENABLED is false"
            )
            return answers.NOTHING_SENT
        if order.deadline <= time.monotonic():
            return self._deferred("deadline exceeded")

        def on_wait() -> None:
            place.give_back()
            asked.on_wait()

        claim = self._claim(order, asked._replace(on_wait=on_wait))
        if isinstance(claim, Settled):
            self._books.note_repeated()
            return claim.reply
        if isinstance(claim, Refused):
            return self._refuse(claim.reason)
        held: AbstractContextManager[object] = claim if isinstance(claim, Claim) else nullcontext()
        with held:
            reply = self._fulfil(order, claim, place)
        self._books.send_seconds.observe(perf_counter() - asked.begun)
        return reply

    # -- what is asked for ---------------------------------------------------------------------
    def _permit(self, request: SendRequest, asked: Asked) -> _Order | None:
        """The order, None when nothing is to be sent and that is a success."""
        options = request.options
        if options is None:
            sender = judge(request, self._policy)
            recipients = Recipients((), (), (), ())
            if sender is not None:
                recipients = Recipients((Recipient(request.to, sender.recipient),), (), (), ())
            options = Options(to=(request.to,))
        else:
            sender, recipients = judge_options(request, options, self._policy, self._extras.max_recipients)
            fields.judge_headers(options.headers, self._extras.allowed_headers)
        if sender is None:
            return None
        everyone = recipients.everyone
        if options.is_individual:
            letters = tuple(_Letter(one, (place,)) for place, one in enumerate(recipients.individually()))
        else:
            letters = (_Letter(recipients, tuple(range(len(everyone)))),)
        deadline = self._own_deadline(options, asked)
        return _Order(
            request,
            options,
            sender,
            everyone,
            letters,
            min(deadline, asked.deadline),
            deadline < asked.deadline,
            self._caller(asked.headers),
        )

    def _own_deadline(self, options: Options, asked: Asked) -> float:
        """Until when the caller waits, on ``time.monotonic()``; later than ``asked.deadline`` when it does not say."""
        arrived_at = asked.deadline - self._extras.patience_seconds
        deadline = asked.deadline + 1.0
        if options.timeout_seconds is not None:
            deadline = min(deadline, arrived_at + options.timeout_seconds)
        if text := asked.headers.get(contract.DEADLINE_HEADER):
            at = parse_time(text.strip())
            if at is None:
                detail = f"the header {contract.DEADLINE_HEADER} must be a time of RFC 3339: 2026-01-31T12:00:00Z"
                raise SubmissionRejected(contract.INVALID_REQUEST_PAYLOAD, contract.DEADLINE_HEADER, detail)
            deadline = min(deadline, time.monotonic() + at.timestamp() - time.time())
        return deadline

    def _caller(self, headers: Mapping[str, str]) -> str:
        """Who calls, as the NATS server says; '' where nobody vouches for it."""
        if not self._extras.trusts_request_info:
            return ""
        try:
            info = orjson.loads(headers.get(contract.REQUEST_INFO_HEADER, ""))
            account = str(info["acc"]).replace("%", "%25").replace("/", "%2F")  # or two callers could share a name
            return f"{account}/{info.get('user', '')}"
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
            return ""

    def _claim(self, order: _Order, asked: Asked) -> Claim | _Unclaimed | Settled | Refused:
        ids = [
            (email_id, order.options.message_id_header or message_id_header)
            for email_id, message_id_header, _ in (new_ids(order.sender.from_address.domain) for _ in order.letters)
        ]
        recipients = [Progress(*ids[number]) for number, letter in enumerate(order.letters) for _ in letter.places]
        group_id = order.request.group_id
        if not group_id:
            group_id = ids[0][0] if len(ids) == 1 else new_ids("")[0]
        if not order.options.request_id:
            return _Unclaimed(group_id, recipients)
        # Those who get it stand beside what is given: the recipient allowlist may be another one by now, and then the
        # places of a stored claim are other people's.
        given = order.request._asdict() | order.options._asdict() | {"everyone": [one.text for one in order.everyone]}
        # A JSON object has no order: the same members again are the same mail.
        given |= {"headers": sorted(order.options.headers), "tags": sorted(order.options.tags)}
        return self._extras.claims.claim(
            claim_key(order.caller, order.options.request_id),
            fingerprint_of({name: value for name, value in given.items() if value and name not in NOT_IN_FINGERPRINT}),
            group_id,
            recipients,
            order.deadline,
            size_bytes=asked.size_bytes,
            on_wait=asked.on_wait,
        )

    # -- what is done --------------------------------------------------------------------------
    def _fulfil(self, order: _Order, claim: Claim | _Unclaimed, place: _Place) -> bytes:
        """Sends what is certainly unsent, and settles the claim with the reply."""
        for letter in order.letters:
            if any(each in claim.found_in_doubt for each in letter.places):
                told = _told(order, claim, letter.places, {})
                self._books.amend(_handed_over(order, claim, letter, told))
        results: dict[int, Progress] = {}
        if claim.unsent:
            try:
                results = self._send_all(self._with_objects(order, place), claim)
            except (BusUnavailable, BusRefused) as error:
                outcome = Outcome(State.DEFERRED, f"the Object Store cannot be read: {error}")
                self._books.note_unattempted(outcome)
                results = self._all_unsent(claim, outcome)
            except SubmissionRejected as refusal:
                if len(claim.unsent) == len(order.everyone):
                    raise  # nobody has it: the whole request is refused
                self._books.note_refused(refusal.error)
                results = self._all_unsent(claim, Outcome(State.FAILED, refusal.detail))
        reply = self._reply(order, claim, results)
        claim.settle(results, reply)
        return reply

    @staticmethod
    def _all_unsent(claim: Claim | _Unclaimed, outcome: Outcome) -> dict[int, Progress]:
        return {place: _progress(claim.recipients[place], outcome) for place in claim.unsent}

    def _with_objects(self, order: _Order, place: _Place) -> _Order:
        options = order.options
        for number, attachment in enumerate(options.attachments):
            if attachment.object is not None:
                place.take(order.deadline)
                room_bytes = mime.room_bytes(order.request, options, self._extras.max_message_bytes)
                field = f"attachments[{number}].object"
                content = self._read_object(field, attachment.object, room_bytes, order.deadline)
                changed = list(options.attachments)
                changed[number] = attachment.fetched(content)
                options = options._replace(attachments=tuple(changed))
        return order._replace(options=options)

    def _read_object(self, field: str, reference: ObjectRef, max_bytes: int, deadline: float) -> bytes:
        if reference.bucket not in self._extras.object_buckets:
            detail = f"{field}: the bucket is not one of the relay's; OBJECT_STORE_BUCKETS names those that are"
            raise SubmissionRejected(contract.INVALID_REQUEST_PAYLOAD, field.partition("[")[0], detail)
        try:
            return read_object(
                self._extras.jetstream, reference.bucket, reference.name, max_bytes=max_bytes, deadline=deadline
            )
        except ObjectUnusable as error:
            detail = f"{field}: {error}"
            raise SubmissionRejected(contract.INVALID_REQUEST_PAYLOAD, field.partition("[")[0], detail) from error

    def _send_all(self, order: _Order, claim: Claim | _Unclaimed) -> dict[int, Progress]:
        """Hands over every mail that somebody is still to get, one at least; what became of each of those."""
        letters = [letter for letter in order.letters if any(place in claim.unsent for place in letter.places)]
        body = None
        if order.options.shapes_content:
            body = mime.prepare_body(order.request, order.options, self._extras.max_message_bytes)
        if len(letters) == 1:
            return self._send(order, claim, letters[0], body)
        size_bytes = 1 if body is None else max(1, body.size_bytes)
        crew = Pool(max(1, min(INDIVIDUAL_AT_ONCE, INDIVIDUAL_BYTES_AT_ONCE // size_bytes)))
        # In copies of this request's context: whoever follows it follows each of them.
        sending = [
            crew.spawn(contextvars.copy_context().run, self._send_one, order, claim, letter, body) for letter in letters
        ]
        gevent.joinall(sending)
        return {place: result for each in sending for place, result in each.value.items()}

    def _send_one(
        self, order: _Order, claim: Claim | _Unclaimed, letter: _Letter, body: mime.Body | None
    ) -> dict[int, Progress]:
        """``_send`` of one of several mails: what keeps it from being sent does not hide the others' outcomes."""
        try:
            return self._send(order, claim, letter, body)
        except SubmissionRejected as refusal:
            outcome = Outcome(State.FAILED, refusal.detail)
        except Exception:  # the boundary of one of many mails: a bug of ours
            log.exception("one mail of a request could not be sent")
            outcome = Outcome(State.IN_DOUBT, "the relay met an error of its own; it may have sent the mail")
        results = {place: _progress(claim.recipients[place], outcome) for place in letter.places}
        self._record(order, claim, letter, results)
        for place, result in results.items():
            claim.note(place, result)
        return results

    def _send(
        self, order: _Order, claim: Claim | _Unclaimed, letter: _Letter, body: mime.Body | None
    ) -> dict[int, Progress]:
        begun = perf_counter()
        unsent = [place for place in letter.places if place in claim.unsent]
        ids = claim.recipients[letter.places[0]]
        content = self._content(order, letter, body, claim.group_id, ids)
        composed = perf_counter()
        outcomes = self._smarthost.relay(
            order.sender.from_address.mailbox,
            tuple(order.everyone[place].address.mailbox for place in unsent),
            content,
            order.deadline,
            partial(self._settle, order, claim, letter, unsent),
            commit=partial(_commit, claim, unsent) if isinstance(claim, Claim) else None,
        )
        del content
        if len(order.letters) == 1 and all(_waited_in_vain(outcome) for outcome in outcomes):
            self._books.waited_in_vain()
        if order.has_own_deadline:
            outcomes = [_in_the_callers_words(outcome) for outcome in outcomes]
        handed_over = perf_counter()
        results = {place: _progress(ids, outcome) for place, outcome in zip(unsent, outcomes, strict=True)}
        decisive = self._record(order, claim, letter, results)
        tracked = perf_counter()
        self._books.note(
            ids.email_id, claim.group_id, decisive, composed - begun, handed_over - composed, tracked - handed_over
        )
        if len(order.letters) > 1:
            for place, result in results.items():
                claim.note(place, result)
        return results

    def _content(self, order: _Order, letter: _Letter, body: mime.Body | None, group_id: str, ids: Progress) -> bytes:
        if body is None:
            content = compose(
                request=order.request._replace(to=letter.recipients.to[0].text),
                sender=order.sender._replace(recipient=letter.recipients.to[0].address),
                message_id_header=ids.message_id_header,
                date_header=date_header(time.time()),
                tracking_id=tracking_id(group_id, ids.email_id),
                email_id=ids.email_id,
                configuration_set=self._configuration_set,
            )
            mime.check_size(len(content), self._extras.max_message_bytes)
            return content
        return mime.compose_options(
            request=order.request,
            options=order.options,
            sender=order.sender,
            recipients=letter.recipients,
            body=body,
            message_id_header=ids.message_id_header,
            date_header=date_header(time.time()),
            tracking_id=tracking_id(group_id, ids.email_id),
            email_id=ids.email_id,
            configuration_set=self._configuration_set,
            limit_bytes=self._extras.max_message_bytes,
        )

    # -- what became of it ---------------------------------------------------------------------
    def _settle(
        self,
        order: _Order,
        claim: Claim | _Unclaimed,
        letter: _Letter,
        unsent: Sequence[int],
        outcomes: list[Outcome],
    ) -> None:
        """The smarthost has spoken of a mail whose caller was told that it is in doubt."""
        ids = claim.recipients[letter.places[0]]
        results = {
            place: _progress(ids, outcome)
            for place, outcome in zip(unsent, outcomes, strict=True)
            if outcome.phase is Phase.DOT  # of the others another attempt may have more to say
        }
        told = _told(order, claim, letter.places, results)
        mail = _handed_over(order, claim, letter, told)._replace(unheard=_unheard(claim, letter, results))
        self._books.settle(mail, answers.decisive_of(told).outcome)

    def _record(
        self, order: _Order, claim: Claim | _Unclaimed, letter: _Letter, results: Mapping[int, Progress]
    ) -> Outcome:
        """Writes the mail's record when somebody has it, or may have it; returns the outcome of this attempt."""
        told = _told(order, claim, letter.places, results)
        decisive = answers.decisive_of(told).outcome
        mail = _handed_over(order, claim, letter, told)
        before = {claim.recipients[place].outcome for place in letter.places}
        if claim.attempt > 1 and results and before & SENT_STATES:
            self._books.amend(mail._replace(unheard=_unheard(claim, letter, results)))
        else:
            self._books.record(mail, decisive)
        return decisive

    def _reply(self, order: _Order, claim: Claim | _Unclaimed, results: Mapping[int, Progress]) -> bytes:
        told = _told(order, claim, range(len(order.everyone)), results)
        decisive = answers.decisive_of(told)
        outcome = decisive.outcome
        ids = next(each for each in claim.recipients if each.email_id == decisive.email_id)
        if len(told) > 1 or order.options.is_individual:
            return answers.sent_to_several(told, claim.group_id, ids.message_id_header)
        if outcome.state is State.RELAYED:
            return answers.sent(ids.email_id, claim.group_id, ids.message_id_header, outcome.remote_id)
        return answers.not_sent(outcome, ids.email_id, claim.group_id)

    def _deferred(self, detail: str) -> bytes:
        outcome = Outcome(State.DEFERRED, detail)
        self._books.note_unattempted(outcome)
        return answers.not_sent(outcome)

    def _refuse(self, reason: Reason) -> bytes:
        if reason.retryable:
            return self._deferred(reason.value)
        self._books.note_refused(reason.value)
        return answers.refused(reason.value)


def _commit(claim: Claim, unsent: Sequence[int], places: Sequence[int]) -> bool:
    """``places`` of the transaction's forward-paths, which are those of ``unsent``."""
    return claim.commit([unsent[place] for place in places])


def _waited_in_vain(outcome: Outcome) -> bool:
    return outcome.state is State.DEFERRED and outcome.phase is Phase.POOL


def _in_the_callers_words(outcome: Outcome) -> Outcome:
    """A mail that was not sent because the caller itself gave it no more time."""
    return outcome._replace(detail=f"deadline exceeded: {outcome.detail}") if outcome.is_late else outcome


def _progress(ids: Progress, outcome: Outcome) -> Progress:
    return Progress(
        ids.email_id,
        ids.message_id_header,
        outcome.state.value,
        outcome.reply_code,
        outcome.enhanced_code,
        outcome.remote_id,
        outcome.detail,
    )


def _told(
    order: _Order, claim: Claim | _Unclaimed, places: Sequence[int], results: Mapping[int, Progress]
) -> list[Told]:
    """What became of those at ``places``, in this attempt or an earlier one."""
    return [
        Told(_address(order.everyone[place]), each.email_id, _outcome(each))
        for place in places
        for each in (results.get(place, claim.recipients[place]),)
    ]


def _unheard(claim: Claim | _Unclaimed, letter: _Letter, results: Mapping[int, Progress]) -> tuple[int, ...]:
    """Which of the letter's recipients this attempt knows nothing final of: their record may know more by now."""
    return tuple(
        number
        for number, place in enumerate(letter.places)
        if place not in results and claim.recipients[place].outcome not in (State.RELAYED, State.FAILED)
    )


def _address(recipient: Recipient) -> str:
    is_short = len(recipient.text.encode()) <= LONGEST_ADDRESS_BYTES
    return recipient.text if is_short else recipient.address.mailbox


def _outcome(progress: Progress) -> Outcome:
    detail = progress.detail
    if progress.outcome == State.IN_DOUBT and not detail:
        detail = "the relay lost sight of the mail after it may have been sent"
    return Outcome(
        State(progress.outcome) if progress.outcome in set(State) else State.DEFERRED,
        detail,
        progress.reply_code,
        progress.enhanced_code,
        phase=Phase.DOT,
        remote_id=progress.remote_id,
    )


def _handed_over(order: _Order, claim: Claim | _Unclaimed, letter: _Letter, told: Sequence[Told]) -> HandedOver:
    decisive = answers.decisive_of(told)
    outcome = decisive.outcome
    recipients: tuple[RecipientOutcome, ...] = ()
    if len(told) > 1:
        recipients = tuple(
            RecipientOutcome(
                each.address, each.outcome.state.value, each.outcome.reply_code, each.outcome.enhanced_code
            )
            for each in told
        )
    return HandedOver(
        decisive.email_id,
        claim.group_id,
        ", ".join(recipient.text for recipient in letter.recipients.to),
        order.request.subject_header,
        time.time(),
        "" if outcome.state is State.RELAYED else outcome.state.value,
        outcome.remote_id,
        recipients,
        order.caller,
    )
