"""Built-in recipes on real data."""
