"""docs/events.md: its JSON, and its commands against moto's server, which keeps SNS and SQS as Amazon does."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore import xform_name
from botocore.config import Config
from botocore.loaders import Loader
from botocore.model import OperationModel, ServiceModel
from botocore.validate import validate_parameters

from relay.settings import Settings
from relay.tracking.events import Kind
from tests.conftest import require
from tests.docs.markdown import blocks, files, page
from tests.support.moto_server import IS_THERE, MotoServer

PAGE = "events.md"
ACCOUNT = "111122223333"
REGION = "eu-west-1"
FILES = files(PAGE)
OPTIONS_OF_THE_CLI = {"endpoint": "notification-endpoint"}
"""Which the aws command line calls otherwise than the API."""
NOT_IN_MOTO = {"create_configuration_set_event_destination"}


class Command:
    """One ``aws`` command: its operation, and what it gives it."""

    def __init__(self, words: list[str]) -> None:
        _, self.service, name, *rest = words
        model = ServiceModel(Loader().load_service_model(self.service, "service-2"))
        by_name = {xform_name(each, "-"): model.operation_model(each) for each in model.operation_names}
        self.operation: OperationModel = by_name[name]
        self.method = name.replace("-", "_")
        members = self.operation.input_shape.members
        options = {OPTIONS_OF_THE_CLI.get(name := xform_name(each, "-"), name): each for each in members}
        self.parameters: dict[str, Any] = {}
        for option, value in zip(rest[::2], rest[1::2], strict=True):
            member = options[option.removeprefix("--")]
            self.parameters[member] = self._value(members[member].type_name, value)

    @staticmethod
    def _value(type_name: str, given: str) -> Any:
        text = FILES[given.removeprefix("file://")] if given.startswith("file://") else given
        if type_name == "string":
            return text
        return json.loads(text) if text.lstrip().startswith("{") else dict([text.split("=", 1)])


def commands() -> list[Command]:
    """The page's ``aws`` commands, in order."""
    (block,) = (block for block in blocks(PAGE, "sh") if "aws " in block)
    lines = block.replace("\\\n", " ").splitlines()
    assert [line for line in lines if not line.startswith("aws ")] == [f"export AWS_DEFAULT_REGION={REGION}"]
    return [Command(shlex.split(line)) for line in lines if line.startswith("aws ")]


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MotoServer]:
    """moto's server, as the page's account."""
    require(IS_THERE, "moto's server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "MOTO_ACCOUNT_ID", ACCOUNT)
        server = MotoServer(tmp_path_factory.mktemp("moto"))
    yield server
    server.stop()


def client(moto: MotoServer, service: str) -> Any:
    """A client in the page's region."""
    return boto3.session.Session().client(
        service,
        endpoint_url=moto.url,
        region_name=REGION,
        aws_access_key_id="test",
        aws_secret_access_key="test",
        config=Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 2}),
    )


def test_the_files() -> None:
    assert set(FILES) == {"topic-policy.json", "queue-attributes.json", "event-destination.json", "worker-policy.json"}
    assert len(FILES) == len(blocks(PAGE, "json")), "every JSON block has a name"
    for text in FILES.values():
        json.loads(text)
    used = set(re.findall(r"file://([\w.-]+)", page(PAGE)))
    assert used == set(FILES)


def test_the_topic_takes_from_ses_alone() -> None:
    (statement,) = json.loads(FILES["topic-policy.json"])["Statement"]
    assert (statement["Principal"], statement["Action"]) == ({"Service": "ses.amazonaws.com"}, "sns:Publish")
    condition = statement["Condition"]
    assert condition["StringEquals"]["AWS:SourceAccount"] == ACCOUNT
    assert condition["ArnEquals"]["AWS:SourceArn"] == f"arn:aws:ses:{REGION}:{ACCOUNT}:configuration-set/relay"


def test_the_queue_takes_from_the_topic_alone_and_is_patient() -> None:
    attributes = json.loads(FILES["queue-attributes.json"])
    (statement,) = json.loads(attributes["Policy"])["Statement"]
    assert (statement["Principal"], statement["Action"]) == ({"Service": "sns.amazonaws.com"}, "sqs:SendMessage")
    topic = f"arn:aws:sns:{REGION}:{ACCOUNT}:relay-events"
    assert statement["Condition"] == {"ArnEquals": {"aws:SourceArn": topic}}
    assert statement["Resource"] == f"arn:aws:sqs:{REGION}:{ACCOUNT}:relay-events"
    redrive = json.loads(attributes["RedrivePolicy"])
    assert int(redrive["maxReceiveCount"]) >= 20
    assert redrive["deadLetterTargetArn"].endswith(":relay-events-dead")
    assert attributes["VisibilityTimeout"] == "60"


def test_the_worker_may_do_what_it_does() -> None:
    (statement,) = json.loads(FILES["worker-policy.json"])["Statement"]
    assert sorted(statement["Action"]) == [
        "sqs:ChangeMessageVisibility",
        "sqs:DeleteMessage",
        "sqs:GetQueueAttributes",
        "sqs:ReceiveMessage",
    ]


def test_all_events_that_relay_understands() -> None:
    destination = json.loads(FILES["event-destination.json"])
    wanted = {re.sub(r"(?<=[a-z])(?=[A-Z])| ", "_", kind.value).upper() for kind in Kind}
    assert set(destination["MatchingEventTypes"]) == wanted


def test_the_settings_are_settings() -> None:
    (block,) = (block for block in blocks(PAGE, "sh") if "SES_" in block)
    given = dict(line.split("=", 1) for line in block.splitlines())
    settings = Settings.model_validate({name.lower(): value for name, value in given.items()})
    assert settings.ses_eventing_enabled
    assert settings.ses_configuration_set == "relay"
    assert f"{REGION}.amazonaws.com/{ACCOUNT}/relay-events" in settings.ses_engagement_sqs_queue_url


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.method)
def test_amazon_knows_the_command(command: Command) -> None:
    validate_parameters(command.parameters, command.operation.input_shape)
    assert set(command.operation.input_shape.required_members) <= set(command.parameters)


def test_what_the_topic_takes_arrives_in_the_queue(moto: MotoServer) -> None:
    # Given the page's commands, in its order
    for command in commands():
        if command.method not in NOT_IN_MOTO:
            getattr(client(moto, command.service), command.method)(**command.parameters)
    # When SES publishes
    topic = f"arn:aws:sns:{REGION}:{ACCOUNT}:relay-events"
    client(moto, "sns").publish(TopicArn=topic, Message='{"eventType":"Send"}')
    # Then it is in the queue, enveloped, and the queue is as the page says
    sqs = client(moto, "sqs")
    url = sqs.get_queue_url(QueueName="relay-events")["QueueUrl"]
    (message,) = sqs.receive_message(QueueUrl=url, WaitTimeSeconds=5)["Messages"]
    assert json.loads(json.loads(message["Body"])["Message"]) == {"eventType": "Send"}
    told = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
    assert (told["VisibilityTimeout"], told["MessageRetentionPeriod"]) == ("60", "1209600")
    assert int(json.loads(told["RedrivePolicy"])["maxReceiveCount"]) >= 20
