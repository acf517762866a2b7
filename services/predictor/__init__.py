"""Answers questions with published averages: their weights loaded in child processes, fed in batches."""
