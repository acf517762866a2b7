"""What callers ask, read strictly: bodies, filters, keys, wishes."""
