"""A mail becomes outcomes: a bounded pool of persistent SMTP connections to the smarthost."""
