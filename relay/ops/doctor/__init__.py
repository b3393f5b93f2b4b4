"""The doctor: questions about everything a relay depends on, each answer with its remedy. ``relayctl doctor``.

One module for each that is asked: this host, the settings, NATS, the smarthost, Amazon. ``relay.ops.preflight``
(``relayctl check``) asks the first few of the same questions; what both ask stands here, once.
"""
