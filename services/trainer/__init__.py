"""Claims queued runs and trains them on Ray."""
