"""A process that tracks mails as a send worker does, without sending any: the relay's own ``Tracker``.

For each line ``{"group_ids": [...], "mails": N}`` on standard input it notes ``N`` mails in each of the groups, one
group after the other, ``AT_ONCE`` mails at a time, and prints ``{"tracked": ..., "lost": ...}``. Ends with its input.
"""

# ruff: noqa: E402 - line one of a process: gevent must patch before anything else is imported.
from gevent import monkey

monkey.patch_all()

import json
import sys
import time
import uuid

import gevent.pool

from relay.bus.client import Bus
from relay.bus.jetstream import JetStream
from relay.tracking.storage import StorageConfig
from relay.tracking.tracker import HandedOver, Tracker

AT_ONCE = 50
ACK_SECONDS = 10.0
"""More than by default: what is measured here is what a mail costs, not what happens when the machine is busy."""


def note(tracker: Tracker, group_id: str) -> None:
    """One relayed mail, with the fields that Amazon SES gives it."""
    tracker.note(
        HandedOver(
            email_id=str(uuid.uuid4()),
            group_id=group_id,
            to="someone@example.com",
            subject_header="Our newsletter of November is here",
            at=time.time(),
            remote_id="0100018c7f3a4b5c-0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9-000000",
        )
    )


def main() -> None:
    """Serves standard input."""
    bus = Bus(sys.argv[1], "bench writer")
    bus.start()
    if not bus.wait_connected(10):
        raise SystemExit(f"NATS: {bus.last_error}")
    tracker = Tracker(JetStream(bus), StorageConfig(), ACK_SECONDS, on_change=lambda _: None)
    tracker.start()
    workers = gevent.pool.Pool(AT_ONCE)
    print(json.dumps({"off_reason": tracker.off_reason}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        tracked, lost = tracker.tracked, tracker.lost
        for group_id in asked["group_ids"]:
            for _ in range(asked["mails"]):
                workers.spawn(note, tracker, group_id)
            workers.join()
        print(json.dumps({"tracked": tracker.tracked - tracked, "lost": tracker.lost - lost}), flush=True)
    tracker.stop()
    bus.close()


if __name__ == "__main__":
    main()
