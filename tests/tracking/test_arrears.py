"""What is owed to bucket and log is written when they take it: once, all of it, and never more than has room."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator

import gevent
import orjson
import pytest

from relay import contract
from relay.bus.client import Bus
from relay.bus.jetstream import JetStream
from relay.bus.kv import Bucket
from relay.tracking import arrears
from relay.tracking import log as log_module
from relay.tracking.arrears import Arrears, Owed
from relay.tracking.facts import Fact
from relay.tracking.log import Log, fact_publication
from relay.tracking.record import rfc3339
from relay.tracking.storage import StorageConfig, ensure_storage
from tests.support.groups import record_of
from tests.support.nats_proxy import Action, NatsProxy
from tests.support.nats_server import NatsServer

ACK_SECONDS = 0.5
WAIT_SECONDS = 10.0
MAILS = 250
"""More than two batches."""


class Books:
    """What the arrears said became of each mail."""

    def __init__(self, jetstream: JetStream, **more: int) -> None:
        self.is_on = True
        self.written: list[str] = []
        self.lost: list[tuple[str, str]] = []
        self.arrears = Arrears(
            jetstream,
            ACK_SECONDS,
            is_on=lambda: self.is_on,
            written=self.written.append,
            lost=lambda email_id, why: self.lost.append((email_id, why)),
            **more,
        )

    def wait_written(self) -> None:
        """Until nothing is owed."""
        with gevent.Timeout(WAIT_SECONDS):
            while len(self.arrears):
                gevent.sleep(0.01)


@pytest.fixture
def server(new_nats_server: Callable[..., NatsServer]) -> NatsServer:
    return new_nats_server()


@pytest.fixture
def jetstream(server: NatsServer, new_bus: Callable[[str], Bus]) -> JetStream:
    made = JetStream(new_bus(server.url))
    assert ensure_storage(made, StorageConfig()) == ""
    return made


@pytest.fixture
def proxy(server: NatsServer) -> Iterator[NatsProxy]:
    made = NatsProxy(server.port)
    yield made
    made.stop()


def owed(jetstream: JetStream, group_id: str, email_id: str = "", *, tried_at: float | None = None) -> Owed:
    """One mail of a group."""
    email_id = email_id or str(uuid.uuid4())
    now = time.time()
    fact = fact_publication(group_id, Fact.SENT, email_id, rfc3339(now))
    record = Bucket(jetstream, contract.RECIPIENTS_BUCKET).creation(email_id, record_of(email_id, group_id))
    return Owed(email_id, group_id, now, (fact,), record, tried_at)


def has_record(jetstream: JetStream, email_id: str) -> bool:
    """Whether the bucket has it."""
    return Bucket(jetstream, contract.RECIPIENTS_BUCKET).get(email_id) is not None


def test_what_is_owed_is_written_once_writing_makes_sense(jetstream: JetStream) -> None:
    books = Books(jetstream)
    books.is_on = False
    mails = [owed(jetstream, "arrears-1") for _ in range(MAILS)]
    assert all(books.arrears.put(mail) for mail in mails)
    gevent.sleep(2 * arrears.POLL_SECONDS)
    assert (len(books.arrears), books.written) == (MAILS, [])
    books.is_on = True
    books.wait_written()
    assert books.written == [mail.email_id for mail in mails]
    assert Log(jetstream).counts("arrears-1") == {"sent": MAILS}
    assert all(has_record(jetstream, mail.email_id) for mail in mails)
    assert books.lost == []


def test_what_was_written_before_counts_once_and_keeps_what_came_of_it(jetstream: JetStream) -> None:
    # Given a mail whose acknowledgement was lost, and an event folded into its record since
    mail = owed(jetstream, "arrears-2", tried_at=time.monotonic())
    jetstream.store([*mail.facts, mail.record], 1.0)
    bucket = Bucket(jetstream, contract.RECIPIENTS_BUCKET)
    entry = bucket.get(mail.email_id)
    assert entry is not None
    changed = orjson.dumps(orjson.loads(entry.value) | {"delivered": True})
    jetstream.store([bucket.replacement(mail.email_id, changed, entry.revision)], 1.0)
    # When it is written again
    books = Books(jetstream)
    books.arrears.put(mail)
    books.wait_written()
    # Then nothing is different
    assert books.written == [mail.email_id]
    assert Log(jetstream).counts("arrears-2") == {"sent": 1}
    entry = bucket.get(mail.email_id)
    assert entry is not None
    assert entry.value == changed


@pytest.mark.parametrize("was_written", [True, False])
def test_a_fact_that_the_server_may_have_forgotten_is_looked_up(jetstream: JetStream, was_written: bool) -> None:
    # Given a mail that was tried longer ago than the server knows ids of facts
    long_ago = time.monotonic() - arrears.SURELY_KNOWN_SECONDS - 1
    mail = owed(jetstream, "arrears-3", tried_at=long_ago)
    (fact,) = mail.facts
    if was_written:
        jetstream.store([fact._replace(headers={})], 1.0)  # without its id: as if that were forgotten
    # When it is written, beside one that never was
    books = Books(jetstream)
    fresh = owed(jetstream, "arrears-3")
    books.arrears.put(mail)
    books.arrears.put(fresh)
    books.wait_written()
    # Then each counts once
    assert Log(jetstream).counts("arrears-3") == {"sent": 2}
    assert has_record(jetstream, mail.email_id)
    assert has_record(jetstream, fresh.email_id)


def test_a_log_that_is_too_long_to_look_keeps_nobody_waiting(
    jetstream: JetStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "LOOKUP_PAGES", 0)
    monkeypatch.setattr(arrears, "PAUSE_SECONDS", 0.01)
    # Given a mail of which nobody can tell whether its fact is in the log, and one behind it
    doubtful = owed(jetstream, "arrears-7", tried_at=time.monotonic() - arrears.SURELY_KNOWN_SECONDS - 1)
    fresh = owed(jetstream, "arrears-7")
    books = Books(jetstream)
    books.arrears.put(doubtful)
    books.arrears.put(fresh)
    books.wait_written()
    # Then it has its record, and whoever mends the log is told
    assert books.written == [fresh.email_id]
    ((email_id, why),) = books.lost
    assert email_id == doubtful.email_id
    assert "relayctl repair" in why
    assert has_record(jetstream, doubtful.email_id)
    assert Log(jetstream).counts("arrears-7") == {"sent": 1}


@pytest.mark.parametrize("action", [Action.DROP, Action.CUT_BEFORE, Action.CUT_AFTER])
@pytest.mark.parametrize("place", [1, 2, 7])
def test_a_batch_that_is_cut_off_is_written_again(
    proxy: NatsProxy, new_bus: Callable[[str], Bus], action: Action, place: int
) -> None:
    jetstream = JetStream(new_bus(proxy.url))
    assert ensure_storage(jetstream, StorageConfig()) == ""
    books = Books(jetstream)
    group_id = f"arrears-{action.name}-{place}"
    mails = [owed(jetstream, group_id) for _ in range(5)]
    proxy.begin(place, action, then=proxy.accept_again)
    for mail in mails:
        books.arrears.put(mail)
    books.wait_written()
    assert proxy.is_reached
    assert sorted(books.written) == sorted(mail.email_id for mail in mails)
    assert Log(jetstream).counts(group_id) == {"sent": 5}
    assert all(has_record(jetstream, mail.email_id) for mail in mails)


def test_there_is_room_for_so_much_and_no_more(jetstream: JetStream) -> None:
    mail = owed(jetstream, "arrears-4")
    books = Books(jetstream, limit_bytes=3 * mail.size_bytes)
    books.is_on = False
    mails = [owed(jetstream, "arrears-4") for _ in range(4)]
    assert [books.arrears.put(each) for each in mails] == [True, True, True, False]
    books.is_on = True
    books.wait_written()
    assert books.arrears.put(mails[3])  # there is room again
    books.wait_written()
    assert books.written == [each.email_id for each in mails]


def test_a_record_that_is_too_large_is_lost_and_keeps_nobody_waiting(jetstream: JetStream) -> None:
    books = Books(jetstream)
    large = owed(jetstream, "arrears-5")
    large = large._replace(record=large.record._replace(payload=b"x" * 1_100_000))
    small = owed(jetstream, "arrears-5")
    books.arrears.put(large)
    books.arrears.put(small)
    books.wait_written()
    assert books.written == [small.email_id]
    assert [email_id for email_id, _ in books.lost] == [large.email_id]


def test_what_is_owed_at_the_end_is_written_or_said_to_be_lost(jetstream: JetStream) -> None:
    books = Books(jetstream)
    mails = [owed(jetstream, "arrears-6") for _ in range(MAILS)]
    for mail in mails:
        books.arrears.put(mail)
    books.arrears.close(5.0)
    assert (len(books.written), books.lost, len(books.arrears)) == (MAILS, [], 0)
    assert not books.arrears.put(owed(jetstream, "arrears-6"))

    books = Books(jetstream)
    books.is_on = False
    books.arrears.put(mails[0])
    books.arrears.close(0.1)
    assert books.lost == [(mails[0].email_id, "the process ends")]
