"""What SES and SNS say, read: every shape that they document, and no shape at all.

The samples are written in the shapes of AWS's documentation; ``enveloped_…`` come through SNS.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.tracking.events import Broken, Dropped, Event, Kind, SentMail, read_notification
from relay.tracking.groups import group_token, tracking_id
from relay.tracking.record import is_email_id, parse_time

SAMPLES = {path.stem: path.read_text() for path in sorted((Path(__file__).parent / "samples").glob("*.json"))}

NOW = 1_771_100_000.25
EMAIL_ID = "7d0f6a7e-3c55-4b0e-9f0e-5f1d9a3e8c21"
OTHER_ID = "b1946ac9-2492-4d23-8c1f-0c4f6e5d7a90"
SES_MESSAGE_ID = "0100019c4e1f7a52-5b7d3a1c-8e55-4c1d-9a51-2f6b8d0c4e77-000000"
SENT_AT = "2026-02-11T09:15:02.118Z"

MAIL = SentMail(SES_MESSAGE_ID, "invite-batch/2026-02", "Jane Doe <jane@example.org>", "Your invitation", SENT_AT)
BARE_MAIL = SentMail(SES_MESSAGE_ID, "", "jane@example.org", "", SENT_AT)
"""Of an event without headers."""

HASH = "the hash of the event"

BOUNCE = {
    "type": "Permanent",
    "subtype": "General",
    "status": "5.1.1",
    "diagnostic": "smtp; 550 5.1.1 <jane@example.org>: no such user here",
}
FEEDBACK_BOUNCE = {
    "type": "Transient",
    "subtype": "MailboxFull",
    "status": "4.2.2",
    "diagnostic": "smtp; 452 4.2.2 The mailbox is over quota",
}
DELAY = {
    "type": "TransientCommunicationFailure",
    "diagnostic": "smtp; 421 4.4.1 Unable to connect to remote host",
}
ACCEPTED = {"diagnostic": "250 ok: accepted as 64111812"}

READ: dict[str, Event | Dropped | Broken] = {
    "send": Event(Kind.SEND, HASH, EMAIL_ID, SENT_AT, {}, MAIL),
    "delivery": Event(
        Kind.DELIVERY,
        HASH,
        EMAIL_ID,
        "2026-02-11T09:15:03.402Z",
        {"diagnostic": "250 2.0.0 OK 1739265303 a1b2c3d4e5f6 - accepted"},
        MAIL,
    ),
    "bounce": Event(Kind.BOUNCE, HASH, EMAIL_ID, "2026-02-11T09:15:04.871Z", BOUNCE, MAIL),
    "complaint": Event(Kind.COMPLAINT, HASH, EMAIL_ID, "2026-02-12T18:40:11.000Z", {"type": "abuse"}, MAIL),
    "reject": Event(Kind.REJECT, HASH, OTHER_ID, SENT_AT, {"reason": "Bad content"}, MAIL),
    "open": Event(Kind.OPEN, HASH, EMAIL_ID, "2026-02-11T11:02:44.050Z", {}, MAIL),
    "click": Event(
        Kind.CLICK,
        HASH,
        EMAIL_ID,
        "2026-02-11T11:03:12.907Z",
        {"link": "https://www.example.com/invite?token=4711&lang=de#start"},
        MAIL,
    ),
    "rendering_failure": Event(
        Kind.RENDERING_FAILURE,
        HASH,
        OTHER_ID,
        SENT_AT,
        {"reason": "Attribute 'first_name' is not present in the rendering data."},
        BARE_MAIL,
    ),
    "delivery_delay": Event(Kind.DELIVERY_DELAY, HASH, EMAIL_ID, "2026-02-11T09:25:02.500Z", DELAY, BARE_MAIL),
    "subscription": Event(
        Kind.SUBSCRIPTION,
        HASH,
        EMAIL_ID,
        "2026-02-13T07:00:00.010Z",
        {"is_unsubscribed": True, "source": "UnsubscribeHeader"},
        MAIL,
    ),
    "subscription_to_topics": Event(
        Kind.SUBSCRIPTION,
        HASH,
        EMAIL_ID,
        "2026-02-14T07:00:00.010Z",
        {"is_unsubscribed": False, "source": "PreferencePage"},
        MAIL,
    ),
    "notification_bounce": Event(Kind.BOUNCE, HASH, EMAIL_ID, "2026-02-11T21:15:09.000Z", FEEDBACK_BOUNCE, MAIL),
    "notification_bounce_without_headers": Dropped("foreign", "Bounce"),
    "notification_bounce_without_dsn": Event(
        Kind.BOUNCE,
        HASH,
        EMAIL_ID,
        "2026-02-11T09:15:02.400Z",
        {"type": "Permanent", "subtype": "OnAccountSuppressionList"},
        MAIL,
    ),
    "notification_complaint": Event(
        Kind.COMPLAINT, HASH, EMAIL_ID, "2026-02-12T18:40:11.000Z", {"type": "not-spam"}, MAIL
    ),
    "notification_complaint_without_report": Event(
        Kind.COMPLAINT, HASH, EMAIL_ID, "2026-02-12T18:40:11.000Z", {"subtype": "OnAccountSuppressionList"}, MAIL
    ),
    "notification_delivery": Event(Kind.DELIVERY, HASH, EMAIL_ID, "2026-02-11T09:15:03.000Z", ACCEPTED, MAIL),
    "notification_delivery_without_headers": Dropped("foreign", "Delivery"),
    "notification_setup": Dropped("validation"),
    "enveloped_open": Event(
        Kind.OPEN, "5d8c2a34-91e0-5b7f-8d66-73a1f0c9e2b4", EMAIL_ID, "2026-02-11T11:02:44.050Z", {}, MAIL
    ),
    "enveloped_reject": Event(
        Kind.REJECT,
        "0c6e1f7a-2b3d-5e4f-8a9b-1c2d3e4f5a6b",
        OTHER_ID,
        "2026-02-11T09:15:03.050Z",
        {"reason": "Bad content"},
        MAIL,
    ),
    "enveloped_notification_delivery": Event(
        Kind.DELIVERY, "91b7d3c5-6f2e-5a1d-b0c9-8e7f6a5b4c3d", EMAIL_ID, "2026-02-11T09:15:03.000Z", ACCEPTED, MAIL
    ),
    "enveloped_validation": Dropped("validation"),
    "enveloped_subscription_confirmation": Dropped("subscription", "SubscriptionConfirmation"),
    "enveloped_unsubscribe_confirmation": Dropped("subscription", "UnsubscribeConfirmation"),
    "eventbridge_bounce": Event(
        Kind.BOUNCE, "3b0c9e7a-5d41-4f2b-9c88-1e2d3c4b5a69", EMAIL_ID, "2026-02-11T09:15:04.871Z", BOUNCE, MAIL
    ),
    "eventbridge_advice": Dropped("unknown type", "Advisor Recommendation Status Open"),
}
"""What each sample says."""

RAW = [name for name, read in READ.items() if isinstance(read, Event) and read.event_id == HASH]


def sample(name: str) -> Any:
    """A sample to be changed."""
    return json.loads(SAMPLES[name])


def canonical_hash(event: Any) -> str:
    text = json.dumps(event, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def enveloped(event: Any, **changes: Any) -> str:
    """An event as SNS sends it; ``None`` takes a field out of the envelope."""
    envelope = sample("enveloped_open") | {"Message": json.dumps(event)} | changes
    return json.dumps({name: value for name, value in envelope.items() if value is not None})


def read(event: Any) -> Event:
    """An event that must be one, raw."""
    found = read_notification(json.dumps(event), NOW)
    assert isinstance(found, Event), found
    return found


def test_every_sample_is_expected_and_every_kind_has_one() -> None:
    assert set(SAMPLES) == set(READ)
    assert {each.kind for each in READ.values() if isinstance(each, Event)} == set(Kind)


@pytest.mark.parametrize("name", READ)
def test_a_sample(name: str) -> None:
    expected = READ[name]
    if name in RAW:
        assert isinstance(expected, Event)
        expected = expected._replace(event_id=canonical_hash(sample(name)))
    assert read_notification(SAMPLES[name], NOW) == expected


@pytest.mark.parametrize("name", RAW)
def test_a_raw_sample_in_an_envelope(name: str) -> None:
    expected = READ[name]
    assert isinstance(expected, Event)
    envelope = sample("enveloped_open")
    has_no_time = expected.kind in {Kind.REJECT, Kind.RENDERING_FAILURE}
    at = "2026-02-11T11:02:44.611Z" if has_no_time else expected.at
    expected = expected._replace(event_id=envelope["MessageId"], at=at)
    assert read_notification(enveloped(sample(name)), NOW) == expected


def test_an_event_of_eventbridges_through_sns_has_the_id_of_the_notification() -> None:
    found = read_notification(enveloped(sample("eventbridge_bounce")), NOW)
    assert isinstance(found, Event)
    assert found.event_id == sample("enveloped_open")["MessageId"]


# -- types -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["eventType", "notificationType"])
@pytest.mark.parametrize("kind", Kind)
def test_types_are_read_whatever_their_case(field: str, kind: Kind) -> None:
    for name in (kind, kind.upper(), kind.lower(), kind.replace(" ", ""), kind.replace(" ", "_").upper()):
        event = sample("open")
        del event["eventType"]
        assert read(event | {field: name}).kind is kind


def test_an_unknown_type_is_dropped_and_named() -> None:
    assert read_notification('{"eventType":"Read\\u0000\\nAloud"}', NOW) == Dropped("unknown type", "Read Aloud")
    dropped = read_notification(json.dumps({"eventType": "ü" * 100_000, "mail": {}}), NOW)
    assert dropped == Dropped("unknown type", "ü" * 32)


def test_the_text_that_ses_posts_when_it_is_set_up() -> None:
    text = "Successfully validated SNS topic for Amazon SES event publishing."
    for body in (text, f"\n{text}\n", json.dumps({"Type": "Notification", "Message": text})):
        assert read_notification(body, NOW) == Dropped("validation")


DEEP = '{"eventType":"Open","mail":{"tags":{"email_id":["a"]}},"x":' + "[" * 300 + "]" * 300 + "}"

BROKEN = {
    "": "the body is no JSON",
    "{": "the body is no JSON",
    '{"eventType":"Open"} trailing': "the body is no JSON",
    "NaN": "the body is no JSON",
    "[" * 2000: "the body is no JSON",
    '{"eventType":"Open","mail":{},"no double holds":1e400}': "the body is no JSON",
    "null": "the body is JSON, but no object",
    "[]": "the body is JSON, but no object",
    '"Open"': "the body is JSON, but no object",
    "{}": "the event has no eventType",
    '{"mail":{}}': "the event has no eventType",
    '{"eventType":7,"mail":{}}': "the event has no eventType",
    '{"eventType":"","notificationType":null}': "the event has no eventType",
    '{"eventType":"Open"}': "the event has no mail object",
    '{"eventType":"Open","mail":[]}': "the event has no mail object",
    DEEP: "the event is nested too deeply",
    '{"Type":"Notification"}': "the SNS envelope has no Message text",
    '{"Type":"Notification","Message":{"eventType":"Open"}}': "the SNS envelope has no Message text",
    '{"Type":["SubscriptionConfirmation"]}': "the SNS envelope has no Message text",
    '{"Message":"hello"}': "the Message in the SNS envelope is no JSON",
    '{"Type":"Notification","Message":"[1]"}': "the Message in the SNS envelope is JSON, but no object",
    '{"Type":"Notification","Message":"{}"}': "the event has no eventType",
    '{"detail-type":"Email Opened","detail":7}': "the event has no eventType",
    '{"detail-type":7,"detail":{}}': "the event has no eventType",
}


@pytest.mark.parametrize(("body", "why"), BROKEN.items(), ids=range(len(BROKEN)))
def test_what_is_broken(body: str, why: str) -> None:
    assert read_notification(body, NOW) == Broken(why)


# -- ids ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given_id", [None, "", "a b", "x" * 65, "ü", "a\n", 7, ["a"]])
def test_where_the_notification_has_no_usable_id_the_event_is_hashed(given_id: object) -> None:
    event = sample("open")
    found = read_notification(enveloped(event, MessageId=given_id), NOW)
    assert isinstance(found, Event)
    assert found.event_id == canonical_hash(event) == read(event).event_id


def test_the_hash_is_of_the_event_not_of_how_it_is_written() -> None:
    event = sample("open")
    backwards = json.dumps(dict(reversed(event.items())), indent=3, ensure_ascii=False)
    again = read_notification(backwards, NOW + 100)
    assert isinstance(again, Event)
    assert again.event_id == read(event).event_id
    event["open"]["userAgent"] += "."
    assert read(event).event_id != again.event_id


def with_headers(*values: object, name: str = "x-lfx-Tracking-id", tags: object = None) -> Any:
    event = sample("open")
    event["mail"]["headers"] = [{"name": "Subject", "value": "X/wrong"}, *({"name": name, "value": v} for v in values)]
    event["mail"]["tags"] = tags
    return event


@pytest.mark.parametrize(
    ("value", "group_id", "email_id"),
    [
        ("g/id-1", "g", "id-1"),
        (" g /id-1 ", "g ", "id-1"),
        ("a/b//id-1", "a/b/", "id-1"),
        ("id-1", "", "id-1"),
        ("/id-1", "", "id-1"),
        ("=w7w/id-1", "ü", "id-1"),
        ("=/id-1", "", "id-1"),
        ("=!/id-1", "", "id-1"),
        ("=7aCA/id-1", "", "id-1"),  # half a surrogate pair
        (f"{group_token('x' * 300)}/id-1", "", "id-1"),
        (f"{'x' * 999}/id-1", "", "id-1"),
    ],
)
def test_the_tracking_header(value: str, group_id: str, email_id: str) -> None:
    found = read(with_headers(value))
    assert (found.mail.group_id, found.email_id) == (group_id, email_id)


@given(
    st.text(max_size=300) | st.text(alphabet="=aQLw7/ -", max_size=8),
    st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
)
def test_a_group_comes_back_from_the_header_that_sending_writes(group_id: str, email_id: str) -> None:
    value = tracking_id(group_id, email_id)
    found = read(with_headers(value))
    assert found.email_id == email_id
    assert found.mail.group_id == ("" if value.startswith("==") else group_id)
    assert not value.startswith("==") or group_token(group_id).startswith("=="), "only what is too long is hashed"


@pytest.mark.parametrize("value", ["g/", "g/a b", "g/>", "g/*", "g/a.b", "g/" + "x" * 65, "", 7, None, ["g/id-1"]])
def test_an_id_that_is_none_is_not_taken_and_the_tag_is_asked(value: object) -> None:
    assert read_notification(json.dumps(with_headers(value)), NOW) == Dropped("foreign", "Open")
    found = read(with_headers(value, tags={"email_id": ["no id", "from-tag"]}))
    assert (found.mail.group_id, found.email_id) == ("", "from-tag")


def test_of_several_headers_the_first_with_an_id_counts() -> None:
    assert read(with_headers("g/no id", "h/one", "i/two", tags={"email_id": ["three"]})).email_id == "one"


@pytest.mark.parametrize("tags", [None, [], {}, {"email_id": []}, {"email_id": [7, "a b"]}, {"email_id": {"a": 1}}])
def test_without_header_and_tag_a_mail_is_foreign(tags: object) -> None:
    assert read_notification(json.dumps(with_headers("g/one", name="X-Other", tags=tags)), NOW) == Dropped(
        "foreign", "Open"
    )
    for headers in (None, {}, "X-LFX-TRACKING-ID: g/one", [None, [], "x", {"name": 7}, {"name": "X-LFX-TRACKING-ID"}]):
        event = with_headers(tags={"email_id": "tagged"})
        event["mail"]["headers"] = headers
        assert read(event).email_id == "tagged"


# -- times -------------------------------------------------------------------------------------------------------------

FALLBACK = "2026-02-14T20:13:20.250Z"
"""``NOW``."""


@pytest.mark.parametrize(
    ("written", "at"),
    [
        ("2018-10-08T14:05:45 +0000", "2018-10-08T14:05:45.000Z"),
        ("2018-10-08T14:05:45", "2018-10-08T14:05:45.000Z"),
        ("2018-10-08 14:05", "2018-10-08T14:05:00.000Z"),
        ("2018-10-08t14:05:45.1z", "2018-10-08T14:05:45.100Z"),
        ("2018-10-08T14:05:45.123456789Z", "2018-10-08T14:05:45.123Z"),
        ("2018-10-08T14:05:45.999999Z", "2018-10-08T14:05:45.999Z"),
        ("2018-10-08T14:05:45,5+02:00", "2018-10-08T12:05:45.500Z"),
        ("2018-10-08T00:05:45-0130", "2018-10-08T01:35:45.000Z"),
        ("2018-10-08T00:05:45-00:30", "2018-10-08T00:35:45.000Z"),
        ("2018-10-08T00:05:45+02", "2018-10-07T22:05:45.000Z"),
        ("2018-10-08T14:05:45 GMT", "2018-10-08T14:05:45.000Z"),
        (1539007545, "2018-10-08T14:05:45.000Z"),
        (1539007545.25, "2018-10-08T14:05:45.250Z"),
        (1539007545250, "2018-10-08T14:05:45.250Z"),
        ("1539007545", "2018-10-08T14:05:45.000Z"),
        ("1539007545250", "2018-10-08T14:05:45.250Z"),
        ("2000-01-01T00:00:00Z", "2000-01-01T00:00:00.000Z"),
    ],
)
def test_a_time(written: object, at: str) -> None:
    event = sample("open")
    event["open"]["timestamp"] = written
    event["mail"]["timestamp"] = written
    found = read(event)
    assert (found.at, found.mail.sent_at) == (at, at)


NO_TIMES = [
    None,
    True,
    "",
    "yesterday",
    "0001-01-01T00:00:00Z",
    "0001-01-01T00:00:00+23:59",
    "9999-12-31T23:59:59-23:59",
    "1999-12-31T23:59:59Z",
    "2026-02-16T00:00:00Z",
    "2100-01-01T00:00:00Z",
    "2018-02-30T00:00:00Z",
    "2018-10-08T25:00:00Z",
    "2018-10-08T14:05:60Z",
    "2018-10-08",
    "２０１８-10-08T14:05:45Z",
    "9" * 100_000,
    0,
    -1,
    1e300,
    -1e300,
    2**63,
    1e11,
    [],
    {"seconds": 1},
]


@pytest.mark.parametrize("written", NO_TIMES, ids=range(len(NO_TIMES)))
def test_what_is_no_time(written: object) -> None:
    event = sample("open")
    event["open"]["timestamp"] = written
    assert read(event).at == SENT_AT
    found = read_notification(enveloped(event), NOW)
    assert isinstance(found, Event)
    assert found.at == "2026-02-11T11:02:44.611Z", "the notification's"
    event["mail"]["timestamp"] = written
    assert (read(event).at, read(event).mail.sent_at) == (FALLBACK, "")


def test_the_time_of_a_send_is_the_mails_and_else_the_notifications() -> None:
    event = sample("send")
    event["send"]["timestamp"] = "2026-03-01T00:00:00.000Z"
    assert read(event).at == SENT_AT
    del event["mail"]["timestamp"]
    found = read_notification(enveloped(event), NOW)
    assert isinstance(found, Event)
    assert (found.at, found.mail.sent_at) == ("2026-02-11T11:02:44.611Z", "")


# -- details -----------------------------------------------------------------------------------------------------------


def test_words_that_ses_has_not_yet_pass() -> None:
    event = sample("bounce")
    event["bounce"] |= {"bounceType": "Sideways", "bounceSubType": "OnTenantSuppressionList"}
    assert read(event).detail == BOUNCE | {"type": "Sideways", "subtype": "OnTenantSuppressionList"}
    event = sample("delivery_delay")
    event["deliveryDelay"]["delayType"] = "SendingDeferral"
    assert read(event).detail == DELAY | {"type": "SendingDeferral"}


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("about", [None, 7, "", [], {}, {"bouncedRecipients": [7, None]}])
def test_where_nothing_is_told_nothing_is_kept(name: str, about: object) -> None:
    event = sample(name)
    (own,) = set(event) - {"eventType", "notificationType", "mail"}
    event[own] = about
    assert read(event).detail == ({"is_unsubscribed": False} if own == "subscription" else {})


def test_texts_are_bounded_and_in_one_line() -> None:
    event = sample("click")
    event["click"]["link"] = "https://www.example.com/" + "ü" * 5000
    link = read(event).detail["link"]
    assert link == "https://www.example.com/" + "ü" * ((2048 - 24) // 2)
    event["click"]["link"] = "https://www.example.com/\x00\x1b[31m\r\n\x7f\x85\u2028x"
    assert read(event).detail == {"link": "https://www.example.com/ [31m x"}
    event = sample("bounce")
    event["bounce"]["bouncedRecipients"][0] |= {"diagnosticCode": "🚀" * 300_000, "status": "5" * 300}
    event["bounce"]["bounceType"] = "\n" * 300
    detail = read(event).detail
    assert detail == {"subtype": "General", "status": "5" * 128, "diagnostic": "🚀" * 256}


def test_of_several_recipients_the_one_that_is_explained() -> None:
    event = sample("bounce")
    explained = event["bounce"]["bouncedRecipients"][0]
    event["bounce"]["bouncedRecipients"] = [7, {"status": "5.0.0"}, explained]
    assert read(event).detail == BOUNCE
    event["bounce"]["bouncedRecipients"] = [7, {"status": "5.0.0"}, {"status": "5.9.9"}]
    assert read(event).detail == {"type": "Permanent", "subtype": "General", "status": "5.0.0"}


@pytest.mark.parametrize(
    ("new", "old", "is_unsubscribed"),
    [
        ({"news": "OptOut"}, {"news": "OptIn"}, True),
        ({"news": "OptOut"}, {}, True),
        ({"news": "OptOut", "offers": "OptOut"}, {"news": "OptOut", "offers": "OptIn"}, True),
        ({"news": "OPT_OUT"}, {"news": "OPT_IN"}, True),
        ({"news": "OptOut", "offers": "OptIn"}, {"news": "OptOut", "offers": "OptOut"}, False),
        ({"news": "OptIn"}, {"news": "OptOut"}, False),
    ],
)
def test_a_topic_that_is_refused_from_now_on(new: dict[str, str], old: dict[str, str], is_unsubscribed: bool) -> None:
    event = sample("subscription_to_topics")
    for side, topics in (("newTopicPreferences", new), ("oldTopicPreferences", old)):
        status = [{"topicName": name, "subscriptionStatus": word} for name, word in topics.items()]
        event["subscription"][side] = {"unsubscribeAll": False, "topicSubscriptionStatus": [*status, None, {}]}
    assert read(event).detail["is_unsubscribed"] is is_unsubscribed


# -- the mail ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "destination", "to"),
    [
        ({"to": ["A <a@example.com>", "b@example.com"]}, ["c@example.com"], "A <a@example.com>, b@example.com"),
        ({"to": "a@example.com"}, ["c@example.com"], "a@example.com"),
        ({"to": []}, ["c@example.com", 7, "d@example.com"], "c@example.com, d@example.com"),
        ([], "c@example.com", "c@example.com"),
        (None, None, ""),
        ({"to": {"a": 1}}, {"b": 2}, ""),
    ],
)
def test_whom_the_mail_was_for(headers: object, destination: object, to: str) -> None:
    event = sample("open")
    event["mail"] |= {"commonHeaders": headers, "destination": destination}
    assert read(event).mail.to == to


def test_half_a_character_costs_no_event() -> None:
    event = sample("open")
    event["mail"]["commonHeaders"]["subject"] = "cut \ud83d"
    event["open"]["userAgent"] = "\udc00 \\ud83d \U0001f680"
    escaped, in_clear = json.dumps(event), json.dumps(event, ensure_ascii=False)
    for body in (
        escaped,
        in_clear,
        enveloped(event),
        json.dumps({"Type": "", "Message": in_clear}, ensure_ascii=False),
    ):
        found = read_notification(body, NOW)
        assert isinstance(found, Event)
        assert found.mail.subject_header == "cut \ufffd"
    repaired = copy.deepcopy(event)
    repaired["mail"]["commonHeaders"]["subject"] = "cut \ufffd"
    repaired["open"]["userAgent"] = "\ufffd \\ud83d \U0001f680"
    assert read(event).event_id == canonical_hash(repaired), "and nothing else is changed"


# -- whatever comes ----------------------------------------------------------------------------------------------------


def check(body: str) -> None:
    """Exactly one of the three, and an event that can be kept."""
    found = read_notification(body, NOW)
    if isinstance(found, Event):
        assert is_email_id(found.email_id)
        assert re.fullmatch(r"[\x21-\x7e]{1,64}", found.event_id)
        assert parse_time(found.at) is not None
        assert not found.mail.sent_at or parse_time(found.mail.sent_at) is not None
        assert all(type(text) is str for text in found.mail)
        assert len(orjson.dumps(found.detail)) < 8192
        orjson.dumps(list(found.mail))
    else:
        assert isinstance(found, Dropped | Broken)
        assert found.why
        assert isinstance(found, Dropped) or len(found.why) < 80, "a sentence of ours, nothing of what was sent"


TEXTS = st.text(max_size=20) | st.sampled_from(
    ["", "g/id", "=w7w/id", "Open", "Bounce", "2026-02-11T09:15:02Z", "0001-01-01T00:00:00+23:59", "\x00", "🚀" * 900]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
OUTER = ["Type", "Message", "MessageId", "Timestamp", "detail", "detail-type", "id"]
INNER = ["eventType", "notificationType", "mail", "headers", "name", "value", "tags", "email_id", "timestamp", "open"]
NAMES = st.sampled_from([*OUTER, *INNER, "commonHeaders", "to", "bounce", "bouncedRecipients"])
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | TEXTS, inner, max_size=6),
    max_leaves=25,
)


@given(st.text())
def test_any_text(text: str) -> None:
    check(text)
    check(json.dumps({"Type": "Notification", "Message": text}))


@given(st.text(alphabet=st.characters(categories=["Cs", "Lu"]), max_size=5))
def test_any_text_with_half_characters(text: str) -> None:
    check(text)
    check(json.dumps(text))
    check(json.dumps(sample("open") | {text: text}))
    check(json.dumps(sample("open") | {"eventType": text}, ensure_ascii=False))


@given(VALUES)
def test_any_json(value: Any) -> None:
    check(json.dumps(value))
    check(enveloped(value))
    check(json.dumps({"eventType": "Open", "mail": value}))


@given(st.sampled_from(sorted(SAMPLES)), st.data())
def test_a_sample_with_some_characters_changed(name: str, data: st.DataObject) -> None:
    text = SAMPLES[name]
    begin = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(begin, min(len(text), begin + 20)))
    check(text[:begin] + data.draw(st.text(alphabet='{}[]",:\\u0d8x\ud800', max_size=6)) + text[end:])


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a value with each of its keys or indexes."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


@given(st.sampled_from(sorted(SAMPLES)), st.data())
def test_a_sample_with_parts_taken_out_or_of_another_type(name: str, data: st.DataObject) -> None:
    event = sample(name)
    for _ in range(data.draw(st.integers(1, 4))):
        if not (places := _places(event)):
            break
        container, key = places[data.draw(st.integers(0, len(places) - 1))]
        if data.draw(st.booleans()):
            del container[key]
        else:
            container[key] = data.draw(VALUES)
    check(json.dumps(event))
    check(enveloped(event))
