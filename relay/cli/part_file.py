"""An output file that never looks complete before it is: written beside its name, renamed at the end.

Until then it is ``FILE.part``, and may have been left at any byte: by a kill, by a crash. So it does not say itself how
far it is good: who goes on with it names a ``Mark``, a length and the checksum of all up to there. It is cut off
there, and refused when it is not the part that the mark was made of.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import zlib
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import click

PRIVATE = 0o600
"""It holds addresses."""
CHUNK_BYTES = 1024 * 1024

_MARK = re.compile(r"(\d{1,18})\.([0-9a-f]{8})")


class Mark(NamedTuple):
    """How far a part is good."""

    size_bytes: int
    checksum: int
    """CRC-32 of so many bytes."""

    def __str__(self) -> str:
        return f"{self.size_bytes}.{self.checksum:08x}"

    @classmethod
    def parse(cls, text: str) -> Mark | None:
        """What ``str`` gave; None for anything else."""
        found = _MARK.fullmatch(text)
        return cls(int(found[1]), int(found[2], 16)) if found else None

    def behind(self, octets: bytes | memoryview) -> Mark:
        """With so many more."""
        return Mark(self.size_bytes + len(octets), zlib.crc32(octets, self.checksum))


START = Mark(0, 0)


class PartFile:
    """``FILE``, written as ``FILE.part`` by one process at a time. What stands behind the last ``keep`` is cut off.

    A context manager: it is renamed by ``complete`` alone; left otherwise, the part stays.
    """

    def __init__(self, path: str, go_on_from: Mark | None = None) -> None:
        """Begins anew, or goes on with the part that is there. Raises ``ClickException`` when it cannot be written."""
        self.path = Path(os.path.realpath(path))
        self.part = self.path.with_name(f"{self.path.name}.part")
        try:
            if self.path.exists() and not self.path.is_file():
                raise click.ClickException(f"{path} is no file; leave out --output to write to standard output")
            self._descriptor = self._open(0 if go_on_from else os.O_CREAT)
        except FileNotFoundError as error:
            if go_on_from is None:
                raise self._unwritable(error) from error
            raise click.ClickException(
                f"there is no {self.part} to go on with; leave out --cursor to begin anew"
            ) from error
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._take_over(go_on_from or START)
        except OSError as error:
            os.close(self._descriptor)
            raise self._unwritable(error) from error
        except click.ClickException:
            os.close(self._descriptor)
            raise
        self.mark = self._end = go_on_from or START
        """``mark``: what has been kept."""
        self._is_complete = False

    def _open(self, more_flags: int) -> int:
        # A link or a pipe that someone put there is neither followed nor waited for.
        flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | more_flags
        return os.open(self.part, flags, PRIVATE)

    def _take_over(self, mark: Mark) -> None:
        """Makes sure that it is ours alone, before anything in it is changed."""
        found = os.fstat(self._descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink > 1:
            raise click.ClickException(f"{self.part} is no file of yours alone; take it away, or choose another name")
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise click.ClickException(f"another export is writing {self.part}") from error
        if not self._has_its_name():  # who held it completed it, between our opening and our lock
            raise click.ClickException(f"another export has just written {self.path}")
        if not self._is_good(mark):
            raise click.ClickException(
                f"{self.part} is not what it was when --cursor was said; leave out --cursor to begin anew"
            )
        os.fchmod(self._descriptor, PRIVATE)
        os.ftruncate(self._descriptor, mark.size_bytes)

    def _has_its_name(self) -> bool:
        try:
            named = os.stat(self.part, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(self._descriptor))

    def _is_good(self, mark: Mark) -> bool:
        read = START
        while chunk := os.pread(self._descriptor, min(CHUNK_BYTES, mark.size_bytes - read.size_bytes), read.size_bytes):
            read = read.behind(chunk)
        return read == mark

    def _unwritable(self, error: OSError) -> click.ClickException:
        why = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        return click.ClickException(f"cannot write {self.part}: {why}")

    def write(self, octets: bytes) -> None:
        """Raises ``OSError``, as for a full disk; what was kept before stays."""
        left = memoryview(octets)
        while left:
            left = left[os.write(self._descriptor, left) :]
        self._end = self._end.behind(octets)

    def keep(self) -> None:
        """What has been written so far stays, whatever comes."""
        self.mark = self._end

    def complete(self) -> None:
        """Gives the file its name; it is on disk then. Raises ``OSError``: nothing more than before is kept."""
        os.fsync(self._descriptor)
        self._is_complete = True  # before it is: a signal in between must not cut off what has its name
        try:
            self.part.replace(self.path)
        except OSError:
            self._is_complete = False
            raise

    def __enter__(self) -> PartFile:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if not self._is_complete:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self.mark.size_bytes)
        os.close(self._descriptor)
