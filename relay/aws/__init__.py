"""Amazon Web Services. The only importer of boto3."""
