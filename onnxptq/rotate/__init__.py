"""Orthogonal rotations of channels, folded into the weights around them."""
