"""The settings as text: the README's table and ``conf/relay.env.example``, both made from ``settings.py``."""

from __future__ import annotations

from pathlib import Path

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from relay.settings import Group, Settings, rows, source_of, without_login

MASK = "********"


def markdown_table() -> str:
    """One table a group: name, default, meaning and the reason for the default."""
    parts = []
    for group in Group:
        parts += [f"**{group.value}**", "", "| Variable | Default | Meaning |", "|---|---|---|"]
        for name, field, _, why in _of(group):
            default = _default(field)
            meaning = f"{field.description} *({why}.)*" if why else str(field.description)
            parts.append(f"| `{name}` | {f'`{default}`' if default else '(empty)'} | {meaning} |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def env_example() -> str:
    """Every setting with its default, commented out."""
    parts = ["# Every setting of Relay with its default. Uncomment what you change."]
    for group in Group:
        parts += ["", f"# --- {group.value}"]
        for name, field, _, why in _of(group):
            parts += [f"# {field.description}" + (f" ({why}.)" if why else ""), f"#{name}={_default(field)}"]
    return "\n".join(parts) + "\n"


def _of(group: Group) -> list[tuple[str, FieldInfo, Group, str]]:
    return [row for row in rows() if row[2] is group]


def _default(field: FieldInfo) -> str:
    return _written(field.default)


def _written(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, SecretStr):
        return ""
    return str(value.as_posix() if isinstance(value, Path) else value)


def effective(settings: Settings) -> list[tuple[str, str, str]]:
    """Every setting: name, value as it would be written (secrets masked), and where it comes from."""
    found = []
    for name, _, _, _ in rows():
        value = getattr(settings, name.lower())
        if isinstance(value, SecretStr):
            shown = MASK if value.get_secret_value() else ""
        else:
            shown = without_login(name, _written(value))
        found.append((name, shown, source_of(name) if name.lower() in settings.model_fields_set else "default"))
    return found
