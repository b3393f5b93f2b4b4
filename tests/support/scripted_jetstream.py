"""A replicated JetStream whose answering replica lags: on a real NATS server without JetStream, over TCP.

A cluster of real servers lags when it likes. Here the follower, which answers direct gets, has only the first messages;
the leader, which answers the API, has all.
"""

from __future__ import annotations

import base64
from typing import Any, NamedTuple

import orjson

from relay.bus.client import Bus, Msg, Publication


class Message(NamedTuple):
    """A message of a stream; its sequence is its place, from 1 on."""

    nats_subject: str
    payload: bytes


class LaggingStream:
    """One stream: the follower has the first ``follower_has`` messages."""

    def __init__(self, bus: Bus, name: str, messages: list[Message], follower_has: int) -> None:
        self._bus = bus
        self._messages = list(enumerate(messages, 1))
        self._followers = self._messages[:follower_has]
        self.asked_leader = 0
        bus.subscribe(f"$JS.API.DIRECT.GET.{name}", "", self._direct_get)
        bus.subscribe(f"$JS.API.DIRECT.GET.{name}.>", "", self._direct_get_by_subject)
        bus.subscribe(f"$JS.API.STREAM.MSG.GET.{name}", "", self._msg_get)

    def _direct_get(self, msg: Msg) -> None:
        asked = orjson.loads(msg.payload)
        if "multi_last" in asked:
            last = {message.nats_subject: (sequence, message) for sequence, message in self._followers}
            found = sorted(last[each] for each in asked["multi_last"] if each in last)
        else:
            found = [
                each
                for each in self._followers
                if each[0] >= asked["seq"] and each[1].nats_subject == asked["next_by_subj"]
            ]
        taken = found[: asked.get("batch", len(found))]
        for number, (sequence, message) in enumerate(taken, 1):
            headers = _headers(sequence, message) | {"Nats-Num-Pending": str(len(found) - number)}
            self._bus.publish(Publication(msg.reply_subject, message.payload, headers))
        self._bus.publish(Publication(msg.reply_subject, b"", {"Status": "204" if taken else "404"}))

    def _direct_get_by_subject(self, msg: Msg) -> None:
        nats_subject = msg.nats_subject.split(".", 5)[5]
        found = [each for each in self._followers if each[1].nats_subject == nats_subject]
        if not found:
            self._bus.publish(Publication(msg.reply_subject, b"", {"Status": "404"}))
            return
        sequence, message = found[-1]
        self._bus.publish(Publication(msg.reply_subject, message.payload, _headers(sequence, message)))

    def _msg_get(self, msg: Msg) -> None:
        self.asked_leader += 1
        asked = orjson.loads(msg.payload)
        nats_subject = asked.get("last_by_subj") or asked["next_by_subj"]
        found = [
            each
            for each in self._messages
            if each[1].nats_subject == nats_subject and each[0] >= int(asked.get("seq", 0))
        ]
        if not found:
            self._reply(msg, {"error": {"code": 404, "err_code": 10037, "description": "no message found"}})
            return
        sequence, message = found[-1] if "last_by_subj" in asked else found[0]
        data = base64.b64encode(message.payload).decode()
        self._reply(msg, {"message": {"subject": message.nats_subject, "seq": sequence, "data": data}})

    def _reply(self, msg: Msg, answer: dict[str, Any]) -> None:
        self._bus.publish(Publication(msg.reply_subject, orjson.dumps(answer)))


def _headers(sequence: int, message: Message) -> dict[str, str]:
    return {"Nats-Subject": message.nats_subject, "Nats-Sequence": str(sequence)}
