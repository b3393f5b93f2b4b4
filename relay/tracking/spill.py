"""Lines by part, more of them than there is memory for: put in in any order, taken out part by part.

What memory does not hold goes to one file without a name in the directory for temporary files (TMPDIR), readable by
this process alone; it is gone when the process ends, however it ends.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from types import TracebackType
from typing import IO, NamedTuple

HELD_BYTES = 16 * 1024 * 1024
"""In memory, of all parts together."""


class _Extent(NamedTuple):
    """A stretch of the file: whole lines of one part."""

    start: int
    length: int


class Spill:
    """``parts`` heaps of lines. A context manager: the file is gone behind it. Raises ``OSError``: the disk is full."""

    def __init__(self, parts: int, held_bytes: int = HELD_BYTES) -> None:
        self._most_held_bytes = held_bytes
        self._held: list[bytearray] = [bytearray() for _ in range(parts)]
        self._held_bytes = 0
        self._written: list[list[_Extent]] = [[] for _ in range(parts)]
        self._file: IO[bytes] | None = None
        self._end = 0

    def add(self, part: int, line: bytes) -> None:
        """Puts a line (without its end, and without line ends in it) to a part."""
        self._held[part] += line
        self._held[part] += b"\n"
        self._held_bytes += len(line) + 1
        if self._held_bytes > self._most_held_bytes:
            self._write_out()

    def take(self, part: int) -> Iterator[bytes]:
        """The lines of a part, in the order in which they came."""
        if self._file is not None:
            for extent in self._written[part]:
                yield from os.pread(self._file.fileno(), extent.length, extent.start).splitlines()
        yield from bytes(self._held[part]).splitlines()

    def _write_out(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # closed behind the block
        for held, written in zip(self._held, self._written, strict=True):
            if not held:
                continue
            left = memoryview(bytes(held))
            while left:
                left = left[self._file.write(left) :]
            written.append(_Extent(self._end, len(held)))
            self._end += len(held)
            held.clear()
        self._held_bytes = 0

    def __enter__(self) -> Spill:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
