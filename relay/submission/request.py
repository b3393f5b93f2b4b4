"""Requests: from the payload's bytes to typed values, with exactly the latitude that callers are used to.

Owns how JSON (RFC 8259) is read. The service that Relay replaces reads it with Go's ``encoding/json`` into a
struct of strings, so that package's rules are the contract: names match exactly or else by case folding,
unknown names are ignored whatever their value, ``null`` leaves a field as it is, the last value wins, malformed
Unicode becomes U+FFFD. What the values mean is left to ``policy`` and ``address``; the mapping of the payload's
``from`` and ``subject`` to our own words happens here and nowhere else.

orjson does the work whenever it provably sees what Go would see. It refuses malformed Unicode and numbers
beyond a double, and it collapses repeated names, so whatever is unusual is read again by the standard library's
parser.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from itertools import repeat
from typing import Final, NamedTuple, NoReturn

import orjson

from relay import contract
from relay.errors import SubmissionRejected
from relay.submission.options import LONE_SURROGATE, Members, ObjectRef, Options, decode_object, decode_options, folded

_QUOTATION_MARKS: Final = repeat('"')
_ONLY_STRINGS: Final = frozenset({str})

MAX_GROUP_ID_CHARACTERS = 10_000
MAX_GROUP_ID_BYTES = 4 * MAX_GROUP_ID_CHARACTERS + 2
"""Of a group id in the record's JSON, where control characters take six: a bucket of lfx's takes records of 64 KiB."""
_ALWAYS_SHORT_CHARACTERS: Final = (MAX_GROUP_ID_BYTES - 2) // 6

MAX_QUESTION_BYTES = 64 * 1024 + 12 * MAX_GROUP_ID_CHARACTERS
"""Of a status question: no group id that was ever taken is longer, however it is escaped."""


MAX_REFERENCE_BYTES = 4 * 1024
"""Of a request that is a reference to an object: a bucket and a name, however they are escaped, and little else."""

_SEND_EMAIL_FIELDS: Final = frozenset(contract.SEND_EMAIL_FIELDS)
_NO_FIELDS: Final = dict.fromkeys(contract.SEND_EMAIL_FIELDS, "")


class SendRequest(NamedTuple):
    """A ``send_email`` request. Same order as ``contract.SEND_EMAIL_FIELDS``; '' where the caller gave nothing."""

    to: str
    subject_header: str
    html: str
    text: str
    from_: str
    from_display_name: str
    reply_to: str
    group_id: str
    options: Options | None = None
    """What it says beyond the contract's eight fields; None for a plain mail. ``to`` then names the first recipient."""


def decode_send_request(payload: bytes) -> SendRequest:
    """The request in ``payload``, with ``to``, ``subject``, ``html`` and ``text`` all non-empty (blanks count as set).

    Raises ``SubmissionRejected`` with ``INVALID_REQUEST_PAYLOAD``, or with ``REQUIRED_FIELDS_MISSING`` and the first
    missing field. A group id too long to be kept in the mail's record is refused before anything is sent.
    """
    decoded = _loaded(payload)
    request = _usual_request(payload, decoded) or _any_request(_whole_members(payload, decoded))
    if not (request.to and request.subject_header and request.html and request.text):
        is_enough = request.options is not None and request.options.allow_single_part and (request.html or request.text)
        if not (is_enough and request.to and request.subject_header):
            missing = contract.SEND_EMAIL_FIELDS[request.index("")]
            raise SubmissionRejected(contract.REQUIRED_FIELDS_MISSING, missing, f"{missing} is missing or empty")
    if len(request.group_id) > _ALWAYS_SHORT_CHARACTERS:
        _check_group_id(request.group_id)
    return request


def decode_request_object(payload: bytes) -> ObjectRef | None:
    """The object that holds the whole request, when ``payload`` is nothing but a reference to one."""
    if len(payload) > MAX_REFERENCE_BYTES or b"{" not in payload[1:]:
        return None
    return decode_object(_whole_members(payload, _loaded(payload)))


def _loaded(payload: bytes) -> object:
    """What orjson makes of ``payload``; None, too, where it refuses what Go may take."""
    try:
        return orjson.loads(payload)
    except orjson.JSONDecodeError:
        return None


def _usual_request(payload: bytes, decoded: object) -> SendRequest | None:
    """Known names, exactly written, and strings only; None for any other request, also one that nobody can read."""
    if type(decoded) is not dict or not decoded.keys() <= _SEND_EMAIL_FIELDS:
        return None
    if set(map(type, decoded.values())) != _ONLY_STRINGS:
        return None
    if _has_dropped_a_name(payload, len(decoded), decoded.values()):
        return None
    return SendRequest._make((*(_NO_FIELDS | decoded).values(), None))


def _any_request(members: Collection[tuple[str, object]]) -> SendRequest:
    fields = dict(_NO_FIELDS)
    for name, value in members:
        field = name if name in fields else folded(name)
        if field not in fields or value is None:
            continue
        if field == "to" and type(value) is list:
            fields[field] = ""  # ``options`` has them all
        elif isinstance(value, str):
            fields[field] = LONE_SURROGATE.sub("\ufffd", value)
        else:
            _reject(field, f"{field} must be a string")
    options = decode_options(members)
    if options is not None:
        fields["to"] = options.to[0] if options.to else ""
    return SendRequest._make((*fields.values(), options))


def _whole_members(payload: bytes, decoded: object) -> Collection[tuple[str, object]]:
    """The members of the request: orjson's where it dropped none, at any depth; else read again by the slow parser."""
    if type(decoded) is dict:
        names, texts = _names_and_texts(decoded)
        if not _has_dropped_a_name(payload, names, texts):
            return decoded.items()
    return list(_members(payload, _OPTIONS_DECODER))


def _names_and_texts(decoded: dict[str, object]) -> tuple[int, list[str]]:
    """How many names there are at any depth, and every string that is a value."""
    names = 0
    texts: list[str] = []
    waiting: list[object] = [decoded]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, dict):
            names += len(value)
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
    return names, texts


def _check_group_id(group_id: str) -> None:
    if len(group_id) > MAX_GROUP_ID_CHARACTERS:
        _reject("group_id", f"group_id is longer than {MAX_GROUP_ID_CHARACTERS} characters")
    if len(orjson.dumps(group_id)) > MAX_GROUP_ID_BYTES:
        _reject("group_id", f"group_id is longer than {MAX_GROUP_ID_BYTES} bytes as JSON")


class StatusRequest(NamedTuple):
    """A ``get_email_status`` request; '' where the caller gave nothing."""

    email_id: str
    group_id: str
    cursor: str
    limit: int | None
    """Mails in a page; None when the caller gave no limit."""


def decode_status_request(payload: bytes) -> StatusRequest:
    """The question in ``payload``. Which of the ids are set is not judged.

    Raises ``SubmissionRejected`` with ``INVALID_REQUEST_PAYLOAD``, or with ``INVALID_LIMIT`` for anything but null or
    an integer from 1 to ``MAX_PAGE_MAILS``.
    """
    if len(payload) > MAX_QUESTION_BYTES:
        _reject("", f"the payload is longer than {MAX_QUESTION_BYTES} bytes")
    fields = decode_fields(payload, contract.STATUS_FIELDS)
    return StatusRequest(**fields, limit=_decode_limit(payload))


def _decode_limit(payload: bytes) -> int | None:
    lower = payload.lower()
    if b"limit" not in lower and b"\\u" not in payload:
        return None
    limit: object = None
    for name, value in _members_with_limit(payload, lower):
        if value is not None and name.lower() == contract.STATUS_LIMIT_FIELD:
            limit = value
    if limit is None:
        return None
    if type(limit) is int and 1 <= limit <= contract.MAX_PAGE_MAILS:
        return limit
    raise SubmissionRejected(contract.INVALID_LIMIT, contract.STATUS_LIMIT_FIELD)


def _members_with_limit(payload: bytes, lower: bytes) -> Iterable[tuple[str, object]]:
    """The members as far as a limit is concerned: orjson's where the name, which stands nowhere else, stands once."""
    if lower.count(b'"limit"') == 1 and b"\\" not in payload:
        try:
            decoded = orjson.loads(payload)
        except orjson.JSONDecodeError:
            return _members(payload, _LIMIT_DECODER)
        if isinstance(decoded, dict):
            return decoded.items()
    return _members(payload, _LIMIT_DECODER)


def decode_fields(payload: bytes, fields: tuple[str, ...]) -> dict[str, str]:
    """The JSON object in ``payload`` as exactly ``fields``, in their order; '' for what is absent or null.

    ``fields`` are lower-case ASCII names. A top-level ``null`` is an empty object. Raises ``SubmissionRejected`` with
    ``INVALID_REQUEST_PAYLOAD`` for anything that is not one JSON object, or when a known field is not a string.
    """
    try:
        decoded = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return _decode_slowly(payload, fields)
    result = dict.fromkeys(fields, "")
    if type(decoded) is not dict:
        if decoded is None:
            return result
        _reject("", "the payload is not a JSON object")
    # The usual request at once, the others member by member.
    if decoded.keys() <= result.keys() and set(map(type, decoded.values())) == _ONLY_STRINGS:
        if _has_dropped_a_name(payload, len(decoded), decoded.values()):
            return _decode_slowly(payload, fields)
        result.update(decoded)
        return result
    for name, value in decoded.items():
        if isinstance(value, (dict, list)):
            return _decode_slowly(payload, fields)
        if name in result:
            if isinstance(value, str):
                result[name] = value
            elif value is not None:
                _reject(name, f"{name} must be a string")
        elif folded(name) in result:
            return _decode_slowly(payload, fields)
    texts = [value for value in decoded.values() if isinstance(value, str)]
    return _decode_slowly(payload, fields) if _has_dropped_a_name(payload, len(decoded), texts) else result


def _has_dropped_a_name(payload: bytes, members: int, texts: Collection[str]) -> bool:
    """Whether orjson may have dropped a name that stands twice: it gave ``members``, ``texts`` are their string values.

    It is seen by counting quotation marks: two per name and per string value, those of dropped ones included, and any
    number inside strings. No value may be an array or an object.
    """
    surplus = payload.count(b'"') - 2 * (members + len(texts))
    if not surplus:
        return False
    # The surplus is either inside strings or of a dropped name. Inside strings it stands behind a reverse solidus. One
    # that is written as another escape does not show in the payload and could make up for a dropped name.
    return surplus != sum(map(str.count, texts, _QUOTATION_MARKS)) or b"\\u0022" in payload


def _reject(field: str, detail: str) -> NoReturn:
    raise SubmissionRejected(contract.INVALID_REQUEST_PAYLOAD, field, detail)


# -- the slow path ----------------------------------------------------------------------------------------------------


def _number(_digits: str) -> int:
    """Any number: no field holds one, so its value, which may be huge, is never computed."""
    return 0


def _small_number(digits: str) -> int:
    """An integer as far as a limit may go; a longer one is never computed, and is no limit."""
    return int(digits) if len(digits) <= 9 else 0


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_SLOW_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=Members, parse_int=_number, parse_float=_number, parse_constant=_refuse_constant
)
_OPTIONS_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=Members, parse_int=_small_number, parse_constant=_refuse_constant
)
_LIMIT_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=Members, parse_int=_small_number, parse_float=str, parse_constant=_refuse_constant
)


def _decode_slowly(payload: bytes, fields: tuple[str, ...]) -> dict[str, str]:
    result = dict.fromkeys(fields, "")
    for name, value in _members(payload, _SLOW_DECODER):
        field = name if name in result else folded(name)
        if field not in result or value is None:
            continue
        if not isinstance(value, str):
            _reject(field, f"{field} must be a string")
        result[field] = LONE_SURROGATE.sub("\ufffd", value)
    return result


def _members(payload: bytes, decoder: json.JSONDecoder) -> Iterator[tuple[str, object]]:
    """The members of the object in ``payload``, in document order, repeated names included; none of a ``null``."""
    try:
        # Each undecodable byte becomes one lone surrogate: an error outside strings, one U+FFFD inside, as in Go.
        decoded = decoder.decode(payload.decode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise SubmissionRejected(contract.INVALID_REQUEST_PAYLOAD, "", "the payload is not valid JSON") from error
    except RecursionError as error:
        # Go stops at 10,000 levels, this parser at about 1,000 (in 3.11); no request needs more than one.
        raise SubmissionRejected(contract.INVALID_REQUEST_PAYLOAD, "", "the payload is nested too deeply") from error
    if decoded is None:
        return iter(())
    if not isinstance(decoded, Members):
        _reject("", "the payload is not a JSON object")
    return iter(decoded)
