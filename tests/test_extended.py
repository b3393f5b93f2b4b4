"""Requests with options in one process: real NATS, a scripted SMTP server, and what both saw."""

from __future__ import annotations

import base64
import email
import email.policy
import json
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import gevent
import pytest

import relay.extended
from relay import contract
from relay.bookkeeping import AMEND_SECONDS, Books
from relay.bus.jetstream import JetStream, Stored
from relay.bus.kv import Bucket
from relay.delivery.config import Host, SmarthostConfig, Timeouts
from relay.delivery.smarthost import Smarthost
from relay.errors import BusUnavailable
from relay.extended import OBJECT_MAILS_AT_ONCE
from relay.idempotency.claim import claim_key
from relay.idempotency.claims import Claims
from relay.sending import Sending
from relay.tracking.log import Log
from relay.tracking.record import RecipientOutcome
from relay.tracking.storage import StorageConfig
from relay.tracking.tracker import HandedOver, Tracker
from tests.bus.test_objects import in_nats_py, put
from tests.support.nats_server import NatsServer
from tests.support.scripted_smtp import Action, ScriptedSmtp, say, stall, wait
from tests.support.sending import ask, extras_for, policy_for

MAIL = {"to": "user@example.com", "subject": "Hello", "text": "Hello.\n", "html": "<p>Hello.</p>"}
PATIENCE_SECONDS = 2.0

NewSending = Callable[..., Sending]


@pytest.fixture
def smtp() -> Iterator[ScriptedSmtp]:
    """An SMTP server that takes everything until it is told otherwise."""
    with ScriptedSmtp() as server:
        yield server


@pytest.fixture
def new_sending(smtp: ScriptedSmtp, jetstream: JetStream) -> Iterator[NewSending]:
    """Makes the job with all its real parts, as one worker of several."""
    smarthosts: list[Smarthost] = []

    def make(
        worker: str = "send-1", rules: dict[str, Any] | None = None, dot_seconds: float = 0.5, **extras: Any
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
            policy=policy_for(**(rules or {})),
            smarthost=smarthost,
            tracker=tracker,
            configuration_set="",
            extras=extras_for(jetstream, PATIENCE_SECONDS, worker, **extras),
        )

    yield make
    for smarthost in smarthosts:
        smarthost.close(time.monotonic())


def send(sending: Sending, *, nats_headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    """One request to the job: ``MAIL`` and ``fields``."""
    return ask(sending, MAIL | fields, PATIENCE_SECONDS, nats_headers)


def record_of(jetstream: JetStream, email_id: str) -> dict[str, Any]:
    """The record that stands in the bucket."""
    entry = Bucket(jetstream, contract.RECIPIENTS_BUCKET).get(email_id)
    assert entry is not None
    found = json.loads(entry.value)
    assert isinstance(found, dict)
    return found


def wait_recorded(jetstream: JetStream, email_id: str, outcomes: list[str]) -> dict[str, Any]:
    """The record, as soon as it says this of its recipients."""
    with gevent.Timeout(10):
        while [each["outcome"] for each in record_of(jetstream, email_id)["recipients"]] != outcomes:
            gevent.sleep(0.01)
    return record_of(jetstream, email_id)


def leave_as_if_killed(jetstream: JetStream, request_id: str, lease_seconds: float) -> None:
    """Makes of a claim that is done what a worker leaves that is killed after its final dot."""
    bucket = Bucket(jetstream, contract.REQUESTS_BUCKET)
    key = claim_key("", request_id)
    entry = bucket.get(key)
    assert entry is not None
    value = json.loads(entry.value)
    ids = [{name: each[name] for name in ("email_id", "message_id_header")} for each in value["recipients"]]
    value |= {"state": "committing", "lease_seconds": lease_seconds}
    value["recipients"] = [each | {"outcome": "committing"} for each in ids]
    del value["reply"]
    (answer,) = jetstream.store([bucket.replacement(key, json.dumps(value).encode(), entry.revision)], 1.0)
    assert isinstance(answer, Stored)


@pytest.fixture
def sent_published(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The subjects of all ``sent`` facts that are published, also of those that the log knows already."""
    subjects: list[str] = []
    store = JetStream.store

    def spying(self: JetStream, publications: list[Any], timeout_seconds: float | None = None) -> Any:
        subjects.extend(each.nats_subject for each in publications if each.nats_subject.endswith(".sent"))
        return store(self, publications, timeout_seconds)

    monkeypatch.setattr(JetStream, "store", spying)
    return subjects


@pytest.fixture
def files() -> str:
    """An Object Store bucket that nobody has used."""
    return uuid.uuid4().hex


def attached(bucket: str, name: str = "f") -> list[dict[str, Any]]:
    """``attachments`` with one that lies in an Object Store."""
    return [{"filename": "a.txt", "object": {"bucket": bucket, "name": name}}]


def parsed(content: bytes) -> email.message.EmailMessage:
    """A mail as the standard library reads it."""
    found = email.message_from_bytes(content, policy=email.policy.default)
    assert isinstance(found, email.message.EmailMessage)
    return found


# -- recipients --------------------------------------------------------------------------------------------------------
def test_one_mail_to_several(new_sending: NewSending, smtp: ScriptedSmtp, jetstream: JetStream) -> None:
    reply = send(
        new_sending(),
        to=["Ann <ann@example.com>", "bob@example.com"],
        cc="carol@example.com",
        bcc=["dan@example.com"],
        group_id="several-1",
    )
    (mail,) = smtp.mails
    assert mail.forward_paths == ("ann@example.com", "bob@example.com", "carol@example.com", "dan@example.com")
    head = parsed(mail.content)
    assert (head["To"], head["Cc"], head["Bcc"]) == (
        "Ann <ann@example.com>, bob@example.com",
        "carol@example.com",
        None,
    )
    assert b"dan@" not in mail.content
    assert [(each["address"], each["outcome"]) for each in reply["recipients"]] == [
        ("Ann <ann@example.com>", "relayed"),
        ("bob@example.com", "relayed"),
        ("carol@example.com", "relayed"),
        ("dan@example.com", "relayed"),
    ]
    record = record_of(jetstream, reply["email_id"])
    assert record["to"] == "Ann <ann@example.com>, bob@example.com"
    assert [each["address"] for each in record["recipients"]] == [each["address"] for each in reply["recipients"]]
    assert Log(jetstream).counts("several-1") == {"sent": 1}


def test_who_is_refused_does_not_keep_the_mail_from_the_others(
    new_sending: NewSending, smtp: ScriptedSmtp, jetstream: JetStream
) -> None:
    smtp.change({"rcpt": [say("250 ok"), say("550 5.1.1 unknown")]})
    reply = send(new_sending(), to=["ann@example.com", "bob@example.com"])
    assert "error" not in reply
    assert [(each["outcome"], each["reply_code"], each["enhanced_code"]) for each in reply["recipients"]] == [
        ("relayed", 250, "2.0.0"),
        ("failed", 550, "5.1.1"),
    ]
    assert [each["outcome"] for each in record_of(jetstream, reply["email_id"])["recipients"]] == ["relayed", "failed"]


def test_nobody_relayed_is_the_worst_outcome(new_sending: NewSending, smtp: ScriptedSmtp) -> None:
    smtp.change({"rcpt": [say("450 4.2.1 later"), say("550 5.1.1 unknown")]})
    reply = send(new_sending(), to=["ann@example.com", "bob@example.com"])
    assert (reply["error"], reply["outcome"], reply["retryable"]) == (contract.DELIVERY_FAILED, "failed", False)
    assert [each["outcome"] for each in reply["recipients"]] == ["deferred", "failed"]


def test_individual_mails_share_a_group(new_sending: NewSending, smtp: ScriptedSmtp, jetstream: JetStream) -> None:
    to = [f"reader{number}@example.com" for number in range(12)]
    reply = send(new_sending(), to=to, recipients_as="individual")
    assert [each["address"] for each in reply["recipients"]] == to
    email_ids = [each["email_id"] for each in reply["recipients"]]
    assert len({*email_ids, reply["group_id"]}) == 13
    assert sorted(mail.forward_paths for mail in smtp.mails) == sorted((one,) for one in to)
    for mail in smtp.mails:
        assert parsed(mail.content)["To"] == mail.forward_paths[0]
    assert Log(jetstream).counts(reply["group_id"]) == {"sent": 12}
    for email_id, address in zip(email_ids, to, strict=True):
        assert record_of(jetstream, email_id)["to"] == address


def test_filtered_recipients_are_left_out(new_sending: NewSending, smtp: ScriptedSmtp) -> None:
    sending = new_sending(rules={"allowed_recipient_domains": ("example.com",)})
    reply = send(sending, to=["ann@example.com", "bob@example.net"])
    assert [mail.forward_paths for mail in smtp.mails] == [("ann@example.com",)]
    assert b"example.net" not in smtp.mails[0].content
    assert reply["email_id"]
    assert send(sending, to=["bob@example.net"]) == {"email_id": "", "group_id": ""}
    assert len(smtp.mails) == 1


def test_bcc_alone_when_to_is_filtered(new_sending: NewSending, smtp: ScriptedSmtp) -> None:
    sending = new_sending(rules={"allowed_recipient_domains": ("example.com",)})
    for more in ({}, {"request_id": "filtered-1"}):
        reply = send(sending, to="ann@example.net", bcc="bob@example.com", **more)
        assert reply["email_id"]
        mail = smtp.mails.pop()
        assert mail.forward_paths == ("bob@example.com",)
        assert parsed(mail.content)["To"] is None
        assert b"ann@" not in mail.content
        assert b"bob@" not in mail.content


def test_one_individual_mail_too_large_does_not_hide_the_others(
    new_sending: NewSending, smtp: ScriptedSmtp, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = {"recipients_as": "individual", "text": "Hello there.\n" * 500}
    send(new_sending(), to=["ann@example.com"], **wanted)
    limit_bytes = len(smtp.mails.pop().content) + 300
    sending = new_sending(max_message_bytes=limit_bytes)
    to = ["ann@example.com", f'"{"y" * 900}" <bob@example.com>', "carol@example.com"]
    reply = send(sending, to=to, request_id="one-too-large", **wanted)
    assert sorted(mail.forward_paths for mail in smtp.mails) == [("ann@example.com",), ("carol@example.com",)]
    assert [each["outcome"] for each in reply["recipients"]] == ["relayed", "failed", "relayed"]
    assert send(sending, to=to, request_id="one-too-large", **wanted) == reply | {"duplicate": True}
    assert "example.com" not in capfd.readouterr().err


@pytest.mark.parametrize(("at_once_bytes", "expected"), [(50_000, 2), (1, 1)])
def test_contents_of_individual_mails_are_bounded(
    new_sending: NewSending,
    smtp: ScriptedSmtp,
    monkeypatch: pytest.MonkeyPatch,
    at_once_bytes: int,
    expected: int,
) -> None:
    monkeypatch.setattr(relay.extended, "INDIVIDUAL_BYTES_AT_ONCE", at_once_bytes)
    to = [f"reader{number}@example.com" for number in range(8)]
    send(new_sending(), to=to, recipients_as="individual", text="Hello there.\n" * 1500)
    assert len(smtp.mails) == 8
    assert smtp.peak_connections == expected


def test_of_a_long_text_only_the_mailbox_is_told(
    new_sending: NewSending, smtp: ScriptedSmtp, jetstream: JetStream
) -> None:
    reply = send(new_sending(), to=[f'"{"n" * 9_900}" <ann@example.com>', "Bob <bob@example.com>"])
    expected = ["ann@example.com", "Bob <bob@example.com>"]
    assert [each["address"] for each in reply["recipients"]] == expected
    record = record_of(jetstream, reply["email_id"])
    assert [each["address"] for each in record["recipients"]] == expected
    assert smtp.mails[0].forward_paths == ("ann@example.com", "bob@example.com")


# -- request ids -------------------------------------------------------------------------------------------------------
def test_the_same_request_again_is_answered_again(new_sending: NewSending, smtp: ScriptedSmtp) -> None:
    first, second = new_sending(), new_sending("send-2")
    reply = send(first, request_id="again-1", group_id="g")
    assert "duplicate" not in reply
    assert send(second, request_id="again-1", group_id="g", timeout_seconds=1) == reply | {"duplicate": True}
    assert len(smtp.mails) == 1


def test_the_id_of_another_mail_is_refused(new_sending: NewSending, smtp: ScriptedSmtp) -> None:
    sending = new_sending()
    send(sending, request_id="other-1")
    reply = send(sending, request_id="other-1", subject="Another")
    assert reply == {"error": contract.REQUEST_ID_REUSED, "outcome": "refused", "retryable": False}
    assert len(smtp.mails) == 1


def test_members_in_another_order_are_the_same_mail(new_sending: NewSending, smtp: ScriptedSmtp) -> None:
    sending = new_sending()
    reply = send(sending, request_id="order-1", headers={"X-A": "1", "X-B": "2"}, tags={"a": "1", "b": "2"})
    again = send(sending, request_id="order-1", tags={"b": "2", "a": "1"}, headers={"X-B": "2", "X-A": "1"})
    assert again == reply | {"duplicate": True}
    assert len(smtp.mails) == 1


def test_twins_wait_for_the_first_one_and_hold_nothing(new_sending: NewSending, smtp: ScriptedSmtp) -> None:
    smtp.change({"dot": [say("250 Ok 0100018c-ses-id-000001")]})
    workers = [new_sending(f"send-{number}") for number in range(1, 5)]
    aside: list[object] = []

    def twin(sending: Sending) -> dict[str, Any]:
        return ask(sending, MAIL | {"request_id": "twins-1"}, PATIENCE_SECONDS, step_aside=aside.append)

    twins = [gevent.spawn(twin, workers[number % 4]) for number in range(40)]
    gevent.joinall(twins, raise_error=True, timeout=10)
    replies = [each.value for each in twins]
    assert len(smtp.mails) == 1
    assert sum("duplicate" not in reply for reply in replies) == 1
    assert len({json.dumps({**reply, "duplicate": None}, sort_keys=True) for reply in replies}) == 1
    assert len(aside) >= 36  # all but those who came when it was done


def test_a_deferred_request_may_be_made_again(new_sending: NewSending, smtp: ScriptedSmtp) -> None:
    smtp.change({"mail": [say("451 4.3.0 later")]})
    sending = new_sending()
    assert send(sending, request_id="deferred-1")["outcome"] == "deferred"
    reply = send(sending, request_id="deferred-1")
    assert reply["email_id"]
    assert "duplicate" not in reply
    assert len(smtp.mails) == 1


def test_a_request_in_doubt_is_not_made_again(
    new_sending: NewSending, smtp: ScriptedSmtp, jetstream: JetStream
) -> None:
    smtp.change({"dot": [stall()]})
    sending = new_sending()
    reply = send(sending, request_id="doubt-1")
    assert (reply["outcome"], reply["retryable"]) == ("in_doubt", False)
    assert send(sending, request_id="doubt-1") == reply | {"duplicate": True}
    assert record_of(jetstream, reply["email_id"])["outcome"] == "in_doubt"


def test_a_retry_sends_only_to_those_who_are_certainly_unsent(
    new_sending: NewSending, smtp: ScriptedSmtp, jetstream: JetStream
) -> None:
    smtp.change({"rcpt": [say("250 ok"), say("450 4.2.1 later")]})
    sending = new_sending()
    wanted = {"to": ["ann@example.com", "bob@example.com"], "request_id": "rest-1", "group_id": "rest"}
    first = send(sending, **wanted)
    assert [each["outcome"] for each in first["recipients"]] == ["relayed", "deferred"]
    second = send(sending, **wanted)
    assert [each["outcome"] for each in second["recipients"]] == ["relayed", "relayed"]
    assert [mail.forward_paths for mail in smtp.mails] == [("ann@example.com",), ("bob@example.com",)]
    assert second["email_id"] == first["email_id"]
    assert parsed(smtp.mails[1].content)["To"] == "ann@example.com, bob@example.com"
    with gevent.Timeout(5):
        while [r["outcome"] for r in record_of(jetstream, first["email_id"])["recipients"]] != ["relayed", "relayed"]:
            gevent.sleep(0.01)
    assert Log(jetstream).counts("rest") == {"sent": 1}
    assert send(sending, **wanted) == second | {"duplicate": True}


# -- records that come late --------------------------------------------------------------------------------------------
def test_who_gets_it_in_a_further_transaction_is_not_counted_again(
    new_sending: NewSending, smtp: ScriptedSmtp, jetstream: JetStream, sent_published: list[str]
) -> None:
    # Given a mail that goes out in two transactions, and the answer to the second comes after the deadline
    smtp.change(
        {
            "rcpt": [say("250 ok"), say("452 4.5.3 too many recipients"), say("250 ok")],
            "dot": [say("250 2.0.0 ok"), wait(1.2)],
        }
    )
    to = ["ann@example.com", "bob@example.com"]
    reply = send(new_sending(dot_seconds=5), to=to, group_id="further", timeout_seconds=0.7)
    assert [each["outcome"] for each in reply["recipients"]] == ["relayed", "in_doubt"]
    # When it has come, then the record says so, and the mail was counted once
    record = wait_recorded(jetstream, reply["email_id"], ["relayed", "relayed"])
    assert "outcome" not in record
    assert len(sent_published) == 1


def test_a_late_answer_does_not_undo_a_later_attempt(
    new_sending: NewSending, smtp: ScriptedSmtp, jetstream: JetStream, sent_published: list[str]
) -> None:
    # Given one whose final dot is not answered yet, and one who was deferred
    smtp.change(
        {
            "rcpt": [say("250 ok"), say("450 4.2.1 later")],
            "dot": [Action(b"451 4.3.0 no\r\n", wait_seconds=1.5), say("250 2.0.0 ok")],
        }
    )
    wanted = {"to": ["ann@example.com", "bob@example.com"], "request_id": "late-1", "group_id": "late"}
    first = send(new_sending(dot_seconds=5), timeout_seconds=0.7, **wanted)
    assert [each["outcome"] for each in first["recipients"]] == ["in_doubt", "deferred"]
    # When a repetition reaches the other, and then the answer to the dot is no
    second = send(new_sending("send-2"), **wanted)
    assert [each["outcome"] for each in second["recipients"]] == ["in_doubt", "relayed"]
    record = wait_recorded(jetstream, first["email_id"], ["deferred", "relayed"])
    # Then the mail is one that was relayed, and was counted once
    assert "outcome" not in record
    assert record["recipients"][1]["reply_code"] == 250
    assert len(sent_published) == 1


def test_a_late_answer_says_nothing_of_the_others(
    new_sending: NewSending, smtp: ScriptedSmtp, jetstream: JetStream
) -> None:
    # Given the same, and the repetition is in doubt too
    smtp.change(
        {
            "rcpt": [say("250 ok"), say("450 4.2.1 later")],
            "dot": [Action(b"451 4.3.0 no\r\n", wait_seconds=2.5), stall()],
        }
    )
    wanted = {"to": ["ann@example.com", "bob@example.com"], "request_id": "late-2"}
    first = send(new_sending(dot_seconds=5), timeout_seconds=0.7, **wanted)
    second = send(new_sending("send-2"), **wanted)
    assert [each["outcome"] for each in second["recipients"]] == ["in_doubt", "in_doubt"]
    # Then the late answer is about the first alone
    record = wait_recorded(jetstream, first["email_id"], ["deferred", "in_doubt"])
    assert record["outcome"] == "in_doubt"


def test_a_repetition_does_not_bring_back_a_doubt(
    new_sending: NewSending, smtp: ScriptedSmtp, jetstream: JetStream
) -> None:
    smtp.change(
        {
            "rcpt": [say("250 ok"), say("450 4.2.1 later")],
            "dot": [Action(b"451 4.3.0 no\r\n", wait_seconds=1.2), say("250 2.0.0 ok")],
        }
    )
    wanted = {"to": ["ann@example.com", "bob@example.com"], "request_id": "late-3"}
    first = send(new_sending(dot_seconds=5), timeout_seconds=0.7, **wanted)
    wait_recorded(jetstream, first["email_id"], ["deferred", "deferred"])
    assert [each["outcome"] for each in send(new_sending("send-2"), **wanted)["recipients"]] == ["in_doubt", "relayed"]
    wait_recorded(jetstream, first["email_id"], ["deferred", "relayed"])


def test_records_that_are_still_to_be_amended_are_waited_for(jetstream: JetStream) -> None:
    tracker = Tracker(jetstream, StorageConfig(), 1.0, on_change=lambda _: None)
    tracker.start()
    books = Books(tracker)
    ann = RecipientOutcome("ann@example.com", "relayed", 250, "")
    bob = RecipientOutcome("bob@example.com", "deferred", 450, "")
    mail = HandedOver(str(uuid.uuid4()), "amended", "ann@example.com", "Hello", time.time(), recipients=(ann, bob))
    tracker.note(mail)
    # Given tracking that is off for a moment, so that it takes longer than anybody waits for
    tracker.off_reason = "for a moment"
    begun = time.monotonic()
    books.amend(mail._replace(recipients=(ann, bob._replace(outcome="relayed"))))
    assert AMEND_SECONDS * 0.9 < time.monotonic() - begun < AMEND_SECONDS * 3
    begun = time.monotonic()
    books.wait_amended(0.1)
    assert 0.09 < time.monotonic() - begun < 1.0
    assert record_of(jetstream, mail.email_id)["recipients"][1]["outcome"] == "deferred"
    # When it is on again, then it is done when the wait is over
    tracker.off_reason = ""
    books.wait_amended(10.0)
    assert record_of(jetstream, mail.email_id)["recipients"][1]["outcome"] == "relayed"


# -- objects -----------------------------------------------------------------------------------------------------------
def gone(*_: object, **__: object) -> bytes:
    """Stands for reading an object while its bucket does not answer."""
    raise BusUnavailable("no answer")


@pytest.mark.parametrize("how", ["deleted", "unavailable"])
def test_what_became_of_a_mail_is_told_without_its_object(
    new_sending: NewSending,
    smtp: ScriptedSmtp,
    jetstream: JetStream,
    nats_server: NatsServer,
    monkeypatch: pytest.MonkeyPatch,
    files: str,
    how: str,
) -> None:
    # Given a mail that is out, and a worker that died before it could say so
    put(nats_server, files, "f", b"abc")
    wanted = {"request_id": f"object-{how}", "attachments": attached(files)}
    send(new_sending(object_buckets=(files,)), **wanted)
    leave_as_if_killed(jetstream, f"object-{how}", 0.01)
    gevent.sleep(0.05)
    # When its object cannot be read any more
    if how == "deleted":
        in_nats_py(nats_server, files, lambda store: store.delete("f"))
    else:
        monkeypatch.setattr(relay.extended, "read_object", gone)
    # Then the answer is about the mail, now and later
    sending = new_sending("send-2", object_buckets=(files,))
    reply = send(sending, **wanted)
    assert (reply["outcome"], reply["retryable"]) == ("in_doubt", False)
    assert send(sending, **wanted) == reply | {"duplicate": True}
    assert len(smtp.mails) == 1
    assert not sending.counts["refused"] + sending.counts["deferred"]


@pytest.mark.parametrize(("how", "outcome"), [("deleted", "failed"), ("unavailable", "deferred")])
def test_who_has_the_mail_is_told_when_the_others_cannot_get_it(
    new_sending: NewSending,
    smtp: ScriptedSmtp,
    nats_server: NatsServer,
    monkeypatch: pytest.MonkeyPatch,
    files: str,
    how: str,
    outcome: str,
) -> None:
    put(nats_server, files, "f", b"abc")
    smtp.change({"rcpt": [say("250 ok"), say("450 4.2.1 later")]})
    to = ["ann@example.com", "bob@example.com"]
    wanted = {"to": to, "request_id": f"rest-{how}", "attachments": attached(files)}
    sending = new_sending(object_buckets=(files,))
    assert [each["outcome"] for each in send(sending, **wanted)["recipients"]] == ["relayed", "deferred"]
    if how == "deleted":
        in_nats_py(nats_server, files, lambda store: store.delete("f"))
    else:
        monkeypatch.setattr(relay.extended, "read_object", gone)
    reply = send(sending, **wanted)
    assert "error" not in reply
    assert [each["outcome"] for each in reply["recipients"]] == ["relayed", outcome]
    assert len(smtp.mails) == 1


def whole(bucket: str, name: str = "m") -> dict[str, Any]:
    """A request that lies in an Object Store."""
    return {"object": {"bucket": bucket, "name": name}}


@pytest.mark.parametrize("is_whole", [True, False], ids=["request", "attachment"])
def test_few_objects_are_read_at_the_same_time(
    new_sending: NewSending,
    smtp: ScriptedSmtp,
    nats_server: NatsServer,
    monkeypatch: pytest.MonkeyPatch,
    files: str,
    is_whole: bool,
) -> None:
    put(nats_server, files, "m", json.dumps(MAIL).encode() if is_whole else b"abc")
    asked = whole(files) if is_whole else MAIL | {"attachments": attached(files, "m")}
    sending = new_sending(object_buckets=(files,))
    read_object = relay.extended.read_object
    reading = 0
    peak = 0

    def counting(*args: Any, **kwargs: Any) -> bytes:
        nonlocal reading, peak
        reading += 1
        peak = max(peak, reading)
        try:
            return read_object(*args, **kwargs)
        finally:
            reading -= 1

    monkeypatch.setattr(relay.extended, "read_object", counting)
    asking = [gevent.spawn(ask, sending, asked, 8.0) for _ in range(3 * OBJECT_MAILS_AT_ONCE)]
    gevent.joinall(asking, raise_error=True, timeout=20)
    assert all(each.value["email_id"] for each in asking)
    assert len(smtp.mails) == len(asking)
    assert peak == OBJECT_MAILS_AT_ONCE


def test_who_gets_no_place_in_time_is_deferred(
    new_sending: NewSending, smtp: ScriptedSmtp, nats_server: NatsServer, files: str
) -> None:
    put(nats_server, files, "m", json.dumps(MAIL).encode())
    smtp.change({"mail": [stall()] * OBJECT_MAILS_AT_ONCE})
    sending = new_sending(object_buckets=(files,))
    holding = [gevent.spawn(ask, sending, whole(files), 20.0) for _ in range(OBJECT_MAILS_AT_ONCE)]
    with gevent.Timeout(10):
        while len([line for line in smtp.commands if line.startswith("MAIL")]) < OBJECT_MAILS_AT_ONCE:
            gevent.sleep(0.01)
    reply = ask(sending, whole(files), 0.1)
    assert (reply["outcome"], reply["retryable"]) == ("deferred", True)
    assert reply["detail"].startswith("the Object Store cannot be read: too many others")
    gevent.joinall(holding, raise_error=True, timeout=20)
    assert ask(sending, whole(files), 20.0)["email_id"], "places are given back"


def test_twins_of_an_object_weigh_what_was_read_and_hold_no_place(
    new_sending: NewSending,
    smtp: ScriptedSmtp,
    jetstream: JetStream,
    nats_server: NatsServer,
    monkeypatch: pytest.MonkeyPatch,
    files: str,
) -> None:
    mail = json.dumps(MAIL | {"request_id": "object-twins", "text": "Hello.\n" * 10_000}).encode()
    put(nats_server, files, "m", mail)
    sending = new_sending(object_buckets=(files,))
    sizes: list[int] = []
    claim = Claims.claim

    def spying(self: Claims, *args: Any, size_bytes: int = 0, **kwargs: Any) -> Any:
        sizes.append(size_bytes)
        return claim(self, *args, size_bytes=size_bytes, **kwargs)

    monkeypatch.setattr(Claims, "claim", spying)
    assert ask(sending, whole(files), 20.0)["email_id"]
    leave_as_if_killed(jetstream, "object-twins", 2.0)
    aside: list[object] = []

    def twin() -> dict[str, Any]:
        return ask(sending, whole(files), 20.0, step_aside=aside.append)

    twins = [gevent.spawn(twin) for _ in range(2 * OBJECT_MAILS_AT_ONCE)]
    gevent.joinall(twins, raise_error=True, timeout=20)
    assert len(aside) == len(twins), "all waited at the same time"
    assert {each.value["outcome"] for each in twins} == {"in_doubt"}
    assert set(sizes) == {len(mail)}
    assert len(smtp.mails) == 1


def test_an_object_that_is_none_is_a_request_without_its_fields(new_sending: NewSending) -> None:
    for reference in ("x", None, 5, ["x"]):
        reply = ask(new_sending(), {"object": reference}, 2.0)
        assert reply["error"] == contract.REQUIRED_FIELDS_MISSING, reference


def test_a_plain_mail_from_an_object_may_be_too_large(
    new_sending: NewSending, smtp: ScriptedSmtp, nats_server: NatsServer, files: str
) -> None:
    mail = MAIL | {"request_id": "large-1", "text": "Hello.\n" * 1700}
    put(nats_server, files, "m", json.dumps(mail).encode())
    reply = ask(new_sending(object_buckets=(files,), max_message_bytes=12_000), whole(files), 5.0)
    assert (reply["error"], reply["outcome"]) == (contract.INVALID_REQUEST_PAYLOAD, "refused")
    assert not smtp.mails
    # It keeps its id for that very mail: it may be sent where there is room, and no other may.
    sending = new_sending(object_buckets=(files,))
    assert send(sending, request_id="large-1")["error"] == contract.REQUEST_ID_REUSED
    assert ask(sending, whole(files), 5.0)["email_id"]
    assert len(smtp.mails) == 1


# -- deadlines ---------------------------------------------------------------------------------------------------------
def test_the_callers_own_deadline(new_sending: NewSending, smtp: ScriptedSmtp) -> None:
    smtp.change({"mail": [stall()]})
    begun = time.monotonic()
    reply = send(new_sending(), timeout_seconds=0.2)
    assert time.monotonic() - begun < 1
    assert (reply["outcome"], reply["retryable"]) == ("deferred", True)
    assert reply["detail"].startswith("deadline exceeded")
    assert not smtp.mails


@pytest.mark.parametrize("offset_seconds", [-1, 60])
def test_a_deadline_in_a_header(new_sending: NewSending, smtp: ScriptedSmtp, offset_seconds: int) -> None:
    at = (datetime.now(UTC) + timedelta(seconds=offset_seconds)).isoformat()
    reply = send(new_sending(), nats_headers={contract.DEADLINE_HEADER: at})
    assert reply.get("detail", "") == ("deadline exceeded" if offset_seconds < 0 else "")
    assert len(smtp.mails) == (offset_seconds > 0)


def test_a_deadline_that_is_none_is_refused(new_sending: NewSending) -> None:
    reply = send(new_sending(), nats_headers={contract.DEADLINE_HEADER: "soon"})
    assert (reply["error"], reply["outcome"]) == (contract.INVALID_REQUEST_PAYLOAD, "refused")


# -- content -----------------------------------------------------------------------------------------------------------
def test_every_part_arrives(new_sending: NewSending, smtp: ScriptedSmtp) -> None:
    reply = send(
        new_sending(),
        message_id_header="<mine-1@example.org>",
        in_reply_to="<theirs@example.com>",
        references=["<root@example.com>", "<theirs@example.com>"],
        headers={"X-Campaign": "spring", "List-Unsubscribe": "<https://example.org/u>"},
        tags={"campaign": "spring"},
        attachments=[
            {"filename": "Grüße.txt", "content_type": "text/plain", "content": base64.b64encode(b"Hallo").decode()},
            {"content_type": "image/png", "content": base64.b64encode(b"\x89PNG").decode(), "content_id": "logo"},
        ],
    )
    assert reply["message_id_header"] == "<mine-1@example.org>"
    mail = parsed(smtp.mails[0].content)
    assert mail["Message-ID"] == "<mine-1@example.org>"
    assert (mail["In-Reply-To"], mail["References"]) == (
        "<theirs@example.com>",
        "<root@example.com> <theirs@example.com>",
    )
    assert (mail["X-Campaign"], mail["List-Unsubscribe"]) == ("spring", "<https://example.org/u>")
    assert mail["X-SES-MESSAGE-TAGS"] == f"email_id={reply['email_id']}, campaign=spring"
    (attached,) = mail.iter_attachments()
    assert (attached.get_filename(), attached.get_content()) == ("Grüße.txt", "Hallo")
    assert mail.get_content_type() == "multipart/mixed"


def test_a_single_part_only_on_request(new_sending: NewSending, smtp: ScriptedSmtp) -> None:
    assert send(new_sending(), html="")["error"] == contract.REQUIRED_FIELDS_MISSING
    assert send(new_sending(), html="", allow_single_part=True)["email_id"]
    assert parsed(smtp.mails[0].content).get_content_type() == "text/plain"


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"headers": {"X-SES-CONFIGURATION-SET": "other"}}, "never taken"),
        ({"headers": {"Sender": "boss@example.org"}}, "never taken"),
        ({"headers": {"X-A": "a\r\nBcc: all@example.com"}}, "line end"),
        ({"to": ["nobody"]}, "to[0]"),
        ({"to": [f"r{n}@example.com" for n in range(51)]}, "50"),
        ({"attachments": [{"object": {"bucket": "secrets", "name": "x"}}]}, "OBJECT_STORE_BUCKETS"),
        ({"request_id": "x" * 129}, "request_id"),
    ],
)
def test_what_is_not_allowed_is_refused(
    new_sending: NewSending, smtp: ScriptedSmtp, fields: dict[str, Any], detail: str
) -> None:
    reply = send(new_sending(), **fields)
    assert (reply["error"], reply["outcome"]) == (contract.INVALID_REQUEST_PAYLOAD, "refused")
    assert detail in reply["detail"]
    assert not smtp.mails


# -- callers -----------------------------------------------------------------------------------------------------------
def test_request_ids_are_each_callers_own_where_nats_vouches_for_it(
    new_sending: NewSending, smtp: ScriptedSmtp, jetstream: JetStream
) -> None:
    sending = new_sending(trusts_request_info=True)
    for acc in ("A", "B"):
        headers = {contract.REQUEST_INFO_HEADER: json.dumps({"acc": acc, "user": "billing"})}
        reply = send(sending, request_id="same-1", nats_headers=headers)
        assert "duplicate" not in reply
        assert record_of(jetstream, reply["email_id"])["caller"] == f"{acc}/billing"
    assert len(smtp.mails) == 2


def test_nobody_is_believed_by_default(new_sending: NewSending, smtp: ScriptedSmtp, jetstream: JetStream) -> None:
    sending = new_sending()
    for acc in ("A", "B"):
        headers = {contract.REQUEST_INFO_HEADER: json.dumps({"acc": acc, "user": "billing"})}
        reply = send(sending, request_id="forged-1", nats_headers=headers)
        assert "caller" not in record_of(jetstream, reply["email_id"])
    assert len(smtp.mails) == 1
