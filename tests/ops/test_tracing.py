"""When traces are on, and what a caller's headers, a slow collector and a missing package can do to them: nothing."""

from __future__ import annotations

import contextvars
import logging
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gevent
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.bookkeeping import Books
from relay.bus.messages import Msg
from relay.bus.service import Handler
from relay.delivery.smarthost import Smarthost
from relay.ops import tracing as tracing_module
from relay.ops.tracing import Tracing, start_tracing, wants
from relay.settings import Settings, load_settings
from tests.delivery.conftest import config_for
from tests.support.otlp_collector import OtlpCollector
from tests.support.scripted_smtp import ScriptedSmtp, say, wait

ROOT = Path(__file__).parents[2]
TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE_ID}-{SPAN_ID}-01"


def settings_with(**otel: str) -> Settings:
    """The usual settings and ``otel``, whose names are without their prefix."""
    return load_settings({f"OTEL_{name.upper()}": value for name, value in otel.items()})


@pytest.fixture
def collector() -> Iterator[OtlpCollector]:
    """A collector that takes everything."""
    made = OtlpCollector()
    yield made
    made.stop()


@pytest.fixture
def new_tracing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Tracing]]:
    """Makes what exports to a URL; OpenTelemetry's logger is as before at the end."""
    made: list[Tracing] = []
    logger = logging.getLogger("opentelemetry")
    before = logger.handlers[:], logger.propagate

    def make(url: str) -> Tracing:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        made.append(Tracing(["otlp"], "test", load_settings()))
        return made[-1]

    yield make
    for each in made:
        each.close(0.5)
    logger.handlers[:], logger.propagate = before


def answering(tracing: Tracing, answer: Callable[[Msg], bytes]) -> Callable[[Mapping[str, str]], bytes]:
    """A traced handler as a function of a request's headers."""
    handler = Handler(lambda msg, deadline, _: answer(msg), b"", b"", b"")
    traced = tracing.traced(handler, "a.subject", "a.queue")
    return lambda headers: traced.answer(
        Msg("a.subject", "_INBOX.1", b"{}", headers), time.monotonic() + 30.0, lambda _: None
    )


@pytest.mark.parametrize(
    ("otel", "exporters"),
    [
        ({}, ()),
        ({"traces_exporter": "none"}, ()),
        ({"traces_exporter": "otlp"}, ("otlp",)),
        ({"traces_exporter": " OTLP , console"}, ("otlp", "console")),
        ({"exporter_otlp_endpoint": "http://collector:4318"}, ("otlp",)),
        ({"exporter_otlp_traces_endpoint": "http://collector:4318/v1/traces"}, ("otlp",)),
        ({"exporter_otlp_endpoint": "http://collector:4318", "traces_exporter": "none"}, ()),
        ({"exporter_otlp_endpoint": "http://collector:4318", "traces_exporter": "console"}, ("console",)),
        ({"exporter_otlp_endpoint": "http://collector:4318", "sdk_disabled": "TRUE"}, ()),
        ({"exporter_otlp_endpoint": "http://collector:4318", "sdk_disabled": "no"}, ("otlp",)),
        ({"exporter_otlp_protocol": "grpc"}, ()),
        ({"traces_exporter": "console", "exporter_otlp_protocol": "grpc"}, ("console",)),
        ({"traces_exporter": "otlp", "exporter_otlp_protocol": "http/protobuf"}, ("otlp",)),
        (
            {
                "traces_exporter": "otlp",
                "exporter_otlp_protocol": "grpc",
                "exporter_otlp_traces_protocol": "http/protobuf",
            },
            ("otlp",),
        ),
    ],
)
def test_traces_are_on_when_they_are_asked_for(otel: dict[str, str], exporters: tuple[str, ...]) -> None:
    assert wants(settings_with(**otel)) == exporters


@pytest.mark.parametrize(
    ("otel", "why"),
    [
        ({"traces_exporter": "otlp", "exporter_otlp_protocol": "grpc"}, "does not go with gevent; set http/protobuf"),
        ({"traces_exporter": "otlp", "exporter_otlp_protocol": "http/json"}, "set http/protobuf"),
        ({"traces_exporter": "zipkin"}, "OTEL_TRACES_EXPORTER=zipkin is not one of otlp, console, none"),
    ],
)
def test_what_cannot_be_had_is_said(otel: dict[str, str], why: str) -> None:
    told: list[str] = []
    assert start_tracing(settings_with(**otel), "test", told.append) is None
    (line,) = told
    assert line.startswith("traces are off: ")
    assert why in line


@pytest.mark.parametrize("prelude", ["", "sys.modules['opentelemetry'] = None; "], ids=["off", "missing"])
def test_a_process_does_without_opentelemetry(prelude: str) -> None:
    program = (
        f"import sys; {prelude}import workers.send; from relay.ops.tracing import start_tracing;"
        " from relay.settings import load_settings;"
        f" wanted = {{'OTEL_TRACES_EXPORTER': 'otlp'}} if {bool(prelude)} else {{}};"
        " assert start_tracing(load_settings(wanted), 'test', print) is None;"
        " print(any(name.partition('.')[0] in ('opentelemetry', 'google') for name in sys.modules"
        " if sys.modules[name] is not None))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    *told, is_loaded = done.stdout.splitlines()
    assert is_loaded == "False"
    assert told == (
        ["traces are off: opentelemetry is not installed; pip install 'relay-email[otel]'"] if prelude else []
    )


@pytest.mark.parametrize(
    "headers",
    [
        {"traceparent": ""},
        {"traceparent": "x" * 1_000_000},
        {"traceparent": GOOD + "0" * 1000},
        {"traceparent": GOOD.upper()},
        {"traceparent": f"ff-{TRACE_ID}-{SPAN_ID}-01"},
        {"traceparent": f"00-{'0' * 32}-{SPAN_ID}-01"},
        {"traceparent": f"00-{TRACE_ID}-{'0' * 16}-01"},
        {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}"},
        {"traceparent": "00-\x00\x01\x7f-\u2028-01"},
        {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-zz"},
        {"tracestate": "a=b"},
        {f"x-{number}": "y" * 100 for number in range(5000)},
    ],
    ids=str,
)
def test_a_header_that_is_no_context_begins_a_new_trace(
    new_tracing: Callable[[str], Tracing], collector: OtlpCollector, headers: dict[str, str]
) -> None:
    tracing = new_tracing(collector.url)
    assert answering(tracing, lambda _: b"{}")(headers) == b"{}"
    tracing.close()
    (span,) = collector.spans
    assert span.parent_id == ""
    assert span.trace_id not in ("", TRACE_ID)
    assert span.trace_state == ""


@pytest.mark.parametrize("name", ["traceparent", "Traceparent"])
@pytest.mark.parametrize("state", ["", "a=1,b=2", "x" * 5000, "a=b=c,,,=,\x01", "a=1," * 500])
def test_a_context_with_any_state_is_the_parent(
    new_tracing: Callable[[str], Tracing], collector: OtlpCollector, name: str, state: str
) -> None:
    tracing = new_tracing(collector.url)
    answering(tracing, lambda _: b"{}")({name: GOOD, "tracestate": state, "baggage": state})
    tracing.close()
    (span,) = collector.spans
    assert (span.trace_id, span.parent_id) == (TRACE_ID, SPAN_ID)


@settings(max_examples=200, deadline=None)
@given(
    headers=st.dictionaries(
        st.sampled_from(["traceparent", "tracestate", "baggage", "Traceparent", "other"]),
        st.text(max_size=300) | st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}.{0,5}"),
    )
)
def test_no_header_keeps_a_request_from_its_answer(hypothesis_tracing: Tracing, headers: dict[str, str]) -> None:
    assert answering(hypothesis_tracing, lambda _: b"{}")(headers) == b"{}"


@pytest.fixture(scope="module")
def hypothesis_tracing() -> Iterator[Tracing]:
    """One for all examples; it exports nowhere."""
    logger = logging.getLogger("opentelemetry")
    before = logger.handlers[:], logger.propagate
    tracing = Tracing([], "test", load_settings())
    yield tracing
    tracing.close(0.5)
    logger.handlers[:], logger.propagate = before


def test_what_a_request_raises_is_told_and_goes_on(
    new_tracing: Callable[[str], Tracing], collector: OtlpCollector
) -> None:
    def broken(_: Msg) -> bytes:
        raise ZeroDivisionError("secret")

    tracing = new_tracing(collector.url)
    with pytest.raises(ZeroDivisionError):
        answering(tracing, broken)({})
    assert tracing.ids() == ("", "")
    tracing.close()
    (span,) = collector.spans
    assert (span.is_error, span.attributes["error.type"]) == (True, "ZeroDivisionError")
    assert b"secret" not in collector.bodies[0]


def test_a_request_that_is_not_sampled_is_not_followed(
    new_tracing: Callable[[str], Tracing], collector: OtlpCollector
) -> None:
    tracing = new_tracing(collector.url)
    seen: list[tuple[str, str]] = []

    def answer(_: Msg) -> bytes:
        seen.append(tracing.ids())
        tracing.step("a step", 0.0, 1.0)
        return b"{}"

    ask = answering(tracing, answer)
    ask({"traceparent": GOOD[:-1] + "0"})
    ask({"traceparent": GOOD})
    tracing.close()
    assert seen[0] == ("", "")
    assert seen[1][0] == TRACE_ID
    assert [span.name for span in collector.spans] == ["a step", "a.subject process"]


def test_a_step_after_the_answer_is_below_its_request_all_the_same(
    new_tracing: Callable[[str], Tracing], collector: OtlpCollector
) -> None:
    tracing = new_tracing(collector.url)
    later: list[Any] = []

    def answer(_: Msg) -> bytes:
        later.append(gevent.spawn(contextvars.copy_context().run, tracing.step, "late", 0.0, 1.0))
        return b"{}"

    answering(tracing, answer)({})
    gevent.joinall(later)
    tracing.close()
    request, late = collector.spans
    assert (late.name, late.trace_id, late.parent_id) == ("late", request.trace_id, request.span_id)


def test_too_many_requests_lose_their_spans_and_nothing_else(
    new_tracing: Callable[[str], Tracing], collector: OtlpCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing_module, "QUEUE_LIMIT", 40)
    tracing = new_tracing(collector.url)
    ask = answering(tracing, lambda _: b"{}")
    assert [ask({}) for _ in range(100)] == [b"{}"] * 100
    tracing.close()
    assert tracing.dropped == 60
    assert len(collector.spans) == tracing.exported == 40


@pytest.mark.parametrize("status", [400, 503])
def test_what_a_collector_does_not_take_is_counted_and_said_once(
    new_tracing: Callable[[str], Tracing], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    refusing = OtlpCollector(status=status)
    try:
        tracing = new_tracing(refusing.url)
        ask = answering(tracing, lambda _: b"{}")
        for _ in range(5):
            ask({})
        begun = time.monotonic()
        tracing.close(1.0)
        assert time.monotonic() - begun < 15.0
    finally:
        refusing.stop()
    assert (tracing.exported, tracing.dropped) == (0, 5)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("the spans of 5 requests are lost: ")


class Hanging:
    """An exporter that never comes back."""

    def export(self, spans: Sequence[Any]) -> None:
        """Hangs."""
        assert spans
        gevent.sleep(60.0)

    def shutdown(self) -> None:
        """Nothing."""


def test_what_is_cut_off_at_the_end_is_counted(
    new_tracing: Callable[[str], Tracing], caplog: pytest.LogCaptureFixture
) -> None:
    tracing = new_tracing("http://127.0.0.1:9")
    hanging: Any = Hanging()
    tracing._exporters[:] = [hanging]
    ask = answering(tracing, lambda _: b"{}")
    for _ in range(3):
        ask({})
    tracing.close(0.2)
    assert tracing.dropped == 3
    assert "the spans of 3 requests are lost" in caplog.text


def test_a_step_that_cannot_be_told_costs_its_batch_and_no_more(
    new_tracing: Callable[[str], Tracing], collector: OtlpCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing_module, "BATCH", 1)
    tracing = new_tracing(collector.url)

    def answer(_: Msg) -> bytes:
        tracing.step("a step", math.nan, 1.0)
        return b"{}"

    answering(tracing, answer)({})
    answering(tracing, lambda _: b"{}")({})
    tracing.close()
    assert (tracing.dropped, tracing.exported, len(collector.spans)) == (1, 1, 1)


def test_each_loss_has_its_own_reason(
    new_tracing: Callable[[str], Tracing], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing_module, "EXPORT_SECONDS", 0.05)
    monkeypatch.setattr(tracing_module, "QUIET_SECONDS", 0.0)
    refusing = OtlpCollector(status=400)
    try:
        tracing = new_tracing(refusing.url)
        ask = answering(tracing, lambda _: b"{}")
        ask({})
        wait_for(lambda: len(caplog.messages) == 1)
        monkeypatch.setattr(tracing_module, "QUEUE_LIMIT", 0)
        ask({})
        wait_for(lambda: len(caplog.messages) == 2)
    finally:
        refusing.stop()
    assert "code: 400" in caplog.messages[0]
    assert caplog.messages[1].endswith("there were more than could be exported")


def wait_for(is_so: Callable[[], bool]) -> None:
    """Until it is, ten seconds at most."""
    with gevent.Timeout(10.0):
        while not is_so():
            gevent.sleep(0.01)


def test_a_header_that_cannot_be_read_is_not_told(
    new_tracing: Callable[[str], Tracing], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "Authorization: Bearer secret-1")
    new_tracing("http://127.0.0.1:9")
    assert "Header format invalid!" in caplog.text
    assert "secret-1" not in caplog.text


def test_a_wait_in_vain_is_an_error(new_tracing: Callable[[str], Tracing], collector: OtlpCollector) -> None:
    tracing = new_tracing(collector.url)
    with ScriptedSmtp({"banner": say("554 5.3.2 not now")}) as server:
        send_with(tracing, server, seconds=5.0)
    tracing.close()
    by_name = {span.name: span for span in collector.spans}
    assert set(by_name) == {"a.subject process", "smtp wait"}
    wait_span = by_name["smtp wait"]
    assert (wait_span.is_error, wait_span.attributes["error.type"]) == (True, "NotConnected")


def test_a_mail_that_was_not_taken_names_the_reply(
    new_tracing: Callable[[str], Tracing], collector: OtlpCollector
) -> None:
    tracing = new_tracing(collector.url)
    # Given a connection that is worth a span
    replies = {"ehlo": wait(0.05), "rcpt": say("550 5.1.1 <alice@example.com> is unknown")}
    with ScriptedSmtp(replies) as server:
        send_with(tracing, server, seconds=5.0)
    tracing.close()
    by_name = {span.name: span for span in collector.spans}
    request, transaction, connection = (
        by_name[name] for name in ("a.subject process", "smtp transaction", "smtp wait")
    )
    assert (request.is_error, request.attributes["error.type"]) == (True, "failed")
    assert (request.attributes["relay.outcome"], request.attributes["relay.reply_code"]) == ("failed", 550)
    assert "is unknown" in request.told
    assert "alice@" not in request.told
    assert (transaction.is_error, transaction.attributes["server.port"]) == (True, server.port)
    assert (transaction.attributes["relay.reply_code"], transaction.attributes["relay.phase"]) == (550, "rcpt")
    assert connection.ended <= transaction.begun + 0.001
    assert connection.kind == "internal"


def test_the_transaction_of_a_mail_in_doubt_is_told_when_it_ends(
    new_tracing: Callable[[str], Tracing], collector: OtlpCollector
) -> None:
    tracing = new_tracing(collector.url)
    with ScriptedSmtp({"dot": wait(1.0)}) as server:
        send_with(tracing, server, seconds=0.5)
    tracing.close()
    request, *_ = [span for span in collector.spans if span.name == "a.subject process"]
    unheard, settled = [span for span in collector.spans if span.name == "smtp transaction"]
    assert request.attributes["relay.outcome"] == "in_doubt"
    assert (unheard.attributes["error.type"], unheard.attributes["relay.phase"]) == ("in_doubt", "dot")
    assert (settled.is_error, settled.attributes["relay.reply_code"]) == (False, 250)
    assert {span.parent_id for span in (unheard, settled)} == {request.span_id}
    assert request.ended < settled.ended


def test_a_batch_of_events_is_a_span(new_tracing: Callable[[str], Tracing], collector: OtlpCollector) -> None:
    tracing = new_tracing(collector.url)
    now = time.monotonic()
    tracing.handled(now - 0.5, now, messages=10, done=9)
    tracing.handled(now - 0.5, now, problem="BusUnavailable", messages=3, done=0)
    tracing.close()
    well, badly = collector.spans
    assert (well.name, well.kind, well.parent_id) == ("events process", "consumer", "")
    assert well.attributes["messaging.system"] == "aws_sqs"
    assert (well.attributes["messaging.batch.message_count"], well.attributes["relay.done"]) == (10, 9)
    assert 0.49 < well.ended - well.begun < 0.51
    assert (well.is_error, badly.is_error) == (False, True)


def send_with(tracing: Tracing, server: ScriptedSmtp, seconds: float) -> None:
    """One mail over a smarthost that is followed, within ``seconds``, and what is kept of it; then all is over."""
    smarthost = Smarthost(config_for(server), default_sender="noreply@example.org", follower=tracing)
    tracker: Any = None  # nothing is recorded
    books = Books(tracker, follower=tracing)

    def answer(_: Msg) -> bytes:
        deadline = time.monotonic() + seconds
        (outcome,) = smarthost.relay(
            "noreply@example.org", ("alice@example.com",), b"Subject: x\r\n\r\nx\r\n", deadline, lambda _: None
        )
        books.note("email-1", "group-1", outcome, 0.0, 0.0, 0.0)
        return b"{}"

    answering(tracing, answer)({})
    smarthost.close(time.monotonic() + 2.0)
    smarthost.wait_settled(2.0)
