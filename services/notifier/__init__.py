"""Tells webhooks what happens to runs; imports neither torch nor ray."""
