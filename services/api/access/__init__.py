"""What stands before every route: limits, ids and logs, who calls and what they may."""
