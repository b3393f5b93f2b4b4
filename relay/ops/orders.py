"""What ``relayctl`` tells the workers, in files of the state directory. The workers' side imports nothing of its own.

============================ ============================================ ============================================
file                         what it says                                 when a worker reads it
============================ ============================================ ============================================
``settings/<number>.json``   settings by name (mode 0600)                 when it starts; its command line names it
``send_workers.json``        how many send workers share the sending rate when it starts, and from then on (``share``)
``drain.json``               how long to drain, less than DRAIN_SECONDS   when it is told to stop
============================ ============================================ ============================================

A worker that supervisord starts again by itself has the settings that it had: its command line is the same.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

import orjson

from relay.errors import RelayError


class SettingsGone(RelayError):
    """The settings that a worker was given cannot be read any more."""


def write_atomically(path: Path, value: object) -> None:
    """Writes JSON that only its owner may read; whoever reads meanwhile gets the old or the new. Raises ``OSError``."""
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(orjson.dumps(value))
    partial.replace(path)


# -- settings ----------------------------------------------------------------------------------------------------------
def keep_settings(state_dir: Path, values: Mapping[str, str], named: Collection[str] = ()) -> Path:
    """Keeps settings under the next number; the file. Raises ``OSError``.

    ``named``: files that programs name, whether they are there or not: one made anew would pass for what they have.
    """
    directory = state_dir / "settings"
    directory.mkdir(mode=0o700, exist_ok=True)
    taken = [*directory.glob("*.json"), *map(Path, named)]
    path = directory / f"{max(map(_number, taken), default=0) + 1}.json"
    write_atomically(path, dict(values))
    return path


def read_settings(path: Path) -> dict[str, str]:
    """Settings as they were kept. Raises ``SettingsGone``."""
    try:
        return {str(name): str(value) for name, value in dict(orjson.loads(path.read_bytes())).items()}
    except (OSError, ValueError, TypeError) as error:
        raise SettingsGone(
            f"{path} cannot be read ({error}); `relayctl reload` gives the workers settings again"
        ) from error


def forget_settings(state_dir: Path, but: Collection[str]) -> None:
    """Removes all that were kept but those files, and what a killed writer left. Raises ``OSError``."""
    for path in (state_dir / "settings").glob("*"):
        if str(path) not in but:
            path.unlink(missing_ok=True)


def _number(path: Path) -> int:
    return int(path.stem) if path.stem.isdigit() else 0


# -- what changes while a worker runs ----------------------------------------------------------------------------------
def tell_send_workers(state_dir: Path, count: int) -> None:
    """Says how many send workers share the sending rate. Raises ``OSError``."""
    write_atomically(send_workers_path(state_dir), count)


def send_workers(state_dir: Path, otherwise: int) -> int:
    """How many share the sending rate, by what was said last."""
    told = _read(send_workers_path(state_dir))
    return told if isinstance(told, int) and told > 0 else otherwise


def send_workers_path(state_dir: Path) -> Path:
    """Where that is said."""
    return state_dir / "send_workers.json"


def tell_drain_seconds(state_dir: Path, seconds: float) -> None:
    """Says that who is told to stop has only so long. Raises ``OSError``."""
    write_atomically(state_dir / "drain.json", seconds)


def forget_drain_seconds(state_dir: Path) -> None:
    """DRAIN_SECONDS holds again. Raises ``OSError``."""
    (state_dir / "drain.json").unlink(missing_ok=True)


def drain_seconds(state_dir: Path, otherwise: float) -> float:
    """How long to drain: ``otherwise``, or less when that was said."""
    told = _read(state_dir / "drain.json")
    return min(otherwise, max(0.0, float(told))) if isinstance(told, (int, float)) else otherwise


def _read(path: Path) -> object:
    try:
        value: object = orjson.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value
