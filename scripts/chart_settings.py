"""Writes Relay's settings into the Helm chart: a part of ``values.yaml``, and what ``values.schema.json`` says of them.

``python -m scripts.chart_settings`` after a change of ``relay/settings.py``; a test tells when it was forgotten.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from relay.cli.settings_text import effective
from relay.settings import FALSE_WORDS, TRUE_WORDS, Group, Settings, rows

CHART = Path(__file__).parents[1] / "conf" / "helm" / "relay"
BEGIN = "# --- made from relay/settings.py by `python -m scripts.chart_settings`, down to the next line of dashes\n"
END = "# ---\n"
OF_THE_CHART = {"RELAY_STATE_DIR": "/var/lib/relay"}
"""Where the chart has a default of its own."""


def secret_names() -> set[str]:
    """Settings that a pod's specification must not show: those whose type says that they are secrets."""
    return {name for name, field, _, _ in rows() if field.annotation is SecretStr}


def values() -> str:
    """The values ``settings``: every setting with its meaning and its default, all of them unset."""
    defaults = {name: value for name, value, _ in effective(Settings.model_construct())} | OF_THE_CHART
    lines = ["settings:"]
    for group in Group:
        lines.append(f"  # -- {group.value}")
        for name, field, _, why in (row for row in rows() if row[2] is group and row[0] not in secret_names()):
            lines.append(f"  # {field.description}" + (f" ({why}.)" if why else ""))
            lines.append(f"  {name}: null" + (f"  # {defaults[name]}" if defaults[name] else ""))
    return "\n".join(lines) + "\n"


def schema() -> dict[str, Any]:
    """What each of them may be: types and bounds as the settings have them."""
    own = Settings.model_json_schema()["properties"]
    names = [name for name, _, _, _ in rows() if name not in secret_names()]
    return {
        "type": "object",
        "properties": {name: _one(own[name.lower()]) for name in names},
        "additionalProperties": False,
    }


def _one(own: dict[str, Any]) -> dict[str, Any]:
    """One setting. Null is unset, and so is an empty text; numbers, too, may be given as text (``--set-string``)."""
    if own["type"] == "boolean":
        return {"enum": [None, True, False, "", *sorted(TRUE_WORDS), *sorted(FALSE_WORDS)]}
    if "enum" in own:
        return {"enum": [None, "", *own["enum"]]}
    bounds: dict[str, Any] = {
        key: own[key] for key in ("minimum", "exclusiveMinimum", "maximum", "pattern") if key in own
    }
    if own["type"] in {"integer", "number"}:
        return {"type": [own["type"], "string", "null"], **bounds, "pattern": r"^([0-9]+(\.[0-9]+)?)?$"}
    return {"type": [own["type"], "string", "null"] if own["type"] == "array" else ["string", "null"], **bounds}


def updated_values(text: str) -> str:
    """``values.yaml`` with the settings of now."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"values.yaml must hold the lines {BEGIN!r} and {END!r}")
    return before + begin + values() + end + after


def updated_schema(text: str) -> str:
    """``values.schema.json`` with the settings of now."""
    whole = json.loads(text)
    whole["properties"]["settings"] = schema()
    return json.dumps(whole, indent=2) + "\n"


def main() -> None:
    """Writes both files."""
    for name, update in (("values.yaml", updated_values), ("values.schema.json", updated_schema)):
        path = CHART / name
        path.write_text(update(path.read_text()))


if __name__ == "__main__":
    main()
