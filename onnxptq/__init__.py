"""Post-training quantization for ONNX."""
