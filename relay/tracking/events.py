"""What Amazon SES tells of a mail: the shapes of SNS and SES become one typed event, or a word why not.

Pure. Owns SES's and SNS's spelling ("Contents of event data that Amazon SES publishes to Amazon SNS" in SES's
developer guide; it grows, so what is unknown passes through) and which mail an event is about. What an event does to a
record is left to folding, whether there is such a record to the job.

A body is SES's event itself (raw delivery), or that event inside the ``Message`` of an SNS envelope, inside the
``detail`` of an EventBridge event, or both. Nothing in it is trusted: a field of the wrong type counts as missing,
texts are bounded, and no body makes this raise. One thing is repaired, as everywhere in Relay: half a surrogate pair
becomes U+FFFD, since an event must not be lost because somebody cut a subject in the middle of an emoji.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, NamedTuple

import orjson

from relay import contract
from relay.tracking.groups import read_tracking_id
from relay.tracking.record import is_email_id, parse_time, rfc3339

MAX_ID_CHARACTERS = 64
"""Of an event's id."""

MAX_WORD_BYTES = 128
"""Of what is one word where SES writes it: types, codes, its message id."""

MAX_DIAGNOSTIC_BYTES = 1024
MAX_LINK_BYTES = 2048


class Kind(StrEnum):
    """SES's event types, spelled as SES does (``eventType``, or ``notificationType`` in feedback notifications)."""

    SEND = "Send"
    DELIVERY = "Delivery"
    BOUNCE = "Bounce"
    COMPLAINT = "Complaint"
    REJECT = "Reject"
    OPEN = "Open"
    CLICK = "Click"
    RENDERING_FAILURE = "Rendering Failure"
    DELIVERY_DELAY = "DeliveryDelay"
    SUBSCRIPTION = "Subscription"


class SentMail(NamedTuple):
    """What an event says of the mail itself; '' where it does not say."""

    ses_message_id: str
    group_id: str
    """From our tracking header; '' when it cannot be known (no header, or the header has only a hash of it)."""
    to: str
    subject_header: str
    sent_at: str
    """When SES took it."""


class Event(NamedTuple):
    """One event of one mail."""

    kind: Kind
    event_id: str
    """The SNS message id, or a hash of the event where SNS left it out: at most 64 of ``[A-Za-z0-9_-]``."""
    email_id: str
    at: str
    """RFC 3339, UTC, milliseconds."""
    detail: dict[str, Any]
    """What the record keeps beside the time: small, texts bounded. Which fields, the functions under "details" say."""
    mail: SentMail


class Dropped(NamedTuple):
    """Nothing of a mail of ours, and nothing wrong with it."""

    why: str
    """One of few words, to be counted: ``foreign``, ``unknown type``, ``subscription``, ``validation``."""
    what: str = ""
    """For the log."""


class Broken(NamedTuple):
    """No event that anybody could read."""

    why: str
    """One sentence."""


def read_notification(body: str, now: float) -> Event | Dropped | Broken:
    """The event in the body of one SQS message. Never raises.

    ``now`` is epoch seconds: the time of an event where neither SES nor SNS gives one. The same body has the same
    ``event_id`` each time, and so has a second copy of the same notification.
    """
    told = _unwrap(body)
    if not isinstance(told, _Told):
        return told
    if not told.type_name:
        return Broken("the event has no eventType")
    kind = _KINDS.get(_plain(told.type_name))
    if kind is None:
        if told.type_name == "AmazonSnsSubscriptionSucceeded":  # what an identity's feedback topic gets first
            return Dropped("validation")
        return Dropped("unknown type", _text(told.type_name, MAX_ID_CHARACTERS))
    mail = told.event.get("mail")
    if not isinstance(mail, dict):
        return Broken("the event has no mail object")
    group_id, email_id = _whose(mail)
    if not email_id:
        return Dropped("foreign", kind)
    event_id = _event_id(told)
    if not event_id:
        return Broken("the event is nested too deeply")
    about = _object(told.event.get(_ABOUT[kind]))
    sent_at = _time(mail.get("timestamp"), now)
    if kind is Kind.SEND:  # has no time of its own: the mail's is it
        at = sent_at or _time(told.notified_at, now)
    else:
        at = _time(about.get("timestamp"), now) or _time(told.notified_at, now) or sent_at
    headers = _object(mail.get("commonHeaders"))
    return Event(
        kind=kind,
        event_id=event_id,
        email_id=email_id,
        at=at or rfc3339(now),
        detail=_DETAILS[kind](about),
        mail=SentMail(
            ses_message_id=_text(mail.get("messageId"), MAX_WORD_BYTES),
            group_id=group_id,
            to=_joined(headers.get("to")) or _joined(mail.get("destination")),
            subject_header=_first_text(headers.get("subject")),
            sent_at=sent_at,
        ),
    )


# -- envelopes ---------------------------------------------------------------------------------------------------------


class _Told(NamedTuple):
    """An event of SES's, out of its envelopes, and what these said."""

    event: dict[str, Any]
    type_name: str
    notification_id: object
    notified_at: object


_VALIDATION_TEXT = "Successfully validated SNS topic for Amazon SES"
"""How the text begins that SES posts to a topic when an event destination is made."""

_NO_EVENTS = ("SubscriptionConfirmation", "UnsubscribeConfirmation")
"""Types of SNS messages about a subscription itself. A queue's subscriptions are confirmed by their owner."""

_NOTIFICATION_ID = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_ID_CHARACTERS}}}")
"""SNS's are UUIDs. Anything else is hashed: an id is a name in the record, and stays there when that is erased."""


def _unwrap(body: str) -> _Told | Dropped | Broken:
    """The event out of its envelopes, and no more is judged than whether there is a JSON object."""
    found = _parsed(body, "the body")
    if isinstance(found, Dropped | Broken):
        return found
    notification_id = notified_at = None
    if not _type_name(found) and ("Message" in found or "Type" in found):
        if found.get("Type") in _NO_EVENTS:
            return Dropped("subscription", found["Type"])
        message = found.get("Message")
        if not isinstance(message, str):
            return Broken("the SNS envelope has no Message text")
        notification_id, notified_at = found.get("MessageId"), found.get("Timestamp")
        found = _parsed(message, "the Message in the SNS envelope")
        if isinstance(found, Dropped | Broken):
            return found
    type_name = _type_name(found)
    if not type_name and "detail-type" in found and isinstance(found.get("detail"), dict):
        notification_id, notified_at = notification_id or found.get("id"), found.get("time") or notified_at
        # SES tells EventBridge of other things too, as its advice for an account: these have no eventType.
        type_name = _type_name(found["detail"]) or _first_text(found["detail-type"])
        found = found["detail"]
    return _Told(found, type_name, notification_id, notified_at)


def _parsed(text: str, what: str) -> dict[str, Any] | Dropped | Broken:
    """The JSON object in a text."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        if text.lstrip().startswith(_VALIDATION_TEXT):
            return Dropped("validation")
        try:
            value = orjson.loads(_without_half_pairs(text))
        except orjson.JSONDecodeError:
            return Broken(f"{what} is no JSON")
    return value if isinstance(value, dict) else Broken(f"{what} is JSON, but no object")


_HALF_PAIR = re.compile(r"(\\[^u]|\\u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w)|\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
"""In JSON: an escape that is none of it, or a whole surrogate pair, both to be kept; or else half of a pair."""


def _without_half_pairs(text: str) -> str:
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # those that are no escapes (any more)
    return _HALF_PAIR.sub(lambda match: match[1] or r"\ufffd", text)


def _type_name(event: dict[str, Any]) -> str:
    return _first_text(event.get("eventType"), event.get("notificationType"))


def _event_id(told: _Told) -> str:
    """'' when the event is so deep that it cannot be written again."""
    if isinstance(told.notification_id, str) and _NOTIFICATION_ID.fullmatch(told.notification_id):
        return told.notification_id
    try:
        canonical = orjson.dumps(told.event, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError:
        return ""
    return hashlib.sha256(canonical).hexdigest()


# -- whose event it is -------------------------------------------------------------------------------------------------

_TRACKING_HEADER = contract.TRACKING_HEADER.lower()


def _whose(mail: dict[str, Any]) -> tuple[str, str]:
    """Group id and email_id; the latter is '' when the mail is none of ours.

    Of several tracking headers the first with an email_id counts, then our tag, which knows no group: feedback
    notifications come without tags, and an event without headers when a mail's are too long for SES.
    """
    headers = mail.get("headers")
    for header in headers if isinstance(headers, list) else ():
        if not isinstance(header, dict):
            continue
        name, value = header.get("name"), header.get("value")
        if isinstance(name, str) and name.lower() == _TRACKING_HEADER and isinstance(value, str):
            group_id, email_id = read_tracking_id(value)
            if is_email_id(email_id):
                return group_id, email_id
    tagged = _object(mail.get("tags")).get(contract.SES_EMAIL_ID_TAG)
    for value in tagged if isinstance(tagged, list) else (tagged,):
        if isinstance(value, str) and is_email_id(value):
            return "", value
    return "", ""


# -- details -----------------------------------------------------------------------------------------------------------
# What is missing, or no text, is left out. Words of SES's pass as they are: it has more of them every year.


def _of_delivery(about: dict[str, Any]) -> dict[str, Any]:
    return _stated(diagnostic=_text(about.get("smtpResponse"), MAX_DIAGNOSTIC_BYTES))


def _of_bounce(about: dict[str, Any]) -> dict[str, Any]:
    recipient = _recipient(about.get("bouncedRecipients"))
    return _stated(
        type=_text(about.get("bounceType"), MAX_WORD_BYTES),
        subtype=_text(about.get("bounceSubType"), MAX_WORD_BYTES),
        status=_text(recipient.get("status"), MAX_WORD_BYTES),
        diagnostic=_text(recipient.get("diagnosticCode"), MAX_DIAGNOSTIC_BYTES),
    )


def _of_complaint(about: dict[str, Any]) -> dict[str, Any]:
    return _stated(
        type=_text(about.get("complaintFeedbackType"), MAX_WORD_BYTES),
        subtype=_text(about.get("complaintSubType"), MAX_WORD_BYTES),
    )


def _of_delay(about: dict[str, Any]) -> dict[str, Any]:
    recipient = _recipient(about.get("delayedRecipients"))
    return _stated(
        type=_text(about.get("delayType"), MAX_WORD_BYTES),
        diagnostic=_text(recipient.get("diagnosticCode"), MAX_DIAGNOSTIC_BYTES),
    )


def _of_reject(about: dict[str, Any]) -> dict[str, Any]:
    return _stated(reason=_text(about.get("reason"), MAX_DIAGNOSTIC_BYTES))


def _of_failure(about: dict[str, Any]) -> dict[str, Any]:
    return _stated(reason=_text(about.get("errorMessage"), MAX_DIAGNOSTIC_BYTES))


def _of_click(about: dict[str, Any]) -> dict[str, Any]:
    return _stated(link=_text(about.get("link"), MAX_LINK_BYTES))


def _of_subscription(about: dict[str, Any]) -> dict[str, Any]:
    """``is_unsubscribed``: all was refused, or a topic that was not refused before."""
    new, old = _object(about.get("newTopicPreferences")), _object(about.get("oldTopicPreferences"))
    is_unsubscribed = new.get("unsubscribeAll") is True or bool(_refused_topics(new) - _refused_topics(old))
    return {"is_unsubscribed": is_unsubscribed} | _stated(source=_text(about.get("source"), MAX_WORD_BYTES))


def _nothing(_about: dict[str, Any]) -> dict[str, Any]:
    return {}


def _stated(**fields: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value}


def _recipient(recipients: object) -> dict[str, Any]:
    """The first recipient that a remote server said something about, else the first: a mail of ours has only one."""
    found = [each for each in recipients if isinstance(each, dict)] if isinstance(recipients, list) else []
    return next((each for each in found if each.get("diagnosticCode")), found[0] if found else {})


def _refused_topics(preferences: dict[str, Any]) -> set[str]:
    topics = preferences.get("topicSubscriptionStatus")
    found = [each for each in topics if isinstance(each, dict)] if isinstance(topics, list) else []
    refused = [each for each in found if _plain(_first_text(each.get("subscriptionStatus"))) == "optout"]
    return {_first_text(each.get("topicName")) for each in refused}


# -- values ------------------------------------------------------------------------------------------------------------

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _first_text(*values: object) -> str:
    """The first that is a text and not empty, else ''."""
    return next((value for value in values if value and isinstance(value, str)), "")


def _joined(texts: object) -> str:
    if isinstance(texts, list):
        return ", ".join([each for each in texts if isinstance(each, str)])
    return _first_text(texts)


def _text(value: object, max_bytes: int) -> str:
    """A text in one line of at most so many bytes of UTF-8; '' when it is none."""
    if not isinstance(value, str):
        return ""
    if len(value) <= max_bytes and value.isascii() and value.isprintable():
        return value
    line = _CONTROL.sub(" ", value[:max_bytes]).strip()
    return line.encode()[:max_bytes].decode("utf-8", "ignore")


_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d{1,9}))?)?\s?(?:Z|UTC|GMT|([+-]\d\d):?(\d\d)?)?",
    re.ASCII | re.IGNORECASE,
)
_AS_KEPT = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", re.ASCII)
"""As SES usually writes it, and a record too."""
_EPOCH = re.compile(r"\d{9,13}(?:\.\d{1,9})?", re.ASCII)

_EARLIEST = datetime(2000, 1, 1, tzinfo=UTC).timestamp()
AHEAD_SECONDS = 86_400
"""What is told may lie so far ahead of this machine's clock. What is outside of these bounds is nobody's time, as zero
in many languages, and as a last open in a hundred years, which would stay the last one for as long."""

_MILLISECONDS_FROM = 1e11
"""Numbers from here on count milliseconds: as seconds, they would be a year beyond 5000."""


def _time(value: object, now: float) -> str:
    """A time as it stands in a record; '' when there is none.

    Takes ISO 8601 as SES writes it (one of its samples has a space before ``+0000``), UTC where no zone is given, and
    epoch seconds or milliseconds.
    """
    if isinstance(value, str):
        if _AS_KEPT.fullmatch(value) and (at := parse_time(value)) is not None:
            return value if at.timestamp() <= now + AHEAD_SECONDS else ""
        seconds = _seconds_of(value)
    elif isinstance(value, int | float):
        seconds = value
    else:
        return ""
    if seconds >= _MILLISECONDS_FROM:
        seconds = min(seconds, 1e15) / 1000  # an int may be too large to become a float
    return rfc3339(seconds) if _EARLIEST <= seconds <= now + AHEAD_SECONDS else ""


def _seconds_of(text: str) -> float:
    """Epoch seconds, or milliseconds where these are written; 0 when it is no time."""
    if (match := _TIME.fullmatch(text)) is None:
        return float(text) if _EPOCH.fullmatch(text) else 0
    year, month, day, hour, minute, second, fraction, zone_hours, zone_minutes = match.groups()
    microseconds = int(fraction[:6].ljust(6, "0")) if fraction else 0
    try:
        at = datetime(int(year), int(month), int(day), int(hour), int(minute), int(second or 0), microseconds, UTC)
    except ValueError:
        return 0
    seconds = at.timestamp()
    if zone_hours:
        offset = timedelta(hours=abs(int(zone_hours)), minutes=int(zone_minutes or 0)).total_seconds()
        seconds += offset if zone_hours.startswith("-") else -offset
    return seconds


# -- tables ------------------------------------------------------------------------------------------------------------


def _plain(type_name: str) -> str:
    """A type without case, spaces and underscores: ``Rendering Failure`` is ``RENDERING_FAILURE`` in SES's API."""
    return type_name.replace(" ", "").replace("_", "").lower()


_KINDS = {_plain(kind): kind for kind in Kind}

_ABOUT = {
    Kind.SEND: "send",
    Kind.DELIVERY: "delivery",
    Kind.BOUNCE: "bounce",
    Kind.COMPLAINT: "complaint",
    Kind.REJECT: "reject",
    Kind.OPEN: "open",
    Kind.CLICK: "click",
    Kind.RENDERING_FAILURE: "failure",
    Kind.DELIVERY_DELAY: "deliveryDelay",
    Kind.SUBSCRIPTION: "subscription",
}
"""Where an event has what is its kind's own."""

_DETAILS: dict[Kind, Callable[[dict[str, Any]], dict[str, Any]]] = {
    Kind.SEND: _nothing,
    Kind.DELIVERY: _of_delivery,
    Kind.BOUNCE: _of_bounce,
    Kind.COMPLAINT: _of_complaint,
    Kind.REJECT: _of_reject,
    Kind.OPEN: _nothing,
    Kind.CLICK: _of_click,
    Kind.RENDERING_FAILURE: _of_failure,
    Kind.DELIVERY_DELAY: _of_delay,
    Kind.SUBSCRIPTION: _of_subscription,
}
