"""The embedded stack behind `wa up`."""
