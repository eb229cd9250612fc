"""Feeds, observers and the streaming calibration run."""
