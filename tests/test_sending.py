"""The journey of a mail in one process: real NATS, a scripted SMTP server, one reply to every request."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay import contract
from relay.bookkeeping import RELAYED, RELAYED_FIELDS
from relay.bus.client import Bus, Publication
from relay.bus.jetstream import JetStream
from relay.bus.kv import Bucket
from relay.bus.service import Service
from relay.delivery.config import Host, SmarthostConfig, Timeouts
from relay.delivery.smarthost import Smarthost
from relay.sending import Sending, send_handler
from relay.submission.admission import Admission
from relay.tracking.log import Log
from relay.tracking.storage import StorageConfig
from relay.tracking.tracker import Tracker
from tests.support.bus_caller import replies_to
from tests.support.scripted_smtp import Action, ScriptedSmtp, drop, say, stall
from tests.support.sending import ask as ask_with
from tests.support.sending import extras_for, policy_for

MAIL = {"to": "user@example.com", "subject": "Hello", "text": "Hello.\n", "html": "<p>Hello.</p>"}
PATIENCE_SECONDS = 1.0


@pytest.fixture
def smtp() -> Iterator[ScriptedSmtp]:
    """An SMTP server that takes everything until it is told otherwise."""
    with ScriptedSmtp() as server:
        yield server


@pytest.fixture
def new_sending(smtp: ScriptedSmtp, jetstream: JetStream) -> Iterator[Callable[..., Sending]]:
    """Makes the job with all its real parts."""
    smarthosts: list[Smarthost] = []

    def make(
        configuration_set: str = "",
        dot_seconds: float = 0.5,
        log_relayed: Callable[..., None] | None = None,
        **policy: Any,
    ) -> Sending:
        config = SmarthostConfig(
            hosts=(Host("127.0.0.1", smtp.port),),
            tls="off",
            pool_size=4,
            timeouts=Timeouts(mail_seconds=0.5, rcpt_seconds=0.5, data_seconds=0.5, dot_seconds=dot_seconds),
        )
        smarthost = Smarthost(config, default_sender="noreply@example.org")
        smarthosts.append(smarthost)
        tracker = Tracker(jetstream, StorageConfig(), 1.0, on_change=lambda _: None)
        tracker.start()
        return Sending(
            policy=policy_for(**policy),
            smarthost=smarthost,
            tracker=tracker,
            configuration_set=configuration_set,
            extras=extras_for(jetstream, PATIENCE_SECONDS),
            **({"log_relayed": log_relayed} if log_relayed else {}),
        )

    yield make
    for smarthost in smarthosts:
        smarthost.close(time.monotonic())


def ask(sending: Sending, request: Any) -> dict[str, Any]:
    """One request to the job itself."""
    return ask_with(sending, request, PATIENCE_SECONDS)


def record_of(jetstream: JetStream, email_id: str) -> dict[str, Any] | None:
    """The record that stands in the bucket."""
    entry = Bucket(jetstream, contract.RECIPIENTS_BUCKET).get(email_id)
    return json.loads(entry.value) if entry else None


def test_a_relayed_mail(new_sending: Callable[..., Sending], smtp: ScriptedSmtp, jetstream: JetStream) -> None:
    smtp.change({"dot": say("250 Ok 0100018c-ses-id-000000")})
    reply = ask(new_sending(), MAIL | {"group_id": "sending-1"})
    assert set(reply) == {"email_id", "group_id", "message_id_header", "remote_id"}
    assert reply["remote_id"] == "0100018c-ses-id-000000"
    (mail,) = smtp.mails
    assert mail.reverse_path == "noreply@example.org"
    assert f"X-LFX-TRACKING-ID: sending-1/{reply['email_id']}".encode() in mail.content
    assert b"X-SES" not in mail.content
    record = record_of(jetstream, reply["email_id"])
    assert record is not None
    assert record["remote_id"] == "0100018c-ses-id-000000"
    assert Log(jetstream).counts("sending-1") == {"sent": 1}


def test_the_line_of_a_relayed_mail(
    new_sending: Callable[..., Sending], smtp: ScriptedSmtp, caplog: pytest.LogCaptureFixture
) -> None:
    lines: list[dict[str, Any]] = []
    caplog.set_level("INFO", "relay.sending")
    sending = new_sending(log_relayed=lambda *values: lines.append(dict(zip(RELAYED_FIELDS, values, strict=True))))
    for each in (new_sending(), sending):
        reply = ask(each, MAIL | {"group_id": "someone@example.com " + "g" * 200})
    (record,) = [record for record in caplog.records if record.message == RELAYED]
    assert lines[0]["email_id"] == reply["email_id"]
    for told in (*lines, vars(record)):
        assert told["group_id"] == "som****@example.com " + "g" * 108
        assert told["outcome"] == "relayed"
        assert type(told["outcome"]) is str
        for step in ("compose_ms", "smtp_ms", "tracking_ms"):
            assert 0 < told[step] < 1000
            assert told[step] == round(told[step], 2)
    # What is not relayed is a line of its own kind.
    smtp.change({"rcpt": say("550 5.1.1 no such user")})
    ask(sending, MAIL)
    assert len(lines) == 1
    assert "mail not relayed" in caplog.text


def test_attempts_are_timed_and_replies_counted_by_class(
    new_sending: Callable[..., Sending], smtp: ScriptedSmtp
) -> None:
    sending = new_sending()
    for reply in ("250 Ok", "451 4.3.0 later", "550 5.7.1 never", "250 Ok"):
        smtp.change({"dot": say(reply)})
        ask(sending, MAIL)
    smtp.change({"dot": stall()})
    ask(sending, MAIL)
    ask(sending, {"subject": "to nobody"})  # refused: no attempt
    assert sending.reply_classes == {"2xx": 2, "4xx": 1, "5xx": 1, "none": 1}
    assert sum(sending.send_seconds.counts) == 5
    smtp.change({})
    several = {key: value for key, value in MAIL.items() if key != "to"}
    ask(sending, several | {"to": ["a@example.com", "b@example.com"], "recipients_as": "individual"})
    # Two mails, one request
    assert (sending.reply_classes["2xx"], sum(sending.send_seconds.counts)) == (4, 6)


def test_the_headers_for_ses(new_sending: Callable[..., Sending], smtp: ScriptedSmtp) -> None:
    reply = ask(new_sending(configuration_set="events"), MAIL)
    (mail,) = smtp.mails
    assert b"X-SES-CONFIGURATION-SET: events\r\n" in mail.content
    assert f"X-SES-MESSAGE-TAGS: email_id={reply['email_id']}\r\n".encode() in mail.content


OUTCOMES = [
    ("rcpt", say("550 5.1.1 no such user"), "failed", False, 550, "5.1.1"),
    ("rcpt", say("450 4.2.0 greylisted"), "deferred", True, 450, "4.2.0"),
    ("mail", say("501 Invalid MAIL FROM address provided"), "failed", False, 501, ""),
    ("data", say("451 4.3.0 try later"), "deferred", True, 451, "4.3.0"),
    ("dot", say("552 5.3.4 Message is too long"), "failed", False, 552, "5.3.4"),
    ("dot", say("454 Temporary service failure"), "deferred", True, 454, ""),
    ("rcpt", drop(), "deferred", True, None, ""),
    ("dot", drop(), "in_doubt", False, None, ""),
    ("dot", stall(), "in_doubt", False, None, ""),
    ("mail", stall(), "deferred", True, None, ""),
]


@pytest.mark.parametrize(("phase", "action", "outcome", "retryable", "code", "enhanced"), OUTCOMES)
def test_what_the_caller_is_told(
    new_sending: Callable[..., Sending],
    smtp: ScriptedSmtp,
    jetstream: JetStream,
    phase: str,
    action: Action,
    outcome: str,
    retryable: bool,
    code: int | None,
    enhanced: str,
) -> None:
    smtp.change({phase: action})
    group_id = f"told-{time.monotonic_ns()}"
    reply = ask(new_sending(), MAIL | {"group_id": group_id})
    assert reply["error"] == contract.DELIVERY_FAILED
    assert (reply["outcome"], reply["retryable"]) == (outcome, retryable)
    assert reply.get("reply_code") == code
    assert reply.get("enhanced_code", "") == enhanced
    assert reply["detail"]
    assert "\n" not in reply["detail"]
    assert Log(jetstream).counts(group_id) == {}, "what is not relayed is not counted as sent"
    if outcome == "in_doubt":
        record = record_of(jetstream, reply["email_id"])
        assert record is not None
        assert record["outcome"] == "in_doubt"
    else:
        assert "email_id" not in reply


@pytest.mark.parametrize(
    ("late", "outcome", "facts"),
    [
        ("250 Ok 0100018c-ses-id-000001", "", {"sent": 1}),
        ("554 5.6.0 no", "failed", {}),
        ("451 4.3.0 try later", "deferred", {}),
    ],
)
def test_a_mail_in_doubt_is_settled_by_what_comes(
    new_sending: Callable[..., Sending],
    smtp: ScriptedSmtp,
    jetstream: JetStream,
    late: str,
    outcome: str,
    facts: dict[str, int],
) -> None:
    smtp.change({"dot": dataclasses.replace(say(late), wait_seconds=0.4)})
    sending = new_sending(dot_seconds=5.0)
    group_id = f"settled-{time.monotonic_ns()}"
    reply = ask_with(sending, MAIL | {"group_id": group_id}, 0.2)
    assert (reply["outcome"], reply["retryable"]) == ("in_doubt", False)
    record = record_of(jetstream, reply["email_id"])
    assert record is not None
    assert record["outcome"] == "in_doubt"
    assert Log(jetstream).counts(group_id) == {}
    with gevent.Timeout(5):
        while record.get("outcome") == "in_doubt":
            gevent.sleep(0.02)
            record = record_of(jetstream, reply["email_id"])
            assert record is not None
    assert record.get("outcome", "") == outcome
    assert record.get("remote_id", "") == ("0100018c-ses-id-000001" if not outcome else "")
    assert Log(jetstream).counts(group_id) == facts
    assert (sending.counts["in_doubt"], sending.counts["settled"]) == (1, 1)


def test_what_the_smarthost_says_of_an_address_is_logged_redacted(
    new_sending: Callable[..., Sending], smtp: ScriptedSmtp, caplog: pytest.LogCaptureFixture
) -> None:
    smtp.change({"rcpt": say("550 5.1.1 <someone@example.com>: no such user")})
    sending = new_sending()
    reply = ask(sending, MAIL | {"to": "someone@example.com"})
    assert "<someone@example.com>" in reply["detail"], "the caller knows the address"
    assert "som****@example.com" in caplog.text
    assert "someone@example.com" not in caplog.text + sending.last_error


def test_the_recipient_filter_answers_success_and_sends_nothing(
    new_sending: Callable[..., Sending], smtp: ScriptedSmtp
) -> None:
    sending = new_sending(allowed_recipient_domains=("example.org",))
    assert ask(sending, MAIL | {"from": "not allowed anyway"}) == {"email_id": "", "group_id": ""}
    assert ask(sending, MAIL | {"to": "a@sub.example.org"})["email_id"]
    assert len(smtp.mails) == 1


def test_switched_off_it_answers_success_and_sends_nothing(
    new_sending: Callable[..., Sending], smtp: ScriptedSmtp
) -> None:
    sending = new_sending(email_enabled=False)
    assert ask(sending, MAIL | {"group_id": "off"}) == {"email_id": "", "group_id": ""}
    assert ask(sending, MAIL | {"from": "x@example.com"})["error"] == contract.FROM_DOMAIN_NOT_ALLOWED
    assert not smtp.mails


def test_what_lfx_takes_and_json_libraries_refuse(new_sending: Callable[..., Sending], smtp: ScriptedSmtp) -> None:
    sending = new_sending()
    lone_surrogate = json.dumps(MAIL).replace("Hello.", "\\ud800").encode()
    assert ask(sending, lone_surrogate)["email_id"]
    assert ask(sending, json.dumps(MAIL).encode().replace(b"Hello", b"\xff"))["email_id"]
    assert ask(sending, {key.upper(): value for key, value in MAIL.items()})["email_id"]
    assert len(smtp.mails) == 3


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=40),
    st.lists(st.text(max_size=5), max_size=3),
)
addresses = st.one_of(
    st.text(max_size=30), st.sampled_from(["a@example.com", "A <a@example.org>", "ü@example.com", "@", "a@b"])
)
requests = st.dictionaries(
    st.one_of(st.sampled_from([*contract.SEND_EMAIL_FIELDS, "To", "SUBJECT"]), st.text(max_size=8)), values, max_size=10
)
mails = st.fixed_dictionaries(
    {"to": addresses, "subject": st.text(max_size=80), "html": st.text(max_size=200), "text": st.text(max_size=200)},
    optional={"from": addresses, "reply_to": addresses, "from_display_name": st.text(), "group_id": st.text()},
)
payloads = st.one_of(
    st.binary(max_size=200),
    st.one_of(requests, mails, values).map(lambda value: json.dumps(value).encode()),
    mails.map(lambda mail: json.dumps(mail, ensure_ascii=False).encode("utf-8", "surrogatepass")),
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(payload=payloads)
def test_no_input_makes_it_raise_stay_silent_or_answer_twice(
    served: Callable[[bytes], list[bytes]], payload: bytes
) -> None:
    (reply,) = served(payload)
    told = json.loads(reply)
    assert set(told) >= {"email_id", "group_id"} or told["error"]
    assert told.get("detail") != "the relay met an error of its own; it may have sent the mail"


@pytest.fixture
def served(bus: Bus, new_sending: Callable[..., Sending]) -> Callable[[bytes], list[bytes]]:
    """The job as the bus serves it; gives all replies to one request."""
    nats_subject = "sending.under.test"
    service = Service(
        bus,
        nats_subject=nats_subject,
        queue_group="q",
        handler=send_handler(new_sending()),
        gate=Admission(100, 10_000_000, 4),
        patience_seconds=5,
        reply_prefixes=("_INBOX",),
    )
    service.start()

    def request(payload: bytes) -> list[bytes]:
        return [msg.payload for msg in replies_to(bus, nats_subject, payload)]

    return request


def test_a_burst_is_answered_completely(bus: Bus, new_sending: Callable[..., Sending], smtp: ScriptedSmtp) -> None:
    service = Service(
        bus,
        nats_subject="burst.under.test",
        queue_group="q",
        handler=send_handler(new_sending()),
        gate=Admission(5000, 64_000_000, 4),
        patience_seconds=30,
        reply_prefixes=("elsewhere",),
    )
    service.start()
    for _ in range(500):
        bus.publish(Publication("burst.under.test", json.dumps(MAIL).encode()))
    bus.flush()
    service.stop()
    assert service.wait_answered(20) == 0
    assert len(smtp.mails) == 500
    assert smtp.peak_connections <= 4
