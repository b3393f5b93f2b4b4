"""Streams and buckets of a test's own."""

from __future__ import annotations

import uuid
from typing import NamedTuple

from relay.bus.client import Publication
from relay.bus.jetstream import JetStream, Stored
from relay.bus.kv import Bucket


class Stream(NamedTuple):
    """A stream that takes ``<prefix>.>``."""

    jetstream: JetStream
    name: str
    prefix: str

    def store(self, *payloads: bytes, last_token: str = "a", headers: dict[str, str] | None = None) -> list[int]:
        """Stores the payloads under ``<prefix>.<last_token>``; their sequences."""
        nats_subject = f"{self.prefix}.{last_token}"
        answers = self.jetstream.store([Publication(nats_subject, payload, headers) for payload in payloads], 10)
        assert all(isinstance(answer, Stored) for answer in answers), answers
        return [answer.sequence for answer in answers if isinstance(answer, Stored)]

    def consumers(self) -> list[str]:
        """The consumers that the stream has."""
        return list(self.jetstream.api(f"CONSUMER.NAMES.{self.name}").get("consumers") or [])


def new_stream(jetstream: JetStream, **options: object) -> Stream:
    """Makes a stream; direct gets allowed unless said otherwise."""
    name = uuid.uuid4().hex
    config = {"name": name, "subjects": [f"{name}.>"], "storage": "memory", "allow_direct": True, **options}
    jetstream.api(f"STREAM.CREATE.{name}", config)
    return Stream(jetstream, name, name)


def new_bucket(jetstream: JetStream, **options: object) -> Bucket:
    """Makes a bucket, with the options that KV clients give one."""
    name = uuid.uuid4().hex
    config = {
        "name": f"KV_{name}",
        "subjects": [f"$KV.{name}.>"],
        "max_msgs_per_subject": 1,
        "allow_direct": True,
        "allow_rollup_hdrs": True,
        "deny_delete": True,
        "discard": "new",
        "storage": "memory",
        **options,
    }
    jetstream.api(f"STREAM.CREATE.KV_{name}", config)
    return Bucket(jetstream, name)
