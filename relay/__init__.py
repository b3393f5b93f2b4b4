"""Relay: a transactional e-mail relay. NATS request/reply in, SMTP out, every mail tracked."""

__version__ = "0.1.0"
