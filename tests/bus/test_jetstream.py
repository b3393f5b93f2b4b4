"""JetStream against a real nats-server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import gevent
import pytest

from relay.bus.client import Bus, Msg, Publication
from relay.bus.jetstream import (
    DENIED,
    MULTI_GET_LIMIT,
    NO_MESSAGE_FOUND,
    STREAM_NOT_FOUND,
    TOO_MANY_RESULTS,
    JetStream,
    StoredMsg,
    _Batch,
    old_server_problem,
)
from relay.bus.kv import Bucket
from relay.errors import BusRefused, BusUnavailable
from tests.bus.freezing import frozen
from tests.bus.streams import Stream, new_bucket, new_stream
from tests.support.nats_server import NatsServer

EITHER_WAY = pytest.mark.parametrize("allow_direct", [True, False], ids=["direct get", "leader only"])


def test_publishing_to_no_stream_is_refused(jetstream: JetStream) -> None:
    (answer,) = jetstream.store([Publication("no.such.stream", b"")], 2)
    assert isinstance(answer, BusRefused)
    assert answer.code == 503


def test_an_api_error_has_its_code(jetstream: JetStream) -> None:
    with pytest.raises(BusRefused, match="stream not found") as refusal:
        jetstream.api("STREAM.INFO.NO_SUCH")
    assert refusal.value.code == STREAM_NOT_FOUND


def test_without_jetstream(new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]) -> None:
    jetstream = JetStream(new_bus(new_nats_server(jetstream=False).url))
    with pytest.raises(BusRefused) as refusal:
        jetstream.api("STREAM.INFO.X")
    assert refusal.value.code == 503


def test_a_frozen_server_costs_the_deadline_and_no_more(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]
) -> None:
    server = new_nats_server()
    jetstream = JetStream(new_bus(server.url), timeout_seconds=0.3)
    calls: dict[str, Callable[[], object]] = {
        "stream_info": lambda: jetstream.stream_info("S"),
        "last_sequence": lambda: jetstream.last_sequence("S"),
        "count_by_subject": lambda: jetstream.count_by_subject("S", ">"),
        "get_last": lambda: jetstream.get_last("S", "s.a"),
        "get_last_of_each": lambda: jetstream.get_last_of_each("S", ["s.a"]),
        "page": lambda: jetstream.page("S", "s.a", 1),
        "get_many": lambda: jetstream.get_many("S", {"multi_last": ["s.a"]}),
        "delete_msg": lambda: jetstream.delete_msg("S", 1),
        "follow": lambda: jetstream.follow("S", ">"),
        "own deadline": lambda: jetstream.get_last("S", "s.a", timeout_seconds=0.1),
    }
    with frozen(server):
        (answer,) = jetstream.store([Publication("s.a", b"")])
        assert isinstance(answer, BusUnavailable)
        for what, call in calls.items():
            begun = time.monotonic()
            with pytest.raises(BusUnavailable):
                call()
            assert time.monotonic() - begun < 0.8, what
    with pytest.raises(BusRefused):
        jetstream.stream_info("S", timeout_seconds=5)


def test_a_stream_that_is_not_there(jetstream: JetStream) -> None:
    calls: list[Callable[[], object]] = [
        lambda: jetstream.stream_info("NONE"),
        lambda: jetstream.last_sequence("NONE"),
        lambda: jetstream.count_by_subject("NONE", ">"),
        lambda: jetstream.get_last("NONE", "a"),
        lambda: jetstream.get_last_of_each("NONE", ["a"]),
        lambda: jetstream.page("NONE", "a", 1),
        lambda: jetstream.get_many("NONE", {"multi_last": ["a"]}),
        lambda: jetstream.delete_msg("NONE", 1),
        lambda: jetstream.follow("NONE", ">"),
    ]
    for call in calls:
        with pytest.raises(BusRefused, match="stream not found") as refusal:
            call()
        assert refusal.value.code == STREAM_NOT_FOUND


def test_stream_info(jetstream: JetStream) -> None:
    stream = new_stream(jetstream, max_msgs=3)
    empty = jetstream.stream_info(stream.name)
    assert (empty.messages, empty.first_sequence, empty.last_sequence, empty.subjects) == (0, 0, 0, 0)
    assert jetstream.last_sequence(stream.name) == 0
    stream.store(b"1", b"2", b"3", b"4")
    stream.store(b"5", last_token="b")
    info = jetstream.stream_info(stream.name)
    assert (info.messages, info.first_sequence, info.last_sequence, info.subjects) == (3, 3, 5, 2)
    assert info.size_bytes > 3
    assert info.config["max_msgs"] == 3
    assert info.created == empty.created
    assert jetstream.last_sequence(stream.name) == 5


def test_count_by_subject(jetstream: JetStream) -> None:
    stream = new_stream(jetstream)
    stream.store(b"1", b"2", b"3", last_token="group.sent")
    stream.store(b"1", last_token="group.opened")
    stream.store(b"1", last_token="other.sent")
    prefix = stream.prefix
    counts = jetstream.count_by_subject(stream.name, f"{prefix}.group.*")
    assert counts == {f"{prefix}.group.sent": 3, f"{prefix}.group.opened": 1}
    assert jetstream.count_by_subject(stream.name, f"{prefix}.nobody.*") == {}


def test_count_by_subject_knows_more_subjects_than_one_answer_holds(jetstream: JetStream) -> None:
    stream = new_stream(jetstream)
    for thousand in range(101):
        jetstream.store([Publication(f"{stream.prefix}.{thousand}.{number}", b"") for number in range(1000)], 20)
    counts = jetstream.count_by_subject(stream.name, f"{stream.prefix}.>", timeout_seconds=20)
    assert len(counts) == 101_000
    assert set(counts.values()) == {1}
    jetstream.api(f"STREAM.DELETE.{stream.name}")


@pytest.mark.parametrize("storage", ["memory", "file"])
def test_delete_msg(jetstream: JetStream, storage: str) -> None:
    stream = new_stream(jetstream, storage=storage)
    first, second, third = stream.store(b"1", b"2", b"3")
    assert jetstream.delete_msg(stream.name, second)
    assert not jetstream.delete_msg(stream.name, second), "again is harmless"
    page = jetstream.page(stream.name, f"{stream.prefix}.>", 1)
    assert [each.sequence for each in page.msgs] == [first, third]
    with pytest.raises(BusRefused):
        jetstream.delete_msg(new_bucket(jetstream).stream, 1)  # deny_delete


# -- reading ---------------------------------------------------------------------------------


@EITHER_WAY
def test_get_last_of_each(jetstream: JetStream, allow_direct: bool) -> None:
    stream = new_stream(jetstream, allow_direct=allow_direct)
    stream.store(b"old", b"new", last_token="a")
    (sequence,) = stream.store(b"1", last_token="b", headers={"X-Own": "yes"})
    a, b, c = (f"{stream.prefix}.{token}" for token in "abc")
    found = jetstream.get_last_of_each(stream.name, [c, b, a])
    assert {nats_subject: each.payload for nats_subject, each in found.items()} == {a: b"new", b: b"1"}
    assert found[b].sequence == sequence
    assert found[b].headers["X-Own"] == "yes"
    assert jetstream.get_last_of_each(stream.name, []) == {}


def test_too_many_keys_at_once_are_refused_and_leave_nothing_behind(jetstream: JetStream, bus: Bus) -> None:
    stream = new_stream(jetstream)
    nats_subjects = [f"{stream.prefix}.{number}" for number in range(1100)]
    jetstream.store([Publication(nats_subject, b"") for nats_subject in nats_subjects], 10)
    for asked in (nats_subjects, [f"{stream.prefix}.*"]):
        with pytest.raises(BusRefused) as refusal:
            jetstream.get_many(stream.name, {"multi_last": asked})
        assert refusal.value.code == TOO_MANY_RESULTS
    assert bus.waiting == 0
    assert len(jetstream.get_last_of_each(stream.name, nats_subjects)) == 1100, "in portions"
    assert len(jetstream.get_many(stream.name, {"multi_last": nats_subjects[:MULTI_GET_LIMIT]})) == MULTI_GET_LIMIT


def pages(stream: Stream, nats_subject: str, limit: int, **options: int) -> Iterator[list[StoredMsg]]:
    sequence: int | None = 1
    while sequence is not None:
        page = stream.jetstream.page(stream.name, nats_subject, sequence, limit, **options)
        yield page.msgs
        sequence = page.next_sequence


@EITHER_WAY
@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 35])
def test_pages(jetstream: JetStream, count: int, allow_direct: bool) -> None:
    stream = new_stream(jetstream, allow_direct=allow_direct)
    for number in range(count):
        stream.store(b"no", last_token="other")
        stream.store(str(number).encode(), last_token="sent")
    stream.store(b"no", last_token="other")
    got = list(pages(stream, f"{stream.prefix}.sent", 10))
    assert [int(each.payload) for page in got for each in page] == list(range(count))
    assert [len(page) for page in got[:-1]] == [10] * (len(got) - 1)
    assert len(got) == max(1, -(-count // 10)), "the last page is known to be the last"
    assert len([each for page in pages(stream, f"{stream.prefix}.*", 1000) for each in page]) == 2 * count + 1


@EITHER_WAY
def test_a_page_is_cut_by_bytes_but_never_empty(jetstream: JetStream, allow_direct: bool) -> None:
    stream = new_stream(jetstream, allow_direct=allow_direct)
    stream.store(*[b"x" * 10_000] * 10)
    got = list(pages(stream, f"{stream.prefix}.a", 1000, max_bytes=35_000))
    assert sum(map(len, got)) == 10
    assert all(1 <= len(page) <= 4 for page in got)
    assert [len(page) for page in pages(stream, f"{stream.prefix}.a", 1000, max_bytes=1)] == [1] * 10


@EITHER_WAY
def test_the_old_form_of_a_page_ends_with_the_last_message(jetstream: JetStream, allow_direct: bool) -> None:
    stream = new_stream(jetstream, allow_direct=allow_direct)
    first, *_ = stream.store(b"1", b"2", b"3")
    request = {"next_by_subj": f"{stream.prefix}.a", "batch": 2}
    found = jetstream.get_many(stream.name, {"seq": first, **request})
    assert [each.payload for each in found] == [b"1", b"2"]
    assert found[-1].pending > 0
    found = jetstream.get_many(stream.name, {"seq": first + 1, **request})
    assert [(each.payload, bool(each.pending)) for each in found][-1] == (b"3", False)
    assert jetstream.get_many(stream.name, {"seq": first + 3, **request}) == []


def answer(sequence: int, before: int) -> Msg:
    """One message of a batch direct get."""
    headers = {"Nats-Subject": "s.a", "Nats-Sequence": str(sequence), "Nats-Last-Sequence": str(before)}
    return Msg("_INBOX.x", "", b"", headers)


@pytest.mark.parametrize(
    ("arrived", "is_whole"),
    [
        ([], True),
        ([(3, 0), (5, 3), (9, 5)], True),
        ([(5, 3), (9, 5)], False),
        ([(3, 0), (9, 5)], False),
        ([(3, 0), (5, 3)], False),
    ],
    ids=["nothing", "all", "first lost", "middle lost", "last lost"],
)
def test_an_answer_of_which_a_part_was_lost_is_no_answer(arrived: list[tuple[int, int]], is_whole: bool) -> None:
    batch = _Batch()
    for sequence, before in arrived:
        assert not batch.take(answer(sequence, before))
    last = {"Status": "204", "Nats-Last-Sequence": "9"} if arrived else {"Status": "404"}
    assert batch.take(Msg("_INBOX.x", "", b"", last))
    assert batch.done.is_set()
    assert (batch.error is None) == is_whole


@pytest.fixture
def lagging(jetstream: JetStream) -> Iterator[Stream]:
    """A stream of which one of the two that answer direct gets has the first message only."""
    stream = new_stream(jetstream)
    stream.store(b"first", last_token="first")
    mirror = {
        "name": f"M{stream.name}",
        "storage": "memory",
        "mirror": {"name": stream.name, "filter_subject": f"{stream.prefix}.first"},
        "mirror_direct": True,
        "allow_direct": True,
    }
    jetstream.api(f"STREAM.CREATE.M{stream.name}", mirror)
    stream.store(*[b"x"] * 20)
    nats_subject = f"{stream.prefix}.a"
    with gevent.Timeout(10):  # until the mirror takes part
        while jetstream._bus.request(_direct_get(stream.name, nats_subject), 2).status != "404":
            pass
    yield stream
    jetstream.api(f"STREAM.DELETE.M{stream.name}")


def _direct_get(stream: str, nats_subject: str) -> Publication:
    return Publication(f"$JS.API.DIRECT.GET.{stream}.{nats_subject}", b"")


def test_what_a_replica_lacks_is_asked_of_the_leader(jetstream: JetStream, lagging: Stream) -> None:
    nats_subject = f"{lagging.prefix}.a"
    misses = 0
    for _ in range(30):
        misses += jetstream._bus.request(_direct_get(lagging.name, nats_subject), 2).status == "404"
        found = jetstream.get_last(lagging.name, nats_subject)
        assert found is not None
        assert found.sequence == 21
        assert list(jetstream.get_last_of_each(lagging.name, [nats_subject])) == [nats_subject]
        assert [len(page) for page in pages(lagging, nats_subject, 50)] == [20]
        assert [len(page) for page in pages(lagging, nats_subject, 8)] == [8, 8, 4]
        assert [len(page) for page in pages(lagging, f"{lagging.prefix}.*", 50)] == [21]
    assert misses, "the mirror did take part"


def test_a_sequence_that_is_not_there_is_refused_with_its_code(jetstream: JetStream) -> None:
    stream = new_stream(jetstream)
    with pytest.raises(BusRefused) as refusal:
        jetstream.api(f"STREAM.MSG.GET.{stream.name}", {"seq": 5})
    assert refusal.value.code == NO_MESSAGE_FOUND


def test_a_key_that_was_deleted_is_known_by_its_marker(jetstream: JetStream) -> None:
    bucket: Bucket = new_bucket(jetstream)
    bucket.put("key", b"1")
    bucket.delete("key")
    nats_subject = bucket.creation("key", b"").nats_subject
    for found in (
        jetstream.get_last(bucket.stream, nats_subject),
        jetstream.get_last_from_leader(bucket.stream, nats_subject),
        jetstream.get_last_of_each(bucket.stream, [nats_subject])[nats_subject],
    ):
        assert found is not None
        assert found.is_deleted


# -- the server ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "is_old"),
    [
        ("2.9.25", True),
        ("2.11.9", True),
        ("2.12.0", False),
        ("2.15.1-beta", False),
        ("3.0", False),
        ("?", False),
        ("", False),
    ],
)
def test_an_old_server_is_named(version: str, is_old: bool) -> None:
    problem = old_server_problem(version)
    assert bool(problem) == is_old
    assert not is_old or (version in problem and "2.12" in problem)


def test_this_server_is_new_enough(jetstream: JetStream) -> None:
    assert jetstream.server_problem == ""


# -- no batches, and no direct gets ------------------------------------------------------------


def reads(jetstream: JetStream, stream: Stream) -> list[object]:
    """What every way to read says; the same whichever way it goes."""
    subjects = [f"{stream.prefix}.{token}" for token in "abc"]
    last = jetstream.get_last(stream.name, subjects[0])
    return [
        last and last.payload,
        {key: each.payload for key, each in jetstream.get_last_of_each(stream.name, subjects).items()},
        [each.payload for each in jetstream.get_many(stream.name, {"multi_last": subjects})],
        [each.payload for each in jetstream.page(stream.name, f"{stream.prefix}.>", 1).msgs],
        jetstream.page(stream.name, f"{stream.prefix}.>", 1, limit=2).next_sequence,
    ]


def fill(jetstream: JetStream) -> Stream:
    stream = new_stream(jetstream)
    for token in "ab":
        stream.store(b"old", token.encode(), last_token=token)
    return stream


def test_a_user_who_may_not_ask_replicas_asks_the_leader(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]
) -> None:
    deny = 'permissions: {publish: {deny: ["$JS.API.DIRECT.GET.>"]}}'
    users = f'{{user: "a", password: "a"}}, {{user: "w", password: "w", {deny}}}'
    url = new_nats_server(config=f"authorization {{ users: [{users}] }}").url
    bus = new_bus(url.replace("//", "//a:a@"))
    stream = fill(JetStream(bus))
    expected = reads(JetStream(bus), stream)
    bus.close()  # a process has one at a time
    jetstream = JetStream(new_bus(url.replace("//", "//w:w@")))
    begun = time.monotonic()
    assert reads(jetstream, stream) == expected
    assert time.monotonic() - begun < 5, "nothing waited for its deadline"


def test_a_user_who_may_not_use_the_api_is_told_at_once(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]
) -> None:
    users = '{user: "w", password: "w", permissions: {publish: {deny: "$JS.API.>"}}}'
    url = new_nats_server(config=f"authorization {{ users: [{users}] }}").url
    jetstream = JetStream(new_bus(url.replace("//", "//w:w@")), timeout_seconds=30)
    calls: list[Callable[[], object]] = [
        lambda: jetstream.stream_info("Upper"),
        lambda: jetstream.get_last("Upper", "s.a"),
        lambda: jetstream.get_last_of_each("Upper", ["s.a", "s.b"]),
        lambda: jetstream.page("Upper", "s.a", 1),
        lambda: jetstream.follow("Upper", ">"),
    ]
    for call in calls:
        with gevent.Timeout(5), pytest.raises(BusRefused) as refusal:
            call()
        assert refusal.value.code == DENIED


def test_a_server_without_batches_is_read_from_its_leader(
    jetstream: JetStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server says that it is old; a batch, to which an old one never says the end, must not be asked for."""
    stream = fill(jetstream)
    expected = reads(jetstream, stream)
    asked: list[str] = []
    monkeypatch.setattr(Bus, "server_version", "2.10.26")
    monkeypatch.setattr(Bus, "request_stream", lambda _, publication, __: asked.append(publication.nats_subject))
    assert reads(jetstream, stream) == expected
    assert asked == []


def test_a_stored_header_decides_nothing(jetstream: JetStream) -> None:
    stream = new_stream(jetstream)
    stream.store(b"1", headers={"Nats-Num-Pending": "many"})
    stream.store(b"2", headers={"Nats-Num-Pending": "9"})
    nats_subject = f"{stream.prefix}.a"
    last = jetstream.get_last(stream.name, nats_subject)
    assert last is not None
    assert (last.payload, last.pending) == (b"2", 0)
    stream.store(b"3", headers={"Nats-Num-Pending": "many"})
    last = jetstream.get_last(stream.name, nats_subject)
    assert last is not None
    assert (last.payload, last.pending) == (b"3", 0)
    assert jetstream.get_last_of_each(stream.name, [nats_subject])[nats_subject].payload == b"3"
    assert [each.payload for each in jetstream.page(stream.name, nats_subject, 1).msgs] == [b"1", b"2", b"3"]
