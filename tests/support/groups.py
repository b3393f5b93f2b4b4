"""Groups of mails as they come to be: facts in the log, records in the bucket, arrays of lfx's."""

from __future__ import annotations

import contextlib
import uuid

from relay import contract
from relay.bus.client import Publication
from relay.bus.jetstream import JetStream, Stored
from relay.bus.kv import Bucket
from relay.errors import BusRefused
from relay.tracking.facts import Fact
from relay.tracking.groups import group_token
from relay.tracking.log import fact_publication
from relay.tracking.record import new_record

SENT_AT = "2025-01-15T10:30:00.000Z"
AT_ONCE = 500


def store(jetstream: JetStream, publications: list[Publication]) -> None:
    """Stores all, some at a time."""
    for start in range(0, len(publications), AT_ONCE):
        answers = jetstream.store(publications[start : start + AT_ONCE], 20)
        assert all(isinstance(answer, Stored) for answer in answers), answers


def record_of(email_id: str, group_id: str, subject_header: str = "Hello", sent_at: str = SENT_AT) -> bytes:
    """A new record, as sending writes it."""
    return new_record(
        email_id=email_id, group_id=group_id, to="user@example.com", subject_header=subject_header, sent_at=sent_at
    )


def send_mails(jetstream: JetStream, group_id: str, count: int, subject_header: str = "Hello") -> list[str]:
    """Tracks mails of a group as sending does; their ids, in order."""
    email_ids = [str(uuid.uuid4()) for _ in range(count)]
    records = Bucket(jetstream, contract.RECIPIENTS_BUCKET)
    publications = []
    for email_id in email_ids:
        publications.append(fact_publication(group_token(group_id), Fact.SENT, email_id, SENT_AT))
        publications.append(records.creation(email_id, record_of(email_id, group_id, subject_header)))
    store(jetstream, publications)
    return email_ids


def put_records(jetstream: JetStream, values: dict[str, bytes]) -> None:
    """Puts values into the bucket of records, whatever they are."""
    store(jetstream, [Publication(f"$KV.{contract.RECIPIENTS_BUCKET}.{key}", value) for key, value in values.items()])


def make_index_bucket(jetstream: JetStream) -> None:
    """lfx's bucket, as its chart declares it: no direct get."""
    name = f"KV_{contract.GROUP_INDEX_BUCKET}"
    config = {"name": name, "subjects": [f"$KV.{contract.GROUP_INDEX_BUCKET}.>"], "max_msgs_per_subject": 1}
    config |= {"discard": "new", "allow_rollup_hdrs": True, "max_msg_size": 1024 * 1024, "storage": "file"}
    with contextlib.suppress(BusRefused):  # it exists
        jetstream.api(f"STREAM.CREATE.{name}", config)


def put_array(jetstream: JetStream, group_id: str, value: bytes) -> None:
    """Writes a group's array as lfx would."""
    store(jetstream, [Publication(f"$KV.{contract.GROUP_INDEX_BUCKET}.{group_id}", value)])
