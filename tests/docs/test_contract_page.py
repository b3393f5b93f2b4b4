"""docs/contract.md: its examples are what a relay answers, and its tables are what the code has."""

from __future__ import annotations

import json
import re

from relay import contract
from relay.delivery.outcome import State
from relay.reporting import ANALYTICS_FACTS
from relay.settings import rows
from relay.submission.request import MAX_GROUP_ID_BYTES, MAX_GROUP_ID_CHARACTERS, MAX_QUESTION_BYTES
from relay.tracking.record import EVENT_TIMES, MAX_TEXT_BYTES, RecipientOutcome
from tests.conftest import require
from tests.docs.contract_examples import remade
from tests.docs.markdown import blocks, page
from tests.support.nats_server import BINARY

PAGE = "contract.md"
TEXT = page(PAGE)
ERRORS = {
    value
    for name, value in vars(contract).items()
    if name.isupper() and isinstance(value, str) and " " in value and not name.endswith("_BUCKET")
}


def section(heading: str) -> str:
    """From the heading to the next of its level or above."""
    level = heading.split(" ")[0]
    return re.split(rf"^#{{1,{len(level)}}} ", TEXT.partition(f"{heading}\n")[2], maxsplit=1, flags=re.M)[0]


def first_cells(text: str) -> set[str]:
    """The names in the first cells of tables."""
    return {name for cell in re.findall(r"^\| (`.+?`) \|", text, re.M) for name in re.findall(r"`([^`]+)`", cell)}


def test_the_examples_are_what_a_relay_answers() -> None:
    require(BINARY.exists(), "nats-server")
    assert remade(TEXT) == TEXT, "run `python -m tests.docs.contract_examples`"


def test_every_error_is_there_and_no_other() -> None:
    assert len(ERRORS) == 17
    assert first_cells(section("## Errors")) - {"error"} == ERRORS
    assert re.findall(r"`([^`]+ [^`]+)`", section("### In this order"))
    for named in re.findall(r"`([a-z_]+ [a-z ,_]+)`", section("### In this order")):
        assert named in ERRORS, named


def test_every_field_of_a_mail_is_there() -> None:
    whole = section("## Sending a mail").partition("### ")[0]
    assert first_cells(whole) == {*contract.SEND_EMAIL_FIELDS, *contract.SEND_EMAIL_OPTIONS, contract.OBJECT_FIELD}
    assert contract.DEADLINE_HEADER in whole
    assert contract.REQUEST_INFO_HEADER in whole


def test_the_subjects_and_headers() -> None:
    assert first_cells(section("## Subjects")) == {
        contract.SEND_EMAIL,
        contract.GET_EMAIL_STATUS,
        contract.GET_EMAIL_ENGAGEMENT_ANALYTICS,
    }
    assert f"`{contract.QUEUE_GROUP}`" in TEXT
    for name in (contract.TRACKING_HEADER, contract.SES_CONFIGURATION_SET_HEADER, contract.SES_MESSAGE_TAGS_HEADER):
        assert name in section("## Header fields of a mail")


def test_every_field_of_a_question_and_its_answer_is_there() -> None:
    asked = section("## Status").partition("### ")[0]
    assert first_cells(asked) == {*contract.STATUS_FIELDS, contract.STATUS_LIMIT_FIELD}
    told = first_cells(section("## Analytics"))
    assert told == {"group_id", "total_sent", *ANALYTICS_FACTS, "first_sent_at", "last_event_at"}
    record = section("### The record")
    names = set(re.findall(r"\w+", " ".join(first_cells(record))))
    assert {*EVENT_TIMES, "truncated", "caller", "recipients"} <= names
    assert set(RecipientOutcome._fields) <= set(re.findall(r"`(\w+)`", record))


def test_the_examples_have_no_field_that_is_not_explained() -> None:
    explained = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.S)))))
    known = explained | {"records"}
    for block in map(json.loads, blocks(PAGE, "json")):
        for each in block.get("records", [block]):
            assert set(each) <= known, set(each) - known


def test_the_outcomes_and_limits_are_those_of_the_code() -> None:
    table = section("### A reply when it was not sent")
    for state in State:
        assert state is State.RELAYED or f"`{state.value}`" in table
    assert f"{MAX_GROUP_ID_CHARACTERS:,} characters, and {MAX_GROUP_ID_BYTES:,} bytes" in TEXT
    assert f"at most {MAX_QUESTION_BYTES:,} bytes" in TEXT
    assert f"first {MAX_TEXT_BYTES:,} bytes" in TEXT
    defaults = {name: field.default for name, field, _, _ in rows()}
    named = set(re.findall(r"\b[A-Z]{3,}(?:_[A-Z]+)+\b", TEXT))
    assert named <= set(defaults)
    assert (defaults["SEND_TIMEOUT_SECONDS"], defaults["TRACKING_ACK_SECONDS"]) == (30, 1)
    assert f"(`{defaults['DEFAULT_SMTP_FROM']}`)" in TEXT
    assert f"(`{defaults['DEFAULT_SMTP_FROM_DISPLAY_NAME']}`)" in TEXT
    assert f"1 to {contract.MAX_PAGE_MAILS} mails" in TEXT
