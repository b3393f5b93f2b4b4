"""Traces: each request, question and batch of events as a span, and its steps as spans below it (OpenTelemetry).

The caller's W3C trace context (https://www.w3.org/TR/trace-context/) comes in the NATS headers; names and attributes
are those of OpenTelemetry's semantic conventions for messaging, as ``lfx-v2-email-service`` has them.

Owns what is followed, what spans are made of it, and that they leave this process. When they are on is ``wants``;
everything else is configured by the OTEL_* variables that OpenTelemetry reads by itself. It is imported only when they
are on, and it is the extra ``otel`` of this package.

A mail never waits for its trace. What is followed of a request is a few values in a list; once the request is answered
a greenlet makes spans of them and exports these, so few at a time that encoding them holds nobody up for long. What it
is too slow for is dropped and counted. OpenTelemetry's own tracer takes thirty times as long to make a span.
"""

from __future__ import annotations

import contextvars
import logging
import platform
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import gevent
from gevent.event import Event

from relay import __version__
from relay.bus.messages import Msg
from relay.bus.service import Handler
from relay.journey import TRACKING, TRANSACTION, WAIT
from relay.redaction import without_addresses
from relay.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import SpanContext

log = logging.getLogger("relay.tracing")

INSTALL: Final = "pip install 'relay-email[otel]'"
EXPORTERS: Final = ("otlp", "console")
QUEUE_LIMIT: Final = 2048
"""Requests whose spans are still to be exported; more are dropped."""
BATCH: Final = 64
"""Requests whose spans are exported together: a request to the collector costs 1 ms of CPU time, and while their spans
are encoded, for 5 ms, no mail is served."""
EXPORT_SECONDS: Final = 2.0
"""At the latest after that a request's spans are exported."""
CLOSE_SECONDS: Final = 2.0
"""When the process ends, for what is still to be exported."""
QUIET_SECONDS: Final = 60.0
"""Between two log lines about spans that were lost."""

LEAST_WAIT_SECONDS: Final = 0.001
"""A connection that was free sooner is no wait, and makes no span."""

ATTRIBUTES: Final[Mapping[str, str]] = {
    "host": "server.address",
    "port": "server.port",
    "messages": "messaging.batch.message_count",
}
"""Facts that have a name of OpenTelemetry's; the others are ``relay.`` and their own."""
CLIENT_STEPS: Final = frozenset({TRANSACTION, TRACKING})
"""Those in which another server is asked."""

_current: contextvars.ContextVar[_Journey | None] = contextvars.ContextVar("relay_journey", default=None)


def wants(settings: Settings) -> tuple[str, ...]:
    """The exporters that are asked for, none when traces are off.

    On: OTEL_TRACES_EXPORTER names one, or names nothing and there is an OTLP endpoint. Off in any case:
    OTEL_SDK_DISABLED=true. Raises ``ValueError`` for what is asked for and cannot be had here.
    """
    if settings.otel_sdk_disabled.strip().lower() == "true":
        return ()
    named = [name.strip().lower() for name in settings.otel_traces_exporter.split(",") if name.strip()]
    if not named and (settings.otel_exporter_otlp_endpoint or settings.otel_exporter_otlp_traces_endpoint):
        named = ["otlp"]
    wanted = tuple(dict.fromkeys(name for name in named if name != "none"))
    for name in wanted:
        if name not in EXPORTERS:
            raise ValueError(f"OTEL_TRACES_EXPORTER={name[:40]} is not one of otlp, console, none")
    protocol = settings.otel_exporter_otlp_traces_protocol or settings.otel_exporter_otlp_protocol
    if "otlp" in wanted and protocol not in ("", "http/protobuf"):
        raise ValueError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol[:40]} does not go with gevent;"
            " set http/protobuf, and the collector's port for that (usually 4318)"
        )
    return wanted


def start_tracing(settings: Settings, program: str, say: Callable[[str], None]) -> Tracing | None:
    """Follows requests from now on; None when traces are off, or cannot be made, which ``say`` and the log are told.

    Mail goes out in any case: OTEL_* variables are often given to every program of a platform alike.
    """
    try:
        exporters = wants(settings)
        if not exporters:
            return None
        return Tracing(exporters, program, settings)
    except ImportError as error:
        why = f"traces are off: {error.name or error} is not installed; {INSTALL}"
    except Exception as error:  # noqa: BLE001 - whatever OpenTelemetry says to the variables that it reads
        why = f"traces are off: {error}"
    log.error("%s", why)
    say(why)
    return None


class _Journey:
    """What is followed of one request."""

    __slots__ = ("attributes", "begun", "ended", "error", "is_over", "name", "outcomes", "parent", "span", "steps")

    def __init__(
        self, name: str, span: SpanContext, parent: SpanContext | None, attributes: dict[str, Any], begun: float
    ) -> None:
        self.name = name
        self.span = span
        self.parent = parent
        self.attributes = attributes
        self.begun = begun
        self.ended = begun
        self.error = ""
        """The class of what was raised."""
        self.steps: list[_Step] = []
        self.outcomes: list[tuple[str, str, Mapping[str, Any]]] = []
        """Outcome, problem and facts: of the request, or of each of its mails."""
        self.is_over = False


_Step = tuple[str, float, float, str, Mapping[str, Any]]
"""Name, begun, ended, problem, facts."""
_Late = tuple[_Journey, _Step]
"""A step that came after its request was answered."""


class Tracing:
    """Follows what this process does, and exports it. One for the process; it is a ``Follower``."""

    def __init__(self, exporters: Sequence[str], program: str, settings: Settings) -> None:
        """``exporters`` as ``wants`` gives them. Raises ``ImportError`` without the extra, and what OpenTelemetry
        raises for its variables.
        """
        from opentelemetry import propagate
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider

        logging.getLogger("opentelemetry.util.re").addFilter(_without_what_was_given)
        given = OTELResourceDetector().detect().attributes
        own = {
            "service.name": "relay",
            "service.version": __version__,
            "service.instance.id": f"{program}@{platform.node()}",
        }
        # It is asked for what it read from the variables; spans are made without it.
        provider = TracerProvider(resource=Resource.create({**own, **given}), shutdown_on_exit=False)
        self._sampler: Any = provider.sampler
        self._ids = provider.id_generator
        self._maker = _SpanMaker(provider.resource, self._ids.generate_span_id)
        self._propagator = propagate.get_global_textmap()
        self._exporters = [_new_exporter(name) for name in exporters]
        self._last_words = _LastWords()
        self._patience_seconds = settings.send_timeout_seconds
        self._queue_of_events = urlsplit(settings.ses_engagement_sqs_queue_url).path.rpartition("/")[2] or "events"
        self._queue: deque[_Journey | _Late] = deque()
        self._wake = Event()
        self._is_closing = False
        self._unreported = 0
        self._quiet_until = 0.0
        self.exported = 0
        """Spans."""
        self.dropped = 0
        """Requests whose spans were lost: there were too many at a time, or the collector did not take them."""
        for handler in logging.getLogger().handlers:
            handler.addFilter(_Ids(self.ids))
        self._exporting = gevent.spawn(self._export)

    # -- what is followed ----------------------------------------------------------------------
    def traced(self, handler: Handler, nats_subject: str, queue_group: str) -> Handler:
        """``handler``, followed: a consumer span for each request, unless the sampler does not want it."""
        name = f"{nats_subject} process"
        answer_untraced = handler.answer
        fixed = {
            "messaging.system": "nats",
            "messaging.destination.name": nats_subject,
            "messaging.operation.type": "process",
            "messaging.operation.name": "process",
            "messaging.consumer.group.name": queue_group,
        }

        def answer(msg: Msg, deadline: float, step_aside: Callable[[Msg], None]) -> bytes:
            attributes = {**fixed, "messaging.message.body.size": len(msg.payload)}
            journey = self._begin(name, msg.headers, attributes, deadline - self._patience_seconds)
            if journey is None:
                return answer_untraced(msg, deadline, step_aside)
            token = _current.set(journey)
            try:
                reply = answer_untraced(msg, deadline, step_aside)
                if not journey.outcomes:  # a question, of which nobody tells
                    journey.outcomes.append(("error" if reply.startswith(b'{"error":') else "answered", "", {}))
                return reply
            except BaseException as error:
                journey.error = type(error).__name__
                raise
            finally:
                _current.reset(token)
                journey.ended = time.monotonic()
                journey.is_over = True
                self._put(journey)

        return handler._replace(answer=answer)

    def step(self, name: str, begun: float, ended: float, *, problem: str = "", **facts: str | int | None) -> None:
        """As ``Follower`` says."""
        journey = _current.get()
        if journey is None:
            return
        step = (name, begun, ended, problem, facts)
        if journey.is_over:
            self._put((journey, step))
        else:
            journey.steps.append(step)

    def came_to(self, outcome: str, *, problem: str = "", **facts: str | int | None) -> None:
        """As ``Follower`` says."""
        journey = _current.get()
        if journey is not None:
            journey.outcomes.append((outcome, problem, facts))

    def handled(self, begun: float, ended: float, *, problem: str = "", **facts: str | int | None) -> None:
        """As ``Follower`` says; the messages are those of the queue of events."""
        name = self._queue_of_events
        fixed: dict[str, Any] = {
            "messaging.system": "aws_sqs",
            "messaging.destination.name": name,
            "messaging.operation.type": "process",
            "messaging.operation.name": "process",
        }
        journey = self._begin(f"{name} process", {}, fixed, begun)
        if journey is not None:
            journey.outcomes.append(("handled" if not problem else "put off", problem, facts))
            journey.ended = ended
            self._put(journey)

    def ids(self) -> tuple[str, str]:
        """Trace and span id of the request that the calling greenlet is at; '' twice when it is not followed."""
        journey = _current.get()
        if journey is None:
            return "", ""
        return f"{journey.span.trace_id:032x}", f"{journey.span.span_id:016x}"

    def _begin(
        self, name: str, headers: Mapping[str, str], attributes: dict[str, Any], begun: float
    ) -> _Journey | None:
        """A journey, in the trace that the headers tell of or in a new one; None when it is not to be followed."""
        maker = self._maker
        context = None
        parent = None
        if headers:
            try:
                context = self._propagator.extract(headers, None, _HEADERS)
                parent = maker.context_in(context)
            except Exception:  # noqa: BLE001 - the boundary of what a caller may write into a header
                context = None
        if parent is not None and not parent.is_valid:
            parent = None
        trace_id = parent.trace_id if parent is not None else self._ids.generate_trace_id()
        result = self._sampler.should_sample(context, trace_id, name, maker.consumer, attributes)
        if not result.decision.is_sampled():
            return None
        span = maker.new_context(trace_id, result.trace_state)
        if result.attributes:
            attributes.update(result.attributes)
        return _Journey(name, span, parent, attributes, begun)

    # -- what becomes of it --------------------------------------------------------------------
    def _put(self, what: _Journey | _Late) -> None:
        if len(self._queue) >= QUEUE_LIMIT or self._is_closing:
            self._lose(1)
            return
        self._queue.append(what)
        if len(self._queue) == BATCH:
            self._wake.set()

    def _export(self) -> None:
        while True:
            self._wake.wait(EXPORT_SECONDS)
            self._wake.clear()
            while self._queue:
                count = min(BATCH, len(self._queue))
                self._export_some([self._queue.popleft() for _ in range(count)])
                gevent.sleep(0)  # mails that are ready go first
                if len(self._queue) < BATCH and not self._is_closing:
                    break
            self._say_what_is_lost()
            if self._is_closing and not self._queue:
                return

    def _export_some(self, followed: Sequence[_Journey | _Late]) -> None:
        is_taken = False
        try:
            spans = self._maker.spans(followed)
            results = [exporter.export(spans) for exporter in self._exporters]
            is_taken = all(result.name == "SUCCESS" for result in results)
            self.exported += len(spans) if is_taken else 0
        except Exception as error:  # noqa: BLE001 - the boundary of exporting: it must go on with the next ones
            self._last_words.told = without_addresses(f"{type(error).__name__}: {error}"[:200])
        finally:  # also when it is cut off
            if not is_taken:
                self._lose(len(followed))

    def _lose(self, requests: int) -> None:
        self.dropped += requests
        self._unreported += requests

    def _say_what_is_lost(self) -> None:
        now = time.monotonic()
        if self._unreported and (now >= self._quiet_until or self._is_closing):
            why = self._last_words.told or "there were more than could be exported"
            log.warning("the spans of %d requests are lost: %s", self._unreported, why)
            self._last_words.told = ""  # the next ones may be lost for another reason
            self._unreported = 0
            self._quiet_until = now + QUIET_SECONDS

    def close(self, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """Exports what is left, at most so long; the rest is dropped."""
        until = time.monotonic() + timeout_seconds
        self._is_closing = True
        self._wake.set()
        self._exporting.join(timeout_seconds)
        for exporter in self._exporters:
            gevent.spawn(exporter.shutdown).join(max(0.1, until - time.monotonic()))
        if not self._exporting.dead:
            self._exporting.kill(timeout=0.5)
            self._lose(len(self._queue))
            self._queue.clear()
            self._say_what_is_lost()


class _SpanMaker:
    """Makes spans of what was followed."""

    def __init__(self, resource: Any, new_span_id: Callable[[], int]) -> None:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, get_current_span

        self._new_span = ReadableSpan
        self._new_context = SpanContext
        self._new_span_id = new_span_id
        self._current_span = get_current_span
        self._sampled = TraceFlags(TraceFlags.SAMPLED)
        self._resource = resource
        self._scope = InstrumentationScope("relay", __version__)
        self.consumer = SpanKind.CONSUMER
        self._client, self._internal = SpanKind.CLIENT, SpanKind.INTERNAL
        self._unset = Status(StatusCode.UNSET)
        self._failed: Callable[[str], Any] = lambda why: Status(StatusCode.ERROR, why or None)

    def context_in(self, context: Any) -> SpanContext:
        """The span that a propagator found; not valid when there was none."""
        return self._current_span(context).get_span_context()

    def new_context(self, trace_id: int, trace_state: Any) -> SpanContext:
        """A span's of ours."""
        return self._new_context(trace_id, self._new_span_id(), False, self._sampled, trace_state)

    def spans(self, followed: Sequence[_Journey | _Late]) -> list[ReadableSpan]:
        """All of them."""
        # Steps are told on the monotonic clock, spans on the wall clock; read together, once for all.
        ahead_ns = time.time_ns() - time.monotonic_ns()
        spans: list[ReadableSpan] = []
        for each in followed:
            if isinstance(each, _Journey):
                spans += [self._step(each, step, ahead_ns) for step in each.steps if _is_worth_a_span(step)]
                spans.append(self._request(each, ahead_ns))
            else:
                spans.append(self._step(*each, ahead_ns))
        return spans

    def _request(self, journey: _Journey, ahead_ns: int) -> ReadableSpan:
        attributes = journey.attributes
        problem = error = ""
        if len(journey.outcomes) == 1:
            ((outcome, problem, facts),) = journey.outcomes
            attributes["relay.outcome"] = outcome
            _add(attributes, facts)
            error = outcome if problem or outcome == "error" else ""
        elif journey.outcomes:
            # Several mails of one request.
            attributes["relay.mails"] = len(journey.outcomes)
            attributes["relay.outcome"] = tuple(outcome for outcome, _, _ in journey.outcomes)
            attributes["relay.email_id"] = tuple(str(facts.get("email_id") or "") for _, _, facts in journey.outcomes)
            attributes["relay.group_id"] = str(journey.outcomes[0][2].get("group_id") or "")
            error, problem = next(((outcome, why) for outcome, why, _ in journey.outcomes if why), ("", ""))
        if journey.error:
            error, problem = journey.error, ""
        if error:
            attributes["error.type"] = error
        return self._new_span(
            journey.name,
            journey.span,
            journey.parent,
            self._resource,
            attributes,
            kind=self.consumer,
            instrumentation_scope=self._scope,
            status=self._failed(problem) if error else self._unset,
            start_time=_ns(journey.begun) + ahead_ns,
            end_time=_ns(journey.ended) + ahead_ns,
        )

    def _step(self, journey: _Journey, step: _Step, ahead_ns: int) -> ReadableSpan:
        name, begun, ended, problem, facts = step
        attributes: dict[str, Any] = {}
        _add(attributes, facts)
        if problem:
            attributes["error.type"] = problem
        return self._new_span(
            name,
            self.new_context(journey.span.trace_id, journey.span.trace_state),
            journey.span,
            self._resource,
            attributes,
            kind=self._client if name in CLIENT_STEPS else self._internal,
            instrumentation_scope=self._scope,
            status=self._failed("") if problem else self._unset,
            start_time=_ns(begun) + ahead_ns,
            end_time=_ns(ended) + ahead_ns,
        )


def _is_worth_a_span(step: _Step) -> bool:
    """A connection that was free at once is no wait."""
    name, begun, ended, problem, _ = step
    return name != WAIT or bool(problem) or ended - begun >= LEAST_WAIT_SECONDS


def _add(attributes: dict[str, Any], facts: Mapping[str, Any]) -> None:
    for name, value in facts.items():
        if value is not None and value != "":
            attributes[ATTRIBUTES.get(name) or f"relay.{name}"] = value


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def _new_exporter(name: str) -> SpanExporter:
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


class _Headers:
    """How a propagator reads NATS headers: their names are what the caller's library made of ``traceparent``."""

    def get(self, carrier: Mapping[str, str], key: str) -> list[str] | None:
        """The values of one."""
        value = carrier.get(key) or carrier.get(key.title())
        return [value] if value else None

    def keys(self, carrier: Mapping[str, str]) -> list[str]:
        """All names."""
        return list(carrier)


_HEADERS: Any = _Headers()


class _LastWords(logging.Handler):
    """Keeps what OpenTelemetry said last about exporting, instead of a line for each try, or for each bad header."""

    def __init__(self) -> None:
        super().__init__()
        self.told = ""
        logger = logging.getLogger("opentelemetry")
        logger.handlers[:] = [self]
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        """As ``logging`` says."""
        if record.name.startswith("opentelemetry.exporter") and record.levelno >= logging.ERROR:
            self.told = without_addresses(record.getMessage()[:200])


def _without_what_was_given(record: logging.LogRecord) -> bool:
    """A header that OpenTelemetry cannot read is told whole by it, and headers hold the collector's passwords."""
    record.args = ("(not shown)",)
    return True


class _Ids(logging.Filter):
    """Gives each log line the ids of the request that it is about."""

    def __init__(self, ids: Callable[[], tuple[str, str]]) -> None:
        super().__init__()
        self._ids = ids

    def filter(self, record: logging.LogRecord) -> bool:
        """As ``logging`` says."""
        record.trace_id, record.span_id = self._ids()
        return True
