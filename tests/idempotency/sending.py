"""A request as the tests send it, and what its smarthost gets."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable

import orjson

from relay.contract import REQUESTS_BUCKET
from relay.idempotency.claim import Progress, Refused, Settled, Value, read_value
from relay.idempotency.claims import Claim, Claims

FINGERPRINT = "fingerprint"
RELAYED = Progress("", outcome="relayed", reply_code=250, remote_id="remote")
FAILED = Progress("", outcome="failed", reply_code=550)
IN_DOUBT = Progress("", outcome="in_doubt", detail="the smarthost did not answer the final dot")
DEFERRED = Progress("", outcome="deferred", reply_code=451)
REPLY = orjson.dumps({"email_id": "id", "group_id": "group"})

Answer = Claim | Settled | Refused


def new_key() -> str:
    """Of a request that nobody has made yet."""
    return uuid.uuid4().hex


def ask(
    claims: Claims,
    key: str,
    *,
    recipients: int = 1,
    seconds: float = 10.0,
    fingerprint: str = FINGERPRINT,
    size_bytes: int = 0,
    on_wait: Callable[[], None] | None = None,
) -> Answer:
    """Claims it, for some recipients and for so long."""
    planned = [Progress(f"{uuid.uuid4()}") for _ in range(recipients)]
    deadline = time.monotonic() + seconds
    return claims.claim(key, fingerprint, "group", planned, deadline, size_bytes=size_bytes, on_wait=on_wait)


def claimed(claims: Claims, key: str, **options: object) -> Claim:
    """The claim, which must be had."""
    answer = ask(claims, key, **options)  # type: ignore[arg-type]
    assert isinstance(answer, Claim), answer
    return answer


def stored(claims: Claims, key: str) -> Value:
    """What the bucket holds."""
    entry = claims.ledger.peek(key)
    assert entry is not None
    value = read_value(entry.value)
    assert value is not None
    return value


def last_sequence(claims: Claims) -> int:
    """Of the bucket: grows by one with each write."""
    return claims.ledger._jetstream.last_sequence(f"KV_{REQUESTS_BUCKET}")


class Smarthost:
    """Counts the final dots."""

    def __init__(self) -> None:
        self.dots: Counter[int] = Counter()

    def send(self, claims: Claims, key: str, *, recipients: int = 1, seconds: float = 10.0) -> Answer:
        """The whole way of a request with individual mails; the claim, if it was had, is settled."""
        answer = ask(claims, key, recipients=recipients, seconds=seconds)
        if not isinstance(answer, Claim):
            return answer
        with answer as claim:
            results: dict[int, Progress] = {}
            for index in claim.unsent:
                if claim.commit([index]):
                    self.dots[index] += 1
                    results[index] = RELAYED
                    claim.note(index, RELAYED)
                else:
                    results[index] = DEFERRED
            claim.settle(results, REPLY)
        return claim
