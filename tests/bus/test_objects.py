"""Objects written with nats-py's own object store, read by ours from a real nats-server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import random
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import gevent
import nats
import pytest
from nats.js.api import ObjectMeta, ObjectMetaOptions
from nats.js.object_store import ObjectStore

from relay.bus.client import Bus, Publication
from relay.bus.jetstream import JetStream, Stored
from relay.bus.objects import MAX_NAME_BYTES, ObjectUnusable, read_object
from relay.errors import BusUnavailable
from tests.bus.freezing import frozen
from tests.conftest import require
from tests.support.nats_proxy import Action, NatsProxy
from tests.support.nats_server import NatsServer

MEGABYTE = 1024 * 1024
ROOT = Path(__file__).parents[2]


def in_nats_py(server: NatsServer, bucket: str, work: Callable[[ObjectStore], Awaitable[Any]]) -> None:
    """Does something with a bucket of nats-py's, made when it is missing; in a thread, for its own event loop."""
    failures: list[BaseException] = []

    async def main() -> None:
        nc = await nats.connect(server.url)
        try:
            js = nc.jetstream()
            try:
                store = await js.object_store(bucket)
            except nats.js.errors.NotFoundError:
                store = await js.create_object_store(bucket)
            await work(store)
        finally:
            await nc.close()

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:  # noqa: BLE001 told in the test's own thread
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not failures, failures


def put(server: NatsServer, bucket: str, name: str, content: bytes, chunk_bytes: int = 128 * 1024) -> None:
    """As a caller does."""
    meta = ObjectMeta(name=name, options=ObjectMetaOptions(max_chunk_size=chunk_bytes))
    in_nats_py(server, bucket, lambda store: store.put(name, content, meta))


@pytest.fixture
def bucket() -> str:
    """A name that nobody has used."""
    return uuid.uuid4().hex


def read(jetstream: JetStream, bucket: str, name: str, *, max_bytes: int = MEGABYTE, seconds: float = 10.0) -> bytes:
    """Within so much and so long."""
    return read_object(jetstream, bucket, name, max_bytes=max_bytes, deadline=time.monotonic() + seconds)


def describe(jetstream: JetStream, bucket: str, name: str, **changed: object) -> None:
    """Writes the description of an object of our own, with some of it changed, and one chunk ``hello``."""
    described: dict[str, object] = {
        "name": name,
        "bucket": bucket,
        "nuid": "nuid",
        "size": 5,
        "chunks": 1,
        "digest": "SHA-256=" + base64.urlsafe_b64encode(hashlib.sha256(b"hello").digest()).decode(),
    }
    described |= changed
    meta = f"$O.{bucket}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"
    publications = [
        Publication(f"$O.{bucket}.C.nuid", b"hello"),
        Publication(meta, json.dumps(described).encode(), {"Nats-Rollup": "sub"}),
    ]
    assert all(isinstance(each, Stored) for each in jetstream.store(publications, 5))


def new_store(jetstream: JetStream, bucket: str, **options: object) -> None:
    """The stream of an object store."""
    config = {
        "name": f"OBJ_{bucket}",
        "subjects": [f"$O.{bucket}.C.>", f"$O.{bucket}.M.>"],
        "allow_rollup_hdrs": True,
        "allow_direct": True,
        "storage": "memory",
        **options,
    }
    jetstream.api(f"STREAM.CREATE.OBJ_{bucket}", config)


# -- what is there --------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 2 * MEGABYTE + 3])
def test_an_object_is_read_as_it_was_written(
    nats_server: NatsServer, jetstream: JetStream, bucket: str, size: int
) -> None:
    content = random.Random(size).randbytes(size)
    put(nats_server, bucket, "report.pdf", content, 1000 if size < 5000 else 128 * 1024)
    assert read(jetstream, bucket, "report.pdf", max_bytes=size) == content


def test_many_chunks_are_read_in_order(nats_server: NatsServer, jetstream: JetStream, bucket: str) -> None:
    content = b"".join(number.to_bytes(4, "big") for number in range(700))
    put(nats_server, bucket, "many", content, chunk_bytes=4)
    assert read(jetstream, bucket, "many") == content


@pytest.mark.parametrize("name", ["a", "a b/ç.html", "*", "x.>", "n" * MAX_NAME_BYTES, "\N{SNOWMAN}" * 300])
def test_a_name_may_be_anything(nats_server: NatsServer, jetstream: JetStream, bucket: str, name: str) -> None:
    put(nats_server, bucket, name, b"content")
    assert read(jetstream, bucket, name) == b"content"


def test_objects_of_one_bucket_are_kept_apart(nats_server: NatsServer, jetstream: JetStream, bucket: str) -> None:
    for name in ("one", "two", "one"):
        put(nats_server, bucket, name, name.encode() * 1000, chunk_bytes=100)
    assert read(jetstream, bucket, "one") == b"one" * 1000
    assert read(jetstream, bucket, "two") == b"two" * 1000


def test_a_bucket_without_direct_gets(jetstream: JetStream, bucket: str) -> None:
    new_store(jetstream, bucket, allow_direct=False)
    describe(jetstream, bucket, "hello")
    assert read(jetstream, bucket, "hello") == b"hello"


@pytest.mark.parametrize("kind", ["SHA-256=", "sha-256="])
@pytest.mark.parametrize("has_padding", [True, False])
def test_digests_as_several_clients_write_them(jetstream: JetStream, bucket: str, kind: str, has_padding: bool) -> None:
    new_store(jetstream, bucket)
    encoded = base64.urlsafe_b64encode(hashlib.sha256(b"hello").digest()).decode()
    describe(jetstream, bucket, "hello", digest=kind + (encoded if has_padding else encoded.rstrip("=")))
    assert read(jetstream, bucket, "hello") == b"hello"


# -- what is not ----------------------------------------------------------------------------------
def test_what_is_not_there(nats_server: NatsServer, jetstream: JetStream, bucket: str) -> None:
    with pytest.raises(ObjectUnusable, match="no such object store bucket"):
        read(jetstream, bucket, "name")
    put(nats_server, bucket, "name", b"content")
    with pytest.raises(ObjectUnusable, match="no such object"):
        read(jetstream, bucket, "another")
    in_nats_py(nats_server, bucket, lambda store: store.delete("name"))
    with pytest.raises(ObjectUnusable, match="deleted"):
        read(jetstream, bucket, "name")


@pytest.mark.parametrize("bucket", ["", "a.b", "*", ">", "a b", "a" * 201, "ä", "a\n"])
def test_a_bucket_that_cannot_be(jetstream: JetStream, bucket: str) -> None:
    with pytest.raises(ObjectUnusable, match="bucket"):
        read(jetstream, bucket, "name")


@pytest.mark.parametrize("name", ["", "n" * (MAX_NAME_BYTES + 1)])
def test_a_name_that_cannot_be(jetstream: JetStream, name: str) -> None:
    with pytest.raises(ObjectUnusable, match="name"):
        read(jetstream, "bucket", name)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"options": {"link": {"bucket": "secrets", "name": "all"}}}, "link"),
        ({"options": {"link": {"bucket": "secrets"}}}, "link"),
        ({"deleted": True}, "deleted"),
        ({"nuid": ">"}, "nuid"),
        ({"nuid": "*"}, "nuid"),
        ({"nuid": "a.b"}, "nuid"),
        ({"nuid": ""}, "nuid"),
        ({"nuid": None}, "nuid"),
        ({"size": -1}, "size"),
        ({"size": "5"}, "size"),
        ({"size": 5.0}, "size"),
        ({"size": True}, "size"),
        ({"chunks": 6}, "size"),
        ({"chunks": None}, "size"),
        ({"size": 10**9, "chunks": 10**9}, "size"),
        ({"digest": ""}, "digest"),
        ({"digest": None}, "digest"),
        ({"digest": "MD5=abc"}, "digest"),
        ({"digest": "SHA-256=abc"}, "digest"),
        ({"digest": "SHA-256=" + "!" * 43}, "digest"),
        ({"digest": "SHA-256=" + "A" * 43}, "digest"),
        ({"size": 6}, "not as many"),
        ({"size": 4}, "not as many"),
        ({"size": 0, "chunks": 0}, "digest"),
        ({"chunks": 2}, None),
        ({"nuid": "nothing"}, "not as many"),
    ],
)
def test_a_description_that_is_wrong(
    jetstream: JetStream, bucket: str, changed: dict[str, object], why: str | None
) -> None:
    new_store(jetstream, bucket)
    describe(jetstream, bucket, "hello", **changed)
    if why is None:  # a chunk that is not there and has no bytes is missed by nobody
        assert read(jetstream, bucket, "hello") == b"hello"
        return
    with pytest.raises(ObjectUnusable, match=why):
        read(jetstream, bucket, "hello")


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"null"])
def test_a_description_that_is_none(jetstream: JetStream, bucket: str, payload: bytes) -> None:
    new_store(jetstream, bucket)
    jetstream.store([Publication(f"$O.{bucket}.M.{base64.urlsafe_b64encode(b'name').decode()}", payload)], 5)
    with pytest.raises(ObjectUnusable, match="cannot be read"):
        read(jetstream, bucket, "name")


def test_nothing_of_an_object_that_is_too_large_is_read(
    nats_server: NatsServer, jetstream: JetStream, bucket: str
) -> None:
    put(nats_server, bucket, "large", bytes(1001))
    jetstream.api(f"STREAM.PURGE.OBJ_{bucket}", {"filter": f"$O.{bucket}.C.>"})
    with pytest.raises(ObjectUnusable, match="has 1001 bytes, and may have 1000"):
        read(jetstream, bucket, "large", max_bytes=1000)


def test_chunks_that_are_longer_than_the_object_says_are_not_all_read(jetstream: JetStream, bucket: str) -> None:
    new_store(jetstream, bucket)
    jetstream.store([Publication(f"$O.{bucket}.C.nuid", bytes(MEGABYTE // 2))] * 40, 10)
    describe(jetstream, bucket, "hello", size=100, chunks=41)
    with pytest.raises(ObjectUnusable, match="not as many"):
        read(jetstream, bucket, "hello")


def test_an_object_that_is_replaced_meanwhile_may_be_asked_for_again(
    nats_server: NatsServer, new_bus: Callable[[str], Bus], bucket: str
) -> None:
    """Between its description and its chunks, which are then no longer there."""
    put(nats_server, bucket, "name", b"old" * 1000, chunk_bytes=100)
    proxy = NatsProxy(nats_server.port, lambda nats_subject: nats_subject == f"$JS.API.DIRECT.GET.OBJ_{bucket}")
    try:
        jetstream = JetStream(new_bus(proxy.url))
        proxy.begin(1, Action.HOLD, lambda: put(nats_server, bucket, "name", b"new" * 1000, chunk_bytes=100))
        with pytest.raises(BusUnavailable, match="replaced"):
            read(jetstream, bucket, "name")
        assert read(jetstream, bucket, "name") == b"new" * 1000
    finally:
        proxy.stop()


def test_reading_ends_at_its_deadline(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus], bucket: str
) -> None:
    server = new_nats_server()
    jetstream = JetStream(new_bus(server.url))
    new_store(jetstream, bucket)
    describe(jetstream, bucket, "hello")
    with pytest.raises(BusUnavailable, match="no time left"):
        read(jetstream, bucket, "hello", seconds=0)
    with frozen(server):
        begun = time.monotonic()
        with pytest.raises(BusUnavailable):
            read(jetstream, bucket, "hello", seconds=0.3)
        assert time.monotonic() - begun < 0.8
    assert read(jetstream, bucket, "hello") == b"hello"


def test_others_go_on_while_an_object_is_read(nats_server: NatsServer, jetstream: JetStream, bucket: str) -> None:
    put(nats_server, bucket, "large", bytes(8 * MEGABYTE))
    reading = [gevent.spawn(read, jetstream, bucket, "large", max_bytes=8 * MEGABYTE) for _ in range(3)]
    gevent.joinall(reading, raise_error=True, timeout=30)
    assert [len(each.value) for each in reading] == [8 * MEGABYTE] * 3


def test_an_object_takes_its_size_in_memory_and_little_more(nats_server: NatsServer, bucket: str) -> None:
    """In a process of its own, which has read a small one before."""
    require(Path("/proc/self/clear_refs").exists(), "the peak of a process's memory, as Linux tells it,")
    size = 25 * MEGABYTE
    put(nats_server, bucket, "small", bytes(1000))
    put(nats_server, bucket, "large", random.Random(1).randbytes(size))
    program = f"""
        from gevent import monkey
        monkey.patch_all()
        import re, time
        from pathlib import Path
        from relay.bus.client import Bus
        from relay.bus.jetstream import JetStream
        from relay.bus.objects import read_object
        bus = Bus({nats_server.url!r}, "reader")
        bus.start()
        assert bus.wait_connected(5)
        def read(name):
            return read_object(JetStream(bus), {bucket!r}, name, max_bytes={size}, deadline=time.monotonic() + 30)
        read("small")
        def peak_bytes():
            return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now on
        before = peak_bytes()
        content = read("large")
        print(len(content), peak_bytes() - before)
        bus.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    length, grown = map(int, done.stdout.split())
    assert length == size
    assert size < grown < 1.7 * size, f"{grown / size:.2f} times its size"
