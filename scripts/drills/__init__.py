"""Fault drills: the whole relay, in processes of its own, against servers that misbehave as real ones do."""
