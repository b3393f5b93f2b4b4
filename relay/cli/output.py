"""An output file that never looks complete before it is: written beside its name, renamed at the end."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import IO

import click

PRIVATE = 0o600
"""It holds addresses."""


class OutputFile:
    """``FILE``, written as ``FILE.part``. ``keep`` marks a place to go on from: whatever stands behind it is cut off.

    A context manager: it is renamed by ``complete`` alone; left otherwise, the part stays.
    """

    def __init__(self, path: str, *, go_on: bool = False) -> None:
        """``go_on``: append to the part that is there. Raises ``ClickException`` when it cannot be written."""
        self.path = Path(path).resolve()
        self.part = self.path.with_name(f"{self.path.name}.part")
        if self.path.exists() and not self.path.is_file():
            raise click.ClickException(f"{path} is no file; leave out --output to write to standard output")
        if go_on and not self.part.is_file():
            raise click.ClickException(f"there is no {self.part} to go on with; leave out --cursor to begin anew")
        flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if go_on else os.O_TRUNC)
        try:
            self._file: IO[bytes] = os.fdopen(os.open(self.part, flags, PRIVATE), "ab" if go_on else "wb")
        except OSError as error:
            raise click.ClickException(f"cannot write {self.part}: {error.strerror}") from error
        self._kept_bytes = self._file.seek(0, os.SEEK_END)
        self._is_complete = False

    def write(self, octets: bytes) -> None:
        """Raises ``OSError``, as for a full disk; what was kept before stays."""
        self._file.write(octets)
        self._file.flush()

    def keep(self) -> None:
        """What has been written so far stays, whatever comes."""
        self._kept_bytes = self._file.tell()

    def complete(self) -> None:
        """Gives the file its name; it is on disk then."""
        os.fsync(self._file.fileno())
        self._file.close()
        self.part.replace(self.path)
        self._is_complete = True

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._is_complete:
            return
        with contextlib.suppress(OSError):  # what a full disk left in the buffer
            self._file.close()
        os.truncate(self.part, self._kept_bytes)
