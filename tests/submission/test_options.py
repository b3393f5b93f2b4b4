"""Options of a request: how they are read from JSON, and what is said of those that cannot be read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from typing import Any, cast

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay import contract
from relay.errors import SubmissionRejected
from relay.submission.attachment import Attachment
from relay.submission.options import (
    OPTION_FIELDS,
    Members,
    ObjectRef,
    Options,
    decode_object,
    decode_options,
)

PLAIN = {"to": "a@example.com", "subject": "s", "html": "h", "text": "t", "group_id": "g", "from": "b@example.org"}
ALL: dict[str, Any] = {
    "to": ["a@example.com", "B <b@example.com>"],
    "cc": "c@example.com",
    "bcc": ["d@example.com"],
    "recipients_as": "together",
    "request_id": "order-17",
    "timeout_seconds": 2.5,
    "message_id_header": "<m@example.org>",
    "in_reply_to": "<0@example.com>",
    "references": "<00@example.com> <0@example.com>",
    "headers": {"X-A": ["1", "2"], "List-Id": "<l.example.com>"},
    "tags": {"campaign": "spring"},
    "attachments": [
        {"filename": "a.txt", "content_type": "text/plain", "content": "YWJj"},
        {"filename": "b.png", "object": {"bucket": "files", "name": "b/c.png"}, "content_id": "<b>"},
    ],
    "allow_single_part": True,
}
DECODED = Options(
    to=("a@example.com", "B <b@example.com>"),
    cc=("c@example.com",),
    bcc=("d@example.com",),
    is_individual=False,
    request_id="order-17",
    timeout_seconds=2.5,
    message_id_header="<m@example.org>",
    in_reply_to="<0@example.com>",
    references=("<00@example.com>", "<0@example.com>"),
    headers=(("X-A", "1"), ("X-A", "2"), ("List-Id", "<l.example.com>")),
    tags=(("campaign", "spring"),),
    attachments=(
        Attachment("a.txt", "text/plain", b"abc", "", "attachment", None),
        Attachment("b.png", "application/octet-stream", b"", "b", "inline", ObjectRef("files", "b/c.png")),
    ),
    allow_single_part=True,
)


def by_orjson(payload: bytes) -> Iterable[tuple[str, object]]:
    return cast(dict[str, object], orjson.loads(payload)).items()


def by_members(payload: bytes) -> Iterable[tuple[str, object]]:
    return cast(Members, json.loads(payload, object_pairs_hook=Members))


READERS = [by_orjson, by_members]


@pytest.mark.parametrize("read", READERS)
def test_every_option(read: Any) -> None:
    assert set(ALL) == set(OPTION_FIELDS)
    assert decode_options(read(orjson.dumps(PLAIN | ALL))) == DECODED


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "write", [str.upper, str.title, lambda name: name.replace("s", "\u017f").replace("k", "\u212a")]
)
def test_names_match_by_case_folding(read: Any, write: Any) -> None:
    def written(value: Any, is_top: bool = True) -> Any:
        if isinstance(value, list):
            return [written(item, is_top=False) for item in value]
        # Not the names in ``headers`` and ``tags``, which are the caller's own.
        names = {"filename", "content_type", "content", "object", "content_id", "bucket", "name", "disposition"}
        if isinstance(value, dict):
            return {
                write(key) if is_top or key in names else key: written(item, is_top=False)
                for key, item in value.items()
            }
        return value

    assert decode_options(read(orjson.dumps(written(ALL)))) == DECODED


NOTHING: list[dict[str, Any]] = [
    {},
    PLAIN,
    PLAIN | {"unknown": [1, {"to": 2}], "option": {}},
    PLAIN | dict.fromkeys(ALL.keys() - {"to"}),
    {"to": None},
    {"to": ""},
    PLAIN | {"cc": [], "bcc": "", "headers": {}, "tags": {}, "attachments": [], "references": []},
    PLAIN | {"recipients_as": "together", "request_id": "", "allow_single_part": False, "in_reply_to": ""},
    PLAIN | {"recipients_as": ""},
]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("request_", NOTHING)
def test_a_request_that_says_nothing_of_the_kind(read: Any, request_: dict[str, Any]) -> None:
    assert decode_options(read(orjson.dumps(request_))) is None


def test_one_string_is_the_recipient_beside_other_options() -> None:
    assert decode_options((PLAIN | {"request_id": "1"}).items()) == Options(to=("a@example.com",), request_id="1")
    assert decode_options({"to": ["a@example.com"]}.items()) == Options(to=("a@example.com",))
    assert decode_options({"to": []}.items()) == Options()


@pytest.mark.parametrize("pairs", [[("tags", {"a": "1"}), ("TAGS", {"b": "2"})], [("tags", 5), ("tags", {"b": "2"})]])
def test_the_last_of_a_name_wins(pairs: Any) -> None:
    assert decode_options(pairs) == Options(tags=(("b", "2"),))
    assert decode_options([*pairs, ("tags", None)]) == Options(tags=(("b", "2"),))


def test_the_last_of_a_name_wins_inside_too() -> None:
    payload = b'{"headers":{"X-A":"1","X-A":"2"},"attachments":[{"content":"?","content":"YQ==","filename":null}]}'
    options = decode_options(by_members(payload))
    assert options is not None
    assert options.headers == (("X-A", "2"),)
    assert options.attachments[0].content == b"a"


WRONG: list[tuple[dict[str, Any], str, str]] = [
    # the request, field, what is said
    ({"to": 1}, "to", "to must be a string or a list of strings"),
    ({"to": {"a": "b"}}, "to", "to must be a string or a list of strings"),
    ({"to": ["a", 1]}, "to", "to[1] must be a string"),
    ({"to": ["a", None]}, "to", "to[1] must be a string"),
    ({"to": ["a", ""]}, "to", "to[1] is empty; leave it out"),
    ({"cc": [["a"]]}, "cc", "cc[0] must be a string"),
    ({"bcc": True}, "bcc", "bcc must be a string or a list of strings"),
    ({"bcc": ["a"] * 10_001}, "bcc", "bcc has 10001 entries; at most 10000 are read"),
    ({"recipients_as": "all"}, "recipients_as", 'recipients_as must be "together" or "individual"'),
    ({"recipients_as": ["individual"]}, "recipients_as", 'recipients_as must be "together" or "individual"'),
    ({"recipients_as": "individual", "cc": "a"}, "cc", 'cc must be empty with recipients_as "individual"'),
    ({"recipients_as": "individual", "bcc": ["a"]}, "bcc", 'bcc must be empty with recipients_as "individual"'),
    (
        {"recipients_as": "individual", "to": ["a", "b"], "message_id_header": "<a@b>"},
        "message_id_header",
        "message_id_header would be that of several mails",
    ),
    ({"request_id": 17}, "request_id", "request_id must be a string"),
    ({"request_id": "a" * 129}, "request_id", "request_id must be 1 to 128 printable ASCII characters"),
    ({"request_id": "a\n"}, "request_id", "request_id must be 1 to 128 printable ASCII characters"),
    ({"request_id": "é"}, "request_id", "request_id must be 1 to 128 printable ASCII characters"),
    ({"timeout_seconds": "5"}, "timeout_seconds", "timeout_seconds must be a number above 0"),
    ({"timeout_seconds": True}, "timeout_seconds", "timeout_seconds must be a number above 0"),
    ({"timeout_seconds": 0}, "timeout_seconds", "timeout_seconds must be a number above 0"),
    ({"timeout_seconds": -0.5}, "timeout_seconds", "timeout_seconds must be a number above 0"),
    ({"timeout_seconds": 86_401}, "timeout_seconds", "timeout_seconds must be a number above 0 and at most 86400"),
    ({"message_id_header": "a@b"}, "message_id_header", "message_id_header must be '<local@domain>'"),
    ({"message_id_header": ["<a@b>"]}, "message_id_header", "message_id_header must be a string"),
    ({"in_reply_to": "a@b"}, "in_reply_to", "in_reply_to must be message ids in angle brackets"),
    ({"in_reply_to": ["<a@b>"]}, "in_reply_to", "in_reply_to must be a string"),
    ({"references": "a"}, "references", "references must be message ids in angle brackets"),
    ({"references": [1]}, "references", "references[0] must be a string"),
    ({"headers": ["X-A: 1"]}, "headers", "headers must be an object"),
    ({"headers": "X-A: 1"}, "headers", "headers must be an object"),
    ({"headers": {"X-A": 1}}, "headers", "headers.X-A must be a string or a list of strings"),
    ({"headers": {"X-A": ["a", 1]}}, "headers", "headers.X-A must be a string or a list of strings"),
    ({"headers": {"X-A": {"a": "b"}}}, "headers", "headers.X-A must be a string or a list of strings"),
    ({"headers": {"X-A\r\nB": 1}}, "headers", "headers must be a string or a list of strings"),
    ({"headers": {"X-A": "a\r\nB: c"}}, "headers", "headers.X-A has a line end"),
    ({"headers": {"X-A": ["a"] * 101}}, "headers", "headers has more than 100 fields"),
    ({"tags": [["a", "b"]]}, "tags", "tags must be an object"),
    ({"tags": {"a": 1}}, "tags", "tags: every value must be a string"),
    ({"tags": {"a": "b c"}}, "tags", "tags.a must be 1 to 256"),
    ({"attachments": {"filename": "a"}}, "attachments", "attachments must be a list of objects"),
    ({"attachments": ["YQ=="]}, "attachments", "attachments[0] must be an object"),
    ({"attachments": [[]]}, "attachments", "attachments[0] must be an object"),
    ({"attachments": [{"content": "YQ=="}] * 101}, "attachments", "attachments has 101 entries; at most 100"),
    (
        {"attachments": [{"content": "YQ==", "contentType": "a/b"}]},
        "attachments",
        "attachments[0] has a field that is not known; its fields are filename, content_type, content, object,",
    ),
    (
        {"attachments": [{"content": "", "content_id": "a"}, {"content": "", "content_id": "<a>"}]},
        "attachments",
        "attachments[1].content_id is that of another attachment",
    ),
    ({"attachments": [{"object": "files/a"}]}, "attachments", "attachments[0].object must be an object"),
    (
        {"attachments": [{"object": {"bucket": "files", "name": "a", "size": 1}}]},
        "attachments",
        "attachments[0].object has a field that is not known; its fields are bucket, name",
    ),
    ({"allow_single_part": 1}, "allow_single_part", "allow_single_part must be true or false"),
    ({"allow_single_part": "true"}, "allow_single_part", "allow_single_part must be true or false"),
]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(("request_", "field", "said"), WRONG)
def test_what_is_wrong_is_said(read: Any, request_: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(SubmissionRejected) as caught:
        decode_options(read(orjson.dumps(request_)))
    assert caught.value.error == contract.INVALID_REQUEST_PAYLOAD
    assert caught.value.field == field
    assert caught.value.detail.startswith(said)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 10**400])
def test_numbers_that_are_no_time(number: Any) -> None:
    with pytest.raises(SubmissionRejected, match="timeout_seconds must be a number"):
        decode_options([("timeout_seconds", number)])


def test_halves_of_surrogate_pairs_are_replaced_as_in_the_eight_fields() -> None:
    options = decode_options([("to", ["\ud800 <a@example.com>"]), ("headers", Members([("X-A", "\udfff")]))])
    assert options is not None
    assert options.to == ("\ufffd <a@example.com>",)
    assert options.headers == (("X-A", "\ufffd"),)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from(OPTION_FIELDS), JSON, max_size=5))
def test_whatever_is_given_is_read_or_refused(request_: dict[str, Any]) -> None:
    with contextlib.suppress(SubmissionRejected):
        options = decode_options(request_.items())
        assert options is None or isinstance(options, Options)


SHAPING: list[tuple[Options, bool]] = [
    (Options(to=("a",), request_id="1", timeout_seconds=1, message_id_header="<a@b>"), False),
    (Options(to=("a",), bcc=("b",)), True),
    (Options(to=("a", "b")), True),
    (Options(to=("a",), cc=("b",)), True),
    (Options(to=("a",), in_reply_to="<a@b>"), True),
    (Options(to=("a",), references=("<a@b>",)), True),
    (Options(to=("a",), headers=(("X-A", "b"),)), True),
    (Options(to=("a",), tags=(("a", "b"),)), True),
    (Options(to=("a",), attachments=(Attachment("", "a/b", b"", "", "inline", None),)), True),
    (Options(to=("a",), allow_single_part=True), True),
]


@pytest.mark.parametrize(("options", "expected"), SHAPING)
def test_which_options_shape_the_mail(options: Options, expected: bool) -> None:
    assert options.shapes_content is expected


# -- a request that is an object --------------------------------------------------------------------------------------

OBJECT = {"object": {"bucket": "mails", "name": "a/b.json"}}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "request_", [OBJECT, OBJECT | {"to": None}, OBJECT | {"unknown": 1}, {"OBJECT": OBJECT["object"]}]
)
def test_a_whole_request_in_an_object(read: Any, request_: dict[str, Any]) -> None:
    assert decode_object(read(orjson.dumps(request_))) == ObjectRef("mails", "a/b.json")


NO_OBJECTS: list[dict[str, Any]] = [
    {},
    PLAIN,
    PLAIN | OBJECT,
    OBJECT | {"request_id": "1"},
    {"object": None},
    {"object": "mails/a"},
    {"object": ["mails", "a"]},
]


@pytest.mark.parametrize("request_", NO_OBJECTS)
def test_beside_other_fields_object_is_unknown(request_: dict[str, Any]) -> None:
    assert decode_object(request_.items()) is None


BAD_OBJECTS: list[tuple[Any, str]] = [
    ({"bucket": "mails"}, "object.name must be 1 to 1024 bytes"),
    ({"name": "a"}, "object.bucket must be the name of"),
    ({"bucket": "a.b", "name": "a"}, "object.bucket must be the name of"),
    ({"bucket": "a>", "name": "a"}, "object.bucket must be the name of"),
    ({"bucket": 1, "name": "a"}, "object.bucket must be the name of"),
    ({"bucket": "a", "name": ""}, "object.name must be 1 to 1024 bytes"),
    ({"bucket": "a", "name": "é" * 513}, "object.name must be 1 to 1024 bytes"),
    ({"bucket": "a", "name": "a\nb"}, "object.name must be 1 to 1024 bytes"),
    ({"bucket": "a", "name": "b", "key": "c"}, "object has a field that is not known"),
]


@pytest.mark.parametrize(("reference", "said"), BAD_OBJECTS)
def test_an_object_that_cannot_be_one(reference: Any, said: str) -> None:
    with pytest.raises(SubmissionRejected) as caught:
        decode_object([("object", reference)])
    assert caught.value.field == "object"
    assert caught.value.detail.startswith(said)
