"""The answer to one question."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    """What was found, and what to do about it."""

    what: str
    ok: bool
    detail: str
    """One sentence: what was found, or what is wrong."""
    is_warning: bool = False
    """Not ok, and still the relay would run."""
    remedy: str = ""
    """One sentence: what to do. '' when all is well."""

    @property
    def level(self) -> str:
        """``ok``, ``warning`` or ``failed``."""
        if self.ok:
            return "ok"
        return "warning" if self.is_warning else "failed"


def well(what: str, detail: str) -> Finding:
    """All is well."""
    return Finding(what, True, detail)


def warning(what: str, detail: str, remedy: str) -> Finding:
    """The relay runs, or would; something is lost or at risk."""
    return Finding(what, False, detail, is_warning=True, remedy=remedy)


def failed(what: str, detail: str, remedy: str) -> Finding:
    """The relay does not do its work like this, or would not."""
    return Finding(what, False, detail, remedy=remedy)
