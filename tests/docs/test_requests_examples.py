"""docs/requests.md: its requests are sent to a started relay, and its errors are all that the code has."""

from __future__ import annotations

import ast
import base64
import importlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.js.api import ObjectStoreConfig

from relay import answers, contract
from relay.delivery.outcome import Outcome, State
from relay.idempotency.claim import Reason
from relay.settings import rows
from relay.submission import attachment, fields, options
from tests.docs.markdown import blocks, page
from tests.support.caller import GET_EMAIL_STATUS, MAIL, SEND_EMAIL, ask, with_nats
from tests.support.nats_server import NatsServer
from tests.support.relay_process import CatchingServer, RelayProcess

PAGE = "requests.md"
RELAY = Path(__file__).parents[2] / "relay"
BUCKET = "attachments"
MAX_MESSAGE_BYTES = 200_000

EXAMPLES = [json.loads(block) for block in blocks(PAGE, "json")]
REQUESTS = [each for each in EXAMPLES if "subject" in each or "object" in each]
DOCUMENTED = re.findall(r"^\| `(.+?)` \|", page(PAGE).partition("## Errors")[2].partition("|---|")[2], re.M)


@pytest.fixture(scope="module")
def smtp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CatchingServer]:
    """An SMTP server that takes everything."""
    server = CatchingServer(tmp_path_factory.mktemp("smtp"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def relay(
    tmp_path_factory: pytest.TempPathFactory, nats_server: NatsServer, smtp: CatchingServer
) -> Iterator[RelayProcess]:
    """A started relay that may read the page's bucket, which is filled; with a NATS server for itself."""
    del nats_server  # it has seen to it that there is one to be had
    server = NatsServer(tmp_path_factory.mktemp("requests-nats")).start()
    directory = Path(tempfile.mkdtemp(prefix="relay-t-"))
    made = RelayProcess(
        directory,
        server.url,
        smtp.port,
        RELAY_SEND_WORKERS="1",
        OBJECT_STORE_BUCKETS=f"{BUCKET},no-such-bucket",
        SMTP_MAX_MESSAGE_BYTES=str(MAX_MESSAGE_BYTES),
    )
    try:
        with_nats(server.url, _fill)
        made.start()
        yield made
    finally:
        made.stop()
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


async def _fill(nc: nats.NATS) -> None:
    jetstream = nc.jetstream()
    store = await jetstream.create_object_store(BUCKET, config=ObjectStoreConfig(bucket=BUCKET))
    await store.put("reports/2026-11.pdf", b"%PDF-1.7")
    await store.put("mails/4711.json", json.dumps(MAIL | {"request_id": "in an object"}).encode())
    await store.put("large", b"x" * MAX_MESSAGE_BYTES)
    await store.put("gone", b"x")
    await store.delete("gone")
    # What anybody who may write there can publish
    described = {"name": "forged", "bucket": BUCKET, "nuid": "forged", "size": 3, "chunks": 1}
    digest = "SHA-256=" + "A" * 43 + "="
    link = {"link": {"bucket": BUCKET, "name": "large"}}
    forged: dict[str, dict[str, Any]] = {"undigested": {}, "short": {"digest": digest}, "link": {"options": link}}
    for name, more in forged.items():
        encoded = base64.urlsafe_b64encode(name.encode()).decode()
        await jetstream.publish(f"$O.{BUCKET}.M.{encoded}", json.dumps(described | more).encode())


# -- examples ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", range(len(REQUESTS)))
def test_the_requests_are_sent(relay: RelayProcess, smtp: CatchingServer, number: int) -> None:
    request = REQUESTS[number]
    before = len(smtp.mails())
    reply = ask(relay.nats_url, SEND_EMAIL, request)
    assert "error" not in reply, reply
    mails = smtp.mails()[before:]
    assert len(mails) == (2 if request.get("recipients_as") else 1)
    for mail in mails:
        for each in request.get("bcc", []):
            assert each.encode() not in mail.content
    if "request_id" in request:
        assert ask(relay.nats_url, SEND_EMAIL, request) == reply | {"duplicate": True}
        assert len(smtp.mails()) == before + len(mails)
    position = EXAMPLES.index(request) + 1
    if position < len(EXAMPLES) and "email_id" in EXAMPLES[position]:
        assert shape(reply) == shape(EXAMPLES[position])


IDS = {"email_id", "message_id_header", "remote_id"}


def shape(reply: Any) -> Any:
    """Without what differs from one mail to the next; whether two ids are the same one is kept."""
    text = json.dumps(reply)
    for number, value in enumerate(dict.fromkeys(reply[name] for name in sorted(IDS))):
        text = text.replace(value, f"id-{number}")
    return json.loads(text)


def test_what_the_record_of_several_gets(relay: RelayProcess) -> None:
    (request,) = (each for each in REQUESTS if "bcc" in each)
    reply = ask(relay.nats_url, SEND_EMAIL, request)
    record = ask(relay.nats_url, GET_EMAIL_STATUS, {"email_id": reply["email_id"]})
    assert record["to"] == "Ann <ann@example.com>, bob@example.com"
    assert [each["address"] for each in record["recipients"]] == [*request["to"], request["cc"], *request["bcc"]]
    assert set(record["recipients"][0]) == {"address", "outcome", "reply_code", "enhanced_code"}


def test_a_comma_makes_no_two_of_one_and_to_is_required(relay: RelayProcess) -> None:
    reply = ask(relay.nats_url, SEND_EMAIL, MAIL | {"to": ["a@example.com, b@example.com"]})
    assert reply["detail"].startswith("to[0]: ")
    without = {name: value for name, value in MAIL.items() if name != "to"}
    for changed in ({"cc": "a@example.com"}, {"to": [], "bcc": ["a@example.com"]}):
        assert ask(relay.nats_url, SEND_EMAIL, without | changed)["error"] == contract.REQUIRED_FIELDS_MISSING


# -- names and limits -------------------------------------------------------------------------------------------------
def test_every_field_is_explained_and_no_other() -> None:
    table = page(PAGE).partition("| Field | Type |")[2].partition("\n\n")[0]
    names = [name for cell in re.findall(r"^\| (`.+?`) \|", table, re.M) for name in re.findall(r"`(\w+)`", cell)]
    assert set(names) == {*contract.SEND_EMAIL_FIELDS, *contract.SEND_EMAIL_OPTIONS}
    assert len(names) == len(set(names))
    assert set(options.OPTION_FIELDS) == {"to", *contract.SEND_EMAIL_OPTIONS}
    section = page(PAGE).partition("## Attachments")[2].partition("## Objects")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.M)) == set(attachment.ATTACHMENT_FIELDS)


def test_the_limits_are_those_of_the_code() -> None:
    text = page(PAGE)
    for limit in (
        f"{fields.HEADERS_LIMIT} fields, values of {fields.HEADER_VALUE_LIMIT} characters",
        f"{fields.TAGS_LIMIT} tags",
        f"{options.ATTACHMENTS_LIMIT} files",
        f"at most {options.TIMEOUT_LIMIT_SECONDS:.0f}",
        f"message ids, {fields.MESSAGE_IDS_LIMIT} characters",
        f"`<local@domain>`, {fields.MESSAGE_ID_LIMIT} characters",
        f"up to {attachment.FILENAME_LIMIT_BYTES} bytes in UTF-8",
    ):
        assert limit in text, limit
    known = {name for name, _, _, _ in rows()}
    named = set(re.findall(r"\b[A-Z]{3,}(?:_[A-Z]+)+\b", text))
    assert named <= known
    defaults = {name: field.default for name, field, _, _ in rows()}
    assert (defaults["SMTP_MAX_RECIPIENTS"], defaults["REQUEST_ID_TTL_HOURS"]) == (50, 24)
    assert (defaults["SMTP_MAX_MESSAGE_BYTES"], defaults["SEND_TIMEOUT_SECONDS"]) == (40_000_000, 30)


def test_what_is_said_of_request_ids_is_what_the_code_says() -> None:
    table = page(PAGE).partition("| `detail` | `outcome` | Meaning |")[2].partition("\n\n")[0]
    told = dict(re.findall(r"^\| `(.+?)` \| `(\w+)` \|", table, re.M))
    deferred = {reason.value: "deferred" for reason in Reason if reason.retryable}
    in_doubt = {detail: outcome for detail, outcome in told.items() if outcome == "in_doubt"}
    assert told == deferred | in_doubt
    assert Reason.PAYLOAD_DIFFERS.value in page(PAGE)
    (lost,) = in_doubt
    assert lost in (RELAY / "extended.py").read_text()


def test_every_field_of_a_reply_is_explained() -> None:
    section = page(PAGE).partition("## The reply, and the record")[2].partition("The mail's record has")[0]
    table = section.partition("| Field | When | Meaning |")[2]
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", table))))
    outcome = Outcome(State.IN_DOUBT, "d", 451, "4.0.0")
    told = [answers.Told("a@example.com", "id", outcome)] * 2
    replies = [answers.sent("id", "g", "<m>", "r"), answers.sent_to_several(told, "g", "<m>")]
    for reply in map(json.loads, replies):
        assert set(reply) <= named
        for each in reply.get("recipients", []):
            assert set(each) <= named


# -- errors -----------------------------------------------------------------------------------------------------------
MODULES = [
    *(f"submission.{name}" for name in ("request", "options", "recipients", "fields", "attachment", "mime")),
    "extended",
    "bus.objects",
]
NOT_THE_CALLERS = {
    "must be a whole number",  # a question's limit
    "the payload is longer than",  # of a question
    "… is missing or empty",  # the contract's own error, with the field's name
    "the relay lost sight",  # an outcome
    "an object's ",  # what ``attachment`` has refused before
}
REFUSING = {"reject", "_reject", "SubmissionRejected", "ObjectUnusable"}


def skeleton(node: ast.expr, names: dict[str, Any]) -> str:
    """A text in the code, with its constants, and ``…`` in place of what else is filled in; '' for what is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(skeleton(each, names) for each in node.values)
    if isinstance(node, ast.FormattedValue):
        text = ast.unparse(node.value)
        is_constant = re.fullmatch(r"(\w+\.)?[A-Z][A-Z_]+", text) is not None
        spec = skeleton(node.format_spec, names) if node.format_spec else ""
        return format(eval(text, names), spec) if is_constant else "…"
    return ""


def details_in_the_code() -> set[str]:
    """Every text that refuses a request: the last argument of what refuses, or a variable ``detail``."""
    found: set[str] = set()
    for module in MODULES:
        names = vars(importlib.import_module(f"relay.{module}"))
        for node in ast.walk(ast.parse((RELAY / f"{module.replace('.', '/')}.py").read_text())):
            if isinstance(node, ast.Call) and node.args:
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name in REFUSING:
                    where = "…: " if name == "ObjectUnusable" else ""  # ``extended`` says which object
                    found.add(where + skeleton(node.args[-1], names))
            elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "detail":
                found.add(skeleton(node.value, names))
    return {text for text in found if " " in text and not any(each in text for each in NOT_THE_CALLERS)}


def pattern(documented: str) -> re.Pattern[str]:
    return re.compile(".+?".join(map(re.escape, documented.split("…"))))


def by_documentation(detail: str) -> list[str]:
    """The rows that this may be, the most telling first."""
    found = [each for each in DOCUMENTED if pattern(each).fullmatch(detail)]
    return sorted(found, key=lambda each: len(each.replace("…", "")), reverse=True)


def is_documented(detail: str) -> bool:
    """The page may name the field where the code fills it in."""
    return bool(by_documentation(detail)) or any(pattern(detail).fullmatch(each) for each in DOCUMENTED)


def test_every_error_of_the_code_is_documented() -> None:
    details = details_in_the_code()
    assert len(details) > 60, "the code is read"
    missing = [detail for detail in sorted(details) if not is_documented(detail)]
    assert not missing, "\n".join(missing)


PNG = {"filename": "a.png", "content": "iVBORw0KGgo="}


def with_file(**changed: Any) -> dict[str, Any]:
    return {"attachments": [PNG | changed]}


def with_object(name: object, bucket: object = BUCKET, **more: object) -> dict[str, Any]:
    return {"attachments": [{"object": {"bucket": bucket, "name": name} | more}]}


REFUSED: list[Any] = [
    b"{",
    b'{"a":' * 5000,
    b"[]",
    {"subject": 1},
    {"request_id": 1},
    {"group_id": "x" * 10_001},
    {"group_id": "\x01" * 9_000},
    {"cc": 1},
    {"headers": {"X-A": 1}},
    {"to": ["a@example.com", ""]},
    {"bcc": ["a@example.com"] * 10_001},
    {"to": ["a@example.com"] * 51},
    {"cc": ["nobody"]},
    {"recipients_as": "both"},
    {"recipients_as": "individual", "cc": "a@example.com"},
    {"recipients_as": "individual", "to": ["a@example.com", "b@example.com"], "message_id_header": "<a@example.com>"},
    {"request_id": "ü"},
    {"timeout_seconds": 0},
    {"message_id_header": "no brackets"},
    {"references": "<a@example.com>" * 1_100},
    {"in_reply_to": "no brackets"},
    {"in_reply_to": f"<{'a' * 900}@example.com>"},
    {"headers": []},
    {"headers": {"X-A": ["a"] * 101}},
    {"headers": {"X A": "a"}},
    {"headers": {"X-A": ""}},
    {"headers": {"X-A": "a" * 4_001}},
    {"headers": {"X-A": "a\r\nBcc: b@example.com"}},
    {"headers": {"List-Id": "ü"}},
    {"headers": {"List-Id": "a" * 1_000}},
    {"headers": {"List-Id": ["a", "b"]}},
    {"headers": {"X-SES-A": "a"}},
    {"headers": {"Organization": "a"}},
    {"tags": {f"t{number}": "a" for number in range(50)}},
    {"tags": {"a b": "a"}},
    {"tags": {"a": 1}},
    {"tags": {"a": "a b"}},
    {"tags": {"email_id": "a"}},
    {"attachments": {}},
    {"attachments": [PNG] * 101},
    with_file(name="a.png"),
    with_file(filename="a\n"),
    with_file(filename="a" * 256),
    with_file(content_type="pdf"),
    with_file(content_type="multipart/mixed"),
    with_file(content_type="message/partial"),
    with_file(content_type="text/plain; charset"),
    with_file(content_type="text/plain; charset=a; charset=b"),
    with_file(content_type='text/plain; charset="=?utf-8?q?a?="'),
    with_file(content_id="a b"),
    {"attachments": [PNG | {"content_id": "a"}, PNG | {"content_id": "a"}]},
    with_file(disposition="hidden"),
    {"attachments": [{"filename": "a.png"}]},
    with_file(content=1),
    with_file(content="a"),
    with_file(content_type="message/rfc822", content=base64.b64encode("ü".encode()).decode()),
    with_file(content=base64.b64encode(b"x" * MAX_MESSAGE_BYTES).decode()),
    {"allow_single_part": 1},
    with_object("a", bucket="a.b"),
    with_object(""),
    with_object("a", bucket="secrets"),
    with_object("a", bucket="no-such-bucket"),
    with_object("a"),
    with_object("gone"),
    with_object("link"),
    with_object("large"),
    with_object("undigested"),
    with_object("short"),
    with_object("a", path="/"),
]
DEADLINE = {contract.DEADLINE_HEADER: "2026-01-31T12:00:00"}


def test_every_documented_error_is_met(relay: RelayProcess, smtp: CatchingServer) -> None:
    before = len(smtp.mails())

    async def refused(nc: nats.NATS) -> list[Any]:
        payloads = [each if isinstance(each, bytes) else json.dumps(MAIL | each).encode() for each in REFUSED]
        made: list[tuple[bytes, dict[str, str] | None]] = [(payload, None) for payload in payloads]
        made.append((json.dumps(MAIL).encode(), DEADLINE))
        return [
            json.loads((await nc.request(SEND_EMAIL, payload, timeout=10, headers=headers)).data)
            for payload, headers in made
        ]

    met = set()
    for reply, request in zip(with_nats(relay.nats_url, refused), [*REFUSED, DEADLINE], strict=True):
        shown = str(request)[:80]
        assert (reply["error"], reply["outcome"]) == (contract.INVALID_REQUEST_PAYLOAD, "refused"), (shown, reply)
        assert reply["retryable"] is False
        rows_ = by_documentation(reply["detail"])
        assert rows_, f"{shown}: {reply['detail']} is not documented"
        met.add(rows_[0])
    assert set(DOCUMENTED) - met == set()
    assert len(smtp.mails()) == before, "nothing is sent"
