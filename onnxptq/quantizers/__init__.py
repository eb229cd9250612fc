"""Pure tensor mathematics of quantization."""
