"""NATS. The only importer of nats and asyncio; everything else is greenlets."""
