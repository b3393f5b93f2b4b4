"""The send worker: joins the queue group and sends mail. N of these run."""

from gevent import monkey

monkey.patch_all()

import time

from relay import contract
from relay.bus.jetstream import JetStream
from relay.delivery.smarthost import Smarthost
from relay.ops.figures import send_service
from relay.ops.parts import extras, log_relayed, policy, service, smarthost_config, tracker
from relay.ops.process import Context, run
from relay.ops.share import Share
from relay.ops.waiting import wait_for_smarthost
from relay.sending import Sending, send_handler
from relay.submission.admission import Admission

SETTLE_SECONDS = 1.0


class SendWorker:
    """Waits for the smarthost, then serves ``send_email``."""

    def __init__(self, context: Context) -> None:
        self._context, settings = context, context.settings
        rules = policy(settings)
        share = Share(context)
        self._config = smarthost_config(settings, share.workers)
        sender = rules.default_from_address.mailbox
        self._smarthost = Smarthost(self._config, default_sender=sender, follower=context.tracing)
        share.follow(self._smarthost)
        jetstream = JetStream(context.bus)
        more = self._more = extras(context, jetstream)
        self._tracker = tracker(context, jetstream)
        gate = Admission(settings.backlog_limit, settings.backlog_limit_bytes, settings.smtp_pool_size)
        sending = self._sending = Sending(
            policy=rules,
            smarthost=self._smarthost,
            tracker=self._tracker,
            configuration_set=settings.ses_configuration_set,
            extras=more,
            log_relayed=log_relayed(context),
            follower=context.tracing,
            waited_in_vain=gate.waited_in_vain,
        )
        served = self._service = service(context, contract.SEND_EMAIL, send_handler(sending), gate)
        self._micro_service = send_service(context, sending, served, gate, self._smarthost, self._tracker, more.claims)

    def start(self) -> None:
        self._micro_service.start()
        self._tracker.start()
        self._more.claims.start()
        if self._context.settings.email_enabled:
            wait_for_smarthost(self._context, self._config)
        else:
            self._context.presence.note("sending", "no mail is sent: EMAIL_ENABLED is false")
        if not self._context.stop.is_set():
            self._service.start()

    def stop_taking(self, timeout_seconds: float) -> None:
        self._service.stop(timeout_seconds)

    def finish(self, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        self._more.claims.limit_waits(deadline)
        self._service.wait_answered(timeout_seconds)
        self._smarthost.close(deadline)
        # What was cut just now is in doubt: its record and its reply are still to be written.
        deadline = time.monotonic() + self._context.settings.tracking_ack_seconds + SETTLE_SECONDS
        self._service.wait_answered(deadline - time.monotonic())
        self._smarthost.wait_settled(max(0.0, deadline - time.monotonic()))
        self._sending.wait_amended(max(0.0, deadline - time.monotonic()))
        self._more.claims.close(max(0.0, deadline - time.monotonic()))
        self._tracker.stop(max(0.0, deadline - time.monotonic()))


if __name__ == "__main__":
    run("send", SendWorker)
