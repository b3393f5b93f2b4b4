"""lfx's group index: read as it is, whatever it holds, and whether or not it is there."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable

import pytest

from relay import contract
from relay.bus.client import Bus, Publication
from relay.bus.jetstream import JetStream, Stored
from relay.tracking.legacy import REMEMBERED_ARRAYS, GroupIndex, parse_index
from tests.support.groups import put_array
from tests.support.nats_server import NatsServer


@pytest.mark.parametrize(
    ("value", "email_ids"),
    [
        (b"[]", []),
        (b"null", []),
        (b'["a"]', ["a"]),
        (b'["b","a","b"]', ["b", "a"]),
        (b'["a",1,null,{"b":2},["c"],"d"]', ["a", "d"]),
        (b"", None),
        (b"[", None),
        (b'{"a":1}', None),
        (b'"a"', None),
        (b"\xff", None),
    ],
)
def test_what_an_array_holds(value: bytes, email_ids: list[str] | None) -> None:
    assert parse_index(value) == email_ids


@pytest.mark.parametrize("group_id", ["plain", "a.b", "a/b=c_d-e", "x" * 3900, "x" * 10_000])
@pytest.mark.usefixtures("index_bucket")
def test_an_array_is_found_by_the_group_id_as_given(jetstream: JetStream, group_id: str) -> None:
    email_ids = [str(uuid.uuid4()) for _ in range(3)]
    if len(group_id) < 3900:
        put_array(jetstream, group_id, json.dumps(email_ids).encode())
    found = GroupIndex(jetstream).email_ids(group_id)
    assert found == (email_ids if len(group_id) < 3900 else None), "a key too long for a control line does no harm"


@pytest.mark.parametrize(
    "group_id", ["*", ">", "a.*", "a.>", ".a", "a.", "a..b", "a b", "", "ü", "a\n", "no-such-group"]
)
@pytest.mark.usefixtures("index_bucket")
def test_no_other_group_id_reaches_an_array(jetstream: JetStream, group_id: str) -> None:
    put_array(jetstream, "a.b", b'["x"]')
    assert GroupIndex(jetstream).email_ids(group_id) is None


@pytest.mark.usefixtures("index_bucket")
def test_a_deleted_array_is_none_and_no_broken_one(jetstream: JetStream, caplog: pytest.LogCaptureFixture) -> None:
    put_array(jetstream, "deleted", b'["x"]')
    nats_subject = f"$KV.{contract.GROUP_INDEX_BUCKET}.deleted"
    (answer,) = jetstream.store([Publication(nats_subject, b"", {"KV-Operation": "DEL"})], 2)
    assert isinstance(answer, Stored)
    assert GroupIndex(jetstream).email_ids("deleted") is None
    assert not caplog.messages
    put_array(jetstream, "deleted", b"{")
    index = GroupIndex(jetstream)
    assert index.email_ids("deleted") is None
    assert "broken" in caplog.text
    caplog.clear()
    assert index.email_ids("deleted") is None
    assert not caplog.text, "it was said once"


@pytest.mark.usefixtures("index_bucket")
def test_the_largest_array_that_lfx_can_write_is_read(jetstream: JetStream) -> None:
    email_ids = [str(uuid.uuid4()) for _ in range(26_800)]
    put_array(jetstream, "full", json.dumps(email_ids, separators=(",", ":")).encode())
    assert GroupIndex(jetstream).email_ids("full") == email_ids


@pytest.mark.usefixtures("index_bucket")
def test_a_group_id_that_fits_into_no_subject_has_no_array(jetstream: JetStream) -> None:
    assert GroupIndex(jetstream).email_ids("x" * 1_048_500) is None, "longer than max_payload with the subject"


@pytest.mark.usefixtures("index_bucket")
def test_an_array_is_parsed_once_as_long_as_it_stays_what_it_is(jetstream: JetStream) -> None:
    index = GroupIndex(jetstream)
    put_array(jetstream, "parsed", b'["a"]')
    first = index.email_ids("parsed")
    assert index.email_ids("parsed") is first
    put_array(jetstream, "parsed", b'["a","b"]')
    assert index.email_ids("parsed") == ["a", "b"]
    for number in range(REMEMBERED_ARRAYS):
        put_array(jetstream, f"parsed-{number}", b'["c"]')
        assert index.email_ids(f"parsed-{number}") == ["c"]
    put_array(jetstream, "parsed", b"{")
    assert index.email_ids("parsed") is None


def test_the_bucket_may_be_missing(new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]) -> None:
    assert GroupIndex(JetStream(new_bus(new_nats_server().url))).email_ids("group") is None


def test_without_permission_there_is_no_array_and_it_is_said_once(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus], caplog: pytest.LogCaptureFixture
) -> None:
    denied = f"$JS.API.STREAM.MSG.GET.KV_{contract.GROUP_INDEX_BUCKET}"
    users = f'{{user: "w", password: "w", permissions: {{publish: {{deny: "{denied}"}}}}}}'
    url = new_nats_server(config=f"authorization {{ users: [{users}] }}").url
    index = GroupIndex(JetStream(new_bus(url.replace("//", "//w:w@"))))
    assert [index.email_ids("group"), index.email_ids("other")] == [None, None]
    told = [each for each in caplog.records if each.name == "relay.tracking"]
    assert [denied in each.getMessage() for each in told] == [True]
