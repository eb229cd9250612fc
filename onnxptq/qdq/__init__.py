"""Writing QuantizeLinear/DequantizeLinear pairs into a graph."""
