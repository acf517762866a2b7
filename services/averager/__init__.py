"""Folds committed checkpoints into averages, assesses and publishes them."""
