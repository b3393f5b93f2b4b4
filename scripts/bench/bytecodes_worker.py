"""The send worker of ``bytecodes.py``: the real one, which counts what it executes.

    bytecodes_worker.py COUNTS_FILE PROGRAM

SIGUSR2 begins to count, another one ends it. Each writes ``COUNTS_FILE``: how often that happened, and a row
``[file, function, bytecodes, calls]`` for each function.
"""

# ruff: noqa: E402 - line one of a process: gevent must patch before anything else is imported.
from gevent import monkey

monkey.patch_all()

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import gevent
import greenlet  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).parents[2]))

from relay.ops.process import run
from workers.send import SendWorker


class Counting:
    """Counts bytecodes and calls of all greenlets of this thread while it is switched on.

    It traces from the beginning, since a frame can only be traced whose call was: the loops that serve for ever are
    called once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_on = False
        self._switched = 0
        self._bytecodes: Counter[CodeType] = Counter()
        self._calls: Counter[CodeType] = Counter()

    def begin(self) -> None:
        """Traces from now on. A trace function is a greenlet's own, so each gets it when it runs."""
        greenlet.settrace(lambda event, args: sys.settrace(self._on_call))
        sys.settrace(self._on_call)

    def _on_call(self, frame: FrameType, event: str, arg: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if self._is_on:
            self._calls[frame.f_code] += 1
        return self._on_event

    def _on_event(self, frame: FrameType, event: str, arg: Any) -> Any:
        if self._is_on and event == "opcode":
            self._bytecodes[frame.f_code] += 1
        return self._on_event

    def switch(self) -> None:
        """Begins to count anew, or ends it; says so in the file."""
        self._is_on = False
        rows = [
            [code.co_filename, code.co_qualname, count, self._calls[code]] for code, count in self._bytecodes.items()
        ]
        self._switched += 1
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps({"switched": self._switched, "rows": rows}))
        os.replace(new, self._path)
        self._bytecodes.clear()
        self._calls.clear()
        self._is_on = self._switched % 2 == 1


if __name__ == "__main__":
    counting = Counting(Path(sys.argv.pop(1)))
    gevent.signal_handler(signal.SIGUSR2, counting.switch)
    counting.begin()
    run("send", SendWorker)
