"""moto's server: SQS and SNS over HTTP in a process of its own, for tests that want Amazon's behaviour."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from tests.support.nats_server import free_port, wait_for_port

IS_THERE = all(importlib.util.find_spec(name) for name in ("moto", "flask", "flask_cors"))
REGION = "us-east-1"


def aws_environment(endpoint_url: str) -> dict[str, str]:
    """What makes boto3 talk to a server of ours, with credentials that open nothing, and ask nobody else for any."""
    return {
        "AWS_ENDPOINT_URL": endpoint_url,
        "AWS_REGION": REGION,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "NO_PROXY": "127.0.0.1",
    }


class MotoServer:
    """One moto server. It keeps everything in memory: ``stop`` loses it."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        with (directory / "moto.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
                stdout=log,
                stderr=log,
            )
        wait_for_port(self.port, 30)

    def client(self, service: str) -> Any:
        """A boto3 client of ``sqs`` or ``sns``, for the test's own side."""
        return boto3.session.Session().client(
            service,
            endpoint_url=self.url,
            region_name=REGION,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            config=Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 2}),
        )

    def new_queue(self, name: str, **attributes: str) -> str:
        """Makes a queue; its URL."""
        return str(self.client("sqs").create_queue(QueueName=name, Attributes=attributes)["QueueUrl"])

    def new_topic(self, name: str, queue_url: str, *, is_raw: bool) -> str:
        """Makes a topic to which the queue is subscribed; its ARN."""
        sqs, sns = self.client("sqs"), self.client("sns")
        arn = sqs.get_queue_attributes(QueueUrl=queue_url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        topic = str(sns.create_topic(Name=name)["TopicArn"])
        sns.subscribe(
            TopicArn=topic,
            Protocol="sqs",
            Endpoint=arn,
            Attributes={"RawMessageDelivery": "true" if is_raw else "false"},
        )
        return topic

    def publish(self, topic: str, messages: list[str]) -> None:
        """Publishes each to the topic, as SES does."""
        sns = self.client("sns")
        for message in messages:
            sns.publish(TopicArn=topic, Message=message)

    def left(self, queue_url: str) -> tuple[int, int]:
        """How many messages the queue has: visible, and in somebody's hands."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        told = self.client("sqs").get_queue_attributes(QueueUrl=queue_url, AttributeNames=names)["Attributes"]
        return int(told[names[0]]), int(told[names[1]])

    def stop(self) -> None:
        """Ends the server and waits for it."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
