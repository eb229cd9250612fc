"""Measurements against other tools on real models and data; never imported by the package or its tests."""
