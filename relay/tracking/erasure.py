"""Personal data out of a record; what was counted stays.

Pure. An erased record has ``to`` and ``subject`` empty, since lfx's type has them always, and ``erased_at``. Of the
rest stay ids, times, numbers, and yes and no: who a mail belongs to, what became of it, how often, and by which event.
Every other text goes, at any depth, whichever part of Relay may write it one day: addresses, user agents, links,
diagnostics.

An event that comes after the erasure is folded as ever, so that counts go on, but where the record has ``erased_at``
what is stored is ``without_personal_data`` of the result (``folding.stored_value``): a link must not come back. The
facts in the log hold ids and times only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

from relay.tracking.facts import Fact
from relay.tracking.record import parse_record, parse_time

ERASED_AT = "erased_at"

ALWAYS_THERE = ("to", "subject")
"""Fields of the contract that cannot be left out: they become empty."""

KEPT_TEXTS = frozenset({"outcome"})
FIRST = "first"
"""The event ids by what they state: the names are those of facts."""
_ID_NAME = re.compile(r"(?:\w+_)?ids?")
_ID = re.compile(r"[A-Za-z0-9_.:/=+-]{1,128}")
_FACTS = frozenset(fact.value for fact in Fact)
_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")


def without_personal_data(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with ids, times, numbers, and yes and no; of an erased one nothing more is taken."""
    kept = {name: value for name, given in record.items() if (value := _kept(name, given)) is not None}
    if "group_id" in record:  # which group a mail belongs to is what is counted
        kept["group_id"] = record["group_id"]
    return kept | {name: "" for name in ALWAYS_THERE if name in record}


def erased(value: bytes, at: str) -> bytes | None:
    """The value of an erased record; the same again, but for what came back meanwhile. None when it is no record.

    ``at`` is the time of the erasure; the first one stays.
    """
    record = parse_record(value)
    if record is None:
        return None
    found = without_personal_data(record)
    if parse_time(found.get(ERASED_AT)) is None:
        found[ERASED_AT] = at
    return value if found == record else orjson.dumps(found)


def erasable(record: Mapping[str, Any]) -> list[str]:
    """The names of the record's own fields that an erasure would empty, shorten or leave out."""
    kept = without_personal_data(record)
    return [name for name, value in record.items() if kept.get(name) != value]


def _kept(name: str, value: Any) -> Any:
    """What stays of a value, None when nothing does."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        is_kept = name in KEPT_TEXTS or (_ID_NAME.fullmatch(name) and _is_id(value)) or parse_time(value)
        return value if is_kept else None
    if isinstance(value, list):
        members = [_kept(name, each) for each in value]
        return [each for each in members if each is not None]
    if name == FIRST:
        return {key: each for key, each in value.items() if key in _FACTS and _is_id(each)}
    fields = {key: _kept(key, each) for key, each in value.items() if _NAME.fullmatch(key)}
    return {key: each for key, each in fields.items() if each is not None}


def _is_id(value: object) -> bool:
    return isinstance(value, str) and _ID.fullmatch(value) is not None
