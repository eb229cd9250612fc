"""Channels moved to the middle of their ranges, without changing the function."""
