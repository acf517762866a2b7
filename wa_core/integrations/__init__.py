"""Adapters for training libraries. Each module needs its own library, and says which extra installs it."""
