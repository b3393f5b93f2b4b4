"""Options: what a request may say beyond the contract's eight string fields.

Owns their names and types as JSON, and the values they become. The rules are stricter than those for the eight: no
caller relies on latitude here, and one who misspells a field of an attachment should hear of it. On top the eight's
rules hold: names match exactly or else by case folding, ``null`` gives nothing, the last value of a name wins. What
the values mean is left to others: who gets the mail to ``recipients``, the header section to ``fields``, the files to
``attachment``, ids of requests to ``idempotency``.

A request with nothing of all this has no ``Options``, and goes the way it always went.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

from relay import contract
from relay.submission import fields
from relay.submission.attachment import (
    ATTACHMENT_FIELDS,
    OBJECT_FIELDS,
    Attachment,
    ObjectRef,
    new_attachment,
    new_object_ref,
)
from relay.submission.fields import reject

__all__ = [
    "OPTION_FIELDS",
    "Attachment",
    "Members",
    "ObjectRef",
    "Options",
    "decode_object",
    "decode_options",
    "folded",
]

ATTACHMENTS_LIMIT: Final = 100
ADDRESSES_LIMIT: Final = 10_000
"""Texts in one list of addresses. How many a mail may go to is the operator's setting; this only bounds the reading."""
TIMEOUT_LIMIT_SECONDS: Final = 86_400.0

_REQUEST_ID: Final = re.compile(r"[ -~]{1,128}")
LONE_SURROGATE: Final = re.compile("[\ud800-\udfff]")


class Members(list[tuple[str, object]]):
    """An object as its members in document order, repeated names included; not to be confused with an array."""


class Options(NamedTuple):
    """What a request says beyond the eight fields; '' and () where the caller gave nothing."""

    to: tuple[str, ...] = ()
    """As given, each one mailbox; also when the request gave a single string."""
    cc: tuple[str, ...] = ()
    bcc: tuple[str, ...] = ()
    is_individual: bool = False
    """A mail of its own for each of ``to``, instead of one for all."""
    request_id: str = ""
    timeout_seconds: float | None = None
    message_id_header: str = ""
    """With its angle brackets."""
    in_reply_to: str = ""
    """One message id or several, with a space between, each with its angle brackets."""
    references: tuple[str, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    """Name and value, in the caller's order; a name may stand several times."""
    tags: tuple[tuple[str, str], ...] = ()
    attachments: tuple[Attachment, ...] = ()
    allow_single_part: bool = False

    @property
    def shapes_content(self) -> bool:
        """Whether the mail looks different from what ``compose`` makes of the eight fields."""
        return bool(
            len(self.to) != 1
            or self.cc
            or self.bcc
            or self.in_reply_to
            or self.references
            or self.headers
            or self.tags
            or self.attachments
            or self.allow_single_part
        )


_NOTHING: Final = Options()


def decode_options(members: Iterable[tuple[str, object]]) -> Options | None:
    """The options among the members of a request, given in document order; None when it says nothing of the kind.

    An object may be a ``dict`` or ``Members``. Attachments are taken out of ``members`` as they are decoded, so that
    their content does not stand in memory twice: do not read those again. Raises ``SubmissionRejected`` with
    ``INVALID_REQUEST_PAYLOAD``, naming the field.
    """
    given: dict[str, object] = {}
    for name, value in members:
        field = name if name in _DECODERS else folded(name)
        if field in _DECODERS and value is not None:
            given[field] = value
    if not given or (len(given) == 1 and isinstance(given.get("to"), str)):
        return None  # a string in ``to`` is the contract's, and no option by itself
    has_list = isinstance(given.get("to"), (list, dict))
    options = Options(**{_ATTRIBUTES.get(name, name): _DECODERS[name](name, value) for name, value in given.items()})
    if not has_list and options == _NOTHING._replace(to=options.to):
        return None
    if options.is_individual:
        _check_individual(options)
    return options


def decode_object(members: Iterable[tuple[str, object]]) -> ObjectRef | None:
    """The object that holds the whole request, when the request is nothing but ``{"object": {…}}``; else None.

    Beside other fields ``object`` is unknown, and ignored like any name that is. Raises ``SubmissionRejected``.
    """
    known = dict(_known_members(members))
    reference = known.pop("object", None)
    if not isinstance(reference, (Mapping, Members)) or any(value is not None for value in known.values()):
        return None
    return new_object_ref("object", _object("object", "object", reference, OBJECT_FIELDS))


def folded(name: str) -> str:
    """``name`` in Go's simple case folding, as far as it can make an ASCII name: U+017F is an s, U+212A a k."""
    return name.lower().replace("\u017f", "s")


def _known_members(members: Iterable[tuple[str, object]]) -> Iterable[tuple[str, object]]:
    known = {*contract.SEND_EMAIL_FIELDS, *OPTION_FIELDS, "object"}
    for name, value in members:
        field = name if name in known else folded(name)
        if field in known:
            yield field, value


def _check_individual(options: Options) -> None:
    for field, texts in (("cc", options.cc), ("bcc", options.bcc)):
        if texts:
            reject(field, f'{field} must be empty with recipients_as "individual", where each mail has one recipient')
    if options.message_id_header and len(options.to) > 1:
        reject("message_id_header", 'message_id_header would be that of several mails with recipients_as "individual"')


# -- one decoder per field --------------------------------------------------------------------------------------------


def _text(field: str, value: object) -> str:
    if not isinstance(value, str):
        reject(field.partition("[")[0].partition(".")[0], f"{field} must be a string")
    return value if value.isascii() else LONE_SURROGATE.sub("\ufffd", value)


def _texts(field: str, value: object) -> tuple[str, ...]:
    """A string as one text (none, when it is empty), or a list of texts that are not empty."""
    if isinstance(value, str):
        return (_text(field, value),) if value else ()
    if type(value) is not list:
        reject(field, f"{field} must be a string or a list of strings")
    if len(value) > ADDRESSES_LIMIT:
        reject(field, f"{field} has {len(value)} entries; at most {ADDRESSES_LIMIT} are read")
    texts = tuple(_text(f"{field}[{number}]", text) for number, text in enumerate(value))
    if "" in texts:
        reject(field, f"{field}[{texts.index('')}] is empty; leave it out")
    return texts


def _is_individual(field: str, value: object) -> bool:
    if value not in ("", "together", "individual"):
        reject(field, f'{field} must be "together" or "individual"')
    return value == "individual"


def _request_id(field: str, value: object) -> str:
    text = _text(field, value)
    if text and not _REQUEST_ID.fullmatch(text):
        reject(field, f"{field} must be 1 to 128 printable ASCII characters")
    return text


def _timeout_seconds(field: str, value: object) -> float:
    # True and false are integers to Python; what is compared is not converted, for an integer may be of any size.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= TIMEOUT_LIMIT_SECONDS:
        reject(field, f"{field} must be a number above 0 and at most {TIMEOUT_LIMIT_SECONDS:.0f}")
    return float(value)


def _message_id_header(field: str, value: object) -> str:
    text = _text(field, value)
    return fields.check_message_id(field, text) if text else ""


def _in_reply_to(field: str, value: object) -> str:
    text = _text(field, value)
    return " ".join(fields.check_message_ids(field, text)) if text else ""


def _references(field: str, value: object) -> tuple[str, ...]:
    texts = _texts(field, value)
    return fields.check_message_ids(field, " ".join(texts)) if texts else ()


def _headers(field: str, value: object) -> tuple[tuple[str, str], ...]:
    headers: list[tuple[str, str]] = []
    for name, values in _object(field, field, value).items():
        shown = f"{field}.{name}" if name.isprintable() and len(name) <= 76 else field
        for text in values if type(values) is list else [values]:
            if not isinstance(text, str):
                reject(field, f"{shown} must be a string or a list of strings")
            clean = _text(shown, text)
            fields.check_header(name, clean)
            headers.append((name, clean))
            if len(headers) > fields.HEADERS_LIMIT:
                reject(field, f"{field} has more than {fields.HEADERS_LIMIT} fields")
    return tuple(headers)


def _tags(field: str, value: object) -> tuple[tuple[str, str], ...]:
    tags = tuple(
        (name, text if isinstance(text, str) else reject(field, f"{field}: every value must be a string"))
        for name, text in _object(field, field, value).items()
    )
    fields.check_tags(tags)
    return tags


def _attachments(field: str, value: object) -> tuple[Attachment, ...]:
    if type(value) is not list:
        reject(field, f"{field} must be a list of objects")
    if len(value) > ATTACHMENTS_LIMIT:
        reject(field, f"{field} has {len(value)} entries; at most {ATTACHMENTS_LIMIT} are taken")
    attachments = []
    content_ids: set[str] = set()
    for number, item in enumerate(value):
        name = f"{field}[{number}]"
        given = _object(field, name, item, ATTACHMENT_FIELDS)
        item.clear()  # only ``given`` holds its content now
        if given.get("object") is not None:
            reference = _object(field, f"{name}.object", given["object"], OBJECT_FIELDS)
            given["object"] = new_object_ref(f"{name}.object", reference)
        attachment = new_attachment(name, given)
        if attachment.content_id and attachment.content_id in content_ids:
            reject(field, f"{name}.content_id is that of another attachment")
        content_ids.add(attachment.content_id)
        attachments.append(attachment)
    return tuple(attachments)


def _allow_single_part(field: str, value: object) -> bool:
    if not isinstance(value, bool):
        reject(field, f"{field} must be true or false")
    return value


def _object(top: str, field: str, value: object, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """The members of an object, the last value of each name. With ``names`` no others are taken, and nulls dropped."""
    if not isinstance(value, (Mapping, Members)):
        reject(top, f"{field} must be an object")
    members: dict[str, Any] = dict(value)
    if not names:
        return {_text(field, name): member for name, member in members.items() if member is not None}
    known: dict[str, Any] = {}
    for name, member in members.items():
        exact = name if name in names else folded(name)
        if exact not in names:
            reject(top, f"{field} has a field that is not known; its fields are {', '.join(names)}")
        if member is not None:
            known[exact] = member if not isinstance(member, str) else _text(f"{field}.{exact}", member)
    return known


_DECODERS: Final[dict[str, Callable[[str, object], Any]]] = {
    "to": _texts,
    "cc": _texts,
    "bcc": _texts,
    "recipients_as": _is_individual,
    "request_id": _request_id,
    "timeout_seconds": _timeout_seconds,
    "message_id_header": _message_id_header,
    "in_reply_to": _in_reply_to,
    "references": _references,
    "headers": _headers,
    "tags": _tags,
    "attachments": _attachments,
    "allow_single_part": _allow_single_part,
}
_ATTRIBUTES: Final = {"recipients_as": "is_individual"}

OPTION_FIELDS: Final = tuple(_DECODERS)
"""Names of the options in a request; ``to`` is one of them and one of the contract's eight."""
