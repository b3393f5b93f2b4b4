"""The engagement worker: takes what SES tells of mails from its queue, and folds it into their records."""

from gevent import monkey

monkey.patch_all()

from relay.aws.sqs import Queue
from relay.bus.jetstream import JetStream
from relay.engagement import Engagement
from relay.errors import ConfigError
from relay.ops.figures import engagement_service
from relay.ops.parts import engagement_config, queue_config, storage_config
from relay.ops.polling import Polling, PollingConfig, prepare
from relay.ops.process import Context, run
from relay.tracking.storage import ensure_storage


class EngagementWorker:
    """Waits for storage and queue, then polls."""

    def __init__(self, context: Context) -> None:
        settings = context.settings
        if not settings.ses_engagement_sqs_queue_url:
            raise ConfigError("SES_ENGAGEMENT_SQS_QUEUE_URL is not set: there is no queue of events; set it")
        self._context = context
        self._jetstream = JetStream(context.bus)
        self._engagement = Engagement(self._jetstream, engagement_config(settings), follower=context.tracing)
        self._polling = Polling(
            Queue(queue_config(settings)),
            self._engagement,
            PollingConfig(settings.engagement_pollers, settings.engagement_receive_failures),
            context.presence.lacks,
            context.fail,
        )
        self._micro_service = engagement_service(context, self._engagement, self._polling)

    def start(self) -> None:
        self._micro_service.start()
        what = "SES_EVENTING_ENABLED is true, and events cannot be recorded"
        prepare(what, self._prepare_storage, self._context.stop, self._context.presence.lacks)
        self._polling.look()
        if not self._context.stop.is_set():
            self._polling.start()

    def _prepare_storage(self) -> str:
        why_not = ensure_storage(self._jetstream, storage_config(self._context.settings))
        if not why_not:
            self._engagement.prepare()
        return why_not

    def stop_taking(self, timeout_seconds: float) -> None:
        self._polling.stop_taking(timeout_seconds)

    def finish(self, timeout_seconds: float) -> None:
        self._polling.finish(timeout_seconds)


if __name__ == "__main__":
    run("engagement", EngagementWorker)
