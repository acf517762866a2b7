"""Averagers, a trainer and its zombies over one bucket, run in an order that a seed decides."""
