"""boto3's bare loop: receives, deletes, and does nothing with what it got.

    python scripts/bench/engagement_bare.py QUEUE_URL POLLERS

What any consumer of SQS in Python pays: the same client, the same calls and as many greenlets as the engagement worker
has pollers. Runs until it is ended.
"""

# ruff: noqa: E402 - line one of a process: gevent must patch before anything else is imported.
from gevent import monkey

monkey.patch_all()

import sys
from typing import Any

import boto3
import gevent
from botocore.config import Config

READ_SECONDS = 35


def poll(client: Any, queue_url: str) -> None:
    """Receives and deletes, for ever."""
    while True:
        answer = client.receive_message(
            QueueUrl=queue_url,
            MaxNumberOfMessages=10,
            WaitTimeSeconds=20,
            VisibilityTimeout=300,
            MessageSystemAttributeNames=["ApproximateReceiveCount", "SentTimestamp"],
        )
        if received := answer.get("Messages"):
            entries = [
                {"Id": str(place), "ReceiptHandle": each["ReceiptHandle"]} for place, each in enumerate(received)
            ]
            client.delete_message_batch(QueueUrl=queue_url, Entries=entries)


def main() -> None:
    """Polls until it is ended, or one of the pollers fails."""
    queue_url, pollers = sys.argv[1], int(sys.argv[2])
    client = boto3.session.Session().client(
        "sqs",
        region_name="us-east-1",
        config=Config(read_timeout=READ_SECONDS, retries={"mode": "standard"}, max_pool_connections=pollers + 2),
    )
    print("ready", flush=True)
    gevent.joinall([gevent.spawn(poll, client, queue_url) for _ in range(pollers)], raise_error=True)


if __name__ == "__main__":
    main()
