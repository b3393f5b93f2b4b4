"""A request that is repeated under the same ``request_id`` is answered again and sent once."""
