"""Differentiable torch functions from ranges of an ONNX graph."""
