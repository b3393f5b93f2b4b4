"""Which permissions grant what a relay needs, as nats-server tells and reads them."""

from __future__ import annotations

from typing import Any

import pytest

from relay import contract
from relay.ops.doctor.granted import lacking
from relay.ops.permissions import Need

SERVED = Need("subscribe", contract.SEND_EMAIL, "requests arrive here", contract.QUEUE_GROUP)
RECORDS = Need("publish", "$KV.email-recipients.>", "a mail's record")
REPLIES = Need("publish", "_INBOX.>", "replies to callers", settings=("RELAY_REPLY_PREFIXES",))


@pytest.mark.parametrize(
    ("need", "permissions", "is_granted"),
    [
        (RECORDS, {}, True),
        (RECORDS, {"publish": {"allow": ["$KV.>"]}}, True),
        (RECORDS, {"publish": {"allow": ["$KV.email-recipients.*"]}}, False),
        (RECORDS, {"publish": {"deny": ["$KV.email-recipients.e-1"]}}, False),
        (RECORDS, {"publish": {"allow": [">"], "deny": ["$KV.email-requests.>"]}}, True),
        (REPLIES, {"publish": {"allow": ["else"]}}, False),
        (REPLIES, {"publish": {"deny": ["_INBOX.>"]}, "responses": {"max": 1}}, True),
        (SERVED, {"subscribe": {"allow": [f"{contract.SEND_EMAIL} {contract.QUEUE_GROUP}"]}}, True),
        (SERVED, {"subscribe": {"allow": [f"{contract.SEND_EMAIL} lfx.>"]}}, True),
        (SERVED, {"subscribe": {"allow": [f"{contract.SEND_EMAIL} other"]}}, False),
        (SERVED, {"subscribe": {"deny": [contract.SEND_EMAIL]}}, False),
        (SERVED, {"subscribe": {"deny": [f"{contract.SEND_EMAIL} {contract.QUEUE_GROUP}"]}}, False),
        (SERVED, {"subscribe": {"deny": [f"{contract.SEND_EMAIL} other"]}}, True),
    ],
)
def test_what_is_granted(need: Need, permissions: dict[str, Any], is_granted: bool) -> None:
    assert lacking(permissions, [need]) == ([] if is_granted else [need])
