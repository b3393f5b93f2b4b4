"""An outcome becomes a record: the bucket of records and the log of facts."""
