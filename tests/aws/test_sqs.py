"""The queue, against moto's server over HTTP, and against a stand-in where Amazon has to fail."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from relay.aws import sqs
from relay.aws.sqs import PERMISSIONS, Backlog, Queue, QueueConfig, SqsMessage, region_of
from relay.errors import ConfigError, QueueUnavailable
from tests.support.moto_server import REGION, MotoServer, aws_environment
from tests.support.nats_server import free_port
from tests.support.sqs_double import HANG_UP, SqsDouble

EVENT = json.dumps({"eventType": "Delivery", "mail": {"messageId": "0100", "note": "Grüße"}})


def queue_at(queue_url: str, wait_seconds: int = 0) -> Queue:
    """A queue that is not waited for."""
    return Queue(QueueConfig(queue_url, REGION, wait_seconds=wait_seconds))


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore tries once; of its own retries nothing is tested here."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(sqs, "DELETE_PAUSE_SECONDS", 0.001)


@pytest.fixture
def at_moto(moto: MotoServer, monkeypatch: pytest.MonkeyPatch) -> MotoServer:
    """moto's server, to which boto3 turns in this test because AWS_ENDPOINT_URL says so."""
    for name, value in aws_environment(moto.url).items():
        monkeypatch.setenv(name, value)
    return moto


# -- as Amazon does it ---------------------------------------------------------------------
@pytest.mark.parametrize("is_raw", [False, True])
def test_what_is_published_to_a_topic_is_received_and_deleted(at_moto: MotoServer, is_raw: bool) -> None:
    # Given a queue that is subscribed to a topic
    queue_url = at_moto.new_queue(f"events-{is_raw}", VisibilityTimeout="30")
    topic = at_moto.new_topic(f"topic-{is_raw}", queue_url, is_raw=is_raw)
    at_moto.publish(topic, [EVENT] * 12)
    queue = queue_at(queue_url)
    assert queue.look().visibility_seconds == queue.visibility_seconds == 30
    # When everything is received
    before = time.time()
    first, second = queue.receive(), queue.receive()
    # Then each message came once, with what it takes to judge it
    assert (len(first), len(second)) == (10, 2)
    assert len({each.sqs_message_id for each in first + second}) == 12
    assert {each.received_count for each in first} == {1}
    assert all(before - 60 < each.sent_at < before + 60 for each in first)
    body = json.loads(first[0].body)
    assert (body if is_raw else json.loads(body["Message"])) == json.loads(EVENT)
    assert queue.backlog() == Backlog(waiting=0, in_flight=12, delayed=0)
    # And what is deleted is gone
    assert queue.delete(first + second) == []
    assert at_moto.left(queue_url) == (0, 0)


def test_what_is_given_back_comes_again_and_what_is_extended_does_not(at_moto: MotoServer) -> None:
    queue_url = at_moto.new_queue("visibility", VisibilityTimeout="30")
    at_moto.client("sqs").send_message(QueueUrl=queue_url, MessageBody="a")
    queue = queue_at(queue_url)
    (once,) = queue.receive()
    queue.hide([once], 60)
    assert queue.receive() == []
    queue.hide([once], 0)
    (again,) = queue.receive()
    assert (again.sqs_message_id, again.received_count) == (once.sqs_message_id, 2)


def test_the_redrive_policy_is_read(at_moto: MotoServer) -> None:
    dead = at_moto.new_queue("dead")
    names = {"QueueUrl": dead, "AttributeNames": ["QueueArn"]}
    arn = at_moto.client("sqs").get_queue_attributes(**names)["Attributes"]["QueueArn"]
    policy = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 25})
    assert queue_at(at_moto.new_queue("redriven", RedrivePolicy=policy)).look().max_receives == 25
    assert queue_at(dead).look().max_receives == 0


def test_a_queue_that_does_not_exist(at_moto: MotoServer) -> None:
    with pytest.raises(ConfigError, match=f"nowhere does not exist in {REGION}; check SES_ENGAGEMENT_SQS_QUEUE_URL"):
        queue_at(f"{at_moto.url}/123456789012/nowhere").look()


def test_the_credentials_may_do_everything(at_moto: MotoServer) -> None:
    queue_url = at_moto.new_queue("allowed")
    at_moto.client("sqs").send_message(QueueUrl=queue_url, MessageBody="a")
    assert queue_at(queue_url).missing_permissions() == []
    assert at_moto.left(queue_url) == (1, 0), "whoever asks takes nothing"


# -- as Amazon fails -----------------------------------------------------------------------
def test_a_receive_asks_for_ten_and_says_how_long_they_stay_hidden(double: SqsDouble) -> None:
    double.visibility_seconds = 45
    queue = Queue(QueueConfig(double.queue_url, REGION))
    queue.look()
    double.add("a")
    queue.receive()
    (asked,) = double.calls_of("ReceiveMessage")
    assert (asked["MaxNumberOfMessages"], asked["WaitTimeSeconds"], asked["VisibilityTimeout"]) == (10, 20, 45)
    assert asked["MessageSystemAttributeNames"] == ["ApproximateReceiveCount", "SentTimestamp"]


def test_a_long_poll_ends_with_the_first_message(double: SqsDouble) -> None:
    queue = queue_at(double.queue_url, wait_seconds=20)
    adding = threading.Timer(0.2, double.add, ["early"])
    adding.start()
    begun = time.monotonic()
    assert [each.body for each in queue.receive()] == ["early"]
    adding.join()
    assert time.monotonic() - begun < 10


def test_an_empty_queue_is_no_failure(double: SqsDouble) -> None:
    assert queue_at(double.queue_url).receive() == []


def received(double: SqsDouble, queue: Queue, count: int) -> list[SqsMessage]:
    """So many messages, received by tens."""
    double.add(*(str(number) for number in range(count)))
    found: list[SqsMessage] = []
    while len(found) < count:
        found += queue.receive()
    return found


def test_entries_that_could_not_be_deleted_are_tried_again(double: SqsDouble) -> None:
    queue = queue_at(double.queue_url)
    messages = received(double, queue, 10)
    double.failing_deletes = 4
    assert queue.delete(messages) == []
    assert [len(each["Entries"]) for each in double.calls_of("DeleteMessageBatch")] == [10, 4]
    assert double.left == []


def test_entries_that_cannot_be_deleted_come_back_after_some_tries(double: SqsDouble) -> None:
    queue = queue_at(double.queue_url)
    messages = received(double, queue, 12)
    double.failing_deletes = 1000
    assert sorted(queue.delete(messages)) == sorted(messages)
    assert len(double.calls_of("DeleteMessageBatch")) == 2 * sqs.DELETE_TRIES
    double.failing_deletes = 0
    assert queue.delete(messages) == []


def test_what_is_our_own_fault_is_not_tried_again(double: SqsDouble) -> None:
    queue = queue_at(double.queue_url)
    messages = received(double, queue, 3)
    double.failing_deletes, double.is_failing_at_sender = 1, True
    assert queue.delete(messages) == messages[:1]
    assert len(double.calls_of("DeleteMessageBatch")) == 1


def test_a_receipt_handle_of_nobody_is_told_by_moto_too(at_moto: MotoServer) -> None:
    queue = queue_at(at_moto.new_queue("nobody"))
    message = SqsMessage("id", "none", "", 1, 0.0)
    assert queue.delete([message]) == [message]
    queue.hide([message], 30)


@pytest.mark.parametrize(
    ("status", "code"), [(500, "InternalError"), (503, "ServiceUnavailable"), (400, "AccessDenied"), (HANG_UP, "")]
)
def test_a_call_that_fails_altogether(double: SqsDouble, status: int, code: str) -> None:
    queue = queue_at(double.queue_url)
    messages = received(double, queue, 1)
    double.failures = [(action, status, code) for action in ("ReceiveMessage", "DeleteMessageBatch")]
    with pytest.raises(QueueUnavailable, match=f"SQS: ReceiveMessage: .*{code}"):
        queue.receive()
    with pytest.raises(QueueUnavailable, match="SQS: DeleteMessageBatch: "):
        queue.delete(messages)
    assert queue.delete(messages) == []


def test_hiding_never_raises(double: SqsDouble, caplog: pytest.LogCaptureFixture) -> None:
    queue = queue_at(double.queue_url)
    messages = received(double, queue, 11)
    double.failures = [("ChangeMessageVisibilityBatch", 500, "InternalError")]
    queue.hide(messages, 60)
    assert "InternalError" in caplog.text
    caplog.clear()
    queue.delete(messages)
    queue.hide(messages, 60)
    assert caplog.text == "", "messages that are gone are no failure"


def test_a_network_that_is_away() -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in aws_environment(f"http://127.0.0.1:{free_port()}").items():
            patch.setenv(name, value)
        queue = queue_at("https://sqs.us-east-1.amazonaws.com/123456789012/events")
        for call in (queue.look, queue.receive, queue.backlog, queue.missing_permissions):
            with pytest.raises(QueueUnavailable, match="Could not connect"):
                call()


@pytest.mark.parametrize("permission", PERMISSIONS)
def test_a_permission_that_is_missing_is_named(double: SqsDouble, permission: str) -> None:
    action = permission.removeprefix("sqs:")
    queue = queue_at(double.queue_url)
    double.denied = {action, f"{action}Batch"}
    assert queue.missing_permissions() == [permission]


def test_a_queue_that_may_not_be_used(double: SqsDouble) -> None:
    double.denied = {"GetQueueAttributes"}
    with pytest.raises(ConfigError, match=r"may not be used .*allow sqs:ReceiveMessage, sqs:DeleteMessage"):
        queue_at(double.queue_url).look()


@pytest.mark.parametrize("code", ["InvalidClientTokenId", "SignatureDoesNotMatch", "ExpiredToken"])
def test_credentials_that_amazon_refuses(double: SqsDouble, code: str) -> None:
    double.failures = [("GetQueueAttributes", 403, code)]
    with pytest.raises(ConfigError, match=f"Amazon refuses the AWS credentials .{code}.*; check them, and AWS_REGION"):
        queue_at(double.queue_url).look()


# -- before anything is asked ---------------------------------------------------------------
def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in aws_environment("http://127.0.0.1:1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigError, match="no AWS credentials were found; give this process a role"):
        queue_at("https://sqs.us-east-1.amazonaws.com/123456789012/events")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "half")
    with pytest.raises(ConfigError, match=r"the AWS credentials cannot be used: .*AWS_SECRET_ACCESS_KEY"):
        queue_at("https://sqs.us-east-1.amazonaws.com/123456789012/events")
    monkeypatch.setenv("AWS_PROFILE", "none")
    with pytest.raises(ConfigError, match=r"the AWS credentials cannot be used: .*none"):
        queue_at("https://sqs.us-east-1.amazonaws.com/123456789012/events")


@pytest.mark.usefixtures("double")
def test_no_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    with pytest.raises(ConfigError, match="the AWS region is not known; set AWS_REGION"):
        Queue(QueueConfig("http://127.0.0.1/123456789012/events"))


def test_an_endpoint_that_is_no_url(double: SqsDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(ConfigError, match=r"no client for SQS can be made: .*nonsense; check the AWS_… variables"):
        queue_at(double.queue_url)


def test_credentials_of_a_file(double: SqsDouble, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    assert queue_at(double.queue_url).backlog().waiting == 0


@pytest.mark.parametrize(
    ("queue_url", "region"),
    [
        ("https://sqs.us-east-1.amazonaws.com/123456789012/events", "us-east-1"),
        ("https://sqs-fips.us-gov-west-1.amazonaws.com/123456789012/events", "us-gov-west-1"),
        ("https://sqs.cn-north-1.amazonaws.com.cn/123456789012/events", "cn-north-1"),
        ("https://eu-central-1.queue.amazonaws.com/123456789012/events", "eu-central-1"),
        ("https://vpce-1-2.sqs.eu-west-1.vpce.amazonaws.com/123456789012/events", "eu-west-1"),
        ("https://sqs.eu-west-1.api.aws/123456789012/events", "eu-west-1"),
        ("http://127.0.0.1:4566/000000000000/events", ""),
        ("https://queue.amazonaws.com/123456789012/events", ""),
        ("https://example.com/sqs.us-east-1.amazonaws.com/events", ""),
    ],
)
def test_the_region_that_a_queue_url_names(queue_url: str, region: str) -> None:
    assert region_of(queue_url) == region


def test_the_region_of_the_url_outranks_the_setting(double: SqsDouble) -> None:
    """On EKS, AWS_REGION is the cluster's: the queue may be elsewhere."""
    url = "https://sqs.eu-west-1.amazonaws.com/123456789012/missing"
    with pytest.raises(ConfigError, match="does not exist in eu-west-1"):
        Queue(QueueConfig(url, "us-east-1")).look()
    assert double.counts["GetQueueAttributes"] == 1
