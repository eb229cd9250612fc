"""Names of what the writer adds: the suffixes of onnxruntime's own quantizer, which debugging tools parse."""

from __future__ import annotations

SCALE = "_scale"
ZERO_POINT = "_zero_point"
QUANTIZED = "_quantized"
QUANTIZE_NODE = "_QuantizeLinear"
DEQUANTIZE_NODE = "_DequantizeLinear"
QUANTIZE_OUTPUT = "_QuantizeLinear_Output"
DEQUANTIZE_OUTPUT = "_DequantizeLinear_Output"
QUANTIZE_INPUT = "_QuantizeLinear_Input"
CLIP_NODE = "_Clip"
CLIP_OUTPUT = "_Clip_Output"
CLIP_LOW = "_clip_min"
CLIP_HIGH = "_clip_max"


def quantize_input(tensor: str, is_output: bool) -> str:
    """The name of the float tensor in front of the quantizer (a graph output's own name moves behind it)."""
    return tensor + QUANTIZE_INPUT if is_output else tensor


def dequantized(quantizer_id: str, tensor: str, is_output: bool) -> str:
    """The name of the tensor behind the quantizer."""
    return tensor if is_output else quantizer_id + DEQUANTIZE_OUTPUT
