"""A progress bar on standard error, where that is a terminal; nothing elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

REFRESH_SECONDS = 0.1


@contextlib.contextmanager
def progress_bar(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Give it how many more are done. ``total`` may turn out to be too small, and may not be known.

    It is drawn by the calls alone: no thread of its own beside the bus.
    """
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(
        *columns,
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not sys.stderr.isatty(),
    )
    task = bar.add_task(what, total=total)
    drawn_at = 0.0

    def advance(count: int) -> None:
        nonlocal drawn_at, total
        bar.advance(task, count)
        done = int(bar.tasks[0].completed)
        if total is not None and done > total:
            total = done
            bar.update(task, total=total)
        if time.monotonic() - drawn_at >= REFRESH_SECONDS:
            drawn_at = time.monotonic()
            bar.refresh()

    with bar:
        yield advance
