"""A request becomes a mail: decode and validate, apply the domain rules, compose RFC 5322 bytes.

Pure: no sockets, no clock, no environment. What it refuses, it refuses with ``SubmissionRejected``.
"""
