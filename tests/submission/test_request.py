"""Decoding: every rule of the contract, and agreement with a plain implementation of encoding/json's rules."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay import contract
from relay.errors import SubmissionRejected
from relay.submission.request import SendRequest, decode_fields, decode_send_request, decode_status_request

FIELDS = ("to", "subject", "group_id")
EMPTY = ("", "", "")

DECODED = [
    # payload, the values of FIELDS
    (b"{}", EMPTY),
    (b" \t\r\n{ } \n", EMPTY),
    (b"null", EMPTY),
    (b" null ", EMPTY),
    (b'{"to":"a","subject":"b","group_id":"c"}', ("a", "b", "c")),
    (b'{"to":null}', EMPTY),
    (b'{"to":"a","to":null}', ("a", "", "")),
    (b'{"to":null,"to":"a"}', ("a", "", "")),
    (b'{"to":"a","to":"b"}', ("b", "", "")),
    (b'{"to":"a","\\u0074o":"b"}', ("b", "", "")),
    (b'{"To":"a"}', ("a", "", "")),
    (b'{"to":"a","TO":"b"}', ("b", "", "")),
    (b'{"TO":"b","to":"a"}', ("a", "", "")),
    (b'{"to":"a","TO":null}', ("a", "", "")),
    ('{"\u017fubject":"s"}'.encode(), ("", "s", "")),
    (b'{"\\u017fUBJECT":"s"}', ("", "s", "")),
    ('{"group_\u0131d":"dotless"}'.encode(), EMPTY),
    ('{"group_\u0130d":"dotted"}'.encode(), EMPTY),
    (b'{" to":"x","to ":"y","t":"z"}', EMPTY),
    (b'{"x":1,"y":[1,{"to":"inner"}],"z":{"to":2},"w":true,"v":1e999,"u":-0.0}', EMPTY),
    (b'{"x":' + b"9" * 5000 + b"}", EMPTY),
    (b'{"to":"\\ud800"}', ("\ufffd", "", "")),
    (b'{"to":"\\ud800\\u0041\\udc00"}', ("\ufffdA\ufffd", "", "")),
    (b'{"to":"\\ud83d\\ude00"}', ("\U0001f600", "", "")),
    (b'{"to":"\xff"}', ("\ufffd", "", "")),
    (b'{"to":"\xe2\x82x\xed\xa0\x80"}', ("\ufffd\ufffdx\ufffd\ufffd\ufffd", "", "")),
    (b'{"to":"\\ud83d\xed\xb8\x80"}', ("\ufffd" * 4, "", "")),
    (b'{"\xff":"x","to":"a"}', ("a", "", "")),
    (b'{"to":"\\u0000\\"\\\\\\/\\b\\f\\n\\r\\t\x7f"}', ('\0"\\/\b\f\n\r\t\x7f', "", "")),
    (b'{"to":"a\\"b","subject":"\\u0022"}', ('a"b', '"', "")),
    (b'{"to":"  "}', ("  ", "", "")),
    # quotation marks in values, and what dropping a name leaves
    (b'{"to":"\\u0022\\u0022","subject":"b"}', ('""', "b", "")),
    (b'{"to":"\\"\\"\\"\\"","subject":"b"}', ('""""', "b", "")),
    (b'{"to":"a","to":"\\"\\"\\"\\""}', ('""""', "", "")),
    (b'{"to":"a","to":"b","subject":"\\u0022\\u0022\\u0022\\u0022"}', ("b", '""""', "")),
    (b'{"to":"a\\\\","subject":"b\\\\\\"","to":"c\\\\"}', ("c\\", 'b\\"', "")),
    (b'{"to":"a","to":"b","x\\"\\"\\"\\"":"c"}', ("b", "", "")),
    (b'{"x":' + b"[" * 500 + b"]" * 500 + b',"to":"a"}', ("a", "", "")),
]

INVALID = [
    b"",
    b" ",
    b"[]",
    b'"x"',
    b"5",
    b"true",
    b"nul",
    b"{",
    b'{"to"}',
    b'{"to":"a",}',
    b"{'to':'a'}",
    b"{}{}",
    b"{} x",
    b"{}\0",
    b"\xef\xbb\xbf{}",
    b"\xff{}",
    b"{}\xff",
    b"\x0c{}",
    b'{"to":5}',
    b'{"to":true}',
    b'{"to":[]}',
    b'{"to":{}}',
    b'{"TO":5}',
    b'{"to":5,"to":"a"}',
    b'{"to":"a","to":5}',
    b'{"to":{"x":"y"},"to":"a"}',
    # a dropped name whose quotation marks are made up for by escaped ones
    b'{"to":5,"to":"a","subject":"\\u0022\\u0022"}',
    b'{"to":"a","x":NaN}',
    b'{"to":"a","x":-Infinity}',
    b'{"to":"a","x":01}',
    b'{"to":"a","x":1.}',
    b'{"to":"a\nb"}',
    b'{"to":"\\x41"}',
    b'{"to":"\\\'"}',
    b'{"to":"\\u12"}',
    b'{"to":"\\ud800',
    b'{"to":"\xff',
    b'{"x":' * 20_000,
    b"[" * 1_048_576,
]


@pytest.mark.parametrize(("payload", "values"), DECODED)
def test_what_encoding_json_takes_is_taken(payload: bytes, values: tuple[str, ...]) -> None:
    assert tuple(decode_fields(payload, FIELDS).items()) == tuple(zip(FIELDS, values, strict=True))


@pytest.mark.parametrize("payload", INVALID, ids=lambda payload: repr(payload[:30]))
def test_what_encoding_json_refuses_is_refused(payload: bytes) -> None:
    with pytest.raises(SubmissionRejected) as refusal:
        decode_fields(payload, FIELDS)
    assert refusal.value.error == contract.INVALID_REQUEST_PAYLOAD
    assert refusal.value.detail


def test_the_field_of_the_wrong_type_is_named() -> None:
    with pytest.raises(SubmissionRejected) as refusal:
        decode_fields(b'{"Subject":5}', FIELDS)
    assert refusal.value.field == "subject"


GOOD = {"to": "a@example.com", "subject": "s", "html": "<p>h</p>", "text": "t"}


def test_a_request_maps_the_payload_to_our_words() -> None:
    payload = json.dumps(
        GOOD | {"from": "f@example.com", "from_display_name": "F", "reply_to": "r@example.com", "group_id": "g"}
    ).encode()
    assert decode_send_request(payload) == SendRequest(
        to="a@example.com",
        subject_header="s",
        html="<p>h</p>",
        text="t",
        from_="f@example.com",
        from_display_name="F",
        reply_to="r@example.com",
        group_id="g",
    )


@pytest.mark.parametrize("field", ["to", "subject", "html", "text"])
@pytest.mark.parametrize("value", ["", None])
def test_a_missing_field_is_named(field: str, value: str | None) -> None:
    with pytest.raises(SubmissionRejected) as refusal:
        decode_send_request(json.dumps(GOOD | {field: value}).encode())
    assert (refusal.value.error, refusal.value.field) == (contract.REQUIRED_FIELDS_MISSING, field)


def test_the_first_missing_field_is_the_one_that_is_named() -> None:
    for payload in (b"null", b"{}", b'{"group_id":"g"}'):
        with pytest.raises(SubmissionRejected) as refusal:
            decode_send_request(payload)
        assert (refusal.value.error, refusal.value.field) == (contract.REQUIRED_FIELDS_MISSING, "to")


@pytest.mark.parametrize("field", ["to", "subject", "html", "text"])
def test_blank_counts_as_set(field: str) -> None:
    assert " " in decode_send_request(json.dumps(GOOD | {field: " "}).encode())


HUGE = {
    "html": json.dumps(GOOD | {"html": '<p class="x">' * 80_000}).encode(),
    "names": b"{" + b",".join(b'"name%d":"x"' % number for number in range(70_000)) + b',"To":"a"}',
    "one name": b"{" + b",".join([b'"to":"x"'] * 100_000) + b"}",
    "digits": b'{"x":' + b"1" * 1_000_000 + b"}",
    "bad octets": b'{"to":"' + b"\xff" * 1_000_000 + b'"}',
    "arrays": b'{"X":[' + b"[]," * 300_000 + b"1]}",
    "deep": b'{"x":' + b"[" * 9_000 + b"]" * 9_000 + b"}",
}


@pytest.mark.parametrize("name", HUGE)
def test_large_payloads_cost_little(name: str) -> None:
    started = time.process_time()
    try:
        decode_fields(HUGE[name], FIELDS)
    except SubmissionRejected:
        assert name == "deep"
    assert time.process_time() - started < 2


# -- a plain implementation of the rules, to compare with -----------------------------------------------------------


class Refused(Exception):
    pass


NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
STRING = re.compile(rb'"((?:[^\x00-\x1f"\\]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*)"')
SPACE = re.compile(rb"[ \t\r\n]*")
ESCAPES = {b"b": "\b", b"f": "\f", b"n": "\n", b"r": "\r", b"t": "\t"}
WRONG_TYPE = object()


def reference(payload: bytes, fields: tuple[str, ...]) -> dict[str, str] | None:
    """What encoding/json makes of it; None when it returns an error."""
    try:
        members, at = value(payload, 0)
        if SPACE.fullmatch(payload, at) is None:
            return None
    except Refused:
        return None
    if not (members is None or isinstance(members, list)):
        return None
    result = dict.fromkeys(fields, "")
    is_good = True
    for name, what in members or ():
        field = name if name in result else next((f for f in fields if folds_to(name, f)), None)
        if field is None or what is None:
            continue
        if isinstance(what, str):
            result[field] = what
        else:
            is_good = False
    return result if is_good else None


def folds_to(name: str, field: str) -> bool:
    same = {"s": "sS\u017f", "k": "kK\u212a"}
    return len(name) == len(field) and all(c in same.get(f, f + f.upper()) for c, f in zip(name, field, strict=True))


def value(payload: bytes, at: int) -> tuple[object, int]:
    """A list of members for an object, a str, None for null, WRONG_TYPE for all else."""
    at = SPACE.match(payload, at).end()  # type: ignore[union-attr]
    if payload[at : at + 1] == b'"':
        return string(payload, at)
    for word, meaning in ((b"null", None), (b"true", WRONG_TYPE), (b"false", WRONG_TYPE)):
        if payload.startswith(word, at):
            return meaning, at + len(word)
    if number := NUMBER.match(payload, at):
        return WRONG_TYPE, number.end()
    closing = {b"{": b"}", b"[": b"]"}.get(payload[at : at + 1])
    if closing is None:
        raise Refused
    members: list[tuple[str, object]] = []
    at = SPACE.match(payload, at + 1).end()  # type: ignore[union-attr]
    while payload[at : at + 1] != closing or members:
        name = ""
        if closing == b"}":
            name, at = string(payload, SPACE.match(payload, at).end())  # type: ignore[union-attr]
            at = SPACE.match(payload, at).end()  # type: ignore[union-attr]
            if payload[at : at + 1] != b":":
                raise Refused
            at += 1
        what, at = value(payload, at)
        members.append((name, what))
        at = SPACE.match(payload, at).end()  # type: ignore[union-attr]
        if payload[at : at + 1] == closing:
            break
        if payload[at : at + 1] != b",":
            raise Refused
        at += 1
    return (members if closing == b"}" else WRONG_TYPE), at + 1


def string(payload: bytes, at: int) -> tuple[str, int]:
    match = STRING.match(payload, at)
    if match is None:
        raise Refused
    pieces: list[str] = []
    for escape, plain in re.findall(rb"\\(u....|.)|([^\\]+)", match[1], re.DOTALL):
        if plain:
            pieces.append(re.sub("[\udc80-\udcff]", "\ufffd", plain.decode("utf-8", "surrogateescape")))
        elif escape[:1] == b"u":
            pieces.append(chr(int(escape[1:], 16)))
            pair = "".join(pieces[-2:])
            if re.fullmatch("[\ud800-\udbff][\udc00-\udfff]", pair):
                pieces[-2:] = [pair.encode("utf-16", "surrogatepass").decode("utf-16")]
        else:
            pieces.append(ESCAPES.get(escape, escape.decode()))
    return re.sub("[\ud800-\udfff]", "\ufffd", "".join(pieces)), match.end()


def outcome(payload: bytes) -> dict[str, str] | None:
    try:
        return decode_fields(payload, FIELDS)
    except SubmissionRejected:
        return None


def test_the_reference_agrees_with_the_tables() -> None:
    for payload, values in DECODED:
        assert reference(payload, FIELDS) == dict(zip(FIELDS, values, strict=True)), payload
    for payload in INVALID[:-2]:
        assert reference(payload, FIELDS) is None, payload


NAMES = st.sampled_from(["to", "To", "TO", "subject", "\\u017fubject", "\u017fubject", "group_id", "x", "\\u0074o", ""])
# fmt: off
STRINGS = st.lists(st.sampled_from([
    b"a", b"\\u0022", b'\\"', b"\\ud83d", b"\\ude00", b"\xff", b"\xe2\x82", b"\xed\xa0\x80", b"\\n", b"\x01", b"\\x",
    b"\xc3\xa9", b"\xf0\x9f\x98\x80", b" ", b":", b"{", b"\\\\", b"\x7f", b"\\u0000",
]), max_size=6).map(lambda parts: b'"' + b"".join(parts) + b'"')
SCALARS = st.sampled_from([
    b"null", b"5", b"-0", b"1e999", b"01", b"true", b"[]", b"{}", b"NaN", b'{"to":1}', b'["\\ud800"]',
])
# fmt: on
GAPS = st.sampled_from([b"", b"", b"", b"", b" ", b"\n\t", b"\r", b"\x0c", b"\xc2\xa0"])
MEMBERS = st.tuples(GAPS, NAMES.map(str.encode), GAPS, STRINGS | STRINGS | SCALARS, GAPS).map(
    lambda parts: b'%b"%b"%b:%b%b' % parts
)
OBJECTS = st.lists(MEMBERS, max_size=5).map(lambda members: b"{" + b",".join(members) + b"}")


@settings(max_examples=800, deadline=None)
@given(OBJECTS)
def test_objects_are_read_as_the_reference_reads_them(payload: bytes) -> None:
    assert outcome(payload) == reference(payload, FIELDS)


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=60) | OBJECTS.flatmap(lambda payload: st.integers(0, len(payload)).map(lambda n: payload[:n]))
)
def test_no_octets_raise_anything_but_a_refusal(payload: bytes) -> None:
    assert outcome(payload) == reference(payload, FIELDS)


@pytest.mark.parametrize(("length", "is_taken"), [(10_000, True), (10_001, False)])
def test_a_group_id_too_long_for_the_record_is_refused(length: int, is_taken: bool) -> None:
    mail = {"to": "a@example.com", "subject": "s", "html": "h", "text": "t", "group_id": "🚀" * length}
    if is_taken:
        assert len(decode_send_request(json.dumps(mail).encode()).group_id) == length
    else:
        with pytest.raises(SubmissionRejected, match="group_id is longer than 10000 characters"):
            decode_send_request(json.dumps(mail).encode())


def test_a_group_id_of_characters_that_grow_in_json_is_refused() -> None:
    mail = {"to": "a@example.com", "subject": "s", "html": "h", "text": "t", "group_id": "\x01" * 10_000}
    with pytest.raises(SubmissionRejected, match="group_id is longer than 40002 bytes as JSON"):
        decode_send_request(json.dumps(mail).encode())
    assert decode_send_request(json.dumps(mail | {"group_id": "\x01" * 6_666}).encode()).group_id


@pytest.mark.parametrize("name", ["limit", "Limit", "LIMIT", "lim\u0131t"])
@pytest.mark.parametrize("value", ["5", "null", "0", "-0", "1001", "5.0", "1e1", '"5"', "true", "9" * 25, "[5]", "{}"])
def test_a_limit_is_read_alike_on_both_paths(name: str, value: str) -> None:
    def read(unknown: str) -> object:
        payload = f'{{"group_id":"g","{name}":{value},"unknown":"{unknown}"}}'.encode()
        try:
            return decode_status_request(payload)
        except SubmissionRejected as error:
            return error.error

    assert read("plain") == read("\\u0041"), "the second is read by the slow parser"


def test_the_limit_of_a_question_with_repeated_names_is_the_last() -> None:
    assert decode_status_request(b'{"limit":0,"LIMIT":7,"group_id":"limit"}').limit == 7


def test_a_question_longer_than_any_group_id_is_refused() -> None:
    assert decode_status_request(b'{"group_id":"%s","limit":1}' % (b"\\ud83d\\ude80" * 10_000)).limit == 1
    with pytest.raises(SubmissionRejected, match="longer than 185536 bytes"):
        decode_status_request(b'{"limit":5,"x":[%s]}' % b",".join([b"[]"] * 100_000))
