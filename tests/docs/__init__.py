"""What the docs show, tried as it stands there."""
