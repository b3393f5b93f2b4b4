"""What other settings would change of a relay that runs: which, as it may be shown, and who is concerned. Pure.

Settings are compared as they were ``captured``: text by name. An empty one counts as not set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from relay.settings import is_secret, is_set, without_login

COUNTS = frozenset({"RELAY_SEND_WORKERS", "RELAY_STATUS_WORKERS"})
"""Say how many there are, and nothing to each of them."""
SHOWN = 60


class Change(NamedTuple):
    """A setting that would be another."""

    name: str
    before: str
    """As it may be shown; '' when it was not set, or is secret."""
    after: str
    is_secret: bool

    def __str__(self) -> str:
        if self.is_secret:
            return f"{self.name} (a secret) changes"
        return f"{self.name}: {self.before or 'not set'} → {self.after or 'not set'}"


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[Change]:
    """Every setting that differs, by name."""
    old, new = _set_ones(before), _set_ones(after)
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return [Change(name, _shown(name, old), _shown(name, new), is_secret(name)) for name in names]


def concern_a_worker(before: Mapping[str, str], after: Mapping[str, str]) -> bool:
    """Whether a worker with the settings ``before`` has to be restarted to have those ``after``."""
    return any(change.name not in COUNTS for change in changes(before, after))


def missing(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """What was set and is not even mentioned any more: forgotten, more likely than unset on purpose."""
    return sorted(name for name in _set_ones(before) if name not in after)


def _set_ones(values: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in values.items() if is_set(name, value)}


def _shown(name: str, values: Mapping[str, str]) -> str:
    value = values.get(name)
    if value is None or is_secret(name):
        return ""
    shown = without_login(name, value)
    return (shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…") or '""'
