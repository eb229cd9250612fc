"""Writing QuantizeLinear/DequantizeLinear pairs into a graph."""

from onnxptq.qdq.write import insert_adjustable, insert_quantizers

__all__ = ["insert_adjustable", "insert_quantizers"]
