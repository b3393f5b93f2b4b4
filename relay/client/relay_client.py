"""``RelayClient``: mails sent and questions asked, for asyncio.

Owns what a call is made of: its tries, the pauses between them and its end. What a try's failure means stands in the
error itself (``errors``). The rule that everything here follows: a try that may have sent the mail is repeated only
under a request_id, since the relay sends a mail once under it; one that certainly has not is always repeated.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Self, TypeVar, Unpack

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.js.object_store import ObjectStore

from relay import contract
from relay.client.errors import DEFERRED, REFUSED, InvalidMail, NoAnswer, ObjectFailed, RelayClientError
from relay.client.link import Link
from relay.client.mail import Mail, MailFields, ObjectRef, StoredMail, as_json, as_mail, with_timeout
from relay.client.many import Item, Progress, Result, Results, check_concurrency, each_result
from relay.client.replies import (
    Analytics,
    MailRecord,
    Page,
    Sent,
    decode_analytics,
    decode_page,
    decode_record,
    decode_sent,
)
from relay.client.retry import Retry, told_seconds

T = TypeVar("T")


class RelayClient:
    """Sends mails through Relay and asks what became of them. One for a whole program; use it in one asyncio loop.

    ``servers`` as for ``nats.connect``, or several separated by commas; further options (``user_credentials``, ``tls``,
    ``inbox_prefix`` …) are passed to it. Or give the ``connection`` that your program has: it is not closed with the
    client, and then a lost connection and a missing permission show only as an answer that does not come.
    ``jetstream_prefix``: where another account's JetStream is imported to, for ``put_object``.
    """

    def __init__(
        self,
        servers: str | Sequence[str] = "nats://localhost:4222",
        *,
        connection: Client | None = None,
        retry: Retry | None = None,
        connect_timeout_seconds: float = 10.0,
        jetstream_prefix: str = "$JS.API",
        **connect_options: Any,
    ) -> None:
        self._jetstream_prefix = jetstream_prefix
        self._retry = retry or Retry()
        self._link = Link(servers, connection, connect_timeout_seconds, connect_options)

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def retry(self) -> Retry:
        """The bounds of each call."""
        return self._retry

    async def connect(self) -> None:
        """Connects; the first call does so as well. Raises ``NotConnected`` after ``connect_timeout_seconds``."""
        await self._link.connect()

    async def close(self) -> None:
        """Closes the connection, unless it was given. What is in flight ends in ``NoAnswer``."""
        await self._link.close()

    # -- sending ------------------------------------------------------------------------------------------------

    async def send(self, mail: Mail | StoredMail | None = None, /, **fields: Unpack[MailFields]) -> Sent:
        """Sends a mail, given as a value, as fields, or as a value with some fields changed.

        Returns when the smarthost has taken it, for one recipient at least (``Sent.recipients``). Raises ``Refused``,
        ``Failed``, ``InDoubt``; ``Deferred``, ``NoResponders``, ``NotConnected``, ``NoAnswer`` when time is up;
        ``InvalidMail``, ``RequestTooLarge``, ``NotPermitted``. Cancelled, the mail may have been sent or not.
        """
        if isinstance(mail, StoredMail):
            if fields:
                raise InvalidMail("invalid mail", detail="a stored mail cannot be changed")
            return await self._send(mail.encode(), mail.request_id, None, is_timed=False)
        mail = as_mail(mail, fields)
        if mail.timeout_seconds is not None and mail.timeout_seconds <= 0:
            raise InvalidMail("invalid timeout_seconds", detail="timeout_seconds must be greater than 0")
        request_id = mail.own_request_id()
        is_timed = bool(request_id) or mail.timeout_seconds is not None  # else a plain mail stays plain
        return await self._send(mail.encode(request_id), request_id, mail.timeout_seconds, is_timed=is_timed)

    def send_many(
        self,
        mails: Iterable[Item] | AsyncIterable[Item],
        *,
        concurrency: int = 50,
        ordered: bool = False,
        on_progress: Callable[[Progress], object] | None = None,
    ) -> AsyncGenerator[Result, None]:
        """Sends ``mails``, at most ``concurrency`` at a time; a ``Result`` for each as it is done, or in their order.

        A mail that fails is a result with an error and stops nothing. ``mails`` may be endless: it is read as there is
        room. Who leaves the loop early cancels what is in flight. ``on_progress`` is called after each mail.
        """
        check_concurrency(concurrency)
        results = Results(mails, ordered=ordered, on_progress=on_progress)
        return each_result(self.send_one, mails, concurrency, results)

    async def send_one(self, position: int, item: Item) -> Result:
        """One of many: what ``send`` raises is in the result."""
        try:
            sent = await (self.send(item) if isinstance(item, Mail | StoredMail) else self.send(**item))
        except RelayClientError as error:
            return Result(position, item, None, error)
        except Exception as unexpected:  # noqa: BLE001 - an item that is no mail must not stop the others
            invalid = InvalidMail("invalid mail", detail=f"{type(unexpected).__name__}: {unexpected}")
            invalid.__cause__ = unexpected
            return Result(position, item, None, invalid)
        return Result(position, item, sent, None)

    async def _send(self, request: bytes, request_id: str, within_seconds: float | None, *, is_timed: bool) -> Sent:
        begun = time.monotonic()
        last_at = begun + self._retry.total_timeout_seconds
        send_by = last_at if within_seconds is None else begun + within_seconds

        async def one_try(wait_seconds: float) -> Sent:
            timed = request
            if is_timed:
                told = told_seconds(wait_seconds)
                if within_seconds is not None:
                    told = min(told, send_by - time.monotonic())
                timed = with_timeout(request, told)
            reply = await self._link.ask(contract.SEND_EMAIL, timed, wait_seconds, may_repeat=bool(request_id))
            return decode_sent(reply, request_id)

        try:
            return await self._persist(one_try, last_at, min(send_by, last_at - self._retry.least_seconds))
        except RelayClientError as error:
            error.request_id = request_id
            raise

    # -- asking --------------------------------------------------------------------------------------------------

    async def get_status(self, email_id: str) -> MailRecord:
        """The record of a mail. Raises ``NotFound``, ``QuestionFailed`` and what else a call may end in."""
        return await self._ask(contract.GET_EMAIL_STATUS, {"email_id": email_id}, decode_record)

    async def get_analytics(self, group_id: str) -> Analytics:
        """The figures of a group. Raises as ``get_status`` does."""
        return await self._ask(contract.GET_EMAIL_ENGAGEMENT_ANALYTICS, {"group_id": group_id}, decode_analytics)

    async def get_page(self, group_id: str, cursor: str = "", limit: int = contract.MAX_PAGE_MAILS) -> Page:
        """The next mails of a group, from the beginning or from a ``cursor``. Raises as ``get_status`` does."""
        question: dict[str, Any] = {"group_id": group_id, "limit": limit}
        if cursor:
            question["cursor"] = cursor
        return await self._ask(contract.GET_EMAIL_STATUS, question, decode_page)

    async def pages(self, group_id: str, limit: int = contract.MAX_PAGE_MAILS) -> AsyncGenerator[Page, None]:
        """All pages of a group; each mail is in exactly one."""
        cursor: str | None = ""
        while cursor is not None:
            page = await self.get_page(group_id, cursor, limit)
            yield page
            cursor = page.cursor

    async def mails(self, group_id: str, limit: int = contract.MAX_PAGE_MAILS) -> AsyncGenerator[MailRecord, None]:
        """All mails of a group, in the order in which they were sent; read page by page."""
        async for page in self.pages(group_id, limit):
            for record in page.records:
                yield record

    async def _ask(self, nats_subject: str, question: dict[str, Any], decode: Callable[[bytes], T]) -> T:
        request = as_json(question)

        async def one_try(wait_seconds: float) -> T:
            return decode(await self._link.ask(nats_subject, request, wait_seconds, may_repeat=True))

        last_at = time.monotonic() + self._retry.total_timeout_seconds
        return await self._persist(one_try, last_at, last_at - self._retry.least_seconds)

    # -- objects ------------------------------------------------------------------------------------------------

    async def put_object(self, bucket: str, content: bytes | str | Path, name: str = "") -> ObjectRef:
        """Puts ``content``, or the file at that path, into an Object Store bucket that exists; for attachments.

        One object may serve many mails. Give it a ``name`` of your own when a call is to be repeated after your process
        has ended: the same request_id needs the same request. Raises ``ObjectFailed``.
        """
        ref = ObjectRef(bucket, name or uuid.uuid4().hex)

        async def put(store: ObjectStore) -> None:
            if isinstance(content, bytes):
                await store.put(ref.name, content)
                return
            with Path(content).open("rb") as file:
                await store.put(ref.name, file)

        await self._with_store(bucket, put)
        return ref

    async def put_mail(self, bucket: str, mail: Mail, name: str = "") -> StoredMail:
        """Puts a whole request into a bucket, for ``send``: for a mail that is too large even without attachments.

        Its ``timeout_seconds`` is what it was when it was put. Raises ``ObjectFailed``, ``InvalidMail``.
        """
        request_id = mail.own_request_id()
        request = mail.encode(request_id)
        if mail.timeout_seconds is not None:
            request = with_timeout(request, mail.timeout_seconds)
        return StoredMail(await self.put_object(bucket, request, name), request_id)

    async def delete_object(self, ref: ObjectRef) -> None:
        """Deletes an object; that it is gone already is no error. Raises ``ObjectFailed``."""

        async def delete(store: ObjectStore) -> None:
            try:
                await store.delete(ref.name)
            except nats.js.errors.NotFoundError:
                return

        await self._with_store(ref.bucket, delete)

    async def _with_store(self, bucket: str, work: Callable[[ObjectStore], Awaitable[None]]) -> None:
        try:
            async with asyncio.timeout(self._retry.total_timeout_seconds):
                store = await (await self._link.jetstream(self._jetstream_prefix)).object_store(bucket)
                await work(store)
        except (OSError, nats.errors.Error) as error:
            is_missing = isinstance(error, nats.js.errors.NotFoundError | nats.js.errors.InvalidBucketNameError)
            said = "there is no such bucket" if is_missing else str(error) or type(error).__name__
            is_final = is_missing or (isinstance(error, OSError) and not isinstance(error, TimeoutError))
            raise ObjectFailed(
                "object store failed", detail=f"bucket {bucket}: {said}", retryable=not is_final
            ) from error

    # -- tries --------------------------------------------------------------------------------------------------

    async def _persist(self, one_try: Callable[[float], Awaitable[T]], last_at: float, try_until: float) -> T:
        """Tries until there is an answer, an error that stays, or no time for another try.

        Everything ends at ``last_at``, and no try begins after ``try_until`` (``time.monotonic()``).
        """
        unanswered: NoAnswer | None = None
        for tries in count(1):
            wait_seconds = min(self._retry.try_timeout_seconds, last_at - time.monotonic())
            try:
                return await one_try(max(wait_seconds, 0.001))
            except RelayClientError as error:
                error.tries = tries
                if isinstance(error, NoAnswer):
                    unanswered = error
                pause_seconds = self._retry.pause_seconds(tries)
                is_over = self._link.is_closed or time.monotonic() + pause_seconds >= try_until
                if not error.retryable or is_over:
                    if unanswered is not None and not error.settles and error.outcome in (DEFERRED, REFUSED):
                        raise _still_unanswered(unanswered, error) from error
                    raise
            await asyncio.sleep(pause_seconds)
        raise AssertionError("count() does not end")


def _still_unanswered(unanswered: NoAnswer, last: RelayClientError) -> NoAnswer:
    """A try before the last was not answered: that the last one sent nothing does not say that none did."""
    error = NoAnswer(unanswered.error, detail=f"{unanswered.detail}; then {last}", retryable=unanswered.retryable)
    error.tries = last.tries
    return error
