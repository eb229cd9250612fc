"""Torch lowerings, one operator family per file."""
