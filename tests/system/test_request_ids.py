"""Request ids and processes that die: each row of the table in ``relay/idempotency/claim.py``, with kill -9.

A worker is held at one point of a request, by a scripted SMTP server or by a proxy before NATS, and killed there. What
it leaves is looked at; then another worker is asked the same. Leases are waited for once, for all rows together.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nats
import pytest

from relay import contract
from relay.idempotency.claim import Value, claim_key, read_value
from relay.idempotency.claims import ClaimsConfig
from scripts.drills.idempotency import Request, SlowSink, complaint_of, twins_complaint
from tests.conftest import require
from tests.support.caller import GET_EMAIL_STATUS, MAIL, SEND_EMAIL, ask, with_nats
from tests.support.nats_proxy import Action, NatsProxy
from tests.support.nats_server import BINARY, NatsServer
from tests.support.relay_process import Worker
from tests.support.scripted_smtp import Action as SmtpAction
from tests.support.scripted_smtp import ReceivedMail, Script, say
from tests.support.workers import Moment, SmtpThread, Workers, kill

TIMEOUT_SECONDS = 1.0
"""What the killed workers' requests have: a lease is ``SETTLING_SECONDS`` more."""
SETTLING_SECONDS = ClaimsConfig().settling_seconds
REPEATED_TIMEOUT_SECONDS = 28.0
"""More than a lease: the repetition waits until it is over."""
NAMES = ("ann", "bob", "carol")
LARGE_BYTES = 16_000_000
"""More than two sockets' buffers hold."""
CONFIG = "max_payload: 33554432"


# -- what is needed ----------------------------------------------------------------------------------------------------
def is_claim(nats_subject: str) -> bool:
    """Whether a publication changes a claim."""
    return nats_subject.startswith(f"$KV.{contract.REQUESTS_BUCKET}.")


@pytest.fixture
def workers() -> Iterator[Workers]:
    """Starts workers, and ends them."""
    made = Workers()
    yield made
    made.stop()


@pytest.fixture
def new_smtp() -> Iterator[Callable[..., SmtpThread]]:
    """Makes SMTP servers."""
    made: list[SmtpThread] = []

    def make(script: Script | None = None) -> SmtpThread:
        made.append(SmtpThread(script))
        return made[-1]

    yield make
    for each in made:
        each.stop()


def publish(url: str, request: dict[str, Any]) -> None:
    """A request whose reply nobody waits for."""

    async def run(nc: nats.NATS) -> None:
        await nc.publish(SEND_EMAIL, json.dumps(request).encode(), reply=nc.new_inbox())
        await asyncio.sleep(0)
        await nc.flush()

    with_nats(url, run)


def stored_claim(url: str, request_id: str) -> Value | None:
    """What the bucket holds."""

    async def run(nc: nats.NATS) -> Value | None:
        bucket = await nc.jetstream().key_value(contract.REQUESTS_BUCKET)
        try:
            return read_value((await bucket.get(claim_key("", request_id))).value or b"")
        except nats.js.errors.KeyNotFoundError:
            return None

    return with_nats(url, run)


# -- the rows ----------------------------------------------------------------------------------------------------------
@dataclass
class Row:
    """A point at which a worker is killed, and what a repetition of its request meets."""

    point: str
    leaves: str
    """The state of the claim; '' for none."""
    outcome: str
    """Of the repetition."""
    mails: int
    """That the smarthost has in the end, of both workers."""
    at: int = 0
    """Which write of the claim meets ``action``."""
    action: Action = Action.CUT_BEFORE
    stalls_at: str = ""
    """A phase of SMTP, instead of a write."""
    stalls_on: int = 1
    """The how-manieth time."""
    script: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    is_frozen: bool = False
    """Not killed but stopped, and goes on when the other worker has taken over."""

    @property
    def has_lease(self) -> bool:
        """Whether a repetition has to wait."""
        return self.leaves in {"claimed", "committing"}

    @property
    def request_id(self) -> str:
        return f"row: {self.point}"

    def request(self, **more: Any) -> dict[str, Any]:
        """The same each time, but for ``more``."""
        return MAIL | {"request_id": self.request_id, "timeout_seconds": TIMEOUT_SECONDS} | self.fields | more


INDIVIDUALLY = {"to": [f"{name}@example.com" for name in NAMES], "recipients_as": "individual"}
ATTACHED = {
    "attachments": [
        {
            "filename": "a.bin",
            "content_type": "application/octet-stream",
            "content": base64.b64encode(b"\0" * LARGE_BYTES).decode(),
        }
    ],
    "timeout_seconds": 3.0,
}

ROWS = (
    # Those that wait for a lease come first: it is over sooner.
    Row("the claim stored, its acknowledgement lost", "claimed", "relayed", 1, at=1, action=Action.CUT_AFTER),
    Row("before committing, in MAIL", "claimed", "relayed", 1, stalls_at="mail"),
    Row("before committing, in DATA", "claimed", "relayed", 1, stalls_at="data"),
    Row("before committing was stored", "claimed", "relayed", 1, at=2),
    Row("it stands still and goes on later", "claimed", "relayed", 1, at=2, is_frozen=True),
    Row("committing stored, its acknowledgement lost", "committing", "in_doubt", 0, at=2, action=Action.CUT_AFTER),
    Row(
        "between committing and the final dot",
        "committing",
        "in_doubt",
        0,
        stalls_at="reading",
        stalls_on=2,
        fields=ATTACHED,
    ),
    Row("between the final dot and its reply", "committing", "in_doubt", 1, stalls_at="dot"),
    Row("the reply was there, done not stored", "committing", "in_doubt", 1, at=3),
    Row(
        "an individual mail sent, the next not begun",
        "committing",
        "relayed",
        3,
        stalls_at="mail",
        stalls_on=2,
        fields=INDIVIDUALLY,
        settings={"SMTP_POOL_SIZE": "1"},
    ),
    Row("before the claim was stored", "", "relayed", 1, at=1),
    Row("done stored, the caller not answered", "done", "relayed", 1, at=3, action=Action.CUT_AFTER),
    Row("open stored", "open", "relayed", 1, at=2, action=Action.CUT_AFTER, script={"mail": [say("451 4.3.0 later")]}),
)


@dataclass
class Played:
    """What was seen of a row."""

    left: Value | None = None
    """The claim, after the kill."""
    in_between: dict[str, Any] | None = None
    """The answer to a repetition while the lease lasts, None when there was no time for one."""
    answer: dict[str, Any] = field(default_factory=dict)
    again: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    first_mails: Sequence[ReceivedMail] = ()
    """Those that the killed worker sent."""
    later_mails: Sequence[ReceivedMail] = ()
    problem: BaseException | None = None


class Play:
    """All rows, one after the other; then what another worker says to each, all at once."""

    def __init__(self, directory: Path) -> None:
        self._cleaning = contextlib.ExitStack()
        self._server = NatsServer(directory, config=CONFIG)
        self._cleaning.callback(self._server.stop)
        self._workers = Workers()
        self._cleaning.callback(self._workers.stop)
        self._smtp: dict[str, SmtpThread] = {}
        self._frozen: dict[str, tuple[Worker, NatsProxy]] = {}
        self._leased_at: dict[str, float] = {}
        self.rows = {row.point: Played() for row in ROWS}

    def run(self) -> None:
        with self._cleaning:
            self._server.start()
            for row in ROWS:
                try:
                    self._kill_at(row)
                except BaseException as error:  # noqa: BLE001 - the others' tests need not fail
                    self.rows[row.point].problem = error
            later = SmtpThread()
            self._cleaning.callback(later.stop)
            self._workers.start(self._server.url, later.port)
            self._workers.start(self._server.url, later.port, module="status")
            with ThreadPoolExecutor(len(ROWS)) as threads:
                for row, done in [(row, threads.submit(self._repeat, row)) for row in ROWS]:
                    problem = done.exception()
                    self.rows[row.point].problem = self.rows[row.point].problem or problem
            for row in ROWS:
                played = self.rows[row.point]
                subject = f"Subject: {row.point}\r\n".encode()
                played.first_mails = list(self._smtp[row.point].mails) if row.point in self._smtp else []
                played.later_mails = [mail for mail in later.mails if subject in mail.content]

    def _kill_at(self, row: Row) -> None:
        moment = Moment()
        script = dict(row.script)
        if row.stalls_at:
            script[row.stalls_at] = self._stalling(row, moment)
        smtp = self._smtp[row.point] = SmtpThread(script)
        self._cleaning.callback(smtp.stop)
        proxy = NatsProxy(self._server.port, is_claim)
        self._cleaning.callback(proxy.stop)
        worker = self._workers.start(proxy.url, smtp.port, **row.settings)

        def end() -> None:
            if row.is_frozen:
                os.kill(worker.process.pid, signal.SIGSTOP)
            else:
                kill(worker)
            moment.reach()

        if row.at:
            proxy.begin(row.at, row.action, end)
        self._leased_at[row.point] = time.monotonic()
        publish(self._server.url, row.request(subject=row.point))
        moment.wait()
        if row.is_frozen:
            self._frozen[row.point] = worker, proxy
        elif row.stalls_at:
            kill(worker)
        self.rows[row.point].left = stored_claim(self._server.url, row.request_id)

    @staticmethod
    def _stalling(row: Row, moment: Moment) -> Callable[[], SmtpAction | None]:
        times = iter(range(1, 100))
        return lambda: moment.then_stall() if next(times) == row.stalls_on else None

    def _repeat(self, row: Row) -> None:
        played, url = self.rows[row.point], self._server.url
        leased_until = self._leased_at[row.point] + TIMEOUT_SECONDS + SETTLING_SECONDS
        # Where the machine was so slow that the lease is over, this would be the repetition itself.
        if row.has_lease and time.monotonic() < leased_until - 2:
            answer = ask(url, SEND_EMAIL, row.request(subject=row.point, timeout_seconds=0.5), 20)
            if time.monotonic() < leased_until - 0.5:
                played.in_between = answer
        request = row.request(subject=row.point, timeout_seconds=REPEATED_TIMEOUT_SECONDS)
        played.answer = ask(url, SEND_EMAIL, request, 2 * REPEATED_TIMEOUT_SECONDS)
        if row.is_frozen:
            worker, proxy = self._frozen[row.point]
            proxy.accept_again()
            worker.process.terminate()
            os.kill(worker.process.pid, signal.SIGCONT)
            worker.output(2 * REPEATED_TIMEOUT_SECONDS)
        played.again = ask(url, SEND_EMAIL, request, 2 * REPEATED_TIMEOUT_SECONDS)
        if email_id := played.answer.get("email_id"):
            played.record = ask(url, GET_EMAIL_STATUS, {"email_id": email_id}, 10)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Played]:
    """Every row, played."""
    require(BINARY.exists(), "nats-server")
    play = Play(tmp_path_factory.mktemp("play"))
    play.run()
    return play.rows


def without(reply: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in reply.items() if name not in names}


@pytest.mark.parametrize("row", ROWS, ids=[row.point for row in ROWS])
def test_a_worker_is_killed_and_the_request_is_made_again(row: Row, played: dict[str, Played]) -> None:
    seen = played[row.point]
    if seen.problem is not None:
        raise seen.problem
    # What it left
    assert (seen.left.phase.value if seen.left is not None else "") == row.leaves
    # While its lease lasts
    if seen.in_between is not None:
        assert (seen.in_between["outcome"], seen.in_between["detail"]) == ("deferred", "in progress")
    # After that
    assert seen.answer.get("outcome", "relayed") == row.outcome
    assert len(seen.first_mails) + len(seen.later_mails) == row.mails
    assert ("duplicate" in seen.answer) == (row.leaves == "done")
    if row.outcome == "in_doubt":
        assert seen.answer["retryable"] is False
    assert seen.again == seen.answer | {"duplicate": True}
    # The mail is known by the ids that it had from the beginning, and has its record
    if seen.left is not None:
        assert seen.answer["email_id"] in {each.email_id for each in seen.left.recipients}
    for mail in (*seen.first_mails, *seen.later_mails):
        assert row.fields or f"/{seen.answer['email_id']}\r\n".encode() in mail.content
    assert seen.record["email_id"] == seen.answer["email_id"]


def test_of_individual_mails_those_go_out_that_are_certainly_unsent(played: dict[str, Played]) -> None:
    seen = played["an individual mail sent, the next not begun"]
    if seen.problem is not None:
        raise seen.problem
    (first,) = [mail.forward_paths[0] for mail in seen.first_mails]
    told = {each["address"]: each["outcome"] for each in seen.answer["recipients"]}
    assert told == {f"{name}@example.com": "relayed" for name in NAMES} | {first: "in_doubt"}
    assert {mail.forward_paths[0] for mail in seen.later_mails} == told.keys() - {first}


def test_what_the_record_knew_it_still_knows(played: dict[str, Played]) -> None:
    """The caller of the repetition is told of a doubt that the record does not have."""
    assert "outcome" not in played["the reply was there, done not stored"].record
    assert played["between the final dot and its reply"].record["outcome"] == "in_doubt"


def test_nearly_every_row_was_looked_at_while_its_lease_lasted(played: dict[str, Played]) -> None:
    """On a machine that is too slow for that, the rows above say less than they seem to."""
    looked = [row.point for row in ROWS if row.has_lease and played[row.point].in_between is not None]
    assert len(looked) >= 3


# -- twins and the end of their worker ---------------------------------------------------------------------------------
def ask_at_once(url: str, requests: Sequence[dict[str, Any]], during: Callable[[], None]) -> list[Any]:
    """All requests at once, then ``during`` in a thread; the replies, as (seconds since ``during``, reply)."""

    async def run(nc: nats.NATS) -> list[Any]:
        begun = asyncio.get_running_loop().create_future()

        async def one(request: dict[str, Any]) -> Any:
            msg = await nc.request(SEND_EMAIL, json.dumps(request).encode(), timeout=40)
            return time.monotonic() - await begun, json.loads(msg.data)

        asking = [asyncio.create_task(one(request)) for request in requests]
        await asyncio.to_thread(during)
        begun.set_result(time.monotonic())
        return await asyncio.gather(*asking)

    return with_nats(url, run)


def waiting(url: str) -> int:
    """How many twins the only worker says that wait."""

    async def run(nc: nats.NATS) -> int:
        stats = json.loads((await nc.request("$SRV.STATS", b"", timeout=5)).data)
        return int(stats["endpoints"][0]["data"]["request_ids"]["waiting"])

    return with_nats(url, run)


def wait_until(is_so: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not become so"
        time.sleep(0.05)


DRAIN_SECONDS = 1.5
TWINS = 50


@pytest.mark.parametrize("is_first_ones_worker_dead", [False, True], ids=["its own", "of a dead one"])
def test_a_worker_that_is_told_to_stop_answers_its_waiting_twins(
    workers: Workers,
    new_smtp: Callable[..., SmtpThread],
    new_nats_server: Callable[..., NatsServer],
    is_first_ones_worker_dead: bool,
) -> None:
    # Given a request that does not come to an end, and twins that wait for it
    server = new_nats_server()
    moment = Moment()
    smtp = new_smtp({"dot": moment.then_stall})
    request = MAIL | {"request_id": "drain-1"}
    worker = workers.start(server.url, smtp.port, DRAIN_SECONDS=f"{DRAIN_SECONDS:g}")
    if is_first_ones_worker_dead:
        publish(server.url, request)
        moment.wait()
        kill(worker)
        worker = workers.start(server.url, smtp.port, DRAIN_SECONDS=f"{DRAIN_SECONDS:g}")

    # When their worker is told to stop
    def stop() -> None:
        wait_until(lambda: waiting(server.url) == TWINS - (not is_first_ones_worker_dead))
        worker.process.terminate()

    replies = ask_at_once(server.url, [request] * TWINS, stop)
    # Then all are answered when its time is over
    assert len(replies) == TWINS
    assert max(seconds for seconds, _ in replies) < DRAIN_SECONDS + 1.5
    told = [reply.get("detail") if reply["outcome"] == "deferred" else reply["outcome"] for _, reply in replies]
    if is_first_ones_worker_dead:
        assert set(told) == {"in progress"}
    else:
        assert set(told) <= {"in progress", "in_doubt"}
        assert [reply["outcome"] for _, reply in replies if "duplicate" not in reply].count("in_doubt") == 1
    worker.output()
    assert worker.process.returncode == 0
    assert len(smtp.mails) == 1


# -- JetStream is away -------------------------------------------------------------------------------------------------
class Switch:
    """Turns a server's JetStream off and on, while NATS itself goes on."""

    def __init__(self, server: NatsServer, directory: Path) -> None:
        self._server = server
        self._config = directory / "nats.conf"
        self._log = directory / "nats.log"
        self._on = self._config.read_text()
        self._reloads = 0

    def off(self) -> None:
        lines = [line for line in self._on.splitlines() if not line.startswith("jetstream")]
        self._reload("\n".join([*lines, "jetstream: disabled", ""]))

    def on(self) -> None:
        self._reload(self._on)

    def _reload(self, config: str) -> None:
        self._config.write_text(config)
        assert self._server.process is not None
        self._server.process.send_signal(signal.SIGHUP)
        self._reloads += 1
        wait_until(lambda: self._log.read_text().count("Reloaded server configuration") >= self._reloads)


@pytest.fixture
def switched(tmp_path: Path) -> Iterator[tuple[NatsServer, Switch]]:
    """A server whose JetStream can be turned off."""
    require(BINARY.exists(), "nats-server")
    server = NatsServer(tmp_path).start()
    yield server, Switch(server, tmp_path)
    server.stop()


def test_without_jetstream_nothing_goes_out_unprotected_and_plain_mails_do(
    workers: Workers, new_smtp: Callable[..., SmtpThread], switched: tuple[NatsServer, Switch]
) -> None:
    server, switch = switched
    smtp = new_smtp()
    workers.start(server.url, smtp.port, TRACKING_ACK_SECONDS="1")
    switch.off()
    protected = MAIL | {"request_id": "away-1"}
    reply = ask(server.url, SEND_EMAIL, protected)
    assert (reply["outcome"], reply["retryable"], reply["detail"]) == ("deferred", True, "deduplication unavailable")
    assert ask(server.url, SEND_EMAIL, MAIL)["email_id"]
    assert ask(server.url, SEND_EMAIL, MAIL | {"tags": {"a": "b"}})["email_id"]
    assert len(smtp.mails) == 2
    # When it is back, request ids are taken again
    switch.on()
    wait_until(lambda: "error" not in (reply := ask(server.url, SEND_EMAIL, protected)) or fail_on(reply), 30)
    assert len(smtp.mails) == 3
    assert ask(server.url, SEND_EMAIL, protected)["duplicate"] is True
    assert len(smtp.mails) == 3


def fail_on(reply: dict[str, Any]) -> bool:
    """Fails for any other reason than that JetStream is away."""
    assert reply["detail"] == "deduplication unavailable", reply
    return False


def test_jetstream_goes_away_before_committing(
    workers: Workers, new_smtp: Callable[..., SmtpThread], switched: tuple[NatsServer, Switch]
) -> None:
    server, switch = switched
    times = iter(range(1, 100))

    def switch_off() -> SmtpAction | None:
        if next(times) == 1:
            switch.off()
        return None

    smtp = new_smtp({"data": switch_off})
    workers.start(server.url, smtp.port, TRACKING_ACK_SECONDS="1")
    request = MAIL | {"request_id": "away-2", "timeout_seconds": 3}
    reply = ask(server.url, SEND_EMAIL, request)
    assert (reply["outcome"], reply["retryable"]) == ("deferred", True)
    assert "deduplication unavailable" in reply["detail"]
    assert not smtp.mails, "no content without leave"
    switch.on()
    # What could not be stored is stored later: nobody has to wait for the lease
    begun = time.monotonic()
    wait_until(lambda: ask(server.url, SEND_EMAIL, request).get("outcome", "relayed") == "relayed", 30)
    assert time.monotonic() - begun < SETTLING_SECONDS
    assert len(smtp.mails) == 1


# -- the drill ---------------------------------------------------------------------------------------------------------
RELAYED = {"email_id": "e-1", "group_id": "g"}
IN_DOUBT = {"error": contract.DELIVERY_FAILED, "outcome": "in_doubt", "email_id": "e-1"}


@pytest.mark.parametrize(
    ("answer", "mails", "email_id", "is_right"),
    [
        (RELAYED, 1, "e-1", True),
        (RELAYED, 0, "e-1", False),
        (RELAYED, 2, "e-1", False),
        (RELAYED, 1, "e-2", False),
        (IN_DOUBT, 1, "e-1", True),
        (IN_DOUBT, 0, "", True),
        (IN_DOUBT, 2, "e-1", False),
        ({"outcome": "failed"}, 0, "", True),
        ({"outcome": "failed"}, 1, "e-1", False),
        ({"outcome": "deferred"}, 1, "e-1", False),
        (None, 0, "", False),
    ],
)
def test_the_drills_judge_sees_what_is_wrong(
    answer: dict[str, Any] | None, mails: int, email_id: str, is_right: bool
) -> None:
    request = Request("t1", answer=answer)
    assert (complaint_of(request, Counter({"t1": mails}), {"t1": email_id}) == "") is is_right


def test_the_drills_judge_of_twins_sees_what_is_wrong() -> None:
    sink = SlowSink(1)
    sink.dots["t1"] = 1
    twin = RELAYED | {"duplicate": True}
    assert twins_complaint("t1", [RELAYED, twin, twin], sink) == ""
    assert twins_complaint("t1", [RELAYED, twin, None], sink)
    assert twins_complaint("t1", [twin, twin, twin], sink)
    assert twins_complaint("t1", [RELAYED, RELAYED, twin], sink)
    assert twins_complaint("t1", [RELAYED, twin | {"email_id": "e-2"}], sink)
    sink.dots["t1"] = 2
    assert twins_complaint("t1", [RELAYED, twin], sink)
