"""The REST service; imports neither torch nor ray."""
