"""Wiring that every process shares: settings, store opening, logging, lifecycle."""
