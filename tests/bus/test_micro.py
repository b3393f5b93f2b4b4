"""The worker as a NATS micro service, over the wire."""

from __future__ import annotations

from typing import Any

import gevent
import nats.micro.service
import orjson
import pytest

from relay.bus.client import Bus, Msg
from relay.bus.micro import MicroService
from relay.bus.service import Handler, Service
from relay.submission.admission import Admission
from tests.support.bus_caller import publish_with_reply_to, replies_to


@pytest.fixture
def micro(bus: Bus) -> MicroService:
    """A started micro service with one endpoint."""
    handler = Handler(lambda msg, *_: msg.payload, b"overloaded", b"broken", b"too large")
    service = Service(
        bus,
        nats_subject="lfx.email-service.micro_test",
        queue_group="q",
        handler=handler,
        gate=Admission(10, 1000, 5),
        patience_seconds=1,
        reply_prefixes=("_INBOX",),
    )
    service.start()
    made = MicroService(
        bus,
        version="1.2.3",
        program="send-1",
        metadata={"host": "example"},
        endpoints=[service],
        figures=lambda: {"relayed": 7},
        reply_prefixes=("_INBOX",),
    )
    made.start()
    return made


def ask(bus: Bus, nats_subject: str) -> Any:
    """One request, one reply, parsed."""
    (reply,) = replies_to(bus, nats_subject, b"")
    return orjson.loads(reply.payload)


@pytest.mark.parametrize("suffix", ["", ".email-service"])
@pytest.mark.usefixtures("micro")
def test_it_answers_every_verb_as_adr_32_says(bus: Bus, suffix: str) -> None:
    ping = ask(bus, f"$SRV.PING{suffix}")
    assert (ping["type"], ping["name"], ping["version"]) == ("io.nats.micro.v1.ping_response", "email-service", "1.2.3")
    info = ask(bus, f"$SRV.INFO{suffix}")
    assert info["id"] == ping["id"]
    assert info["endpoints"][0]["subject"] == "lfx.email-service.micro_test"
    stats = ask(bus, f"$SRV.STATS{suffix}.{ping['id']}") if suffix else ask(bus, "$SRV.STATS")
    assert stats["metadata"] == {"program": "send-1", "host": "example"}


@pytest.mark.usefixtures("micro")
def test_clients_of_nats_understand_it(bus: Bus) -> None:
    nats.micro.service.ServiceInfo.from_dict(ask(bus, "$SRV.INFO"))
    nats.micro.service.ServiceStats.from_dict(ask(bus, "$SRV.STATS"))
    nats.micro.service.ServicePing.from_dict(ask(bus, "$SRV.PING"))


@pytest.mark.usefixtures("micro")
def test_the_stats_count_requests_and_carry_our_figures(bus: Bus) -> None:
    for _ in range(3):
        replies_to(bus, "lfx.email-service.micro_test", b"x")
    (endpoint,) = ask(bus, "$SRV.STATS")["endpoints"]
    assert endpoint["num_requests"] == 3
    assert endpoint["num_errors"] == 0
    assert endpoint["processing_time"] > 0
    assert endpoint["data"] == {"relayed": 7}


def test_who_serves_no_subject_tells_figures_all_the_same(bus: Bus) -> None:
    made = MicroService(
        bus,
        version="1.2.3",
        program="engagement",
        metadata={},
        endpoints=[],
        figures=lambda: {"received": 7},
        reply_prefixes=("_INBOX",),
    )
    made.start()
    stats = ask(bus, "$SRV.STATS")
    nats.micro.service.ServiceStats.from_dict(stats)
    assert stats["endpoints"][0]["data"] == {"received": 7}
    assert ask(bus, "$SRV.INFO")["endpoints"] == []


@pytest.mark.usefixtures("micro")
def test_a_hostile_reply_subject_gets_nothing(bus: Bus) -> None:
    seen: list[Msg] = []
    bus.subscribe("$KV.>", "", seen.append)
    publish_with_reply_to(bus, "$SRV.STATS", b"", "$KV.email-recipients.x")
    gevent.sleep(0.1)
    bus.flush()
    assert not seen
