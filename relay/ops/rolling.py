"""Changing what runs while mail flows: one worker after the other, each drained, and the next when it is ready.

Every step leaves something that works, or that the next command takes up (``mend``): what is kept (``arrangement``) is
what is wanted, and supervisord says how what runs differs from it.

=============== ===========================================================================================
what is done    in which order
=============== ===========================================================================================
a worker rolled asked to stop, drained, gone; kept with its new settings; started; ready, or put back
send workers    a substitute (``send-extra``) is started first and goes last: bad settings or a smarthost that
                is down show before any worker is touched, and never fewer are ready than before less one
the last status a substitute (``status-extra``), as above; PORT is away while ``status`` is restarted
more of them    those that run are told their smaller share of the sending rate, then the others are started
fewer of them   drained side by side; then those that stay are told their larger share
=============== ===========================================================================================
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final, NamedTuple

from relay.ops.arrangement import (
    EXTRA,
    Arrangement,
    Program,
    is_send_worker,
    is_substitute,
    is_worker,
    like,
    programs,
    read_arrangement,
    told_of,
    write_arrangement,
)
from relay.ops.changes import concern_a_worker
from relay.ops.orders import (
    SettingsGone,
    forget_drain_seconds,
    forget_settings,
    keep_settings,
    read_settings,
    tell_send_workers,
    write_atomically,
)
from relay.ops.supervision import LIVE_STATES, ProgramStatus, Supervision, SupervisionError, has_failed
from relay.settings import Settings

LOOK_SECONDS: Final = 0.05
SHARE_SECONDS: Final = 3.0
"""For a worker to say that it knows its share; one that hangs does not keep the others from changing."""
STOP_MARGIN_SECONDS: Final = 10.0
"""Beyond ``stop_wait_seconds``, when supervisord kills it."""
STOPPED_STATES: Final = frozenset({"STOPPED", "STOPPING"})
STATUS_WORKER: Final = "status"


class What(StrEnum):
    """What has become of a program."""

    STARTING = "starting"
    DRAINING = "draining"
    DRAINED = "drained"
    READY = "ready"
    FAILED = "failed"
    PUT_BACK = "put back"
    REMOVED = "removed"
    STAYS = "stays"


class Step(NamedTuple):
    """Something that has just happened to a program."""

    program: str
    what: What
    seconds: float = 0.0
    """How long it took; 0 where that says nothing."""
    detail: str = ""


class RollStopped(SupervisionError):
    """A program did not become ready. What was not reached is as it was."""

    def __init__(self, text: str, program: str = "", lines: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.program = program
        self.lines = lines
        """The last ones of its log."""


class Rolling:
    """One command's changes. ``supervision.changing`` must be held for as long."""

    def __init__(
        self,
        supervision: Supervision,
        say: Callable[[Step], None],
        timeout_seconds: float,
        is_asked_to_end: Callable[[], bool] = lambda: False,
    ) -> None:
        """``timeout_seconds``: for a program to become ready. ``is_asked_to_end``: somebody wants it to end soon.

        Raises ``SupervisionError`` when there is no relay that this version could change.
        """
        self._supervision = supervision
        self._state_dir = supervision.state_dir
        self._say = say
        self._timeout_seconds = timeout_seconds
        self._is_asked_to_end = is_asked_to_end
        supervision.states()  # says when none runs
        self.now: Arrangement = read_arrangement(self._state_dir)
        """What runs."""
        with supervision.writing():
            forget_drain_seconds(self._state_dir)

    @property
    def workers(self) -> list[str]:
        """Those of our own, but for substitutes."""
        return [name for name in self.now.programs if is_worker(name) and not is_substitute(name)]

    @property
    def _send_workers(self) -> list[str]:
        return [name for name in self.workers if is_send_worker(name)]

    @property
    def _sharing(self) -> int:
        """How many send workers there are, a substitute included."""
        return sum(map(is_send_worker, self.now.programs))

    def lacks_settings(self, program: str) -> bool:
        """Whether what it was given cannot be read any more, so that it could not be started again with it."""
        try:
            read_settings(Path(self.now.programs[program].settings))
        except SettingsGone:
            return True
        return False

    def settings_of(self, program: str) -> dict[str, str]:
        """What it was given. {} when that cannot be read any more."""
        try:
            return read_settings(Path(self.now.programs[program].settings))
        except SettingsGone:
            return {}

    # -- the commands ------------------------------------------------------------------------
    def mend(self) -> None:
        """Takes up what a command that was killed has left: what is stopped is started, what is too much goes."""
        added, _, removed = self._supervision.read_again()
        states = self._supervision.states()
        missing = [name for name in self.now.programs if name in added or states.get(name) in STOPPED_STATES]
        self._stop(missing)  # one may still drain
        for name in missing:
            self._say(Step(name, What.STARTING, detail="an earlier command had left it stopped"))
            self._supervision.add(name)
        self._wait_ready(missing)
        self._take_away(removed)
        self._remove_substitutes()
        self._share(self._sharing)

    def restart(self, names: Collection[str]) -> None:
        """Rolls these programs with the settings that they have. Raises ``SupervisionError``."""
        if unknown := [name for name in names if name not in self.now.programs or is_substitute(name)]:
            raise SupervisionError(
                f"there is no program {unknown[0]}; there are {', '.join([*self.now.programs])}",
            )
        self._roll([self.now.programs[name] for name in dict.fromkeys(names)])

    def scale(self, count: int) -> None:
        """Adds send workers, or removes those with the highest numbers. Raises ``SupervisionError``."""
        wanted = [f"send-{number}" for number in range(1, count + 1)]
        more = [like(self.now.programs["send-1"], name) for name in wanted if name not in self.now.programs]
        fewer = [name for name in self._send_workers if name not in wanted]
        if fewer and not any(status.is_ready for status in self._supervision.statuses() if status.name in wanted):
            raise SupervisionError(
                f"none of those that would stay ({', '.join(wanted)}) is ready: nobody would send mail; nothing was"
                " changed"
            )
        if more:
            self._share(self._sharing + len(more))
            try:
                self._start(more)
            except SupervisionError:
                self._share(self._sharing)
                raise
        self._write(self.now._replace(send_workers=count))
        self._take_away(fewer)
        self._share(self._sharing)

    def reload(self, settings: Settings, values: dict[str, str]) -> None:
        """Rolls who has other settings, starts and removes what these settings say. Raises ``SupervisionError``."""
        with self._supervision.writing():
            named = [each.settings for each in self.now.programs.values()]
            kept = keep_settings(self._state_dir, values, named)
        try:
            self._reload(settings, values, kept)
        finally:
            with self._supervision.writing():
                forget_settings(self._state_dir, but=[each.settings for each in self.now.programs.values()])

    def _reload(self, settings: Settings, values: dict[str, str], kept: Path) -> None:
        count = self.now.send_workers
        if settings.relay_send_workers != self.now.send_workers_set:
            count = settings.relay_send_workers
        target = {each.name: each for each in programs(settings, None, kept, send_workers=count)}
        roll = [target[name] for name in self.workers if name in target and self.is_concerned(name, values)]
        new = [each for name, each in target.items() if name not in self.now.programs and not is_send_worker(name)]
        gone = [name for name in self.workers if name not in target and not is_send_worker(name)]
        self._roll(roll, new)
        for path in {self.now.programs[name].settings for name in self.workers if name not in gone} - {str(kept)}:
            with self._supervision.writing():
                write_atomically(Path(path), values)  # of those whom nothing of it concerns
        self._take_away(gone)
        self._write(self.now._replace(told=told_of(settings)))
        if count != len(self._send_workers):
            self.scale(count)
        self._write(self.now._replace(send_workers_set=settings.relay_send_workers))

    def has_taken(self, settings: Settings) -> bool:
        """Whether a reload of these got to its end: a worker's own settings do not tell."""
        return self.now.told == told_of(settings) and self.now.send_workers_set == settings.relay_send_workers

    def is_concerned(self, program: str, values: dict[str, str]) -> bool:
        """Whether a worker has to be restarted to have these settings; also if nobody knows any more which it has."""
        return self.lacks_settings(program) or concern_a_worker(self.settings_of(program), values)

    # -- rolling -------------------------------------------------------------------------------
    def _roll(self, rolled: Sequence[Program], new: Sequence[Program] = ()) -> None:
        """Rolls one after the other; before any is touched, substitutes and ``new`` ones have to be ready."""
        substitutes = self._substitutes(rolled)
        if any(is_send_worker(each.name) for each in substitutes):
            self._share(len(self._send_workers) + 1)
        try:
            self._start([*substitutes, *new])
            for program in sorted(rolled, key=lambda each: _TURNS.index(each.name.partition("-")[0])):
                if self._is_asked_to_end():
                    raise RollStopped(f"interrupted before {program.name}: it and those after it were not touched")
                self._roll_one(program)
        finally:
            self._remove_substitutes()
            self._share(self._sharing)

    def _substitutes(self, rolled: Sequence[Program]) -> list[Program]:
        first_send = next((each for each in rolled if is_send_worker(each.name)), None)
        found = [] if first_send is None else [like(first_send, f"send-{EXTRA}")]
        status = next((each for each in rolled if each.name == STATUS_WORKER), None)
        if status is not None and not any(each.startswith(f"{STATUS_WORKER}-") for each in self.workers):
            found.append(like(status, f"{STATUS_WORKER}-{EXTRA}"))
        return found

    def _roll_one(self, program: Program) -> None:
        """Restarts one, and puts it back as it was when that fails, if it was otherwise."""
        before = self.now.programs[program.name]
        can_go_back = before != program and not self.lacks_settings(program.name)
        self._replace(program)
        failed = self._wait_ready([program.name])
        if failed is None:
            return
        error = self._failure(failed)
        if can_go_back and not self._is_asked_to_end():
            self._say(Step(program.name, What.PUT_BACK, detail="it gets the settings back that it had"))
            self._replace(before)
            self._wait_ready([program.name])
        raise error

    def _replace(self, program: Program) -> None:
        """Drains the one of that name and starts this one. A presence of the old one cannot pass for the new one's."""
        self._say(Step(program.name, What.DRAINING))
        begun = time.monotonic()
        self._stop([program.name])
        self._say(Step(program.name, What.DRAINED, time.monotonic() - begun))
        self._add([program])

    def _start(self, new: Sequence[Program]) -> None:
        """Starts them side by side; takes all of them away again when one does not become ready."""
        ready = {status.name for status in self._supervision.statuses() if status.is_ready}
        # A substitute that was left serves on: it may be all that serves. Unless it has other settings.
        new = [each for each in new if each.name not in ready or self.now.programs.get(each.name) != each]
        for each in new:
            if each.name in self.now.programs:
                self._stop([each.name])
            self._say(Step(each.name, What.STARTING))
        self._add(new)
        failed = self._wait_ready([each.name for each in new])
        if failed is not None:
            error = self._failure(failed)
            self._take_away([each.name for each in new])
            raise error

    def _remove_substitutes(self) -> None:
        """Takes away those whose kind is ready; another stays, since it may be all that serves."""
        ready = {status.name for status in self._supervision.statuses() if status.is_ready}
        going = []
        for name in filter(is_substitute, self.now.programs):
            kind = name.partition("-")[0]
            if name in ready and not ready.issuperset(each for each in self.workers if each.partition("-")[0] == kind):
                self._say(Step(name, What.STAYS, detail="until the next restart, since not all of its kind are ready"))
            else:
                going.append(name)
        self._take_away(going)

    # -- supervisord -----------------------------------------------------------------------------
    def _write(self, arrangement: Arrangement) -> None:
        with self._supervision.writing():
            write_arrangement(self._state_dir, arrangement)
        self.now = arrangement

    def _add(self, new: Sequence[Program]) -> None:
        self._write(self.now.with_programs(new))
        self._supervision.read_again()
        for each in new:
            self._supervision.add(each.name)

    def _take_away(self, names: Sequence[str]) -> None:
        """Drains them side by side, and forgets them."""
        if not names:
            return
        # Of all: one that a killed command was about to take away is not among them any more, and may still drain.
        wait_seconds = max(each.stop_wait_seconds for each in self.now.programs.values())
        self._write(self.now.without(names))
        begun = time.monotonic()
        for name in names:
            self._say(Step(name, What.DRAINING))
        self._stop(names, wait_seconds)
        self._supervision.read_again()
        for name in names:
            self._say(Step(name, What.REMOVED, time.monotonic() - begun))

    def _stop(self, names: Iterable[str], wait_seconds: float = 0.0) -> None:
        """Returns when they are gone and forgotten by supervisord. It kills whom it waited for in vain."""
        left = list(names)
        waits = [self.now.programs[name].stop_wait_seconds for name in left if name in self.now.programs]
        deadline = time.monotonic() + max(wait_seconds, *waits, 0.0) + STOP_MARGIN_SECONDS
        while True:
            states = self._supervision.states()
            for name in left:
                if states.get(name) in LIVE_STATES:
                    self._supervision.ask_to_stop(name)
            ended = [name for name in left if states.get(name) not in {*LIVE_STATES, "STOPPING"}]
            left = [name for name in left if name not in ended or not self._supervision.remove(name)]
            if not left:
                return
            if time.monotonic() > deadline:
                raise SupervisionError(f"{', '.join(left)} cannot be stopped: supervisord's log may tell why")
            time.sleep(LOOK_SECONDS)

    # -- waiting -----------------------------------------------------------------------------------
    def _wait_ready(self, names: Sequence[str]) -> ProgramStatus | None:
        """Blocks until all are ready, one has failed, or time is up; one that is not ready then.

        Raises ``SupervisionError`` when supervisord has one of them no more: somebody else took it away.
        """
        begun = time.monotonic()
        waiting = set(names)
        while waiting:
            statuses = [status for status in self._supervision.statuses() if status.name in waiting]
            if gone := waiting - {status.name for status in statuses}:
                raise SupervisionError(f"{min(gone)} was taken away while it was starting; say the command again")
            for status in statuses:
                if status.is_ready:
                    waiting.discard(status.name)
                    self._say(Step(status.name, What.READY, time.monotonic() - begun))
            late = [status for status in statuses if not status.is_ready]
            failed = next((status for status in late if has_failed(status)), None)
            is_over = time.monotonic() - begun > self._timeout_seconds or self._is_asked_to_end()
            if late and (failed or is_over):
                return failed or late[0]
            if waiting:
                time.sleep(LOOK_SECONDS)
        return None

    def _failure(self, status: ProgramStatus) -> RollStopped:
        name = status.name
        report = status.report
        # What it ended for says more than what it had not come to yet.
        reason = "" if report is None else report.lacking.get("program") or report.reason
        reason = reason or f"it is {status.state.lower()}; see its log"
        self._say(Step(name, What.FAILED, detail=reason))
        if self._is_asked_to_end():
            return RollStopped(f"interrupted while {name} was starting")
        return RollStopped(f"{name} did not become ready: {reason}", name, self._supervision.last_lines(name))

    def _share(self, send_workers: int) -> None:
        """Tells how many share the sending rate; returns when those who serve know, where there is a rate to share."""
        with self._supervision.writing():
            tell_send_workers(self._state_dir, send_workers)
        deadline = time.monotonic() + SHARE_SECONDS
        while self.now.told.get("max_recipients_per_second") and time.monotonic() < deadline:
            reports = [
                status.report
                for status in self._supervision.statuses()
                if is_send_worker(status.name) and status.is_ready and status.report is not None
            ]
            if all(report.send_workers == send_workers for report in reports):
                return
            time.sleep(LOOK_SECONDS)


_TURNS: Final = ("nats", "catcher", "engagement", "status", "send")
"""Who can be put back with nothing else changed comes first: those of which there is one."""
