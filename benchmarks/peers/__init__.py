"""One other tool a file, each run as ``python -m benchmarks.peers.<file>``; needs numpy, onnx and its tool only."""
