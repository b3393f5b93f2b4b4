"""The catcher of the development stack. No gevent here: aiosmtpd runs in a thread of its own."""

import signal
import sys

from relay.errors import EXIT_CONFIG, EXIT_FAILED, ConfigError
from relay.ops.catcher import Catcher
from relay.ops.presence import Presence
from relay.settings import load_settings


def main() -> int:
    """Catches mail until SIGTERM or SIGINT."""
    try:
        settings = load_settings()
    except ConfigError as error:
        print(f"catcher: {error}", file=sys.stderr)
        return EXIT_CONFIG
    asked_to_stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, asked_to_stop)  # before the thread starts, which inherits it
    presence = Presence(settings.relay_state_dir, "catcher")
    catcher = Catcher(settings.relay_state_dir / "caught", settings.smtp_port)
    try:
        catcher.start()
    except OSError as error:
        print(f"catcher: cannot listen on 127.0.0.1:{settings.smtp_port}: {error}", file=sys.stderr)
        return EXIT_FAILED
    presence.lacks("start", "")
    signal.sigwait(asked_to_stop)
    presence.draining()
    catcher.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
