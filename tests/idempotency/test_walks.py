"""Random walks of several workers at one claim: writes are lost, late or unacknowledged, workers die, the clock jumps.

Each worker does what ``Claims`` does, with the same pure changes, step by step; hypothesis decides who makes the next
step and what happens to it. Whatever it does, nobody gets two mails, and what is done does not change.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Generator
from enum import Enum, auto
from typing import NamedTuple

import orjson
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.delivery.outcome import State
from relay.idempotency.claim import (
    SETTLED_OUTCOMES,
    Owner,
    Phase,
    Progress,
    Refusal,
    Value,
    claimed,
    committing,
    settled,
    taken_over,
)

LEASE_SECONDS = 30.0
TRIES = 4


class Fate(Enum):
    """What becomes of a write."""

    ACKNOWLEDGED = auto()
    ACKNOWLEDGEMENT_LOST = auto()
    LOST = auto()
    LATE = auto()
    """It arrives at some later time, or never."""


class Write(NamedTuple):
    """A compare-and-set."""

    value: Value
    revision: int


class Read:
    """A read from the leader."""


class Dot(NamedTuple):
    """The final dot for some recipients."""

    indexes: tuple[int, ...]


class Found(NamedTuple):
    """What a read gives."""

    value: Value | None
    revision: int
    age_seconds: float


Step = Write | Read | Dot
Result = bool | None | Found | str
"""Of a write: whether it is stored, None when that is not known; of a read; of a dot, the outcome."""


class Claimed:
    """The bucket's one key, and the smarthost."""

    def __init__(self) -> None:
        self.value: Value | None = None
        self.revision = 0
        self.stored_at = 0.0
        self.now = 0.0
        self.late: list[Write] = []
        self.mails: Counter[int] = Counter()
        """Per recipient, how many the smarthost has, or may have."""
        self.done: Value | None = None

    def store(self, write: Write) -> bool:
        """Compares and sets."""
        if write.revision != self.revision:
            return False
        assert self.done is None, "what is done does not change"
        before = self.value.recipients if self.value is not None else ()
        for old, new in zip(before, write.value.recipients, strict=False):
            if old.outcome in SETTLED_OUTCOMES:
                assert new == old, "nobody who was sent to is forgotten"
        self.value, self.stored_at = write.value, self.now
        self.revision += 1
        if write.value.phase is Phase.DONE:
            self.done = write.value
        return True

    def found(self) -> Found:
        """As the leader has it."""
        return Found(self.value, self.revision, self.now - self.stored_at)

    def send(self, dot: Dot, outcome: State) -> str:
        """The smarthost takes it or does not."""
        for index in dot.indexes:
            assert not self.mails[index], "a second mail"
            self.mails[index] += outcome is not State.DEFERRED
        return outcome.value


class Worker:
    """One attempt at the request: the steps of ``Claims.claim``, ``Claim.commit`` and ``Claim.settle``."""

    def __init__(self, number: int, recipients: int, is_individual: bool) -> None:
        self.owner = Owner(f"token-{number}", f"worker-{number}", LEASE_SECONDS)
        self.plan = [Progress(f"id-{index}-of-{number}") for index in range(recipients)]
        self.is_individual = is_individual
        self.answer: bytes | None = None
        self.held: Write | None = None

    def run(self) -> Generator[Step, Result, None]:
        """Step by step."""
        yield from self._claim()
        if self.held is None:
            return
        unsent = self.held.value.unsent
        results: dict[int, Progress] = {}
        for indexes in [(index,) for index in unsent] if self.is_individual else [unsent]:
            if not indexes or not (yield from self._commit(indexes, dict(results))):
                results |= {index: Progress("", outcome=State.DEFERRED) for index in indexes}
                continue
            outcome = yield Dot(indexes)
            assert isinstance(outcome, str)
            results |= {index: Progress("", outcome=outcome) for index in indexes}
        reply = orjson.dumps({"from": self.owner.worker})
        yield from self._change(lambda value: settled(value, self.owner, results, reply))
        self.answer = reply

    def _claim(self) -> Generator[Step, Result, None]:
        write = Write(claimed("fingerprint", "group", self.plan, self.owner), 0)
        for _ in range(TRIES):
            if (yield write):
                self.held = write._replace(revision=write.revision + 1)
                return
            found = yield Read()
            assert isinstance(found, Found)
            if found.value is None or found.revision == write.revision:
                continue
            if found.value.owner.token == self.owner.token:
                self.held = Write(found.value, found.revision)
                return
            after = taken_over(found.value, self.owner, is_expired=found.age_seconds >= LEASE_SECONDS)
            if isinstance(after, Refusal):
                if after is Refusal.IS_DONE:
                    self.answer = found.value.reply
                return
            write = Write(after, found.revision)

    def _commit(self, indexes: tuple[int, ...], noted: dict[int, Progress]) -> Generator[Step, Result, bool]:
        return (yield from self._change(lambda value: committing(value, self.owner, indexes, noted)))

    def _change(self, change: object) -> Generator[Step, Result, bool]:
        assert callable(change)
        assert self.held is not None
        for _ in range(TRIES):
            after = change(self.held.value)
            if isinstance(after, Refusal):
                return False
            if (yield Write(after, self.held.revision)):
                self.held = Write(after, self.held.revision + 1)
                return True
            found = yield Read()
            assert isinstance(found, Found)
            if found.value is None or found.value.owner.token != self.owner.token:
                return False
            self.held = Write(found.value, found.revision)
            if found.value == after:
                return True
        return False


OUTCOMES = st.sampled_from([State.RELAYED, State.RELAYED, State.FAILED, State.DEFERRED, State.IN_DOUBT])
FATES = st.sampled_from([*[Fate.ACKNOWLEDGED] * 3, Fate.ACKNOWLEDGEMENT_LOST, Fate.LOST, Fate.LATE])
JUMPS = st.sampled_from([0.1, 5.0, LEASE_SECONDS - 1, LEASE_SECONDS + 1, 3600.0, -3600.0])
CHOICES = st.sampled_from(["step"] * 12 + ["new", "crash", "jump", "late"])


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.integers(1, 3), st.booleans())
def test_nobody_gets_two_mails(data: st.DataObject, recipients: int, is_individual: bool) -> None:
    claim = Claimed()
    running: dict[int, tuple[Worker, Generator[Step, Result, None], Step]] = {}
    workers: list[Worker] = []

    def start() -> None:
        worker = Worker(len(workers), recipients, is_individual)
        workers.append(worker)
        steps = worker.run()
        running[len(workers)] = worker, steps, next(steps)

    def happen(step: Step, fate: Fate, outcome: State) -> Result:
        if isinstance(step, Dot):
            return claim.send(step, outcome)
        if isinstance(step, Read):
            return claim.found()
        if fate is Fate.LATE:
            claim.late.append(step)
        if fate in {Fate.LATE, Fate.LOST}:
            return None
        is_stored = claim.store(step)
        return is_stored if fate is Fate.ACKNOWLEDGED else None

    def go_on(number: int, fate: Fate, outcome: State) -> None:
        worker, steps, step = running.pop(number)
        with contextlib.suppress(StopIteration):
            running[number] = worker, steps, steps.send(happen(step, fate, outcome))

    start()
    for _ in range(data.draw(st.integers(0, 60))):
        choice = data.draw(CHOICES)
        if choice == "new" and len(workers) < 6:
            start()
        elif choice == "jump":
            claim.now += data.draw(JUMPS)
        elif choice == "late" and claim.late:
            claim.store(claim.late.pop(data.draw(st.integers(0, len(claim.late) - 1))))
        elif running:
            number = data.draw(st.sampled_from(sorted(running)))
            if choice == "crash":
                del running[number]
            else:
                go_on(number, data.draw(FATES), data.draw(OUTCOMES))

    # Everybody dies, what was late never comes, and when all leases are over the next one gets an answer.
    running.clear()
    for _ in range(3):
        claim.now = max(claim.now, claim.stored_at) + LEASE_SECONDS
        start()
        while running:
            go_on(*running, Fate.ACKNOWLEDGED, State.RELAYED)
    assert claim.done is not None
    for index, each in enumerate(claim.done.recipients):
        assert claim.mails[index] == 1 or each.outcome == State.IN_DOUBT, "nobody is forgotten"
    answers = {worker.answer for worker in workers[-2:]}
    assert answers == {claim.done.reply}, "every twin gets the same reply"
