"""relayctl, the operator's front door. Nothing imports it."""
