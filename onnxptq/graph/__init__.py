"""Loading, saving, canonicalizing and indexing ONNX graphs."""
