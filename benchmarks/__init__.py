"""Measurements that print what the documentation claims."""
