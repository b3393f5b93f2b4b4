"""The delivery layer against Postfix: another implementation's idea of the protocol."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent.pool import Pool

from relay.delivery.config import Host, SmarthostConfig
from relay.delivery.outcome import Outcome, Phase, State
from relay.delivery.smarthost import Smarthost
from relay.submission.compose import compose
from relay.submission.policy import Policy, judge
from relay.submission.request import SendRequest
from tests.conftest import require
from tests.support import postfix as installed
from tests.support.nats_server import free_port, wait_for_port
from tests.support.postfix import DeliveredMail, Postfix
from tests.support.scripted_smtp import make_certificate

TEST_SECONDS = 30.0
SEND_SECONDS = 10.0
DELIVERY_SECONDS = 10.0
MOST_TRIES = 5
CONTENT = b"Subject: Hello\r\n\r\n" + b".a line that begins with a dot\r\n" * 200


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    """No test hangs."""
    with gevent.Timeout(TEST_SECONDS, AssertionError(f"not finished after {TEST_SECONDS} s")):
        yield


@pytest.fixture
def new_smarthost() -> Iterator[Callable[..., Smarthost]]:
    """Makes smarthosts and closes them at the end."""
    made: list[Smarthost] = []

    def make(host: str, port: int, **changes: Any) -> Smarthost:
        values: dict[str, Any] = {"pool_size": 10, "helo_name": "relay.example.org"}
        made.append(Smarthost(SmarthostConfig((Host(host, port),), **(values | changes))))
        return made[-1]

    yield make
    for smarthost in made:
        smarthost.close(time.monotonic() + 1)


@pytest.fixture(params=["", "-p"], ids=["pipelining", "no pipelining"])
def sink_port(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """The port of a running smtp-sink."""
    program = shutil.which("smtp-sink", path=os.environ.get("PATH", "") + ":/usr/sbin")
    require(program is not None, "Postfix's smtp-sink")
    port = free_port()
    options = [request.param] if request.param else []
    if os.geteuid() == 0:
        options += ["-u", "postfix"]
    with (tmp_path / "sink.log").open("wb") as log:
        process = subprocess.Popen([str(program), *options, f"127.0.0.1:{port}", "100"], stdout=log, stderr=log)
    try:
        wait_for_port(port)
        yield port
    finally:
        process.terminate()
        process.wait(10)


def test_500_mails_over_10_connections(sink_port: int, new_smarthost: Callable[..., Smarthost]) -> None:
    smarthost = new_smarthost("127.0.0.1", sink_port)
    outcomes = send_all(smarthost, dict.fromkeys(range(500), CONTENT))
    assert [outcome.state for outcome in outcomes.values()] == [State.RELAYED] * 500
    assert int(smarthost.figures()["connections_opened"]) <= 10


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def postfix_process(certificate: tuple[Path, Path]) -> Iterator[Postfix]:
    """A running Postfix that several tests share."""
    require(installed.PROGRAM is not None, "Postfix")
    require(os.geteuid() == 0, "root, who alone can start Postfix,")
    # Not below pytest's own directory, through which Postfix's users may not pass.
    directory = Path(tempfile.mkdtemp(prefix="relay-p-"))
    server = Postfix(directory, *certificate)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def postfix(postfix_process: Postfix) -> Postfix:
    """It runs and has no mail, whatever the test before did."""
    postfix_process.stop()
    postfix_process.forget_mails()
    postfix_process.start()
    return postfix_process


def test_1000_mails_arrive_as_they_were(
    postfix: Postfix, certificate: tuple[Path, Path], new_smarthost: Callable[..., Smarthost]
) -> None:
    mails = contents(1000)
    smarthost = new_smarthost("localhost", postfix.port, tls="starttls", ca_file=str(certificate[0]))
    outcomes = send_all(smarthost, mails)
    assert {outcome.state for outcome in outcomes.values()} == {State.RELAYED}
    assert int(smarthost.figures()["connections_opened"]) <= 10
    postfix.wait_until_delivered(DELIVERY_SECONDS)
    expect_exactly(postfix, mails, outcomes)


def test_postfix_stops_in_the_middle_of_1000_mails(
    postfix: Postfix, certificate: tuple[Path, Path], new_smarthost: Callable[..., Smarthost]
) -> None:
    mails = contents(1000)
    smarthost = new_smarthost("localhost", postfix.port, tls="starttls", ca_file=str(certificate[0]))
    with Restart(postfix, after=300, is_back=False) as stopping:
        outcomes = send_all(smarthost, mails, stopping.note)
    assert stopping.is_done
    postfix.start()
    postfix.wait_until_delivered(DELIVERY_SECONDS)
    expect_exactly(postfix, mails, outcomes)
    told = Counter(outcome.state for outcome in outcomes.values())
    assert told[State.RELAYED] >= 300
    assert told[State.DEFERRED] > 0

    again = to_send_again(outcomes, numbers(postfix.mails()))
    print(f"Postfix stopped: {describe(told)}; to be sent again: {len(again)}")
    wait_until_taken_again(smarthost)
    outcomes |= send_all(smarthost, {number: mails[number] for number in again})
    postfix.wait_until_delivered(DELIVERY_SECONDS)
    expect_exactly(postfix, mails, outcomes)
    assert {outcome.state for number, outcome in outcomes.items() if number in again} == {State.RELAYED}
    assert numbers(postfix.mails()) == set(mails)


def test_postfix_restarts_while_30_callers_send_1000_mails(
    postfix: Postfix, certificate: tuple[Path, Path], new_smarthost: Callable[..., Smarthost]
) -> None:
    mails = contents(1000)
    smarthost = new_smarthost("localhost", postfix.port, tls="starttls", ca_file=str(certificate[0]))
    told: Counter[State] = Counter()
    outcomes: dict[int, Outcome] = {}

    def send(number: int) -> None:
        """As a caller does: what is deferred is sent again when the smarthost works again, nothing else is."""
        for _ in range(MOST_TRIES):
            outcomes[number] = send_one(smarthost, number, mails[number])
            told[outcomes[number].state] += 1
            restart.note()
            if outcomes[number].state is not State.DEFERRED:
                return
            wait_until_taken_again(smarthost)

    callers = Pool(30)
    with Restart(postfix, after=300, is_back=True) as restart:
        for number in mails:
            callers.spawn(send, number)
        callers.join(raise_error=True)
    assert restart.is_done
    # What the restart broke was replaced, tried again or told to the caller: how much of which is chance.
    figures = smarthost.figures()
    in_the_way = told[State.DEFERRED] + told[State.IN_DOUBT] + figures["retried"] + figures["stale_replaced"]
    assert in_the_way > 0, "the restart was in nobody's way"

    postfix.wait_until_delivered(DELIVERY_SECONDS)
    expect_exactly(postfix, mails, outcomes)
    # What is in doubt is looked for before it is sent again.
    again = to_send_again(outcomes, numbers(postfix.mails()))
    print(f"Postfix restarted: {describe(told)}; to be sent again: {len(again)}; {smarthost.figures()}")
    assert {outcomes[number].state for number in again} <= {State.IN_DOUBT}
    outcomes |= send_all(smarthost, {number: mails[number] for number in again})
    postfix.wait_until_delivered(DELIVERY_SECONDS)
    expect_exactly(postfix, mails, outcomes)
    assert numbers(postfix.mails()) == set(mails)


def test_who_cannot_be_trusted_gets_no_mail(
    postfix: Postfix, tmp_path: Path, new_smarthost: Callable[..., Smarthost]
) -> None:
    stranger, _ = make_certificate(tmp_path)
    smarthost = new_smarthost("localhost", postfix.port, tls="starttls", ca_file=str(stranger))
    (outcome,) = send_all(smarthost, {0: CONTENT}).values()
    assert (outcome.state, outcome.phase) == (State.DEFERRED, Phase.STARTTLS)
    postfix.wait_until_delivered(DELIVERY_SECONDS)
    assert postfix.mails() == []


def test_without_tls_postfix_refuses_and_the_mail_may_be_sent_again(
    postfix: Postfix, new_smarthost: Callable[..., Smarthost]
) -> None:
    smarthost = new_smarthost("localhost", postfix.port, tls="off")
    (outcome,) = send_all(smarthost, {0: CONTENT}).values()
    assert (outcome.state, outcome.reply_code) == (State.DEFERRED, 530)
    assert postfix.mails() == []


class Restart:
    """Stops Postfix once a number of outcomes are known, and starts it again. It does so in a thread of its own."""

    def __init__(self, postfix: Postfix, *, after: int, is_back: bool) -> None:
        self._postfix = postfix
        self._after = after
        self._is_back = is_back
        self._known = 0
        self._task: Any = None

    @property
    def is_done(self) -> bool:
        """Whether it was begun and went well."""
        return self._task is not None and self._task.successful()

    def note(self) -> None:
        """Count an outcome."""
        self._known += 1
        if self._known == self._after:
            self._task = gevent.get_hub().threadpool.spawn(self._run)

    def __enter__(self) -> Restart:
        return self

    def __exit__(self, *_exception: object) -> None:
        """Wait for it: nobody else may stop or start Postfix meanwhile."""
        if self._task is not None:
            self._task.wait(timeout=TEST_SECONDS)

    def _run(self) -> None:
        self._postfix.stop()
        if self._is_back:
            self._postfix.start()


def send_one(smarthost: Smarthost, number: int, content: bytes) -> Outcome:
    """Hand one mail over, to a recipient of its own."""
    path = f"b{number}@example.com"
    (outcome,) = smarthost.relay("sender@example.org", (path,), content, time.monotonic() + SEND_SECONDS)
    return outcome


def send_all(
    smarthost: Smarthost, mails: Mapping[int, bytes], note: Callable[[], None] | None = None
) -> dict[int, Outcome]:
    """Hand all over at once; ``note`` is called whenever an outcome is known."""
    outcomes: dict[int, Outcome] = {}

    def send(number: int, content: bytes) -> None:
        outcomes[number] = send_one(smarthost, number, content)
        if note is not None:
            note()

    sending = [gevent.spawn(send, number, content) for number, content in mails.items()]
    gevent.joinall(sending, raise_error=True)
    return outcomes


def to_send_again(outcomes: Mapping[int, Outcome], arrived: set[int]) -> set[int]:
    """The mails that were deferred, and those in doubt that did not arrive."""
    deferred = {number for number, outcome in outcomes.items() if outcome.state is State.DEFERRED}
    in_doubt = {number for number, outcome in outcomes.items() if outcome.state is State.IN_DOUBT}
    return deferred | (in_doubt - arrived)


def describe(told: Counter[State]) -> str:
    """How many mails ended how."""
    return ", ".join(f"{told[state]} {state.value}" for state in State)


def numbers(mails: list[DeliveredMail]) -> set[int]:
    """Which mails these are."""
    return {_number(mail) for mail in mails}


def _number(mail: DeliveredMail) -> int:
    return int(mail.forward_path.removeprefix("b").removesuffix("@example.com"))


def expect_exactly(postfix: Postfix, mails: Mapping[int, bytes], outcomes: Mapping[int, Outcome]) -> None:
    """What is RELAYED is there, once, as it was, under the id that its outcome names; besides it only what is in doubt.

    A mail of which an earlier attempt was in doubt has the outcome of the last one.
    """
    delivered = {mail.queue_id: mail for mail in postfix.mails()}
    relayed = {outcome.remote_id: number for number, outcome in outcomes.items() if outcome.state is State.RELAYED}
    in_doubt = {number for number, outcome in outcomes.items() if outcome.state is State.IN_DOUBT}
    assert len(relayed) == sum(outcome.state is State.RELAYED for outcome in outcomes.values())
    assert {outcome.state for outcome in outcomes.values()} <= {State.RELAYED, State.DEFERRED, State.IN_DOUBT}
    assert relayed.keys() <= delivered.keys(), "lost"
    besides = [_number(mail) for queue_id, mail in delivered.items() if queue_id not in relayed]
    assert set(besides) <= in_doubt, "taken, but the caller was told otherwise"
    assert len(besides) == len(set(besides)), "doubled"
    for queue_id, mail in delivered.items():
        assert mail.is_over_tls
        assert relayed.get(queue_id, _number(mail)) == _number(mail)
        assert mail.content == mails[_number(mail)]


def wait_until_taken_again(smarthost: Smarthost) -> None:
    """Return when a probe of the smarthost has succeeded."""
    deadline = time.monotonic() + SEND_SECONDS
    while smarthost.figures()["circuit"] != "closed":
        assert time.monotonic() < deadline, smarthost.figures()
        gevent.sleep(0.02)


# -- what is sent ------------------------------------------------------------------------------------------------------

BODIES = [
    b"",
    b"\r\n",
    b"\r\n" * 40,
    b"Hello.\r\n",
    b".\r\n",
    b"..\r\n",
    b".\r\n.\r\n.\r\n",
    b"...\r\n. \r\n.\t\r\n.a\r\n",
    b"above\r\n.\r\nMAIL FROM:<a@example.org>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n.\r\nQUIT\r\n",
    b"x" * 998 + b"\r\n",
    b"." * 998 + b"\r\n",
    (b"." + b"x" * 997 + b"\r\n") * 20,
    b"blanks \r\ntabs\t\t\r\n \r\n\t\r\n  leading\r\n",
    b"From me to you\r\n>From me to you\r\n\r\nFrom a@example.org Thu Jan  1 00:00:00 1970\r\n",
    b"Subject: not one\r\n\r\nTo: nobody\r\n",
    b"\x01\x07\x08\x0b\x0c\x1b\x7f\r\n",
    "Grüße aus Köln, Łódź, 東京 🙂\r\n".encode() * 10,
    bytes(range(0x80, 0x100)) + b"\r\n",
    b"=20=\r\n=0D=0A.=0D=0A=\r\n",
    (b"A" * 76 + b"\r\n") * 5000,
]
TEXTS = [
    "Hello.\n",
    ".",
    ".\n.\n",
    " ",
    "above\n.\r\nbelow\r.\rend",
    "a" * 998,
    "a" * 999,
    "." * 998 + "\n" + "." * 999,
    "blanks \t \n\n \n" * 5,
    "Grüße aus Köln, das ist eine Zeile, die in quoted-printable umbrochen wird. " * 30,
    "ü" * 24 + ".\n" + "=" * 500 + " \n",
    "=20\n=\n=0D=0A.=0D=0A",
    "Москва, Київ, София, 東京 🙂\n" * 40,
    "\ufeff\u2028.\u2028\x85.\x85\x00.\x00\n",
    "word " * 20_000,
]
POLICY = Policy(
    email_enabled=True,
    default_from="noreply@example.org",
    default_from_display_name="Relay",
    allowed_from_domains=(),
    allowed_reply_to_domains=(),
    allowed_recipient_domains=(),
)


def contents(count: int) -> dict[int, bytes]:
    """So many mails, no two alike: header and body as they are, and what submission makes of a request."""
    return {number: _content(number) for number in range(count)}


def _content(number: int) -> bytes:
    kind = number % (len(BODIES) + len(TEXTS))
    if kind < len(BODIES):
        return b"Subject: Mail %d\r\nX-Long: %b\r\n\r\n%b" % (number, b"x" * 990, BODIES[kind])
    text = TEXTS[kind - len(BODIES)]
    request = SendRequest(
        to=f"Jürgen <b{number}@example.com>",
        subject_header=f"Ваша пошта {number}",
        html=f"<p>{text}</p>",
        text=text,
        from_="",
        from_display_name="",
        reply_to="",
        group_id="",
    )
    sender = judge(request, POLICY)
    assert sender is not None
    return compose(
        request=request,
        sender=sender,
        message_id_header=f"<{number}@example.org>",
        date_header="Thu, 01 Jan 2026 00:00:00 +0000",
        tracking_id=f"group/{number}",
        email_id=str(number),
        configuration_set="",
    )
