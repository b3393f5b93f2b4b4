"""Traces of a real relay, as a collector gets them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import nats
import nats.errors
import pytest

from relay import __version__
from tests.support.caller import GET_EMAIL_STATUS, MAIL, SEND_EMAIL, send, under_load, with_nats
from tests.support.nats_server import NatsServer, free_port
from tests.support.otlp_collector import OtlpCollector, Span
from tests.support.relay_process import CatchingServer, RelayProcess, Worker

SENT = "lfx.email-service.send_email process"


@pytest.fixture
def collector() -> Iterator[OtlpCollector]:
    """A collector that takes everything."""
    made = OtlpCollector()
    yield made
    made.stop()


@pytest.fixture
def traced(new_relay: Callable[..., RelayProcess], collector: OtlpCollector) -> RelayProcess:
    """A relay that sends its traces there; started."""
    relay = new_relay(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, RELAY_SEND_WORKERS="1")
    relay.start()
    return relay


def new_ids() -> tuple[str, str]:
    """Trace id and span id of a caller."""
    return os.urandom(16).hex(), os.urandom(8).hex()


def ask_in_trace(url: str, nats_subject: str, request: Any, headers: dict[str, str]) -> Any:
    """One request with header fields; the reply."""

    async def run(nc: nats.NATS) -> Any:
        payload = json.dumps(request).encode()
        return json.loads((await nc.request(nats_subject, payload, timeout=10, headers=headers)).data)

    return with_nats(url, run)


def wait_until_served(url: str) -> None:
    """Until a mail is sent."""
    until = time.monotonic() + 15
    while True:
        try:
            assert "email_id" in send(url)
            return
        except nats.errors.NoRespondersError:
            assert time.monotonic() < until
            time.sleep(0.05)


def of_trace(spans: Sequence[Span], trace_id: str) -> dict[str, list[Span]]:
    """The spans of one trace, by name."""
    found: dict[str, list[Span]] = {}
    for span in spans:
        if span.trace_id == trace_id:
            found.setdefault(span.name, []).append(span)
    return found


def test_a_mail_is_a_span_of_the_callers_trace_and_its_steps_are_below_it(
    traced: RelayProcess, collector: OtlpCollector
) -> None:
    # Given a caller with a trace
    trace_id, span_id = new_ids()
    context = {"traceparent": f"00-{trace_id}-{span_id}-01", "tracestate": "vendor=opaque"}
    # When it has a mail sent
    before = time.time()
    reply = ask_in_trace(traced.nats_url, SEND_EMAIL, MAIL | {"group_id": "traced"}, context)
    after = time.time()
    # Then its trace has a consumer span of ours
    found = of_trace(collector.wait_for(lambda spans: SENT in of_trace(spans, trace_id)), trace_id)
    (mail,) = found.pop(SENT)
    assert (mail.kind, mail.parent_id, mail.trace_state, mail.is_error) == ("consumer", span_id, "vendor=opaque", False)
    assert before - 0.1 <= mail.begun <= mail.ended <= after + 0.1
    assert mail.attributes == {
        "messaging.system": "nats",
        "messaging.destination.name": SEND_EMAIL,
        "messaging.operation.type": "process",
        "messaging.operation.name": "process",
        "messaging.consumer.group.name": "lfx.email-service.queue",
        "messaging.message.body.size": len(json.dumps(MAIL | {"group_id": "traced"})),
        "relay.outcome": "relayed",
        "relay.email_id": reply["email_id"],
        "relay.group_id": "traced",
        "relay.reply_code": 250,
    } | {name: value for name, value in mail.attributes.items() if name == "relay.enhanced_code"}
    assert mail.resource["service.name"] == "relay"
    assert mail.resource["service.version"] == __version__
    assert mail.resource["service.instance.id"].startswith("send-1@")
    # … and below it one for the transaction and one for the record, each within it
    (transaction,) = found.pop("smtp transaction")
    (tracking,) = found.pop("tracking write")
    found.pop("smtp wait", None)
    assert not found
    for step in (transaction, tracking):
        assert (step.kind, step.parent_id, step.is_error) == ("client", mail.span_id, False)
        assert mail.begun <= step.begun <= step.ended <= mail.ended + 0.001
    assert transaction.ended <= tracking.begun + 0.001
    assert transaction.attributes["server.address"] == "127.0.0.1"
    assert transaction.attributes["server.port"] == int(traced.settings["SMTP_PORT"])
    assert transaction.attributes["relay.reply_code"] == 250
    # … and the mail's log line names it
    (line,) = [line for line in traced.log("send-1") if line.get("email_id") == reply["email_id"]]
    assert (line["trace_id"], line["span_id"]) == (trace_id, mail.span_id)


def test_nothing_personal_is_told(traced: RelayProcess, collector: OtlpCollector) -> None:
    send(traced.nats_url, to="Jane Doe <jane.doe@private.example.org>", subject="Quarterly figures", text="for Jane")
    refused = send(traced.nats_url, to="jane.doe@private.example.org", **{"from": "x@elsewhere.example.org"})
    assert "error" in refused
    collector.wait_for(lambda spans: sum(span.name == SENT for span in spans) == 2)
    told = b"".join(collector.bodies).lower()
    for word in (b"jane", b"private", b"quarterly", b"elsewhere"):
        assert word not in told


def test_who_asks_without_a_trace_begins_one_and_who_does_not_sample_has_none(
    traced: RelayProcess, collector: OtlpCollector
) -> None:
    trace_id, span_id = new_ids()
    ask_in_trace(traced.nats_url, SEND_EMAIL, MAIL, {"traceparent": f"00-{trace_id}-{span_id}-00"})
    ask_in_trace(traced.nats_url, SEND_EMAIL, MAIL, {"traceparent": "00-" + "0" * 32 + "-what?-01"})
    send(traced.nats_url)
    spans = collector.wait_for(lambda spans: sum(span.name == SENT for span in spans) == 2)
    assert not of_trace(spans, trace_id)
    mails = [span for span in spans if span.name == SENT]
    assert {mail.parent_id for mail in mails} == {""}
    assert len({mail.trace_id for mail in mails}) == 2


def test_a_question_is_a_span_too(traced: RelayProcess, collector: OtlpCollector) -> None:
    known, span_id = new_ids()
    unknown, _ = new_ids()
    email_id = send(traced.nats_url)["email_id"]
    ask_in_trace(traced.nats_url, GET_EMAIL_STATUS, {"email_id": email_id}, {"Traceparent": f"00-{known}-{span_id}-01"})
    ask_in_trace(
        traced.nats_url, GET_EMAIL_STATUS, {"email_id": "nobody"}, {"traceparent": f"00-{unknown}-{span_id}-01"}
    )
    spans = collector.wait_for(lambda spans: of_trace(spans, known) and of_trace(spans, unknown))
    (answered,) = of_trace(spans, known)[f"{GET_EMAIL_STATUS} process"]
    assert (answered.kind, answered.attributes["relay.outcome"], answered.is_error) == ("consumer", "answered", False)
    (failed,) = of_trace(spans, unknown)[f"{GET_EMAIL_STATUS} process"]
    assert failed.attributes["relay.outcome"] == "error"


def test_mails_of_one_request_are_steps_of_one_span(traced: RelayProcess, collector: OtlpCollector) -> None:
    trace_id, span_id = new_ids()
    request = {key: value for key, value in MAIL.items() if key != "to"}
    request["to"] = ["a@example.com", "b@example.com", "c@example.com"]
    request["recipients_as"] = "individual"
    reply = ask_in_trace(traced.nats_url, SEND_EMAIL, request, {"traceparent": f"00-{trace_id}-{span_id}-01"})
    assert len(reply["recipients"]) == 3, reply
    found = of_trace(collector.wait_for(lambda spans: SENT in of_trace(spans, trace_id)), trace_id)
    (mail,) = found[SENT]
    assert mail.attributes["relay.mails"] == 3
    assert set(mail.attributes["relay.email_id"]) == {each["email_id"] for each in reply["recipients"]}
    assert [span.parent_id for span in found["smtp transaction"]] == [mail.span_id] * 3
    assert [span.parent_id for span in found["tracking write"]] == [mail.span_id] * 3


def test_the_last_spans_leave_before_the_process_ends(traced: RelayProcess, collector: OtlpCollector) -> None:
    email_ids = {send(traced.nats_url)["email_id"] for _ in range(5)}
    traced.stop()
    assert {span.attributes["relay.email_id"] for span in collector.spans if span.name == SENT} == email_ids


def test_the_variables_of_opentelemetry_are_heeded(
    new_relay: Callable[..., RelayProcess], collector: OtlpCollector
) -> None:
    relay = new_relay(
        OTEL_TRACES_EXPORTER="otlp",
        OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"{collector.url}/of/ours",
        OTEL_EXPORTER_OTLP_HEADERS="x-tenant=blue",
        OTEL_EXPORTER_OTLP_COMPRESSION="none",
        OTEL_SERVICE_NAME="mailer",
        OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=staging",
        OTEL_TRACES_SAMPLER="parentbased_always_off",
    )
    relay.start()
    trace_id, span_id = new_ids()
    send(relay.nats_url)
    ask_in_trace(relay.nats_url, SEND_EMAIL, MAIL, {"traceparent": f"00-{trace_id}-{span_id}-01"})
    spans = collector.wait_for(lambda spans: spans)
    assert {span.trace_id for span in spans} == {trace_id}
    assert spans[0].resource["service.name"] == "mailer"
    assert spans[0].resource["deployment.environment.name"] == "staging"
    assert (collector.headers[0]["path"], collector.headers[0]["x-tenant"]) == ("/of/ours", "blue")


@pytest.mark.parametrize("is_there", [True, False], ids=["silent", "gone"])
def test_a_dead_collector_costs_spans_and_nothing_else(new_relay: Callable[..., RelayProcess], is_there: bool) -> None:
    # Given a collector that answers nothing, or is not there
    silent = OtlpCollector(silence_seconds=60.0) if is_there else None
    url = silent.url if silent is not None else f"http://127.0.0.1:{free_port()}"
    try:
        relay = new_relay(OTEL_EXPORTER_OTLP_ENDPOINT=url, RELAY_SEND_WORKERS="1")
        relay.start()
        # When mail is sent
        load = under_load(
            relay.nats_url, callers=4, seconds=3.0, during=lambda: None, after_seconds=0.1, timeout_seconds=5
        )
        # Then it is all sent as ever
        assert load.timed_out == 0
        assert load.replies
        assert all("email_id" in reply for reply in load.replies)
        gaps = sorted(b - a for a, b in zip(load.seconds_at_reply, load.seconds_at_reply[1:], strict=False))
        assert gaps[-1] < 1.0
        # … and the worker ends in time
        begun = time.monotonic()
        relay.stop()
        assert time.monotonic() - begun < 10.0
        (lost, *_) = [line["msg"] for line in relay.log("send-1") if line["msg"].startswith("the spans of")]
        assert lost
    finally:
        if silent is not None:
            silent.stop()


def test_what_cannot_be_had_is_said_and_mail_goes_out(new_relay: Callable[..., RelayProcess]) -> None:
    relay = new_relay(OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:4317", OTEL_EXPORTER_OTLP_PROTOCOL="grpc")
    relay.start()
    assert send(relay.nats_url)["email_id"]
    (told,) = [line for line in relay.log("send-1") if "traces are off" in line["msg"]]
    assert told["level"] == "error"
    assert "grpc does not go with gevent" in told["msg"]
    assert "traces are off" in relay.relayctl("status").stdout


def test_opentelemetry_is_not_loaded_when_traces_are_off(
    nats_server: NatsServer, smtp: CatchingServer, state_dir: Any
) -> None:
    """The maps of a running worker name every extension module: protobuf's is the one that would be there."""
    settings = {
        "NATS_URL": nats_server.url,
        "SMTP_HOST": "127.0.0.1",
        "SMTP_PORT": str(smtp.port),
        "EMAIL_ENABLED": "true",
        "RELAY_STATE_DIR": str(state_dir),
    }
    for extra, is_loaded in (({}, False), ({"OTEL_TRACES_EXPORTER": "otlp"}, True)):
        worker = Worker("send", settings | extra)
        try:
            wait_until_served(nats_server.url)
            with open(f"/proc/{worker.process.pid}/maps") as maps:
                assert ("google/_upb" in maps.read()) is is_loaded
        finally:
            worker.process.terminate()
            worker.output()
            worker.end()
