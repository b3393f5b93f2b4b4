"""Many mails at a time, with and without asyncio."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing
from typing import Any

import pytest

from relay.client import (
    BlockingRelayClient,
    Failed,
    InvalidMail,
    Mail,
    Progress,
    RelayClient,
    Result,
    Retry,
)
from relay.client.many import AHEAD
from tests.client.responder import SENT, Responder
from tests.support.nats_server import NatsServer

RETRY = Retry(20, 10, 0.01, 0.05)
FAILED = {"error": "email delivery failed", "outcome": "failed", "retryable": False}


def mail(number: int, **changed: Any) -> Mail:
    return Mail(
        **{"to": f"u{number}@example.com", "subject": "S", "html": "H", "text": "T", "group_id": str(number)} | changed
    )


class Counting:
    """A relay of sorts that knows how many requests it has in hand."""

    def __init__(self, seconds: Callable[[int], float] = lambda _: 0.01) -> None:
        self.in_hand = 0
        self.most = 0
        self._seconds = seconds

    async def __call__(self, request: dict[str, Any], number: int) -> Any:
        self.in_hand += 1
        self.most = max(self.most, self.in_hand)
        await asyncio.sleep(self._seconds(int(request["group_id"])))
        self.in_hand -= 1
        return FAILED if int(request["group_id"]) % 10 == 3 else SENT | {"group_id": request["group_id"]}


Sender = Callable[..., list[Result]]


def with_asyncio(url: str, mails: Any, **options: Any) -> list[Result]:
    async def run() -> list[Result]:
        async with RelayClient(url, retry=RETRY) as client:
            return [result async for result in client.send_many(mails, **options)]

    return asyncio.run(run())


def with_threads(url: str, mails: Any, **options: Any) -> list[Result]:
    with BlockingRelayClient(url, retry=RETRY) as client:
        return list(client.send_many(mails, **options))


@pytest.fixture(params=[with_asyncio, with_threads])
def send_many(request: pytest.FixtureRequest) -> Sender:
    """Both clients."""
    sender: Sender = request.param
    return sender


def test_one_failure_stops_nothing_and_concurrency_is_bounded(
    nats_server: NatsServer, new_responder: Callable[..., Responder], send_many: Sender
) -> None:
    relay = Counting()
    new_responder(relay)
    results = send_many(nats_server.url, [mail(number) for number in range(100)], concurrency=7)
    assert sorted(result.position for result in results) == list(range(100))
    for result in results:
        if result.position % 10 == 3:
            assert isinstance(result.error, Failed)
            assert (result.sent, result.is_sent) == (None, False)
        else:
            assert result.sent is not None
            assert result.sent.group_id == str(result.position)
            assert result.error is None
        assert isinstance(result.item, Mail)
        assert "example.com" not in repr(result)
    assert relay.most == 7


def test_as_completed_and_in_order(
    nats_server: NatsServer, new_responder: Callable[..., Responder], send_many: Sender
) -> None:
    new_responder(Counting(lambda number: 0.5 if number == 0 else 0.001))
    mails = [mail(number) for number in range(60)]
    done = [result.position for result in send_many(nats_server.url, mails, concurrency=10)]
    assert done[-1] == 0, "the slow first is given out when it is done"
    ordered = [result.position for result in send_many(nats_server.url, mails, concurrency=10, ordered=True)]
    assert ordered == list(range(60))


def test_progress(nats_server: NatsServer, new_responder: Callable[..., Responder], send_many: Sender) -> None:
    new_responder(Counting())
    seen: list[Progress] = []
    send_many(nats_server.url, [mail(number) for number in range(30)], on_progress=seen.append)
    assert [progress.done for progress in seen] == list(range(1, 31))
    assert seen[-1] == (30, 27, 3, 30)
    seen.clear()
    send_many(nats_server.url, (mail(number) for number in range(3)), on_progress=seen.append)
    assert seen[-1] == (3, 3, 0, None), "a generator does not say how many there will be"


def test_what_is_no_mail_is_a_failure_like_any_other(
    nats_server: NatsServer, new_responder: Callable[..., Responder], send_many: Sender
) -> None:
    new_responder(Counting())
    fields = {"to": "a@example.com", "subject": "S", "html": "H", "text": "T", "group_id": "1"}
    items: list[Any] = [fields, {"to": "a@example.com"}, 7, mail(1, timeout_seconds=0), mail(2, to=object()), mail(4)]
    results = send_many(nats_server.url, items, ordered=True)
    assert [result.is_sent for result in results] == [True, False, False, False, False, True]
    assert all(isinstance(result.error, InvalidMail) for result in results[1:5])


def test_mails_are_read_as_there_is_room(
    nats_server: NatsServer, new_responder: Callable[..., Responder], send_many: Sender
) -> None:
    """Also while one of them, in order, holds all the others up."""
    new_responder(Counting(lambda number: 0.6 if number == 0 else 0.0005))
    read: list[int] = []
    ahead: list[int] = []

    def mails() -> Iterator[Mail]:
        for number in range(300):
            read.append(number)
            yield mail(number)

    def note(progress: Progress) -> None:
        ahead.append(len(read) - progress.done)

    results = send_many(nats_server.url, mails(), concurrency=2, ordered=True, on_progress=note)
    assert [result.position for result in results] == list(range(300))
    assert max(ahead) <= 3


@pytest.mark.parametrize("is_blocking", [False, True])
def test_what_waits_for_a_slow_one_before_it_is_bounded(
    nats_server: NatsServer, new_responder: Callable[..., Responder], is_blocking: bool
) -> None:
    new_responder(Counting(lambda number: 1.5 if number == 0 else 0.0))
    read: list[int] = []

    def mails() -> Iterator[Mail]:
        for number in range(400):
            read.append(number)
            yield mail(number)

    async def run() -> Result:
        async with (
            RelayClient(nats_server.url, retry=RETRY) as client,
            aclosing(client.send_many(mails(), concurrency=4, ordered=True)) as results,
        ):
            return await anext(results)

    if is_blocking:
        with BlockingRelayClient(nats_server.url, retry=RETRY) as client:
            first = next(client.send_many(mails(), concurrency=4, ordered=True))
    else:
        first = asyncio.run(run())
    assert first.position == 0
    assert 60 < len(read) <= 4 * AHEAD


def test_a_source_that_breaks_is_told_after_what_was_in_flight(
    nats_server: NatsServer, new_responder: Callable[..., Responder], send_many: Sender
) -> None:
    new_responder(Counting(lambda _: 0.1))
    got: list[int] = []

    def mails() -> Iterator[Mail]:
        yield from (mail(number) for number in range(4))
        raise RuntimeError("the database has gone")

    def note(progress: Progress) -> None:
        got.append(progress.done)

    with pytest.raises(RuntimeError, match="database"):
        send_many(nats_server.url, mails(), on_progress=note)
    assert got == [1, 2, 3, 4]


def test_an_endless_asynchronous_source(nats_server: NatsServer, new_responder: Callable[..., Responder]) -> None:
    """A slow source holds back no result, and who leaves the loop ends everything."""
    new_responder(Counting())

    async def mails() -> AsyncIterator[Mail]:
        number = 0
        while True:
            yield mail(number)
            number += 1
            await asyncio.sleep(0.02 if number < 20 else 3600)

    async def run() -> list[int]:
        got = []
        async with RelayClient(nats_server.url, retry=RETRY) as client:
            async with aclosing(client.send_many(mails(), concurrency=5)) as results:
                async for result in results:
                    got.append(result.position)
                    if len(got) == 20:
                        break
            assert len(asyncio.all_tasks()) < 8, "nobody is left waiting"
        return got

    assert sorted(asyncio.run(asyncio.wait_for(run(), 20))) == list(range(20))


@pytest.mark.parametrize("concurrency", [0, -1])
def test_no_concurrency(concurrency: int) -> None:
    with pytest.raises(ValueError, match="concurrency"):
        RelayClient().send_many([], concurrency=concurrency)
    with pytest.raises(ValueError, match="concurrency"):
        BlockingRelayClient().send_many([], concurrency=concurrency)


def test_no_mails(nats_server: NatsServer, send_many: Sender) -> None:
    assert send_many(nats_server.url, []) == []


def test_blocking_mails_are_read_in_the_callers_thread(
    nats_server: NatsServer, new_responder: Callable[..., Responder]
) -> None:
    new_responder(Counting())
    threads = set()

    def mails() -> Iterable[Mail]:
        for number in range(5):
            threads.add(threading.current_thread())
            yield mail(number)

    def note(_: Progress) -> None:
        threads.add(threading.current_thread())

    with BlockingRelayClient(nats_server.url, retry=RETRY) as client:
        assert len(list(client.send_many(mails(), on_progress=note))) == 5
    assert threads == {threading.current_thread()}


def test_leaving_early_ends_what_is_in_flight(nats_server: NatsServer, new_responder: Callable[..., Responder]) -> None:
    relay = Counting(lambda number: 0.001 if number < 1 else 30)
    new_responder(relay)
    begun = time.monotonic()
    with BlockingRelayClient(nats_server.url, retry=RETRY) as client:
        for result in client.send_many(mail(number) for number in range(1000)):
            assert result.position == 0
            break
    assert time.monotonic() - begun < 10
