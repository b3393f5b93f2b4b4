"""What composing a mail of 4 KB costs; prints its CPU in µs, for ``ascii`` and for ``quoted_printable``."""

from __future__ import annotations

import json
import time
import timeit

from load import request_of

from relay.submission.compose import compose, date_header
from relay.submission.policy import Policy, judge
from relay.submission.request import decode_send_request

SIZE_BYTES = 4096
TIMES = 2_000
REPEATS = 7
BODIES = {"ascii": "ascii", "quoted_printable": "utf8"}


def cost_us(body: str) -> float:
    """The least of some repeats, since whatever disturbs only adds."""
    policy = Policy(
        email_enabled=True,
        default_from="noreply@example.com",
        default_from_display_name="Our newsletter",
        allowed_from_domains=(),
        allowed_reply_to_domains=(),
        allowed_recipient_domains=(),
    )
    request = decode_send_request(request_of(SIZE_BYTES, body))
    sender = judge(request, policy)
    if sender is None:
        raise SystemExit("the request of the benchmark is not to be sent")

    def once() -> bytes:
        return compose(
            request=request,
            sender=sender,
            message_id_header="<0123456789abcdef0123456789abcdef@example.com>",
            date_header=date_header(1_763_800_000.0),
            tracking_id="bench/0123456789",
            email_id="0123456789",
            configuration_set="bench",
        )

    return min(timeit.repeat(once, timer=time.process_time, number=TIMES, repeat=REPEATS)) / TIMES * 1e6


if __name__ == "__main__":
    print(json.dumps({name: cost_us(body) for name, body in BODIES.items()}))
