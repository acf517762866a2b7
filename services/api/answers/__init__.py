"""What callers are answered: resources, pages, streams and files."""
