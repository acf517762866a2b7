"""Turns published weights into programs that need no recipe: a process of its own, for it runs user code."""
