"""Exact per-channel rescaling of activations, so that one scale per tensor costs less."""
